"""TorchServe's inference protocol (CONTRACTS 3): predictions, explanations, KServe's first protocol, and older paths.

A model is a registered name, or else the key of an archive in the store, with or without its `.mar`. Names have
slashes, so that the longest registered name that a path begins with wins; what follows it is a version, and then what a
handler gets as `url_path`. Registered models answer only while they have workers, as clients of TorchServe expect;
archives that nobody has registered are loaded by their first request, as everywhere here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from server import contract
from server.contract import raw_header
from server.errors import Refused, Situation
from server.front.archive_requests import AskedArchive, StoreNames, ask_archive, parse_parameters
from server.front.chunks import Chunks, Ending
from server.front.exchange import DialectOperation, Headers, HttpReply, HttpRequest, Limit, list_code_headers
from server.front.handler_calls import CallDetails
from server.front.inference import InferResponse
from server.front.inference_plane import InferencePlane
from server.front.registrations import RegisteredPath, find_version, key_of
from server.front.shared_watch import SharedWatch
from server.ipc.operations import ServedVersion
from server.model_server_api.bodies import JSON, NO_CACHE, NO_SUCH_METHOD, NO_SUCH_PATH, encode_error, encode_pretty
from server.model_server_api.torchserve_description import describe_inference, describe_model
from server.routes.inference import TORCHSERVE
from server.settings import Settings

PREDICT, EXPLAIN, INVOKE, DESCRIBE_MODEL, DESCRIBE_API = "predict", "explain", "invoke", "describe_model", "describe"
LIVE, READY = "live", "ready"  #: what clients of KServe's first protocol ask before they predict
NO_BODY = 64 * 1024  #: most bytes of a body that is not read
OK, NOT_FOUND, FAILED, UNAVAILABLE = 200, 404, 500, 503
_V1, _PREDICTIONS, _EXPLANATIONS, _MODELS = "/v1/models/", "/predictions/", "/explanations/", "/models/"
_VERBS = {":predict": PREDICT, ":explain": EXPLAIN}
_INVOKE, _OLD_PREDICT = "/invoke", "/predict"
_ERROR_TYPE = raw_header(contract.HEADER_ERROR_TYPE)


class Code(NamedTuple):
    """How the protocol says a situation."""

    status: int
    type: str


_BAD, _FAILED, _BUSY = "BadRequestException", "InternalServerException", "ServiceUnavailableException"
ERRORS: Mapping[Situation, Code] = {
    Situation.BAD_NAME: Code(400, _BAD),
    Situation.NO_TARGET: Code(400, _BAD),
    Situation.BAD_REQUEST: Code(400, _BAD),
    Situation.TOO_LARGE: Code(413, "RequestEntityTooLargeException"),
    Situation.NOT_FOUND: Code(404, "ModelNotFoundException"),
    Situation.MODEL_FAILED: Code(500, _FAILED),
    Situation.ARCHIVE_FAILED: Code(500, _FAILED),
    Situation.STORE_FAILED: Code(503, _BUSY),
    Situation.NO_ROOM: Code(507, _FAILED),
    Situation.OVERLOADED: Code(503, _BUSY),
    Situation.NOT_READY: Code(503, _BUSY),
    Situation.WORKER_LOST: Code(503, _BUSY),
    Situation.DEADLINE: Code(504, _FAILED),
    Situation.INTERNAL: Code(500, _FAILED),
    Situation.NO_ROUTE: Code(404, "ResourceNotFoundException"),
    Situation.BAD_METHOD: Code(405, "MethodNotAllowedException"),
    Situation.SLOW_CLIENT: Code(408, _BAD),
    Situation.BAD_SIGNATURE: Code(403, "InvalidKeyException"),
    Situation.UNSUPPORTED_CODING: Code(415, _BAD),
    Situation.UNAUTHORIZED: Code(401, "InvalidKeyException"),
    Situation.FORBIDDEN: Code(403, "InvalidKeyException"),
}


class NoVersion(Refused):
    """The model is registered, but not with this version."""

    def __init__(self, name: str, version: str) -> None:
        super().__init__(Situation.NOT_FOUND, f"Model version: {version[:80]} does not exist for model: {name[:80]}")


@dataclass(frozen=True)
class ModelOperation(DialectOperation):
    """What is asked of a model. `path`: its name, and what may follow. What of it, and whether the query, code gets."""

    path: str = ""
    tells_path: bool = False
    tells_query: bool = False


class TorchServe:
    """See the module."""

    name = "torchserve"
    routes = TORCHSERVE

    def __init__(self, settings: Settings) -> None:
        self._limit = Limit(int(settings.max_body_bytes), "max_body_bytes")
        self._names = StoreNames()

    def match(self, method: str, path: str, query: bytes = b"") -> DialectOperation | None:
        """What is asked: of one model, or the description of the protocol. It owns `/predictions` and `/models`."""
        if path in ("/", "/api-description"):
            return _match_description(method, path)
        if method == "GET" and (name := _find_probed_model(path)):
            return ModelOperation(READY, Limit(NO_BODY, "what this path allows"), name)
        if path == contract.INVOCATIONS_PATH:
            return self._match_invocations(query)
        found = self._match_model(path)
        if found is not None and method == "OPTIONS" and path.startswith(_PREDICTIONS):
            return ModelOperation(DESCRIBE_MODEL, Limit(NO_BODY, "what this path allows"), found.path)
        if found is None and path.startswith(("/predictions", "/explanations", "/models", _V1)):
            raise Refused(Situation.NO_ROUTE, NO_SUCH_PATH)
        return found

    def _match_model(self, path: str) -> ModelOperation | None:
        for prefix, verb in ((_PREDICTIONS, PREDICT), (_EXPLANATIONS, EXPLAIN)):
            if path.startswith(prefix) and len(path) > len(prefix):
                return ModelOperation(verb, self._limit, path[len(prefix) :], tells_path=True)
        if path.startswith(_MODELS) and path.endswith(_INVOKE) and len(path) > len(_MODELS) + len(_INVOKE):
            return ModelOperation(INVOKE, self._limit, path[len(_MODELS) : -len(_INVOKE)], tells_query=True)
        if path.startswith(_V1):
            name, colon, verb = path[len(_V1) :].rpartition(":")
            if name and colon + verb in _VERBS:
                return ModelOperation(_VERBS[colon + verb], self._limit, name)
        elif path.endswith(_OLD_PREDICT) and len(path) > len(_OLD_PREDICT) + 1:
            return ModelOperation(INVOKE, self._limit, path[1 : -len(_OLD_PREDICT)], tells_query=True)
        return None

    def _match_invocations(self, query: bytes) -> ModelOperation | None:
        """Without a model's name in the query the path is SageMaker's, whose header names the model."""
        name = dict(parse_parameters(query)).get(contract.MODEL_NAME_PARAMETER.decode())
        return None if name is None else ModelOperation(INVOKE, self._limit, name, tells_query=True)

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """The model's answer as it is, or a description."""
        if not isinstance(operation, ModelOperation):
            return _reply(encode_pretty(describe_inference() if operation.name != LIVE else {"status": "alive"}))
        registered = plane.registrations.find_longest(operation.path)
        if operation.name == DESCRIBE_MODEL:
            if registered is None:
                raise _refuse_model(operation.path)
            return _reply(encode_pretty(describe_model(registered.name)))
        if operation.name == READY:
            asked = msgspec.structs.replace(
                request, body=b"", content_type=contract.OPEN_INFERENCE_DESCRIBE, accept=operation.path
            )
            await self._ask(operation, registered, asked, plane)
            return _reply(encode_pretty({"name": operation.path, "ready": True}))
        watched = msgspec.structs.replace(request, client_gone=SharedWatch(request.client_gone))
        response = await self._ask(operation, registered, watched, plane, streams=True)
        if not response.is_streamed:
            return _make_reply(response)
        chunks = await Chunks.open(response.stream(), self._end, request.deadline, watched.client_gone)
        return msgspec.structs.replace(_make_reply(response), body=b"", stream=None, chunks=chunks)

    async def predict(
        self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane, *, streams: bool
    ) -> InferResponse:
        """A model's answer as the data plane has it; `streams`: it may be sent while it is made. Raises Refused."""
        assert isinstance(operation, ModelOperation), "it asks a model"
        registered = plane.registrations.find_longest(operation.path)
        return await self._ask(operation, registered, request, plane, streams=streams)

    def _end(self, why: Refused) -> Ending:
        """Half of an answer cannot be told from a whole one by TorchServe's clients, unless the connection is cut."""
        return Ending(ERRORS[why.situation].status, None)

    async def _ask(
        self,
        operation: ModelOperation,
        registered: RegisteredPath | None,
        request: HttpRequest,
        plane: InferencePlane,
        *,
        streams: bool = False,
    ) -> InferResponse:
        """The answer of what the path names: a registered model, else an archive of the store. Raises Refused."""
        call = _make_call(operation, request, registered, streams=streams)
        if registered is None:
            unknown = _refuse_model(operation.path)
            return await self._names.ask(operation.path, call, request, plane, unknown)
        asked = _choose_version(registered, plane)
        if asked is not None:
            return await ask_archive(asked, call, request, plane)
        unknown = NoVersion(registered.name, registered.rest.partition("/")[0])
        return await self._names.ask(operation.path, call, request, plane, unknown)

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """`code`, `type` and `message`. Also for paths that no dialect has, with the header that boto3 reads."""
        del request
        code, detail = ERRORS[why.situation], why.detail
        status, kind, message = code.status, code.type, detail.say()
        if isinstance(why, NoVersion):
            kind = "ModelVersionNotFoundException"
        elif why.situation is Situation.MODEL_FAILED and detail.status is not None:
            status = detail.status
        headers: Headers = list(NO_CACHE)
        if why.situation is Situation.NO_ROUTE:
            headers.append((_ERROR_TYPE, b"UnknownOperationException"))
        elif detail.retry_ms is not None:
            headers.append((b"retry-after", b"%d" % -(-detail.retry_ms // 1000)))
        return HttpReply(status, JSON, encode_error(status, kind, message), headers)


def _find_probed_model(path: str) -> str:
    """The model of `/v1/models/MODEL`; empty for any other path, and for one that ends in a verb."""
    name = path.removeprefix(_V1)
    return "" if name == path or name.endswith(tuple(_VERBS)) else name


def _match_description(method: str, path: str) -> DialectOperation:
    """`OPTIONS /`, `GET /api-description`, or `GET /`, which KServe's clients take for the sign of a living server."""
    if (method, path) == ("GET", "/"):
        return DialectOperation(LIVE, None)
    if (path == "/") != (method == "OPTIONS"):
        raise Refused(Situation.BAD_METHOD, NO_SUCH_METHOD)
    return DialectOperation(DESCRIBE_API, None)


def _refuse_model(path: str) -> Refused:
    return Refused(Situation.NOT_FOUND, f"Model not found: {path[:80]}")


def _choose_version(place: RegisteredPath, plane: InferencePlane) -> AskedArchive | None:
    """What answers at a registered name; None where it has not the version that follows it. Raises Refused."""
    wanted, _, url_path = place.rest.partition("/")
    version = wanted or place.model.default
    found = find_version(place.model, version)
    if found is None:
        return None
    _require_workers(place.name, found)
    served = plane.registrations.count_for(place.name, version)
    return AskedArchive(key_of(found), url_path, found.timeout_s, served)


def _require_workers(name: str, version: ServedVersion) -> None:
    if not version.workers:
        message = (
            f'Model "{name[:80]}" has no worker to serve inference request. Please use scale workers API to add '
            "workers. If this is a sequence inference, please check if it is closed, or expired; or exceeds "
            "maxSequenceJobQueueSize"
        )
        raise Refused(Situation.NOT_READY, message)


def _make_call(
    operation: ModelOperation, request: HttpRequest, place: RegisteredPath | None, *, streams: bool
) -> CallDetails:
    """What the code of an archive is told of the request."""
    properties: dict[str, str] = {}
    if operation.name != INVOKE:
        properties["explain"] = str(operation.name == EXPLAIN)
    if operation.tells_path:
        properties["url_path"] = "" if place is None else place.rest.partition("/")[2]
    parts = parse_parameters(request.query) if operation.tells_query else ()
    return CallDetails(request.headers, parts, properties, streams)


def _make_reply(response: InferResponse) -> HttpReply:
    """The answer as the handler has it, its status and headers too; of an archive without code as it is."""
    head = response.head
    if head is None:
        return HttpReply(OK, response.content_type, response.body, list(NO_CACHE), response.stats, response)
    headers = [*list_code_headers(response), *NO_CACHE]
    return HttpReply(
        head.status, head.content_type, response.body, headers, response.stats, response, reason=head.reason
    )


def _reply(body: bytes) -> HttpReply:
    return HttpReply(OK, JSON, body, list(NO_CACHE), counted=())
