"""TorchServe's management service over gRPC (0.12): its REST API, asked of the supervisor. Runs in the gRPC front.

INVARIANT: the supervisor checks each call as it checks those over HTTP; the front has no rights of its own.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec

from server.errors import Refused, Situation
from server.front.grpc.calls import STOPPING, Call, Method
from server.front.grpc.messages import find_message
from server.front.grpc.statuses import AnsweredBadly
from server.ipc.control import ChannelClosed, ControlChannel, ControlError
from server.ipc.operations import CallManagement

SERVICE = "org.pytorch.serve.grpc.management.ManagementAPIsService"
MAX_TEXT = 4096  #: characters of a field
FAILED = 400  #: statuses from here on are no success
_NAMES = ("model_name", "model_version")
_package = SERVICE.rpartition(".")[0]
_Response = find_message(f"{_package}.ManagementResponse")


class RestCall(NamedTuple):
    """What a message asks of the REST API."""

    method: str
    path: str
    query: Mapping[str, str]


class TorchServeManagement:
    """See the module. `channel` leads to the supervisor."""

    def __init__(self, channel: ControlChannel) -> None:
        self._channel = channel

    def __repr__(self) -> str:
        """For example `<TorchServeManagement>`."""
        return "<TorchServeManagement>"

    def list_methods(self) -> Sequence[Method]:
        """The service's methods. They are open here: the supervisor asks for the token."""
        return [
            Method(
                f"/{SERVICE}/{name}", find_message(f"{_package}.{name}Request"), partial(self._answer, make),
                is_open=True,
            )
            for name, make in REST_CALLS.items()
        ]  # fmt: skip

    async def _answer(self, make: Callable[[Any], RestCall], request: Any, call: Call) -> Any:
        for field, value in request.ListFields():
            if isinstance(value, str) and len(value) > MAX_TEXT:
                raise Refused(Situation.BAD_REQUEST, f"a text has {MAX_TEXT} characters at most", field=field.name)
        wanted = make(request)
        token = call.headers.get(b"authorization", b"").decode("latin-1")
        asked = CallManagement(
            wanted.method, wanted.path, dict(wanted.query), token[:MAX_TEXT], call.peer, call.certificate
        )
        try:
            answer = await self._channel.ask(asked, max(0.0, call.limit() - time.monotonic()))
        except TimeoutError:
            raise Refused(Situation.DEADLINE, "the deadline passed before it was done; it may still be") from None
        except ChannelClosed:
            raise Refused(Situation.NOT_READY, STOPPING) from None
        except ControlError as error:
            raise Refused(Situation(error.situation or Situation.INTERNAL), str(error)) from None
        if answer.status >= FAILED:
            raise AnsweredBadly(answer.status, read_error(answer.body))
        return _Response(msg=read_message(answer.body))


def read_message(body: str) -> str:
    """What a successful answer says: of an operation its sentence, else all of the JSON."""
    found = msgspec.json.decode(body)
    if isinstance(found, dict) and found.keys() == {"status"}:
        return str(found["status"])
    return body


def read_error(body: str) -> str:
    """The message, and on a line of its own the kind of error, as TorchServe has it."""
    try:
        found = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.MsgspecError:
        return body
    if isinstance(found.get("error"), dict):  # of the listener itself, which asks for tokens
        return str(found["error"].get("message", body))
    return f"{found.get('message', body)}\n{found.get('type', '')}".strip()


def _make_path(request: Any, last: str = "") -> str:
    name = request.model_name
    if not name:
        raise Refused(Situation.BAD_REQUEST, "Parameter model_name is required.")
    parts = ["/models", name, *filter(None, [request.model_version, last])]
    return "/".join(parts)


def _list_query(request: Any, *left_out: str) -> dict[str, str]:
    """The fields that are set; one that is zero or empty is not, as TorchServe has it."""
    return {
        field.name: str(value).lower() if isinstance(value, bool) else str(value)
        for field, value in request.ListFields()
        if field.name not in left_out
    }


def _describe(request: Any) -> RestCall:
    return RestCall("GET", _make_path(request), _list_query(request, *_NAMES))


def _list(request: Any) -> RestCall:
    return RestCall("GET", "/models", _list_query(request))


def _register(request: Any) -> RestCall:
    return RestCall("POST", "/models", _list_query(request))


def _scale(request: Any) -> RestCall:
    return RestCall("PUT", _make_path(request), _list_query(request, *_NAMES))


def _set_default(request: Any) -> RestCall:
    if not request.model_version:
        raise Refused(Situation.BAD_REQUEST, "Parameter model_version is required.")
    return RestCall("PUT", _make_path(request, "set-default"), {})


def _unregister(request: Any) -> RestCall:
    return RestCall("DELETE", _make_path(request), {})


REST_CALLS: Mapping[str, Callable[[Any], RestCall]] = {
    "DescribeModel": _describe,
    "ListModels": _list,
    "RegisterModel": _register,
    "ScaleWorker": _scale,
    "SetDefault": _set_default,
    "UnregisterModel": _unregister,
}
