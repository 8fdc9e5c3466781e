"""How gRPC says a situation. Pure.

The metrics count the HTTP status that the Open Inference Protocol has for it (`server.front.dialects.open_inference`),
so that one query over `code` holds for all protocols.
"""

from collections.abc import Mapping

from grpc import StatusCode

from server.errors import Refused, Situation
from server.settings import Settings

TOO_MANY = 429
LONGEST_DETAILS = 1500  #: characters; what a client takes of headers is small, and each may be sent as nine bytes

#: Clients that retry by themselves repeat UNAVAILABLE alone, so only what may succeed the next time is that.
STATUS: Mapping[Situation, StatusCode] = {
    Situation.BAD_NAME: StatusCode.INVALID_ARGUMENT,
    Situation.NO_TARGET: StatusCode.INVALID_ARGUMENT,
    Situation.BAD_REQUEST: StatusCode.INVALID_ARGUMENT,
    Situation.TOO_LARGE: StatusCode.RESOURCE_EXHAUSTED,
    Situation.NOT_FOUND: StatusCode.NOT_FOUND,
    Situation.MODEL_FAILED: StatusCode.INTERNAL,
    Situation.ARCHIVE_FAILED: StatusCode.FAILED_PRECONDITION,
    Situation.STORE_FAILED: StatusCode.UNAVAILABLE,
    Situation.NO_ROOM: StatusCode.RESOURCE_EXHAUSTED,
    Situation.OVERLOADED: StatusCode.UNAVAILABLE,
    Situation.NOT_READY: StatusCode.UNAVAILABLE,
    Situation.WORKER_LOST: StatusCode.UNAVAILABLE,
    Situation.DEADLINE: StatusCode.DEADLINE_EXCEEDED,
    Situation.INTERNAL: StatusCode.INTERNAL,
    Situation.NO_ROUTE: StatusCode.UNIMPLEMENTED,
    Situation.BAD_METHOD: StatusCode.UNIMPLEMENTED,
    Situation.SLOW_CLIENT: StatusCode.ABORTED,
    Situation.BAD_SIGNATURE: StatusCode.UNAUTHENTICATED,
    Situation.UNSUPPORTED_CODING: StatusCode.UNIMPLEMENTED,
    Situation.UNAUTHORIZED: StatusCode.UNAUTHENTICATED,
    Situation.FORBIDDEN: StatusCode.PERMISSION_DENIED,
}


#: Statuses of HTTP that say what went wrong; others are INTERNAL from 500 on, below FAILED_PRECONDITION.
OF_HTTP: Mapping[int, StatusCode] = {
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    405: StatusCode.UNIMPLEMENTED,
    409: StatusCode.ALREADY_EXISTS,
    413: StatusCode.RESOURCE_EXHAUSTED,
    429: StatusCode.RESOURCE_EXHAUSTED,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.DEADLINE_EXCEEDED,
    507: StatusCode.RESOURCE_EXHAUSTED,
}
FAILED_HERE = 500


class AnsweredBadly(Refused):
    """An answer that has an HTTP status of its own: the code of an archive has chosen it, or another API."""

    def __init__(self, status: int, message: str, code: StatusCode | None = None) -> None:
        super().__init__(Situation.MODEL_FAILED, message, status=status)
        self.status = status
        usual = StatusCode.INTERNAL if status >= FAILED_HERE else StatusCode.FAILED_PRECONDITION
        self.code = code or OF_HTTP.get(status, usual)


def choose_statuses(settings: Settings) -> Mapping[Situation, StatusCode]:
    """The table as `overload_status` has it: 429 asks clients not to retry by themselves."""
    if settings.overload_status == TOO_MANY:
        return {**STATUS, Situation.OVERLOADED: StatusCode.RESOURCE_EXHAUSTED}
    return STATUS


def describe_refusal(why: Refused) -> str:
    """One sentence that begins with the place where there is one: clients show nothing else."""
    detail = why.detail
    message = detail.say()
    return message if len(message) <= LONGEST_DETAILS else message[:LONGEST_DETAILS] + "..."


def list_advice(why: Refused) -> list[tuple[str, str]]:
    """Trailing metadata that says when to try again: gRPC's own, in milliseconds, and HTTP's, in seconds."""
    retry_ms = why.detail.retry_ms
    if retry_ms is None:
        return []
    return [("grpc-retry-pushback-ms", str(retry_ms)), ("retry-after", str(-(-retry_ms // 1000)))]
