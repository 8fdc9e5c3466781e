"""Situations and the one table from situations to protocol codes. Pure; shared by front, worker and supervisor."""

from dataclasses import dataclass
from enum import IntEnum

import msgspec

from model_store.errors import LoadError


class Situation(IntEnum):
    """Everything that can be said instead of an answer. The number travels in response frames."""

    OK = 0
    BAD_NAME = 1
    NO_TARGET = 2
    BAD_REQUEST = 3
    TOO_LARGE = 4
    NOT_FOUND = 5
    MODEL_FAILED = 6
    ARCHIVE_FAILED = 7
    STORE_FAILED = 8
    NO_ROOM = 9
    OVERLOADED = 10
    NOT_READY = 11
    WORKER_LOST = 12
    DEADLINE = 13
    INTERNAL = 14
    NO_ROUTE = 15
    BAD_METHOD = 16
    SLOW_CLIENT = 17
    BAD_SIGNATURE = 18


@dataclass(frozen=True, slots=True)
class SageMakerCode:
    """How the SageMaker runtime contract says it (CONTRACTS 1). `original` is OriginalStatusCode of a ModelError."""

    status: int
    type: str
    original: int | None = None
    retry_after_ms: int | None = None


#: CONTRACTS 1. A passed deadline is a ModelError with original status 504: botocore would retry a bare 504.
SAGEMAKER: dict[Situation, SageMakerCode] = {
    Situation.BAD_NAME: SageMakerCode(400, "ValidationError"),
    Situation.NO_TARGET: SageMakerCode(400, "ValidationError"),
    Situation.BAD_REQUEST: SageMakerCode(400, "ValidationError"),
    Situation.TOO_LARGE: SageMakerCode(413, "ValidationError"),
    Situation.NOT_FOUND: SageMakerCode(400, "ValidationError"),
    Situation.MODEL_FAILED: SageMakerCode(424, "ModelError", original=500),
    Situation.ARCHIVE_FAILED: SageMakerCode(424, "ModelError", original=500),
    Situation.STORE_FAILED: SageMakerCode(503, "ServiceUnavailable", retry_after_ms=1000),
    Situation.NO_ROOM: SageMakerCode(424, "ModelError", original=507),
    Situation.OVERLOADED: SageMakerCode(503, "ServiceUnavailable", retry_after_ms=200),
    Situation.NOT_READY: SageMakerCode(503, "ServiceUnavailable", retry_after_ms=500),
    Situation.WORKER_LOST: SageMakerCode(503, "ServiceUnavailable", retry_after_ms=500),
    Situation.DEADLINE: SageMakerCode(424, "ModelError", original=504),
    Situation.INTERNAL: SageMakerCode(500, "InternalFailure"),
    Situation.NO_ROUTE: SageMakerCode(404, "UnknownOperationException"),
    Situation.BAD_METHOD: SageMakerCode(405, "UnknownOperationException"),
    Situation.SLOW_CLIENT: SageMakerCode(408, "RequestTimeout"),
    Situation.BAD_SIGNATURE: SageMakerCode(403, "AccessDeniedException"),
}

_LOAD_SITUATIONS = {
    "not_found": Situation.NOT_FOUND,
    "store_denied": Situation.STORE_FAILED,
    "store_unavailable": Situation.STORE_FAILED,
    "no_room": Situation.NO_ROOM,
}


def situation_of(error: LoadError) -> Situation:
    """What a failed load is to the client: the archive's fault unless it is the key's, the store's or the room's."""
    return _LOAD_SITUATIONS.get(error.reason, Situation.ARCHIVE_FAILED)


class Detail(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of an error response frame: what was wrong and where."""

    message: str
    instance: int | None = None
    field: str | None = None


class Refused(Exception):
    """A request ends here with a situation; the front says it in the client's protocol."""

    def __init__(
        self, situation: Situation, message: str, instance: int | None = None, field: str | None = None
    ) -> None:
        super().__init__(message)
        self.situation = situation
        self.detail = Detail(message, instance, field)


def sagemaker_error(
    situation: Situation, detail: Detail, code: SageMakerCode | None = None
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Status, headers and JSON body of an error in the SageMaker dialect; boto3 needs `x-amzn-ErrorType` to type it.

    `code` where the operator chose another than the table's.
    """
    code = code or SAGEMAKER[situation]
    body: dict[str, object] = {"message": detail.message}
    place = {k: v for k, v in (("instance", detail.instance), ("field", detail.field)) if v is not None}
    if place:
        body["error"] = {"code": situation.name.lower(), "message": detail.message, **place}
    if code.original is not None:
        body |= {"Message": detail.message, "OriginalStatusCode": code.original, "OriginalMessage": detail.message}
    headers = [(b"content-type", b"application/json"), (b"x-amzn-errortype", code.type.encode())]
    if code.retry_after_ms is not None:
        headers.append((b"x-amz-retry-after", str(code.retry_after_ms).encode()))
        headers.append((b"retry-after", str(-(-code.retry_after_ms // 1000)).encode()))
    return code.status, headers, msgspec.json.encode(body)
