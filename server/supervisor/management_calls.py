"""Calls of the management API that come by gRPC: asked of the HTTP listener's application, with its checks and log.

Runs on the supervisor's event loop. The gRPC front has no rights of its own: it hands on what its client shows.
"""

from typing import Any
from urllib.parse import urlencode

from server.access.tls import CLIENT_NAME
from server.ipc.operations import CallManagement, ManagementAnswer
from server.supervisor.access_control import LOOPBACK, App


async def call_management(app: App, asked: CallManagement) -> ManagementAnswer:
    """The status and body that an HTTP client would get."""
    headers = [(b"host", LOOPBACK.encode())]
    if asked.authorization:
        headers.append((b"authorization", asked.authorization.encode("latin-1", "replace")))
    scope: dict[str, Any] = {
        "type": "http",
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": asked.path,
        "query_string": urlencode(asked.query).encode(),
        "headers": headers,
        "client": (asked.peer, 0),
        "server": (LOOPBACK, 0),
        **({CLIENT_NAME: asked.certificate} if asked.certificate else {}),
    }
    answer = _Answer()
    await app(scope, answer.receive, answer.send)
    return ManagementAnswer(answer.status, bytes(answer.body).decode())


class _Answer:
    """What the application sends. The call has no body of its own."""

    def __init__(self) -> None:
        self.status, self.body = 500, bytearray()

    def __repr__(self) -> str:
        return f"<_Answer {self.status}>"

    async def receive(self) -> dict[str, Any]:
        """See the ASGI specification."""
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message: Any) -> None:
        """See the ASGI specification."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.body += message.get("body", b"")
