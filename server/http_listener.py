"""The HTTP listener: uvicorn, with stricter reading of requests and a time limit for slow clients.

Runs in the event loop of fronts and of the supervisor.
"""

import asyncio
import contextlib
import fcntl
import math
import socket
import termios
import time
from collections.abc import Hashable, Iterator
from functools import lru_cache
from itertools import chain
from typing import Any
from urllib.parse import unquote

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from server.access.tls import CLIENT_NAME, Tls, name_client
from server.http_drain import DrainState, PendingConnections, end_connections
from server.request_head import Fields, body_framing, find_fault, refuse_head

MAX_HEAD = 64 * 1024  #: bytes of a request's line and headers, or of the framing between two pieces of its body
TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
TLS_LOOK_S = 1.0  #: how often certificates' files are looked at
MAX_PIPELINED = 512  #: requests of one connection that wait for the answer to an earlier one
LOOKS = 10  #: checks of all clients within `patience_s`
BODY_FOLLOWS = "fleetcast.body_follows"  #: in `http.response.start`: the body's first part is sent without a pause
WHOLE_BODY = "fleetcast.whole_body"  #: in the same message: all of the body, where the scope has this extension
HEADERS_BY_NAME = "fleetcast.headers"  #: in the scope: the headers by lower-case name, of a repeated one the last
REASON = "fleetcast.reason"  #: in the same message: the status line's reason, where it is not the usual one
CLOSE = (b"connection", b"close")
KNOWN_TARGETS = 256  #: requests' targets of which the parts are remembered
LONGEST_KNOWN = 256  #: bytes of a target that is
_EXTENSIONS: dict[str, dict[object, object]] = {WHOLE_BODY: {}}
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

    def __init__(self, connection: "ClientConnection", scope: Any, *, keep_alive: bool, expects_100: bool) -> None:
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


