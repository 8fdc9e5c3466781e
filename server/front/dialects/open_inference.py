"""The Open Inference Protocol (V2) over HTTP, as clients of Triton, KServe and MLServer speak it (CONTRACTS 4).

A request's tensors are read by the worker that has the model; here only the header that says where its JSON ends is.
A model is ready when it answers: one that is in the store is loaded for the question. Every model has the version 1.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
import structlog

from model_store.names import InvalidModelName, ModelName, parse_model_name
from server import contract
from server.contract import raw_header
from server.errors import Refused, Situation
from server.front.content_coding import choose_coding, pack
from server.front.dialects.open_inference_models import (
    MOST_LISTED,
    PLATFORM,
    VERSION,
    make_config,
    make_statistics,
)
from server.front.dialects.open_inference_repository import control_model, list_index
from server.front.exchange import DialectOperation, Headers, HttpReply, HttpRequest, Limit
from server.front.inference import InferRequest, InferStats
from server.front.inference_plane import InferencePlane, add_near_names
from server.front.statuses import USUAL_STATUS
from server.ipc.operations import KnownModel, ListKnownModels
from server.ipc.readiness import describe_workers, stuck_after_s
from server.routes.inference import V2
from server.sdk import __version__
from server.settings import Settings

__all__ = ["EXTENSIONS", "STATUS", "VERSION", "ModelOperation", "OpenInference"]

EXTENSIONS = (
    "binary_tensor_data", "classification", "parameters", "statistics", "model_configuration", "model_repository"
)  # fmt: skip
SMALL_BODY = 64 * 1024  #: most bytes of a body that asks for no inference
_JSON_BYTES = raw_header("Inference-Header-Content-Length")
_TARGETS = (b"target-model", raw_header(contract.HEADER_TARGET_MODEL))  #: headers that name a model
_MODELS_PATH = "/v2/models/"
_REPOSITORY_PATH = "/v2/repository/models/"
_VERBS = ("ready", "infer", "config", "stats")

log = structlog.get_logger()

#: Clients retry nothing by themselves, so each status is the one that HTTP has for it.
STATUS: Mapping[Situation, int] = {
    **USUAL_STATUS,
    Situation.MODEL_FAILED: 500,
    Situation.ARCHIVE_FAILED: 500,
}


@dataclass(frozen=True)
class ModelOperation(DialectOperation):
    """What is asked of a model, as the path names it."""

    model: str = ""
    version: str = VERSION


class _Tensors(msgspec.Struct):
    """A worker's description of a model: see `handlers.codecs.open_inference.describe_tensors`."""

    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    parameters: dict[str, Any] = {}


_SMALL = Limit(SMALL_BODY, "what this path allows")
_SERVER, _LIVE, _READY = (
    DialectOperation("server", None),
    DialectOperation("live", None),
    DialectOperation("ready", None),
)
_STATS, _INDEX = DialectOperation("all stats", _SMALL), DialectOperation("index", _SMALL)


class _Parameters(msgspec.Struct, frozen=True):
    timeout: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0


class _Head(msgspec.Struct):
    """Of a request, what is needed before a worker reads it."""

    parameters: _Parameters = _Parameters()


_FIXED = {
    "/v2": _SERVER, "/v2/health/live": _LIVE, "/v2/health/ready": _READY, "/v2/models/stats": _STATS,
    "/v2/repository/index": _INDEX,
}  # fmt: skip
_POSTED = ("infer", "index", "load", "unload")
_decode_timeout = msgspec.json.Decoder(_Head).decode
_decode_tensors = msgspec.json.Decoder(_Tensors).decode


