"""The Open Inference Protocol (V2) over gRPC, as clients of Triton, KServe and MLServer speak it (CONTRACTS 12).

Every model has the version 1. Runs in the gRPC front. See `server.front.dialects.open_inference`, the same over HTTP.
"""

import math
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import msgspec
import structlog
from google.protobuf.json_format import ParseDict

from model_store.names import ModelName
from server import contract
from server.errors import Refused, Situation
from server.front.chunks import CLIENT_GONE
from server.front.dialects.open_inference import EXTENSIONS, STATUS
from server.front.dialects.open_inference_models import PLATFORM, VERSION, make_config
from server.front.grpc.calls import LATE, OK, SERVER_FAILED, Call, Method, Send
from server.front.grpc.messages import POOL, find_message
from server.front.grpc.models import ask_model, parse_name
from server.front.grpc.repository import list_repository_methods
from server.front.grpc.statuses import describe_refusal
from server.front.grpc.streams import answer_all
from server.front.grpc.tensors import read_answer, write_body
from server.front.inference_plane import InferencePlane
from server.ipc.readiness import describe_workers, stuck_after_s
from server.sdk import __version__
from server.settings import Settings

SERVICE = "inference.GRPCInferenceService"
MAX_SHOWN = 200  #: characters of a client's name for a model in an answer that is an error
_MICROSECONDS = 1e-6
_FINAL = "triton_final_response"  #: the parameter of a stream's answer by which clients see that no part follows

log = structlog.get_logger()


class _Tensors(msgspec.Struct):
    """A worker's description of a model: see `handlers.codecs.open_inference.describe_tensors`."""

    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]


_decode_tensors = msgspec.json.Decoder(_Tensors).decode
_ServerLive, _ServerReady, _ModelReady, _ServerMetadata, _ModelMetadata, _ModelConfig, _StreamReply = (
    find_message(f"inference.{name}Response")
    for name in (
        "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStreamInfer",
    )
)  # fmt: skip


class OpenInferenceService:
    """See the module."""

    def __init__(self, settings: Settings, plane: InferencePlane) -> None:
        self._plane, self._stuck_s = plane, stuck_after_s(settings)

    def list_methods(self) -> Sequence[Method]:
        """The service's methods."""
        probes = (
            ("ServerLive", self._is_live),
            ("ServerReady", self._is_ready),
            ("ServerMetadata", self._describe_server),
        )
        asked = (
            ("ModelReady", self._is_model_ready),
            ("ModelMetadata", self._describe_model),
            ("ModelConfig", self._configure_model),
            ("ModelInfer", _infer),
        )
        return [
            *(Method(_path(name), _request(name), answer, is_open=True) for name, answer in probes),
            *(Method(_path(name), _request(name), answer) for name, answer in asked),
            *list_repository_methods(SERVICE),
            Method(_path("ModelStreamInfer"), _request("ModelInfer"), stream=self._infer_all),
        ]

    # --- the server -------------------------------------------------------------------------------------------------

    async def _is_live(self, _: Any, call: Call) -> Any:
        del call
        return _ServerLive(live=True)

    async def _is_ready(self, _: Any, call: Call) -> Any:
        """From what the front sees of the workers: none is asked, so a stopped one holds no probe up."""
        del call
        return _ServerReady(ready=self.has_ready_worker())

    def has_ready_worker(self) -> bool:
        """Whether some worker takes every request."""
        return describe_workers(self._plane.workers, self._plane.expected, self._stuck_s).ready

    async def _describe_server(self, _: Any, call: Call) -> Any:
        del call
        return _ServerMetadata(name=PLATFORM, version=__version__, extensions=EXTENSIONS)

    # --- models -----------------------------------------------------------------------------------------------------

    async def _is_model_ready(self, request: Any, call: Call) -> Any:
        """A model is ready when it answers; one that cannot be had is not, and that is no error, as in Triton."""
        model = parse_name(request.name, request.version, call)
        try:
            await self._ask_tensors(model, call)
        except Refused as refused:
            if refused.situation in (Situation.NOT_FOUND, Situation.ARCHIVE_FAILED, Situation.MODEL_FAILED):
                return _ModelReady(ready=False)
            raise
        return _ModelReady(ready=True)

    async def _describe_model(self, request: Any, call: Call) -> Any:
        model = parse_name(request.name, request.version, call)
        tensors = await self._ask_tensors(model, call)
        return _ModelMetadata(
            name=model, versions=[VERSION], platform=PLATFORM, inputs=tensors.inputs, outputs=tensors.outputs
        )

    async def _configure_model(self, request: Any, call: Call) -> Any:
        model = parse_name(request.name, request.version, call)
        tensors = await self._ask_tensors(model, call)
        config = make_config(model, tensors.inputs, tensors.outputs)
        return ParseDict({"config": config}, _ModelConfig(), ignore_unknown_fields=True, descriptor_pool=POOL)

    async def _ask_tensors(self, model: ModelName, call: Call) -> _Tensors:
        response = await ask_model(model, b"", contract.OPEN_INFERENCE_DESCRIBE, call.deadline, call)
        return _decode_tensors(await response.read())

    # --- inference --------------------------------------------------------------------------------------------------

    async def _infer_all(self, requests: AsyncIterator[Any], send: Send, call: Call) -> None:
        """Answer each message of a stream, in their order, some of them side by side.

        An error is the answer of one message and ends nothing.
        """
        await answer_all(requests, send, call.plane.held, partial(_answer_one, call))


