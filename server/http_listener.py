"""The HTTP listener: uvicorn, with stricter reading of requests and a time limit for slow clients.

Runs in the event loop of fronts and of the supervisor.
"""

import asyncio
import contextlib
import fcntl
import socket
import termios
import time
from collections.abc import Hashable, Iterator
from typing import Any, cast

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.access.tls import CLIENT_NAME, Tls, name_client
from server.request_head import body_framing, find_fault, refuse_head

MAX_HEAD = 64 * 1024  #: bytes of a request's line and headers, or of the framing between two pieces of its body
TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
TLS_LOOK_S = 1.0  #: how often certificates' files are looked at
MAX_PIPELINED = 512  #: requests of one connection that wait for the answer to an earlier one
LOOKS = 10  #: checks of all clients within `patience_s`
SMALL = 4096  #: bytes that are worth copying to save a write


class OneWrite:
    """A client's transport that sends a response's head and body in one write.

    Uvicorn writes them separately, and uvloop sends each at once, which would wake the client twice. A small first
    write is held for the second, at most until the end of the loop's pass. Other methods are the transport's own.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held = b""
        self._call_soon = asyncio.get_running_loop().call_soon
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        """The transport's own."""
        return getattr(self._transport, name)

    def __repr__(self) -> str:
        """For example `<OneWrite 0 bytes held, <TCPTransport ...>>`."""
        return f"<OneWrite {len(self._held)} bytes held, {self._transport!r}>"

    def write(self, data: bytes) -> None:
        """Send the bytes, or hold them for the next write."""
        if self._held:
            data, self._held = self._held + data, b""
            self._transport.write(data)
        elif len(data) > SMALL:
            self._transport.write(data)
        elif data:
            self._held = data
            self._call_soon(self._flush)

    def close(self) -> None:
        """Send the held bytes and close."""
        self._flush()
        self._transport.close()

    def get_write_buffer_size(self) -> int:
        """Bytes that are not sent yet."""
        return len(self._held) + self._transport.get_write_buffer_size()

    def _flush(self) -> None:
        data, self._held = self._held, b""
        if data and not self.is_closing():  # a closed transport would log an error
            self._transport.write(data)


class ClientConnection(HttpToolsProtocol):
    """One client's connection, stricter and more bounded than uvicorn's.

    - A head has at most `MAX_HEAD` bytes, and so have a chunked body's trailers; uvicorn bounds neither.
    - At most `MAX_PIPELINED` requests wait behind one that is being answered; they are answered, then the connection is
      closed. Uvicorn pauses reading only for bytes that it has not received yet, and these can hold 10,000 requests.
    - Trailers are dropped: they never become headers of the request.
    - `Upgrade` is ignored (RFC 9110, 7.8) and the body is read as the head says. The parser (llhttp) takes the bytes
      after such a head for another protocol and would read a body as the next request: a second parser reads the body.
    - A head that breaks a rule of `server.request_head` is answered 400 in its turn, and the connection is closed.
    - Where the client has shown a certificate, the application finds its name in the scope, as `CLIENT_NAME`.
    """

    _framing_bytes = 0  #: received since the last piece of a body or the last end of a head or message
    _advanced = False  #: whether the bytes at hand held such a piece or end
    _in_message = False  #: after a head's end, until its message ends
    _replaying = False  #: while the second parser is given a head that has been handled already
    _over = False  #: what comes is not read any more
    _apart = b""  #: framing of a body that the parser takes for another protocol
    _client_name: str | None = None  #: of the certificate, which is that of the whole connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Answers are written through `OneWrite`."""
        certificate = transport.get_extra_info("peercert")
        if certificate is not None:
            self._client_name = name_client(certificate)
        super().connection_made(cast("asyncio.Transport", OneWrite(transport)))

    def data_received(self, data: bytes) -> None:
        """Bytes of one or many requests. Those that lie wholly within a head, framing or trailers are counted."""
        if self._over:
            return
        self._unset_keepalive_if_required()
        self._advanced = False
        self._feed(memoryview(data))
        self._framing_bytes = 0 if self._advanced else self._framing_bytes + len(data)
        if self._framing_bytes > MAX_HEAD:
            self._end(TOO_LONG)

    def _feed(self, data: memoryview) -> None:
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                if self._apart:
                    self._read_body_apart()
            except httptools.HttpParserError as error:
                self._end(_not_http(str(error)))
                return
            else:
                return

    def _read_body_apart(self) -> None:
        """A parser that stands where the body begins: it has read a head of the same framing without `Upgrade`."""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's first one
        head, self._apart = b"POST / HTTP/1.1\r\n" + self._apart + b"\r\n", b""
        self._replaying = True
        self.parser.feed_data(head)
        self._replaying = False

    def _end(self, answer: bytes) -> None:
        """Answer bytes that belong to no sound request, and close. Requests before them are answered first."""
        self._over = True
        cycle = self.cycle
        busy = cycle is not None and not cycle.response_complete
        if busy and not self._in_message:
            cycle.keep_alive = False
            self.flow.pause_reading()
        elif not self.transport.is_closing():
            if not (self.pipeline or (busy and cycle.response_started)):
                self.transport.write(answer)
            self.transport.close()

    def on_message_begin(self) -> None:
        """A head begins. Raises ValueError for one too many behind an unanswered request, which ends the connection."""
        if self._replaying:
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError(f"more than {MAX_PIPELINED} requests wait on one connection")
        super().on_message_begin()
        if self._client_name is not None:
            cast("dict[str, Any]", self.scope)[CLIENT_NAME] = self._client_name

    def on_url(self, url: bytes) -> None:
        """The request's target, or a part of it."""
        if not self._replaying:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field of the head. After the head's end it is a trailer, which is dropped."""
        if not (self._replaying or self._in_message):
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A head has ended: the application is started, or one that refuses."""
        if self._replaying:
            return
        self._advanced = self._in_message = True
        fault = find_fault(self.headers, self.parser.get_http_version())
        if self.parser.should_upgrade():
            self._apart = body_framing(self.headers)
        served = self.app
        if fault is not None:
            self.app = _refusing(fault)
        try:
            super().on_headers_complete()
        finally:
            self.app = served

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._advanced = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The next head may begin, unless the parser has only left out a body that is read apart."""
        if self._apart:
            return
        self._advanced, self._in_message = True, False
        super().on_message_complete()