class OpenInference:
    """See the module."""

    name = "v2"
    routes = V2

    def __init__(self, settings: Settings) -> None:
        self._limit = Limit(int(settings.max_body_bytes), "max_body_bytes")
        self._stuck_s = stuck_after_s(settings)
        self._version = __version__

    def match(self, method: str, path: str, query: bytes = b"") -> DialectOperation | None:
        """What is asked below `/v2`. A model's name may have slashes; the last part of the path is the verb."""
        del query
        if not path.startswith("/v2/") and path != "/v2":
            return None
        operation = _FIXED.get(path)
        if operation is None:
            model, version, verb = _split_path(path)
            operation = ModelOperation(verb, self._limit if verb == "infer" else _SMALL, model, version)
        expected = "POST" if operation.name in _POSTED else "GET"
        if method != expected:
            raise Refused(Situation.BAD_METHOD, f"{path[:200]} is asked by {expected}, not {method}")
        return operation

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """Tensors for tensors, or what is known of the server or a model."""
        if operation is _STATS:
            asked = ListKnownModels("", "", MOST_LISTED)
            return _reply_json(make_statistics(await plane.list_known(asked, request.deadline)))
        if operation is _INDEX:
            return _reply_json(await list_index(request, plane))
        if not isinstance(operation, ModelOperation):
            return self._describe_server(operation, plane)
        model = _parse_name(operation, request)
        try:
            if operation.name == "infer":
                return await _infer(request, model, plane)
            if operation.name in ("load", "unload"):
                return await _control(operation.name, model, request, plane)
            return await _describe(operation.name, model, request, plane)
        except Refused as why:
            add_near_names(why, model, plane)
            raise

    def _describe_server(self, operation: DialectOperation, plane: InferencePlane) -> HttpReply:
        """Probes are not counted, and no worker is asked. Triton's have no body; KServe's client reads one."""
        if operation is _LIVE:
            return HttpReply(200, contract.JSON, b'{"live":true}', counted=())
        if operation is _READY:
            found = describe_workers(plane.workers, plane.expected, self._stuck_s)
            said = msgspec.json.encode({"ready": found.status == HTTPStatus.OK})
            return HttpReply(found.status, contract.JSON, said, counted=())
        body = {"name": "fleetcast", "version": self._version, "extensions": EXTENSIONS}
        return HttpReply(200, contract.JSON, msgspec.json.encode(body), counted=())

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """`error`, one sentence that begins with the place where there is one: clients show nothing else."""
        del request
        detail = why.detail
        message = detail.say()
        headers: Headers = []
        if detail.retry_ms is not None:
            headers.append((b"retry-after", b"%d" % -(-detail.retry_ms // 1000)))
        return HttpReply(STATUS[why.situation], contract.JSON, msgspec.json.encode({"error": message}), headers)


def _reply_json(value: object, stats: InferStats | None = None) -> HttpReply:
    return HttpReply(200, contract.JSON, msgspec.json.encode(value), [], stats)


async def _describe(verb: str, model: ModelName, request: HttpRequest, plane: InferencePlane) -> HttpReply:
    """What a model says of itself, for which it is loaded where it is not."""
    if verb == "stats":
        known = await plane.list_known(ListKnownModels(model, "", 1), request.deadline)
        if known and known[0].model == model and known[0].state != "unavailable":
            return _reply_json(make_statistics(known))
    response = await plane.infer(_make_request(request, model, contract.OPEN_INFERENCE_DESCRIBE))
    if verb == "ready":
        return _reply_json({"name": model, "ready": True}, response.stats)
    if verb == "stats":
        return _reply_json(make_statistics([KnownModel(model, "ready")]), response.stats)
    tensors = _decode_tensors(await response.read())
    if verb == "config":
        return _reply_json(make_config(model, tensors.inputs, tensors.outputs), response.stats)
    body = {
        "name": model,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": tensors.inputs,
        "outputs": tensors.outputs,
        **({"parameters": tensors.parameters} if tensors.parameters else {}),
    }
    return _reply_json(body, response.stats)


async def _control(verb: str, model: ModelName, request: HttpRequest, plane: InferencePlane) -> HttpReply:
    """Load or unload a model, which is logged as on the management listener, whatever becomes of it."""
    status = 500
    try:
        await control_model(verb, model, request, plane)
        status = 200
    except Refused as why:
        status = STATUS[why.situation]
        raise
    finally:
        log.info("management_call", token=request.client or "-", verb=verb, model=model, status=status)
    return HttpReply(200, contract.JSON, b"")


def _split_path(path: str) -> tuple[str, str, str]:
    """The model, its version and what is asked of it. Raises Refused for a path that names no model."""
    if path.startswith(_REPOSITORY_PATH):
        model, _, verb = path.removeprefix(_REPOSITORY_PATH).rpartition("/")
        if model and verb in ("load", "unload"):
            return model, VERSION, verb
    model = path.removeprefix(_MODELS_PATH)
    if model == path or not model:
        message = f"no such path: {path[:200]}; there are /v2, /v2/health/live, /v2/health/ready, /v2/repository/index"
        below = "/v2/repository/models/MODEL/load and /unload, /v2/models/stats"
        raise Refused(Situation.NO_ROUTE, f"{message}, {below}, /v2/models/MODEL, and below it {', '.join(_VERBS)}")
    verb = "metadata"
    before, _, last = model.rpartition("/")
    if before and last in _VERBS:
        model, verb = before, last
    before, mark, version = model.rpartition("/versions/")
    return (before, version, verb) if mark and "/" not in version else (model, VERSION, verb)


async def _infer(request: HttpRequest, model: ModelName, plane: InferencePlane) -> HttpReply:
    """Tensors for tensors, compressed where the client names how."""
    size = _find_json_bytes(request)
    request.deadline = min(request.deadline, _find_deadline(request, size))
    coding = choose_coding(request.headers) if b"accept-encoding" in request.headers else ""
    response = await plane.infer(_make_request(request, model, f"{contract.OPEN_INFERENCE_INFER};json={size}"))
    media, _, json_bytes = response.content_type.partition(";json=")
    headers = [(_JSON_BYTES, json_bytes.encode())] if json_bytes else []
    if not coding:
        return HttpReply(200, media, response.body, headers, response.stats, response)
    try:
        with plane.held.hold(response.body_bytes):
            packed = await pack(await response.read(), coding)
    finally:
        response.cancel()  # what there was no room to read; nothing where all was read
    return HttpReply(200, media, packed, [*headers, (b"content-encoding", coding.encode())], response.stats)


def _find_deadline(request: HttpRequest, size: int) -> float:
    """The deadline of the request's `parameters.timeout` (microseconds), infinity where it has none.

    The document is read here only if it says `timeout` anywhere. One that is wrong is refused by the worker.
    """
    if request.body.find(b'"timeout"', 0, size) < 0:
        return math.inf
    try:
        timeout = _decode_timeout(memoryview(request.body)[:size]).parameters.timeout
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return math.inf
    return request.arrived + timeout / 1e6 if timeout else math.inf


def _parse_name(operation: ModelOperation, request: HttpRequest) -> ModelName:
    """The model's name, of the header before the path's.

    Raises Refused for one that breaks a rule, and for a version that no model has.
    """
    named = next((request.headers[name] for name in _TARGETS if name in request.headers), None)
    try:
        model = parse_model_name(operation.model if named is None else named.decode())
    except UnicodeDecodeError as error:
        raise Refused(Situation.BAD_NAME, "the model's name in the header is not UTF-8") from error
    except InvalidModelName as error:
        raise Refused(Situation.BAD_NAME, str(error)) from error
    if operation.version != VERSION:
        message = f"the model {model} has no version {operation.version[:40]!r}: every model has the version {VERSION}"
        raise Refused(Situation.NOT_FOUND, message)
    return model


def _find_json_bytes(request: HttpRequest) -> int:
    """Where the JSON of a request ends: at the end, unless the header says that binary parts follow. Raises Refused."""
    given = request.headers.get(_JSON_BYTES)
    if given is None:
        return len(request.body)
    if not re.fullmatch(rb"[0-9]{1,12}", given) or int(given) > len(request.body):
        shown = given[:40].decode("latin-1")
        message = f"Inference-Header-Content-Length must be at most the body's {len(request.body)} bytes, not {shown!r}"
        raise Refused(Situation.BAD_REQUEST, message)
    return int(given)


def _make_request(request: HttpRequest, model: ModelName, content_type: str) -> InferRequest:
    """The request under a media type of ours, for which the model's name as the client knows it stands for `accept`."""
    return InferRequest(
        model,
        request.body if content_type != contract.OPEN_INFERENCE_DESCRIBE else b"",
        content_type,
        model,
        request.deadline,
        request.client_gone,
        request.arrived,
        request.id,
        request.client,
    )