async def _answer_one(call: Call, request: Any) -> bytes:
    """The answer to one message of a stream, whatever happens; it is counted as a request."""
    started, ident, model, status = time.monotonic(), request.id, request.model_name, CLIENT_GONE
    try:
        answering = _infer(request, call)
        del request  # its bytes are in the body
        reply = _StreamReply(infer_response=await answering)
        status = OK
    except Refused as refused:
        status = STATUS[refused.situation]
        reply = _StreamReply(error_message=describe_refusal(refused))
        reply.infer_response.id, reply.infer_response.model_name = ident, model[:MAX_SHOWN]
    except Exception:
        log.exception("request_failed")
        status = STATUS[Situation.INTERNAL]
        reply = _StreamReply(error_message=SERVER_FAILED)
        reply.infer_response.id = ident
    finally:
        call.count(status, time.monotonic() - started)
    reply.infer_response.parameters[_FINAL].bool_param = True
    raw: bytes = reply.SerializeToString()
    return raw


async def _infer(request: Any, call: Call) -> Any:
    """The answer to a ModelInferRequest. Raises Refused."""
    model = parse_name(request.model_name, request.model_version, call)
    timeout_us = _read_number(request, "timeout")
    _read_number(request, "priority")  # requests have no ranks here; a client may name one, as long as it is one
    deadline = call.limit(timeout_us * _MICROSECONDS if timeout_us else math.inf)
    written = write_body(request)
    del request  # its bytes are in the body
    content_type = f"{contract.OPEN_INFERENCE_INFER};json={written.json_bytes}"
    response = await ask_model(model, written.body, content_type, deadline, call)
    found = await response.read()
    if time.monotonic() > deadline:
        raise Refused(Situation.DEADLINE, LATE)
    return read_answer(found, response.content_type)


def _read_number(request: Any, name: str) -> int:
    """A parameter that is a number, not negative; 0 where it is not there. Raises Refused."""
    if name not in request.parameters:
        return 0
    parameter = request.parameters[name]
    choice = parameter.WhichOneof("parameter_choice")
    value: object = getattr(parameter, choice) if choice else None
    if type(value) is not int or value < 0:
        message = f"must be a whole number, not negative, in int64_param or uint64_param, not {value!r:.40}"
        raise Refused(Situation.BAD_REQUEST, message, field=f"parameters.{name}")
    return value


def _path(method: str) -> str:
    return f"/{SERVICE}/{method}"


def _request(method: str) -> Any:
    return find_message(f"inference.{method}Request")
