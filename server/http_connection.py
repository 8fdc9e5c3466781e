"""One client's connection: it reads requests, strictly and within bounds, and has the application answer them.

Runs on the listener's event loop.
"""

import asyncio
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.access.tls import CLIENT_NAME, name_client
from server.http_drain import DrainState
from server.http_exchange import WHOLE_BODY, Exchange
from server.known_heads import KnownHead, KnownHeads
from server.request_head import HEADERS_BY_NAME, body_framing, find_fault, refuse_head

MAX_HEAD = 64 * 1024  #: bytes of a request's line and headers, or of the framing between two pieces of its body
TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
MAX_PIPELINED = 512  #: requests of one connection that wait for the answer to an earlier one
KNOWN_TARGETS = 256  #: requests' targets of which the parts are remembered
LONGEST_KNOWN = 256  #: bytes of a target that is
KNOWN_HEADS = KnownHeads()  #: of all connections of this process
_EXTENSIONS: dict[str, dict[object, object]] = {WHOLE_BODY: {}}


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
    - A request whose head was read before, and which comes whole, is not given to the parser (`server.known_heads`).
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
    _shared: dict[str, Any]  #: what the scopes of all its requests have in common
    _idle: tuple[asyncio.Task[Any], asyncio.Future[tuple[Any, Any]]] | None = None  #: a task and what it waits for
    _idle_since: float | None = None  #: by the loop's clock: when the last answer was complete and nothing came since
    _heads = 0  #: that the bytes at hand held the end of
    _plain: dict[str, Any] | None = None  #: what follows from the last of them, unless it cannot be known

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note what all requests of the connection have in common, such as whose certificate the client has shown."""
        super().connection_made(transport)
        self._shared = {
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,
            "root_path": self.root_path,
        }
        certificate = transport.get_extra_info("peercert")
        if certificate is not None:
            self._shared[CLIENT_NAME] = name_client(certificate)

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
        is_new = self._awaits_request
        if is_new and (found := KNOWN_HEADS.recall(data)) is not None:
            self._take_known(*found)
            return
        self._advanced, self._plain, self._heads = False, None, 0
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._feed_again(memoryview(data)[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            self._end(_not_http(str(error)))
        self._framing_bytes = 0 if self._advanced else self._framing_bytes + len(data)
        if self._framing_bytes > MAX_HEAD:
            self._end(TOO_LONG)
        elif is_new:
            self._remember(data)

    @property
    def is_idle(self) -> bool:
        """Whether no request has begun that is not answered. The rest of a body that nobody reads is no request."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered and not (self.pipeline or self._in_head)

    @property
    def _awaits_head(self) -> bool:
        """Whether the parser stands where a message begins."""
        return not (self._in_head or self._in_message or self._framing_bytes or self._apart)

    @property
    def _awaits_request(self) -> bool:
        """Whether the parser stands there, and nothing is to be answered before the request that comes."""
        answered = self.cycle is None or self.cycle.response_complete
        return answered and self._awaits_head and not (self.pipeline or self.server_state.draining)

    def _remember(self, data: bytes) -> None:
        """Know the head of the request that these bytes are. INVARIANT: they are one, from first byte to last."""
        if self._plain is not None and self._heads == 1 and self._awaits_head:
            KNOWN_HEADS.remember(data, self._plain)

    def _take_known(self, known: KnownHead, body: bytes) -> None:
        """Begin a request whose head was read before, as the parser's calls would."""
        self.cycle = cycle = Exchange(self, {**known.scope, **self._shared}, keep_alive=True, expects_100=False)
        cycle.body, cycle.more_body = body, False
        cycle.message_event.set()
        self._start_asgi_task(cycle, self.app)

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
        self._heads += 1
        version, fields = self.parser.get_http_version(), self.headers
        by_name = dict(fields)
        fault = find_fault(fields, by_name, version)
        if self.parser.should_upgrade():
            self._apart = body_framing(fields)
        target = self.url
        raw_path, query, path = split_known(target) if len(target) <= LONGEST_KNOWN else split_target(target)
        said: dict[str, Any] = {
            "type": "http",
            "http_version": version,
            "headers": fields,
            HEADERS_BY_NAME: by_name,
            "method": self.parser.get_method().decode("ascii"),
            "path": path,
            "raw_path": raw_path,
            "query_string": query,
            "extensions": _EXTENSIONS,
        }
        keep_alive = version != "1.0" and self.parser.should_keep_alive()
        self._plain = said if keep_alive and fault is None and version == "1.1" else None
        self.headers = []  # what comes now is a trailer, which is dropped
        before, served = self.cycle, self.app if fault is None else _refusing(fault)
        expects_100 = by_name.get(b"expect", b"").lower() == b"100-continue"
        self.cycle = Exchange(self, {**said, **self._shared}, keep_alive=keep_alive, expects_100=expects_100)
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
