"""What a call of the SDK may raise: one class for each thing a caller can do about it. All are FleetcastError."""

from collections.abc import Mapping
from typing import Any


class FleetcastError(Exception):
    """A forecast or a command that did not succeed; the text is the server's own message.

    `code` is the server's name of the situation, for example `not_found`; empty where the protocol does not give it.
    `status` is the HTTP status, 0 without one; `error_type` what the SageMaker dialect calls it, such as `ModelError`.
    `instance` counts the series of the request from 0, and `field` is the part of it that was wrong, if one was.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        status: int = 0,
        error_type: str = "",
        instance: int | None = None,
        field: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.code, self.status, self.error_type = message, code, status, error_type
        self.instance, self.field = instance, field


class InvalidRequest(FleetcastError, ValueError):
    """The request is wrong: change it. `field` names the place where the server knows it."""


class ModelNotFound(FleetcastError, LookupError):
    """The store has no archive of this name."""


class ModelFailed(FleetcastError):
    """The archive cannot be loaded, does not fit into memory, or gave numbers that are not finite."""


class DeadlineExceeded(FleetcastError, TimeoutError):
    """The answer was not ready within the request's time-out."""


class AccessDenied(FleetcastError):
    """The server wants a token or a signature, or what was sent does not allow this."""


class Unavailable(FleetcastError):
    """The server cannot take the request now; the client has retried it as often as it was told to."""


class Unreachable(FleetcastError, ConnectionError):
    """No server answers at this address, or its answer is not one of a Fleetcast server."""


class ServerFailed(FleetcastError):
    """A fault of the server."""


_BY_CODE: Mapping[str, type[FleetcastError]] = {
    **dict.fromkeys(("bad_name", "no_target", "bad_request", "too_large"), InvalidRequest),
    "not_found": ModelNotFound,
    **dict.fromkeys(("model_failed", "archive_failed", "no_room"), ModelFailed),
    "deadline": DeadlineExceeded,
    **dict.fromkeys(("bad_signature", "unauthorized", "forbidden"), AccessDenied),
    **dict.fromkeys(("store_failed", "overloaded", "not_ready", "worker_lost"), Unavailable),
}
_BY_STATUS: Mapping[int, type[FleetcastError]] = {
    **dict.fromkeys((400, 413), InvalidRequest),
    **dict.fromkeys((401, 403), AccessDenied),
    **dict.fromkeys((422, 424, 507), ModelFailed),
    **dict.fromkeys((429, 503), Unavailable),
    404: ModelNotFound,
    504: DeadlineExceeded,
}


def error_from_reply(status: int, error_type: str, reply: Any) -> FleetcastError:
    """The exception for an error reply's decoded JSON, whose shape is that of the dialect which was asked."""
    fields = reply if isinstance(reply, dict) else {}
    said = fields.get("error")  # an object of `/v1/forecasts` and management, a sentence of the Open Inference Protocol
    detail = said if isinstance(said, dict) else {"message": said}
    error_type = error_type or str(fields.get("type", ""))  # of TorchServe and Multi Model Server
    code = str(detail.get("code", ""))
    status = int(fields.get("OriginalStatusCode", status))
    kind = _BY_CODE.get(code) or _BY_STATUS.get(status) or (ModelFailed if "OriginalStatusCode" in fields else None)
    message = str(detail.get("message") or fields.get("message") or reply or f"status {status}")
    return (kind or ServerFailed)(
        message,
        code=code,
        status=status,
        error_type=error_type,
        instance=detail.get("instance"),
        field=detail.get("field"),
    )


def error_from_item(error: Mapping[str, Any]) -> FleetcastError:
    """The exception for the `error` of one item of a call for many models, without its place in the call."""
    kind = _BY_CODE.get(str(error.get("code", "")), ServerFailed)
    return kind(str(error.get("message")), code=str(error.get("code", "")), field=error.get("field"))
