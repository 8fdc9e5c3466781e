"""Bodies and headers of answers, as TorchServe and Multi Model Server write them. Pure."""

import json
from typing import Final

JSON: Final = "application/json"
NO_SUCH_PATH: Final = "Requested resource is not found, please refer to API document."
NO_SUCH_METHOD: Final = "Requested method is not allowed, please refer to API document."
#: That no answer may be kept, as both servers say it with each, semicolon and all.
NO_CACHE: Final = (
    (b"pragma", b"no-cache"),
    (b"cache-control", b"no-cache; no-store, must-revalidate, private"),
    (b"expires", b"Thu, 01 Jan 1970 00:00:00 UTC"),
)


def encode_pretty(value: object) -> bytes:
    """JSON with two spaces of indent and a last line break."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def encode_error(status: int, kind: str, message: str) -> bytes:
    """The body of an error."""
    return encode_pretty({"code": status, "type": kind, "message": message})


def encode_status(text: str) -> bytes:
    """The body of a management call that was carried out."""
    return encode_pretty({"status": text})
