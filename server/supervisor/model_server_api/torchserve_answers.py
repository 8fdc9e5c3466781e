"""How TorchServe's management API says what was done, and what was wrong: statuses, kinds and texts."""

import uuid
from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from server.errors import Situation
from server.ipc.control import ControlError
from server.model_server_api.bodies import JSON, NO_CACHE, NO_SUCH_METHOD, NO_SUCH_PATH, encode_error
from server.supervisor.registrations.refusals import (
    AlreadyRegistered,
    ArchiveUnreadable,
    BadOption,
    DefaultVersionStays,
    ModelUnknown,
    NotInStore,
    NotLoaded,
    RegistrationRefused,
    TableFull,
    UrlOutsideStore,
    VersionUnknown,
    shorten_name,
)

OK, METHOD_NOT_ALLOWED = 200, 405

Endpoint = Callable[[Request], Awaitable[Response]]

#: How TorchServe says what went wrong with a load, by situation; all else is 500.
_NOT_LOADED = {
    Situation.NO_ROOM: (507, "InternalServerException"),
    Situation.NOT_FOUND: (404, "ModelNotFoundException"),
    Situation.STORE_FAILED: (503, "ServiceUnavailableException"),
    Situation.OVERLOADED: (503, "ServiceUnavailableException"),
    Situation.NOT_READY: (503, "ServiceUnavailableException"),
    Situation.WORKER_LOST: (503, "ServiceUnavailableException"),
    Situation.DEADLINE: (503, "ServiceUnavailableException"),
}
#: And with any other call.
_NOT_DONE = {
    **_NOT_LOADED,
    Situation.MODEL_FAILED: (503, "InternalServerException"),
    Situation.BAD_REQUEST: (400, "BadRequestException"),
    Situation.TOO_LARGE: (413, "RequestEntityTooLargeException"),
}


def refuse_path(request: Request, error: Exception) -> Response:
    """The answer for a path or method that the listener does not have."""
    del request
    assert isinstance(error, HTTPException), "it is registered for these alone"
    if error.status_code == METHOD_NOT_ALLOWED:
        return refuse(METHOD_NOT_ALLOWED, "MethodNotAllowedException", NO_SUCH_METHOD)
    return refuse(error.status_code, "ResourceNotFoundException", NO_SUCH_PATH)


def guard(endpoint: Endpoint) -> Endpoint:
    """The endpoint, whose refusals are said as TorchServe says them."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except (RegistrationRefused, ControlError) as error:
            return _say(error)

    return answer


def _say(error: RegistrationRefused | ControlError) -> Response:  # noqa: C901 -- one case a situation
    """One case a situation; the texts are TorchServe's, with advice behind where it has none."""
    match error:
        case ModelUnknown(name=name):
            return refuse(404, "ModelNotFoundException", f"Model not found: {shorten_name(name)}")
        case VersionUnknown(name=name, version=version):
            text = f"Model version: {shorten_name(version)} does not exist for model: {shorten_name(name)}"
            return refuse(404, "ModelVersionNotFoundException", text)
        case AlreadyRegistered(name=name, version=version):
            text = f"Model version {version} is already registered for model {shorten_name(name)}"
            return refuse(409, "ConflictStatusException", text)
        case DefaultVersionStays(name=name):
            text = f"Cannot remove default version for model {shorten_name(name)}"
            return refuse(403, "InvalidModelVersionException", text)
        case UrlOutsideStore(url=url):
            text = f"Failed to download archive from: {shorten_name(url)}: {error}"
            return refuse(400, "DownloadArchiveException", text)
        case NotInStore():
            return refuse(404, "ModelNotFoundException", str(error))
        case BadOption():
            return refuse(400, "BadRequestException", str(error))
        case TableFull():
            return refuse(507, "InternalServerException", str(error))
        case ArchiveUnreadable(situation=Situation.ARCHIVE_FAILED):
            return refuse(400, "InvalidModelException", str(error))
        case NotLoaded(situation=situation) | ArchiveUnreadable(situation=situation):
            status, kind = _NOT_LOADED.get(Situation(situation), (500, "InternalServerException"))
            return refuse(status, kind, f"Failed to start workers: {error}")
        case ControlError(situation=situation):
            status, kind = _NOT_DONE.get(Situation(situation), (500, "InternalServerException"))
            return refuse(status, kind, str(error))
        case _:
            return refuse(500, "InternalServerException", str(error))


def reply(body: bytes, status: int = OK) -> Response:
    """An answer of this API, with the headers that TorchServe's have."""
    headers = {name.decode(): value.decode() for name, value in NO_CACHE}
    return Response(body, status, {"x-request-id": str(uuid.uuid4()), **headers}, JSON)


def refuse(status: int, kind: str, message: str) -> Response:
    """An error. `kind`: the name that TorchServe has for it."""
    return reply(encode_error(status, kind, message), status)
