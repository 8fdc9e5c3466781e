"""Multi Model Server's inference API (CONTRACTS 3), and what SageMaker asks of a container's port (CONTRACTS 2).

The listener speaks it where `model_server_api` is mms, or `container` says that SageMaker asks. In a container of many
models management is asked on the same port, and the supervisor answers it. A name that nobody has registered is a key
of the store; but in such a container it is not loaded, and so not found.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from model_store.names import ModelName
from server import contract
from server.contract import raw_header
from server.errors import Refused, Situation
from server.front.archive_requests import AskedArchive, StoreNames, ask_archive, parse_parameters
from server.front.exchange import DialectOperation, Headers, HttpReply, HttpRequest, Limit, list_code_headers
from server.front.handler_calls import CallDetails
from server.front.inference import InferResponse
from server.front.inference_plane import InferencePlane
from server.front.registrations import find_version, key_of
from server.ipc.operations import ManageModels
from server.model_server_api.bodies import NO_CACHE, NO_SUCH_METHOD, NO_SUCH_PATH, encode_error, encode_pretty
from server.model_server_api.mms_description import describe_api, describe_model_api
from server.model_server_api.mms_errors import ERRORS
from server.routes.inference import MULTI_MODEL_SERVER
from server.sagemaker_container.batch_transform import describe_transform
from server.sagemaker_container.environment import MULTI_MODEL, ONLY_MODEL, SINGLE_MODEL
from server.settings import Settings

MANAGEMENT_BYTES = 64 * 1024  #: most bytes of the body of a management request
TRANSFORMS = 64  #: requests of a batch transform that are worth sending at a time: they share batches
_PREDICTIONS, _LEGACY = re.compile(r"/predictions/(.+)"), re.compile(r"/(.+)/predict")
_INVOKE, _MODELS = re.compile(r"/models/(.+)/invoke"), "/models"
_TARGET_MODEL = raw_header(contract.HEADER_TARGET_MODEL)
_INFERENCE = ("POST", "GET", "PUT")
_DESCRIPTION = ("/", "/api-description")
EXECUTION_PARAMETERS = "/execution-parameters"


@dataclass(frozen=True)
class Prediction(DialectOperation):
    """A request to a model; `model` is empty where the query says it. `keeps_query`: the handler gets it as parts."""

    model: str = ""
    keeps_query: bool = False


_DESCRIBE, _TRANSFORM = DialectOperation("describe", None), DialectOperation("execution-parameters", None)


class MultiModelServer:
    """See the module."""

    name = "mms"
    routes = MULTI_MODEL_SERVER

    def __init__(self, settings: Settings) -> None:
        self._limit = Limit(int(settings.max_body_bytes), "max_body_bytes")
        self._container = settings.container
        self._names = StoreNames()
        self._manages = settings.container == MULTI_MODEL
        self._small = Limit(MANAGEMENT_BYTES, "what this path allows")
        full = 2 * max(1, self._limit.bytes)  # a request of full size, and its answer
        at_once = max(1, min(TRANSFORMS, int(settings.max_inflight_bytes) // full))
        self._transform = encode_pretty(describe_transform(os.environ, self._limit.bytes, at_once))
        self._description = encode_pretty(describe_api(manages=self._manages))

    def match(self, method: str, path: str, query: bytes = b"") -> DialectOperation | None:
        """What is asked of the server, of a model, or where the listener is a container's, of the supervisor."""
        del query
        if path == "/" and method != "OPTIONS":
            raise Refused(Situation.BAD_METHOD, f"{path} is asked by OPTIONS, not {method}")
        if path in _DESCRIPTION:
            return _DESCRIBE
        if path == EXECUTION_PARAMETERS and self._container != "off":
            return _TRANSFORM
        return self._match_prediction(method, path) or self._match_management(path)

    def _match_prediction(self, method: str, path: str) -> Prediction | None:
        """A request to the model that the path names, or the query."""
        if path == contract.INVOCATIONS_PATH:
            return self._predict(method, "", keeps_query=True)
        if (found := _PREDICTIONS.fullmatch(path)) is not None:
            if method == "OPTIONS":
                return Prediction("describe-model", self._small, found[1])
            return self._predict(method, found[1], keeps_query=False)
        found = _INVOKE.fullmatch(path) or _LEGACY.fullmatch(path)
        return None if found is None else self._predict(method, found[1], keeps_query=True)

    def _match_management(self, path: str) -> DialectOperation | None:
        is_managed = path == _MODELS or path.startswith(f"{_MODELS}/")
        return DialectOperation("manage", self._small) if self._manages and is_managed else None

    def _predict(self, method: str, model: str, *, keeps_query: bool) -> Prediction:
        if method not in _INFERENCE:
            raise Refused(Situation.BAD_METHOD, method)
        return Prediction("predict", self._limit, model, keeps_query)

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """A model's answer, or that of the supervisor, or what is known here."""
        if operation is _DESCRIBE:
            return _reply(200, self._description, counted=())
        if operation is _TRANSFORM:
            return _reply(200, self._transform, counted=())
        if not isinstance(operation, Prediction):
            return await self._manage(request, plane)
        fields = parse_parameters(request.query)
        name = operation.model or self._name_model(fields, request)
        if operation.name == "describe-model":
            if self._container == MULTI_MODEL and name not in plane.registrations.models:
                raise _refuse_model(name)
            return _reply(200, encode_pretty(describe_model_api(name)), counted=())
        asked = self._find_archive(name, plane)
        call = CallDetails(request.headers, fields if operation.keeps_query else ())
        if asked is None:
            return _make_reply(await self._names.ask(name, call, request, plane, _refuse_model(name)))
        return _make_reply(await ask_archive(asked, call, request, plane))

    def _name_model(self, fields: Sequence[tuple[str, str]], request: HttpRequest) -> str:
        """The model of a path that names none. A header that names it is SageMaker's own way. Raises Refused."""
        if self._container == SINGLE_MODEL:
            return ONLY_MODEL
        given = request.headers.get(_TARGET_MODEL, b"").decode(errors="replace")
        name = dict(fields).get("model_name", "") or given
        if not name:
            raise Refused(Situation.NO_TARGET, "Parameter model_name is required.")
        return name

    def _find_archive(self, name: str, plane: InferencePlane) -> AskedArchive | None:
        """The archive that a registered name means; None where it may be a key of the store. Raises Refused."""
        if self._container == SINGLE_MODEL:
            return AskedArchive(ModelName(ONLY_MODEL))
        registered = plane.registrations.models.get(name)
        if registered is not None:
            version = find_version(registered, None)
            if version is None or not version.workers:
                message = f"No worker is available to serve request for model: {name}."
                raise Refused(Situation.NOT_READY, f"{message} Consider increasing job queue size.")
            served = plane.registrations.count_for(name, registered.default)
            return AskedArchive(key_of(version), timeout_s=version.timeout_s, served=served)
        if self._container != "off":
            raise _refuse_model(name)
        return None

    async def _manage(self, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """What the supervisor answers. A page of a browser is no platform that manages models. Raises Refused."""
        if b"origin" in request.headers:
            raise Refused(Situation.FORBIDDEN, "models are not managed from pages of a browser (header Origin)")
        query = request.query.decode("latin-1")
        asked = ManageModels(request.method, request.path, query, bytes(request.body))
        found = await plane.manage(asked, request.deadline)
        return _reply(found.status, found.body)

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """Code, type and message. A path or method that is not there gets the words that clients know."""
        del request
        status, kind = ERRORS[why.situation]
        detail, message = why.detail, why.detail.message
        if why.situation is Situation.MODEL_FAILED and detail.status is not None:
            status = detail.status
        if why.situation is Situation.NO_ROUTE:
            message = NO_SUCH_PATH
        elif why.situation is Situation.BAD_METHOD:
            message = NO_SUCH_METHOD
        else:
            message = detail.say()
        reply = _reply(status, encode_error(status, kind, message))
        if detail.retry_ms is not None:
            reply.headers.append((b"retry-after", b"%d" % -(-detail.retry_ms // 1000)))
        return reply


def _refuse_model(name: str) -> Refused:
    return Refused(Situation.NOT_FOUND, f"Model not found: {name[:200]}")


def _make_reply(response: InferResponse) -> HttpReply:
    """A model's answer as it is; what the code of an archive has said of it stands in the head."""
    head, headers = response.head, [*NO_CACHE]
    if head is None:
        return HttpReply(200, response.content_type, response.body, headers, response.stats, response)
    given = list_code_headers(response)
    names = {name.lower() for name, _ in given}
    headers = [*(each for each in headers if each[0] not in names), *given]
    reason = head.reason or None
    return HttpReply(
        head.status, response.content_type, response.body, headers, response.stats, response, reason=reason
    )


def _reply(status: int, body: bytes, counted: tuple[int, ...] | None = None) -> HttpReply:
    headers: Headers = [*NO_CACHE]
    return HttpReply(status, contract.JSON, body, headers, counted=counted)
