"""The HTTP status that most dialects give to each situation; a dialect names beside it what it says otherwise. Pure."""

from collections.abc import Mapping

from server.errors import Situation

#: A failure of the model is 424, so that no client takes it for one of the server, which repeating might heal.
USUAL_STATUS: Mapping[Situation, int] = {
    Situation.BAD_NAME: 400,
    Situation.NO_TARGET: 400,
    Situation.BAD_REQUEST: 400,
    Situation.TOO_LARGE: 413,
    Situation.NOT_FOUND: 404,
    Situation.MODEL_FAILED: 424,
    Situation.ARCHIVE_FAILED: 424,
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
