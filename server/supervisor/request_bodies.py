"""Bodies of requests to the management listener, which are small."""

from starlette.requests import Request

from server.errors import Situation
from server.ipc.control import ControlError


async def read_body(request: Request, most: int) -> bytes:
    """The whole body. Raises ControlError where it has more than `most` bytes."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise ControlError(f"the body has more than {most} bytes", Situation.TOO_LARGE)
    return bytes(body)
