"""How Multi Model Server says what was wrong: the status and type of each situation. Pure."""

from collections.abc import Mapping
from typing import Final

from server.errors import Situation

INTERNAL: Final = "InternalServerException"
UNAVAILABLE: Final = "ServiceUnavailableException"
BAD_REQUEST: Final = "BadRequestException"
NO_MODEL: Final = "ModelNotFoundException"

#: Status and type of each situation. What the code of an archive made wrong has its own status.
ERRORS: Final[Mapping[Situation, tuple[int, str]]] = {
    Situation.BAD_NAME: (400, BAD_REQUEST),
    Situation.NO_TARGET: (400, BAD_REQUEST),
    Situation.BAD_REQUEST: (400, BAD_REQUEST),
    Situation.TOO_LARGE: (413, "RequestEntityTooLargeException"),
    Situation.NOT_FOUND: (404, NO_MODEL),
    Situation.MODEL_FAILED: (500, INTERNAL),
    Situation.ARCHIVE_FAILED: (500, INTERNAL),
    Situation.STORE_FAILED: (503, UNAVAILABLE),
    Situation.NO_ROOM: (507, INTERNAL),
    Situation.OVERLOADED: (503, UNAVAILABLE),
    Situation.NOT_READY: (503, UNAVAILABLE),
    Situation.WORKER_LOST: (503, UNAVAILABLE),
    Situation.DEADLINE: (504, "RequestTimeoutException"),
    Situation.INTERNAL: (500, INTERNAL),
    Situation.NO_ROUTE: (404, "ResourceNotFoundException"),
    Situation.BAD_METHOD: (405, "MethodNotAllowedException"),
    Situation.SLOW_CLIENT: (408, "RequestTimeoutException"),
    Situation.BAD_SIGNATURE: (403, "AccessDeniedException"),
    Situation.UNSUPPORTED_CODING: (415, BAD_REQUEST),
    Situation.UNAUTHORIZED: (401, "AccessDeniedException"),
    Situation.FORBIDDEN: (403, "AccessDeniedException"),
}
