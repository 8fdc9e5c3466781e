"""The repository extension of the Open Inference Protocol: its index, and models that clients load and unload.

A load costs other models their places, so the data plane does it only where the operator allows it.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from model_store.archives.json_faults import FAULTS, explain_fault
from model_store.names import ModelName
from server.errors import Refused, Situation
from server.front.dialects.open_inference_models import MOST_LISTED, make_index
from server.front.exchange import HttpRequest
from server.front.inference_plane import InferencePlane
from server.ipc.operations import ListKnownModels, LoadForClient, UnloadForClient

BROWSERS = (b"origin", b"sec-fetch-site")  #: headers that browsers send, and no other client

T = TypeVar("T")


class _IndexBody(msgspec.Struct):
    """What an index is asked for."""

    ready: bool = False


class _ControlBody(msgspec.Struct):
    """What a load or unload is asked with."""

    parameters: dict[str, Any] = {}


_decode_index = msgspec.json.Decoder(_IndexBody).decode
_decode_control = msgspec.json.Decoder(_ControlBody).decode


async def list_index(request: HttpRequest, plane: InferencePlane) -> list[dict[str, str]]:
    """The models that workers know. Raises Refused."""
    asked = _decode_small(request.body, _decode_index, _IndexBody())
    known = await plane.list_known(ListKnownModels("", "", MOST_LISTED), request.deadline)
    return make_index(known, only_ready=asked.ready)


async def control_model(verb: str, model: ModelName, request: HttpRequest, plane: InferencePlane) -> None:
    """Load or unload a model. Raises Refused."""
    _check_control(verb, request)
    await plane.control((LoadForClient if verb == "load" else UnloadForClient)(model), request.deadline)


def _check_control(verb: str, request: HttpRequest) -> None:
    """Raises Refused for a browser's request, and for parameters that an archive cannot follow."""
    if any(name in request.headers for name in BROWSERS):  # a page anywhere can have its visitor send this
        raise Refused(Situation.FORBIDDEN, "a browser may not load or unload models")
    parameters = _decode_small(request.body, _decode_control, _ControlBody()).parameters
    unknown = [name for name in parameters if (verb, name) != ("unload", "unload_dependents")]
    if unknown:
        message = f"{unknown[0][:80]!r} is no parameter of {verb}: an archive brings its configuration and its files"
        raise Refused(Situation.BAD_REQUEST, message, field="parameters")


def _decode_small(body: bytes, decode: Callable[[bytes], T], empty: T) -> T:
    """A body that may be left out. Raises Refused."""
    if not body:
        return empty
    try:
        return decode(body)
    except FAULTS as error:
        fault = explain_fault(error)
        message = f"the body is not what this path takes: {fault.message}"
        raise Refused(Situation.BAD_REQUEST, message, field=fault.place or None) from None
