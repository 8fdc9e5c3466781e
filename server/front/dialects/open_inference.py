"""The Open Inference Protocol (V2) over HTTP, as clients of Triton, KServe and MLServer speak it (CONTRACTS 4).

A request's tensors are read by the worker that has the model; here only the header that says where its JSON ends is.
A model is ready when it answers: one that is in the store is loaded for the question. Every model has the version 1.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from model_store.names import InvalidModelName, ModelName, parse_model_name
from server import contract
from server.contract import raw_header
from server.errors import Refused, Situation
from server.front.dataplane import InferencePlane, InferRequest
from server.front.exchange import DialectOperation, Headers, HttpReply, HttpRequest, Limit
from server.ipc.readiness import describe_workers, stuck_after_s
from server.sdk import __version__
from server.settings import Settings

VERSION = "1"  #: of every model; what is served is said by X-Fleetcast-Model-Version
EXTENSIONS = ("binary_tensor_data",)
NO_BODY = 64 * 1024  #: most bytes of a body that is not read
_JSON_BYTES = raw_header("Inference-Header-Content-Length")
_MODELS_PATH = "/v2/models/"
_VERBS = ("ready", "infer")

#: Clients retry nothing by themselves, so each status is the one that HTTP has for it.
STATUS: Mapping[Situation, int] = {
    Situation.BAD_NAME: 400,
    Situation.NO_TARGET: 400,
    Situation.BAD_REQUEST: 400,
    Situation.TOO_LARGE: 413,
    Situation.NOT_FOUND: 404,
    Situation.MODEL_FAILED: 500,
    Situation.ARCHIVE_FAILED: 500,
    Situation.STORE_FAILED: 503,
    Situation.NO_ROOM: 507,
    Situation.OVERLOADED: 503,
    Situation.NOT_READY: 503,
    Situation.WORKER_LOST: 503,
    Situation.DEADLINE: 504,
    Situation.INTERNAL: 500,
    Situation.NO_ROUTE: 404,
    Situation.BAD_METHOD: 405,
    Situation.SLOW_CLIENT: 408,
    Situation.BAD_SIGNATURE: 403,
    Situation.UNSUPPORTED_CODING: 415,
    Situation.UNAUTHORIZED: 401,
    Situation.FORBIDDEN: 403,
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


_SERVER, _LIVE, _READY = (
    DialectOperation("server", None),
    DialectOperation("live", None),
    DialectOperation("ready", None),
)
_OPEN = {"/v2": _SERVER, "/v2/health/live": _LIVE, "/v2/health/ready": _READY}
_decode_tensors = msgspec.json.Decoder(_Tensors).decode


class OpenInference:
    """See the module."""

    name = "v2"
    paths = "/v2/models/MODEL/infer"

    def __init__(self, settings: Settings) -> None:
        self._limit = Limit(int(settings.max_body_bytes), "max_body_bytes")
        self._stuck_s = stuck_after_s(settings)
        self._version = __version__

    def match(self, method: str, path: str, query: bytes = b"") -> DialectOperation | None:
        """What is asked below `/v2`. A model's name may have slashes; the last part of the path is the verb."""
        del query
        if not path.startswith("/v2/") and path != "/v2":
            return None
        operation = _OPEN.get(path)
        if operation is None:
            model, version, verb = _split_path(path)
            limit = self._limit if verb == "infer" else Limit(NO_BODY, "what this path allows")
            operation = ModelOperation(verb, limit, model, version)
        expected = "POST" if operation.name == "infer" else "GET"
        if method != expected:
            raise Refused(Situation.BAD_METHOD, f"{path[:200]} is asked by {expected}, not {method}")
        return operation

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """Tensors for tensors, or what is known of the server or a model."""
        if not isinstance(operation, ModelOperation):
            return self._describe_server(operation, plane)
        model = _parse_name(operation)
        if operation.name == "infer":
            content_type = f"{contract.OPEN_INFERENCE_INFER};json={_find_json_bytes(request)}"
            response = await plane.infer(_make_request(request, model, content_type))
            media, _, size = response.content_type.partition(";json=")
            headers = [(_JSON_BYTES, size.encode())] if size else []
            return HttpReply(200, media, response.body, headers, response.stats, response)
        response = await plane.infer(_make_request(request, model, contract.OPEN_INFERENCE_DESCRIBE))
        if operation.name == "ready":
            return HttpReply(200, "text/plain", b"", [], response.stats)
        tensors = _decode_tensors(await response.read())
        body = {
            "name": model,
            "versions": [VERSION],
            "platform": "fleetcast",
            "inputs": tensors.inputs,
            "outputs": tensors.outputs,
        }
        return HttpReply(200, contract.JSON, msgspec.json.encode(body), [], response.stats)

    def _describe_server(self, operation: DialectOperation, plane: InferencePlane) -> HttpReply:
        """Probes are not counted, and no worker is asked."""
        if operation is _LIVE:
            return HttpReply(200, "text/plain", b"", counted=())
        if operation is _READY:
            found = describe_workers(plane.workers, plane.expected, self._stuck_s)
            return HttpReply(found.status, "text/plain", b"", counted=())
        body = {"name": "fleetcast", "version": self._version, "extensions": EXTENSIONS}
        return HttpReply(200, contract.JSON, msgspec.json.encode(body), counted=())

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """`error`, one sentence that begins with the place where there is one: clients show nothing else."""
        del request
        detail = why.detail
        message = f"{detail.field}: {detail.message}" if detail.field else detail.message
        headers: Headers = []
        if detail.retry_ms is not None:
            headers.append((b"retry-after", b"%d" % -(-detail.retry_ms // 1000)))
        return HttpReply(STATUS[why.situation], contract.JSON, msgspec.json.encode({"error": message}), headers)


def _split_path(path: str) -> tuple[str, str, str]:
    """The model, its version and what is asked of it. Raises Refused for a path that names no model."""
    model = path.removeprefix(_MODELS_PATH)
    if model == path or not model:
        message = f"no such path: {path[:200]}; there are /v2, /v2/health/live, /v2/health/ready, /v2/models/MODEL"
        raise Refused(Situation.NO_ROUTE, f"{message}, and below it /ready and /infer")
    verb = "metadata"
    before, _, last = model.rpartition("/")
    if before and last in _VERBS:
        model, verb = before, last
    before, mark, version = model.rpartition("/versions/")
    return (before, version, verb) if mark and "/" not in version else (model, VERSION, verb)


def _parse_name(operation: ModelOperation) -> ModelName:
    """The model's name. Raises Refused for one that breaks a rule, and for a version that no model has."""
    try:
        model = parse_model_name(operation.model)
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