class ClientConnection(HttpToolsProtocol):
    """One client's connection, stricter and more bounded than uvicorn's.

    - A head has at most `MAX_HEAD` bytes, and so have a chunked body's trailers; uvicorn bounds neither.
    - At most `MAX_PIPELINED` requests wait behind one that is being answered; they are answered, then the connection is
      closed. Uvicorn pauses reading only for bytes that it has not received yet, and these can hold 10,000 requests.
    - Trailers are dropped: they never become headers of the request.
    - A request's response is an `Exchange`, whose head and body leave in one write.
    - `Upgrade` is ignored (RFC 9110, 7.8) and the body is read as the head says. The parser (llhttp) takes the bytes
      after such a head for another protocol and would read a body as the next request: a second parser reads the body.
    - A head that breaks a rule of `server.request_head` is answered 400 in its turn, and the connection is closed.
    - Where the client has shown a certificate, the application finds its name in the scope, as `CLIENT_NAME`.
    - While the listener drains, the last request that has come is answered with `Connection: close`.
    """

    server_state: DrainState
    _framing_bytes = 0  #: received since the last piece of a body or the last end of a head or message
    _advanced = False  #: whether the bytes at hand held such a piece or end
    _in_head = False  #: after a head's first byte, until its end
    _in_message = False  #: after a head's end, until its message ends
    _last: Any = None  #: the request whose answer says `Connection: close` because the listener drains
    _replaying = False  #: while the second parser is given a head that has been handled already
    _over = False  #: what comes is not read any more
    _apart = b""  #: framing of a body that the parser takes for another protocol
    _client_name: str | None = None  #: of the certificate, which is that of the whole connection
    _idle: tuple[asyncio.Task[Any], asyncio.Future[tuple[Any, Any]]] | None = None  #: a task and what it waits for
    _idle_since: float | None = None  #: by the loop's clock: when the last answer was complete and nothing came since

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note whose certificate the client has shown."""
        certificate = transport.get_extra_info("peercert")
        if certificate is not None:
            self._client_name = name_client(certificate)
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left, or the connection was closed: the task that serves it ends with its last answer."""
        super().connection_lost(exc)
        if self._idle is not None:
            self._idle[1].cancel()
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()

    def data_received(self, data: bytes) -> None:
        """Bytes of one or many requests. Those that lie wholly within a head, framing or trailers are counted."""
        if self._over:
            return
        self._idle_since = None
        self._advanced = False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._feed_again(memoryview(data)[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._end(_not_http(str(error)))
        self._framing_bytes = 0 if self._advanced else self._framing_bytes + len(data)
        if self._framing_bytes > MAX_HEAD:
            self._end(TOO_LONG)

    @property
    def is_idle(self) -> bool:
        """Whether no request has begun that is not answered. The rest of a body that nobody reads is no request."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered and not (self.pipeline or self._in_head)

    def start_drain(self) -> None:
        """Say `Connection: close` in the last answer. One that has begun cannot say it: the connection stays."""
        if self.cycle is not None:
            self._close_after(self.cycle)

    def _close_after(self, cycle: Any) -> None:
        if cycle.keep_alive and not cycle.response_started:
            cycle.keep_alive, self._last = False, cycle

    def _feed_again(self, data: memoryview) -> None:
        """What follows a head with `Upgrade`, at which the parser has stopped; more such heads may be in it."""
        while True:
            if self._apart:
                self._read_body_apart()
            if not data:
                return
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
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
        self.url, self.headers = b"", []
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer."""
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """A head has ended: the application is started, or one that refuses, in its turn."""
        if self._replaying:
            return
        self._advanced = self._in_message = True
        self._in_head = False
        version, fields = self.parser.get_http_version(), self.headers
        by_name = dict(fields)
        fault = find_fault(fields, by_name, version)
        if self.parser.should_upgrade():
            self._apart = body_framing(fields)
        target = self.url
        raw_path, query, path = split_known(target) if len(target) <= LONGEST_KNOWN else split_target(target)
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "root_path": self.root_path,
            "headers": fields,
            HEADERS_BY_NAME: by_name,
            "method": self.parser.get_method().decode("ascii"),
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "extensions": _EXTENSIONS,
        }
        if self._client_name is not None:
            scope[CLIENT_NAME] = self._client_name
        self.headers = []  # what comes now is a trailer, which is dropped
        before, served = self.cycle, self.app if fault is None else _refusing(fault)
        self.cycle = Exchange(
            self,
            scope,
            keep_alive=version != "1.0" and self.parser.should_keep_alive(),
            expects_100=by_name.get(b"expect", b"").lower() == b"100-continue",
        )
        if before is None or before.response_complete:
            self._start_asgi_task(self.cycle, served)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, served))
        if self.server_state.draining:
            if before is not None and before is self._last and not before.response_started:
                before.keep_alive = True  # another has come behind it
            self._close_after(self.cycle)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Serve a request, by the task that has served the last one where it is free: a new one takes 3 us."""
        if self._idle is not None and not self._idle[1].done():
            (task, awaited), self._idle = self._idle, None
            awaited.set_result((cycle, app))
        else:
            task = self.loop.create_task(self._serve(cycle, app))
            task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    async def _serve(self, cycle: Any, app: Any) -> None:
        """Serve a request, and those that come when it is answered. In `tasks` only while it serves one."""
        task = asyncio.current_task()
        assert task is not None, "a coroutine that runs is a task's"
        while True:
            await cycle.run_asgi(app)
            self.tasks.discard(task)
            del cycle, app  # a connection that waits holds no body
            if self._idle is not None or self.transport.is_closing():
                return
            awaited = self.loop.create_future()
            self._idle = task, awaited
            cycle, app = await awaited

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._advanced = True
        cycle: Any = self.cycle
        if cycle.response_complete:
            return
        if not cycle.body:
            cycle.body = body
        elif isinstance(cycle.body, bytes):
            cycle.body = bytearray(cycle.body) + body  # it grows: a join of all pieces would be the square of it
        else:
            cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        """The next head may begin, unless the parser has only left out a body that is read apart."""
        if self._apart:
            return
        self._advanced, self._in_message = True, False
        cycle: Any = self.cycle
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()

    def on_response_complete(self) -> None:
        """An answer has been sent: the next request's turn, or that of the clock for connections without one."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)

    @property
    def is_kept_alive(self) -> bool:
        """Whether it waits for a next request, no longer than the listener allows."""
        return self._idle_since is not None

    def _close_if_idle(self) -> None:
        """Close a connection without a request for too long; look again when that may be the case, while it is not.

        One timer for all of a connection's pauses: uvicorn makes and cancels one with every request.
        """
        self.timeout_keep_alive_task = None
        if self._idle_since is None or self.transport.is_closing():
            return
        left_s = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self.timeout_keep_alive_task = self.loop.call_later(left_s, self._close_if_idle)
        else:
            self.transport.close()


