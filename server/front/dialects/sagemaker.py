"""The SageMaker runtime's protocol, as boto3 speaks it (CONTRACTS 1): one model, named by a header."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qs

import msgspec

from model_store.name_table import NameTable
from model_store.names import InvalidModelName, ModelName, parse_model_name
from server import contract
from server.contract import raw_header
from server.errors import Refused, Situation
from server.front.dialects.mlflow import name_error
from server.front.exchange import (
    DialectOperation,
    Headers,
    HttpReply,
    HttpRequest,
    Limit,
    list_code_headers,
    wrong_method,
)
from server.front.forecasting.calls import parse_model
from server.front.forecasting.scoring import Scoring
from server.front.handler_calls import CallDetails
from server.front.inference import InferRequest, InferResponse
from server.front.inference_plane import InferencePlane, add_near_names
from server.routes.inference import SAGEMAKER
from server.settings import Settings

TOO_MANY = 429
OK, MULTIPLE_CHOICES = 200, 300
MAX_SAID = 2000  #: bytes of a handler's body that a ModelError repeats
MAX_NAME_BYTES = 8 * 1024 * 1024  #: of checked names that are remembered; clients can make them up
MAX_ATTRIBUTES = 1024  #: bytes of the custom attributes that are echoed, as SageMaker has it
_NAME = re.compile(r"[A-Za-z0-9](?:-?[A-Za-z0-9]){0,62}")  # of an endpoint of SageMaker's
_ENDPOINT = re.compile(rf"/endpoints/{_NAME.pattern}/invocations")
_MODEL_PATH = re.compile(r"/endpoints/(.+)/invocations", re.DOTALL)  # of a name that no endpoint of SageMaker's has
_FRAME = re.compile(rb'\s{0,16}\{\s{0,16}"dataframe_')  # how the body of MLflow's frames begins
_COMPONENT = raw_header(contract.HEADER_INFERENCE_COMPONENT)
_TARGET_MODEL = raw_header(contract.HEADER_TARGET_MODEL)
_ATTRIBUTES = raw_header(contract.HEADER_CUSTOM_ATTRIBUTES)
_ERROR_TYPE = raw_header(contract.HEADER_ERROR_TYPE)
_RETRY_AFTER_MS = raw_header(contract.HEADER_RETRY_AFTER_MS)
_AWS_REQUEST_ID = b"x-amzn-requestid"  #: what boto3 shows as `ResponseMetadata.RequestId`
_VARIANT = (raw_header(contract.HEADER_VARIANT), b"AllTraffic")


@dataclass(frozen=True, slots=True)
class Code:
    """How the protocol says a situation. `original` is the OriginalStatusCode of a ModelError."""

    status: int
    type: str
    original: int | None = None
    retry_after_ms: int | None = None


#: A passed deadline is a ModelError with original status 504, because botocore would retry a bare 504.
ERRORS: Mapping[Situation, Code] = {
    Situation.BAD_NAME: Code(400, "ValidationError"),
    Situation.NO_TARGET: Code(400, "ValidationError"),
    Situation.BAD_REQUEST: Code(400, "ValidationError"),
    Situation.TOO_LARGE: Code(413, "ValidationError"),
    Situation.NOT_FOUND: Code(400, "ValidationError"),
    Situation.MODEL_FAILED: Code(424, "ModelError", original=500),
    Situation.ARCHIVE_FAILED: Code(424, "ModelError", original=500),
    Situation.STORE_FAILED: Code(503, "ServiceUnavailable", retry_after_ms=1000),
    Situation.NO_ROOM: Code(424, "ModelError", original=507),
    Situation.OVERLOADED: Code(503, "ServiceUnavailable", retry_after_ms=200),
    Situation.NOT_READY: Code(503, "ServiceUnavailable", retry_after_ms=500),
    Situation.WORKER_LOST: Code(503, "ServiceUnavailable", retry_after_ms=500),
    Situation.DEADLINE: Code(424, "ModelError", original=504),
    Situation.INTERNAL: Code(500, "InternalFailure"),
    Situation.NO_ROUTE: Code(404, "UnknownOperationException"),
    Situation.BAD_METHOD: Code(405, "UnknownOperationException"),
    Situation.SLOW_CLIENT: Code(408, "RequestTimeout"),
    Situation.BAD_SIGNATURE: Code(403, "AccessDeniedException"),
    Situation.UNSUPPORTED_CODING: Code(415, "ValidationError"),
    Situation.UNAUTHORIZED: Code(401, "UnrecognizedClientException"),
    Situation.FORBIDDEN: Code(403, "AccessDeniedException"),
}
_OVERLOADED_AS_429 = Code(TOO_MANY, "ModelNotReadyException", retry_after_ms=200)


@dataclass(frozen=True)
class NamedModel(DialectOperation):
    """A call whose path has a model's name in the place of an endpoint's."""

    model: str = ""


class SageMaker:
    """See the module."""

    name = "sagemaker"
    routes = SAGEMAKER

    def __init__(self, settings: Settings) -> None:
        self._limit = Limit(int(settings.max_body_bytes), "max_body_bytes")
        self._invoke, self._default = DialectOperation("invoke", self._limit), settings.default_model
        too_many = settings.overload_status == TOO_MANY
        self._errors = {**ERRORS, Situation.OVERLOADED: _OVERLOADED_AS_429} if too_many else ERRORS
        self._names: NameTable[ModelName] = NameTable(MAX_NAME_BYTES)
        self._runs_code = bool(settings.allow_code)

    def match(self, method: str, path: str, query: bytes = b"") -> DialectOperation | None:
        """POST to `/invocations` or `/endpoints/{any name}/invocations`: what cannot be an endpoint's is a model's.

        Where the query of `/invocations` names a model, it is a client's of an archived model server.
        """
        named = None
        if query and path == contract.INVOCATIONS_PATH and contract.MODEL_NAME_PARAMETER in query:
            return None
        if path != contract.INVOCATIONS_PATH and _ENDPOINT.fullmatch(path) is None:
            named = _MODEL_PATH.fullmatch(path)
            if named is None:
                return None
        if method != "POST":
            raise wrong_method(method)
        return self._invoke if named is None else NamedModel("invoke", self._limit, named[1])

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """The model's answer as it is."""
        raw = request.headers.get(_TARGET_MODEL)
        if raw is None:
            return await self._score(operation, request, plane)
        model = self._names.get(raw)
        if model is None:
            model = self._parse_name(raw)
        if not self._runs_code and _FRAME.match(request.body) is not None:
            return await self._score_model(model, request, plane)
        asked = InferRequest(
            model,
            request.body,
            request.content_type,
            request.accept,
            request.deadline,
            request.client_gone,
            request.arrived,
            request.id,
            request.client,
            CallDetails(request.headers) if self._runs_code else None,
        )  # fmt: skip
        try:
            response = await plane.infer(asked)
        except Refused as why:
            add_near_names(why, model, plane)
            raise
        headers = _make_headers(request)
        if response.head is not None:
            headers = await add_code_headers(headers, response)
        return HttpReply(200, response.content_type, response.body, headers, response.stats, response)

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """`message`; the place where there is one; what boto3 reads of a ModelError; the type in a header."""
        code, detail = self._errors[why.situation], why.detail
        said = detail.say()
        body: dict[str, object] = {"message": said, "error_code": name_error(code.status)}
        place = {k: v for k, v in (("instance", detail.instance), ("field", detail.field)) if v is not None}
        if place:
            body["error"] = {"code": why.situation.name.lower(), "message": said, **place}
        if code.original is not None:
            original = code.original if detail.status is None else detail.status
            body |= {"Message": said, "OriginalStatusCode": original, "OriginalMessage": said}
        headers = [(_ERROR_TYPE, code.type.encode()), *_make_headers(request)]
        retry_ms = code.retry_after_ms if detail.retry_ms is None else detail.retry_ms
        if retry_ms is not None:
            headers.append((_RETRY_AFTER_MS, b"%d" % retry_ms))  # botocore's, in milliseconds
            headers.append((b"retry-after", b"%d" % -(-retry_ms // 1000)))
        return HttpReply(code.status, contract.JSON, msgspec.json.encode(body), headers)

    async def _score(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """The answer to a client that sends no target: MLflow's, or boto3 with the model as endpoint."""
        model = self._choose_model(operation.model if isinstance(operation, NamedModel) else "", request)
        return await self._score_model(model, request, plane)

    async def _score_model(self, model: ModelName, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """The answer to MLflow's body."""
        reply = await Scoring(plane, request, model, self._limit).answer()
        reply.headers = _make_headers(request)
        return reply

    def find_model(self, request: HttpRequest, endpoint: str) -> ModelName:
        """The model of a call to this endpoint, by the target's header or else as `_choose_model` has it."""
        raw = request.headers.get(_TARGET_MODEL)
        if raw is not None:
            return self._parse_name(raw)
        return self._choose_model("" if _NAME.fullmatch(endpoint) else endpoint, request)

    def find_status(self, situation: Situation) -> int:
        """The status that this situation has, and is counted with."""
        return self._errors[situation].status

    @staticmethod
    def make_headers(request: HttpRequest) -> Headers:
        """What every answer carries."""
        return _make_headers(request)

    def _choose_model(self, named: str, request: HttpRequest) -> ModelName:
        """The model by the inference component, the query, its name in the path, or the operator. Raises Refused."""
        component = request.headers.get(_COMPONENT, b"").decode("utf-8", "replace")
        queried = parse_qs(request.query.decode("latin-1"), max_num_fields=20).get("model_name", [""])[0]
        chosen = component or queried or named or self._default
        if not chosen:
            message = f"no target model: send the header {contract.HEADER_TARGET_MODEL}"
            raise Refused(Situation.NO_TARGET, f"{message}, or name the model as ?model_name= or as the endpoint")
        return parse_model(chosen, "model_name")

    def _parse_name(self, raw: bytes) -> ModelName:
        """The target model, remembered for the next request. Raises Refused."""
        try:
            name = parse_model_name(raw.decode())
        except UnicodeDecodeError:
            message = f"{contract.HEADER_TARGET_MODEL}: {raw[:80]!r} is not UTF-8; send the model's name as UTF-8"
            raise Refused(Situation.BAD_NAME, message) from None
        except InvalidModelName as error:
            raise Refused(Situation.BAD_NAME, f"{contract.HEADER_TARGET_MODEL}: {error}") from error
        self._names.put(raw, name)
        return name


async def add_code_headers(headers: Headers, response: InferResponse) -> Headers:
    """The headers with those of an archive's code, which replace ours. Raises Refused for a status of no success."""
    assert response.head is not None, "who asks has told the code of the request"
    status = response.head.status
    if not OK <= status < MULTIPLE_CHOICES:
        said = bytes(await response.read())[:MAX_SAID].decode(errors="replace")
        message = said or response.head.reason or f"the handler answered with status {status}"
        raise Refused(Situation.MODEL_FAILED, message, status=status)
    given = list_code_headers(response)
    if not given:  # as it mostly is
        return headers
    names = {name.lower() for name, _ in given}
    return [*(each for each in headers if each[0] not in names), *given]


def _make_headers(request: HttpRequest) -> Headers:
    """What every answer carries, whatever happens to the request."""
    headers = [_VARIANT]
    if request.id:
        headers.append((_AWS_REQUEST_ID, request.id))
    custom = request.headers.get(_ATTRIBUTES)
    if custom is not None and len(custom) <= MAX_ATTRIBUTES:
        headers.append((_ATTRIBUTES, custom))
    return headers