def _not_http(reason: str) -> bytes:
    message = f"not a valid HTTP/1.1 request: {reason}. Paths and header names are ASCII, header values UTF-8"
    _, headers, body = refuse_head(message)
    lines = [b"HTTP/1.1 400 Bad Request", *(name + b": " + value for name, value in headers)]
    return b"\r\n".join([*lines, b"", body])


def _refusing(fault: str) -> Any:
    """An application that answers 400 and has the connection closed after it."""

    async def refuse(_scope: Any, _receive: Any, send: Any) -> None:
        status, headers, body = refuse_head(fault)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return refuse


class Listener(uvicorn.Server):
    """A uvicorn server that closes connections of clients that stand still, and that handles no signals.

    Uvicorn bounds only the pause between two requests. This one also bounds by `patience_s` seconds how long a client
    may take to send its first request, to finish a request it has begun, and to read any part of an answer. The
    supervisor decides when the server stops. With `tls` it speaks TLS, and renewed certificates are used at once.
    """

    def __init__(self, config: uvicorn.Config, patience_s: float, tls: Tls | None = None) -> None:
        super().__init__(config)
        self._patience_s, self._tls = patience_s, tls
        self._stands: dict[Any, tuple[Hashable, float]] = {}  # connection -> state, and since when

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers."""
        yield

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop and drained."""
        looking = [asyncio.create_task(self._look())]
        if self._tls is not None:
            looking.append(asyncio.create_task(self._renew(self._tls)))
        try:
            await super().serve(sockets)
        finally:
            for task in looking:
                task.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, with TLS where it is configured: uvicorn itself takes files, which it would read only once."""
        if self._tls is not None:
            self.config.ssl = self._tls.context
        await super().startup(sockets)

    async def _renew(self, tls: Tls) -> None:
        while True:
            await asyncio.sleep(TLS_LOOK_S)
            tls.reload_if_changed()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self._patience_s / LOOKS)
            self._cut_off(time.monotonic())

    def _cut_off(self, now: float) -> None:
        stands = {}
        for connection in list(self.server_state.connections):
            wait = _waits_for(connection)
            if wait is None:
                continue
            before, since = self._stands.get(connection, (None, now))
            if wait != before:
                stands[connection] = (wait, now)
            elif now - since < self._patience_s:
                stands[connection] = (wait, since)
            else:
                connection.transport.abort()  # closing would wait until the client has read
        self._stands = stands


def _waits_for(connection: Any) -> Hashable:
    """What a connection (uvicorn's HttpToolsProtocol) waits for from its client; None when it is the server's turn.

    The value changes only when something is achieved. Bytes of a request achieve nothing until the request is whole.
    """
    unsent = connection.transport.get_write_buffer_size()
    cycle = connection.cycle
    if unsent:
        return "taking", cycle, unsent, _count_unacknowledged(connection.transport)
    if connection.pipeline or connection.timeout_keep_alive_task is not None:
        return None  # an earlier request is being answered, or uvicorn times the idle connection
    if cycle is None or cycle.response_complete:
        return "asking", cycle
    return ("sending", cycle) if cycle.more_body else None


def _count_unacknowledged(transport: asyncio.Transport) -> bytes:
    """The number of bytes that the kernel holds for the client, as the raw memory of an int.

    The kernel may hold megabytes and asks for more only when a third is gone, which a slow reader delays for long.
    """
    try:
        return fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return b""  # the platform has no such call


def make_listener(app: Any, grace_s: float, patience_s: float, keep_alive_s: int, tls: Tls | None = None) -> Listener:
    """Uvicorn as every listener is run: httptools, no access log, no signal handlers.

    `grace_s`: seconds that running requests get once the server is told to stop. `patience_s`: seconds that a client
    may let pass where it is its turn. `keep_alive_s`: seconds that a connection stays open between two requests.
    """
    config = uvicorn.Config(
        app,
        loop="none",
        http=ClientConnection,
        ws="none",
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        log_level="warning",
        server_header=False,
        date_header=True,
        timeout_keep_alive=keep_alive_s,
        timeout_graceful_shutdown=max(1, int(grace_s)),
        backlog=2048,
    )
    return Listener(config, patience_s, tls)