def split_target(target: bytes) -> tuple[bytes, bytes, str]:
    """The raw path, the query and the decoded path of a request's target. Raises httptools.HttpParserInvalidURLError.

    UnicodeDecodeError is raised for a path that is not ASCII.
    """
    url = httptools.parse_url(target)
    return url.path, url.query or b"", unquote(url.path.decode("ascii"))


split_known = lru_cache(KNOWN_TARGETS)(split_target)


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
    supervisor decides when the server stops: what has arrived then is answered within `grace_s` seconds, or told that
    the server stops (`server.http_drain`). With `tls` it speaks TLS, and renewed certificates are used at once.
    """

    def __init__(self, config: uvicorn.Config, grace_s: float, patience_s: float, tls: Tls | None = None) -> None:
        super().__init__(config)
        self.server_state: DrainState = DrainState()
        self._grace_s, self._patience_s, self._tls = grace_s, patience_s, tls
        self._until = math.inf
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

    def stop(self, grace_s: float = math.inf) -> None:
        """Stop, within `grace_s` seconds where that is less than the listener's own. May be said again, with less."""
        self._until = min(self._until, asyncio.get_running_loop().time() + min(grace_s, self._grace_s))
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new connections; answer and close those that are there. Uvicorn would close idle ones at once."""
        self.stop()
        pending = PendingConnections(
            sockets or [], self._make_connection, None if self._tls is None else self._tls.context
        )
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        await end_connections(self.server_state, pending, lambda: self._until, linger=self._tls is not None)

    def _make_connection(self) -> asyncio.Protocol:
        return ClientConnection(self.config, self.server_state, self.lifespan.state, asyncio.get_running_loop())

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
    if connection.pipeline or connection.is_kept_alive:
        return None  # an earlier request is being answered, or the idle connection is timed by itself
    if cycle is None or cycle.response_complete:
        return "asking", cycle
    return ("sending", cycle) if cycle.more_body else None


def _count_unacknowledged(transport: asyncio.Transport) -> bytes:
    """The number of bytes that the kernel holds for the client, as the raw memory of an int.

    The kernel may hold megabytes and asks for more only when a third is gone, which a slow reader delays for long.
    """
    sock = transport.get_extra_info("socket")
    if sock is None:  # over TLS: lost, which the connection itself learns in the loop's next turn
        return b""
    try:
        return fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return b""  # the platform has no such call


def make_listener(app: Any, grace_s: float, patience_s: float, keep_alive_s: int, tls: Tls | None = None) -> Listener:
    """Uvicorn as every listener is run: httptools, no access log, no signal handlers.

    `grace_s`: seconds in which requests are answered once the server is told to stop. `patience_s`: seconds that a
    client may let pass where it is its turn. `keep_alive_s`: seconds that a connection stays open between two requests.
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
        backlog=2048,
    )
    return Listener(config, grace_s, patience_s, tls)
