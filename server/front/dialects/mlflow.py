"""MLflow's scoring server and Databricks' model serving, as their clients speak them (CONTRACTS 9).

`/invocations` and `/endpoints/E/invocations` are SageMaker's paths as well, and its dialect answers them: it takes a
request that names no model by SageMaker's header for MLflow's. Here are the paths that are not SageMaker's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from server.contract import JSON
from server.errors import Refused, Situation
from server.front.exchange import DialectOperation, Headers, HttpReply, HttpRequest, Limit, wrong_method
from server.front.forecasting.bodies import say_place
from server.front.forecasting.calls import parse_model
from server.front.forecasting.scoring import Scoring
from server.front.inference_plane import InferencePlane
from server.front.statuses import USUAL_STATUS
from server.routes.inference import MLFLOW
from server.sdk import __version__
from server.settings import Settings

PREFIX, SUFFIX = "/serving-endpoints/", "/invocations"
OK = 200
_OPEN = {"/health": DialectOperation("health", None), "/version": DialectOperation("version", None)}

#: MLflow's code of each status, and the status of each situation. Its clients repeat 429, 500 and 503.
CODES: Mapping[int, str] = {
    400: "BAD_REQUEST",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "RESOURCE_DOES_NOT_EXIST",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL_ERROR",
    503: "TEMPORARILY_UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
STATUS: Mapping[Situation, int] = {
    **USUAL_STATUS,
    Situation.NO_ROOM: 424,
}


@dataclass(frozen=True)
class Endpoint(DialectOperation):
    """A call to the model that the path names."""

    model: str = ""


class MLflow:
    """See the module."""

    name = "mlflow"
    routes = MLFLOW

    def __init__(self, settings: Settings) -> None:
        self._limit = Limit(int(settings.max_body_bytes), "max_body_bytes")
        self._status = {**STATUS, Situation.OVERLOADED: int(settings.overload_status)}

    def match(self, method: str, path: str, query: bytes = b"") -> DialectOperation | None:
        """Databricks' path of a model, whose name may have slashes; `/health` and `/version`."""
        del query
        operation = _OPEN.get(path)
        expected = "POST" if operation is None else "GET"
        if operation is None:
            if not (path.startswith(PREFIX) and path.endswith(SUFFIX)):
                return None
            operation = Endpoint("score", self._limit, path[len(PREFIX) : -len(SUFFIX)])
        if method != expected:
            if expected == "POST":
                raise wrong_method(method)
            raise Refused(Situation.BAD_METHOD, f"{path} is asked by GET, not {method}")
        return operation

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """The model's predictions, or that the server is there."""
        if not isinstance(operation, Endpoint):
            body = b"\n" if operation.name == "health" else __version__.encode()
            return HttpReply(OK, JSON if operation.name == "health" else "text/plain", body, counted=())
        return await Scoring(plane, request, parse_model(operation.model, "endpoint"), self._limit).answer()

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """`error_code` and `message`, in which the place is said: clients show the body as it is."""
        del request
        status = self._status[why.situation]
        headers: Headers = []
        if why.detail.retry_ms is not None:
            headers.append((b"retry-after", b"%d" % -(-why.detail.retry_ms // 1000)))
        body = {"error_code": name_error(status), "message": say_place(why)}
        return HttpReply(status, JSON, msgspec.json.encode(body), headers)


def name_error(status: int) -> str:
    """MLflow's name for an error of this status."""
    return CODES.get(status, "INTERNAL_ERROR" if status >= 500 else "BAD_REQUEST")  # noqa: PLR2004 - HTTP's classes
