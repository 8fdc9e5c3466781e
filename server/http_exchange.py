"""One HTTP request and its response, of which head and body leave in one write. Runs on the listener's event loop."""

import asyncio
from itertools import chain
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from server.request_head import Fields

BODY_FOLLOWS = "fleetcast.body_follows"  #: in `http.response.start`: the body's first part is sent without a pause
WHOLE_BODY = "fleetcast.whole_body"  #: in the same message: all of the body, where the scope has this extension
REASON = "fleetcast.reason"  #: in the same message: the status line's reason, where it is not the usual one
CLOSE = (b"connection", b"close")
_CONTROL = bytes({*range(0x20), 0x7F} - {ord("\t")})  #: bytes that no header may hold


class BodyEvent:
    """Set when something has come of a request's body: an `asyncio.Event` that is only made when it is waited for."""

    def __init__(self) -> None:
        self._is_set = False
        self._event: asyncio.Event | None = None

    def __repr__(self) -> str:
        """For example `<BodyEvent set>`."""
        return f"<BodyEvent {'set' if self._is_set else 'not set'}>"

    def set(self) -> None:
        """Something has come, or nothing will."""
        self._is_set = True
        if self._event is not None:
            self._event.set()

    def clear(self) -> None:
        """It has been read."""
        self._is_set = False
        if self._event is not None:
            self._event.clear()

    async def wait(self) -> None:
        """Wait until something has come."""
        if self._is_set:
            return
        if self._event is None:
            self._event = asyncio.Event()
        await self._event.wait()


class Exchange(RequestResponseCycle):
    """One request and its response, of which head and first part leave in one write where the application allows it.

    Uvicorn writes them separately, and uvloop sends each at once, which would wake the client twice. An application
    that sends the body's first part right after the head says so by `BODY_FOLLOWS` in its `http.response.start`; one
    that has all of the body adds it to that message as `WHOLE_BODY`, and has sent its response by it.

    What uvicorn's initialiser sets for each request is an attribute of the class here: it takes 3 us.
    """

    access_log = disconnected = response_started = response_complete = False
    more_body = True
    chunked_encoding: bool | None = None
    expected_content_length = 0
    body: Any = b""  #: what has come and was not read; bytes while it is one piece, then a bytearray

    _head = b""  # a head whose body is about to follow
    _until_close = False  # whether the end of the connection is that of the body

    def __init__(self, connection: HttpToolsProtocol, scope: Any, *, keep_alive: bool, expects_100: bool) -> None:
        self.scope, self.transport, self.flow = scope, connection.transport, connection.flow
        self.logger, self.access_logger = connection.logger, connection.access_logger
        self.default_headers = connection.server_state.default_headers
        self.message_event: Any = BodyEvent()
        self.on_response = connection.on_response_complete
        self.keep_alive, self.waiting_for_100_continue = keep_alive, expects_100

    async def receive(self) -> Any:
        """See the ASGI specification. A body that is here whole is given at once and without a copy."""
        if self.more_body or not self.body or self.waiting_for_100_continue or self.disconnected:
            return await super().receive()
        self.flow.resume_reading()
        self.message_event.clear()
        body, self.body = self.body, b""
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    async def send(self, message: Any) -> None:
        """See the ASGI specification. Raises RuntimeError for a message out of turn and for a faulty head or body."""
        if WHOLE_BODY in message:
            await self._send_whole(message)
        elif self._head:
            if self.flow.write_paused and not self.disconnected:
                await self.flow.drain()
            self._send_first(message["body"], more=message.get("more_body", False))
        elif BODY_FOLLOWS in message and not self.response_started and self.scope["method"] != "HEAD":
            self._head = self._make_head(message["status"], message["headers"], message.get(REASON))
            self.response_started, self.waiting_for_100_continue = True, False
        elif self._until_close:
            await self._send_unframed(message["body"], more=message.get("more_body", False))
        else:
            self._until_close = (
                not self.response_started
                and self.scope["http_version"] == "1.0"
                and not any(name == b"content-length" for name, _ in message["headers"])
            )
            self.chunked_encoding = False if self._until_close else self.chunked_encoding
            await super().send(message)

    async def _send_whole(self, message: Any) -> None:
        """Send head and body."""
        if self.response_started or self.scope["method"] == "HEAD":
            await super().send(message)
            await super().send({"type": "http.response.body", "body": message[WHOLE_BODY]})
            return
        self._head = self._make_head(message["status"], message["headers"], message.get(REASON))
        self.response_started, self.waiting_for_100_continue = True, False
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        self._send_first(message[WHOLE_BODY], more=False)

    async def _send_unframed(self, body: bytes, *, more: bool) -> None:
        """Send a part of a body of unknown length to a client of HTTP/1.0, which knows no chunks."""
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        self.transport.write(body)
        if not more:
            await super().send({"type": "http.response.body", "body": b"", "more_body": False})

    def _make_head(self, status: int, headers: Fields, reason: str | None) -> bytes:
        """The bytes of the head. Content-Length must be the first header; names are the application's own.

        `reason`: None for the usual one. Raises RuntimeError for a head that is no head.
        """
        fields = [*self.default_headers, *headers]
        if CLOSE in headers:
            self.keep_alive = False
        elif not self.keep_alive:
            fields.append(CLOSE)
        flat = tuple(chain.from_iterable(fields))  # a loop over the fields would take three times as long
        text = b"".join(flat)
        if len(text.translate(None, _CONTROL)) < len(text):
            raise RuntimeError("a response header holds a control character")
        name, size = headers[0]
        if name != b"content-length":
            raise RuntimeError(f"the first header of a response is Content-Length, not {name!r}")
        self.expected_content_length, self.chunked_encoding = int(size), False
        line = STATUS_LINE[status] if reason is None else _make_status_line(status, reason)
        return b"%b%b\r\n" % (line, b"%b: %b\r\n" * len(fields) % flat)

    def _send_first(self, body: bytes, *, more: bool) -> None:
        """Send the head and the first part of the body, which may be all of it."""
        head, self._head = self._head, b""
        if self.disconnected:
            return
        self.expected_content_length -= len(body)
        if self.expected_content_length < 0 or (self.expected_content_length and not more):
            raise RuntimeError("the response's body is longer or shorter than its Content-Length")
        self.transport.writelines((head, body))
        if not more:
            self.response_complete = True
            self.message_event.set()
            if not self.keep_alive:
                self.transport.close()
            self.on_response()


def _make_status_line(status: int, reason: str) -> bytes:
    """A status line with a reason of the application's. Raises RuntimeError for one that would end the line."""
    if not (reason.isascii() and (reason.isprintable() or not reason)):
        raise RuntimeError("the reason of a status holds a character that no status line may hold")
    return b"HTTP/1.1 %d %b\r\n" % (status, reason.encode())
