"""The open-loop driver: every request is sent at its intended time, however slow the responses are.

A closed loop sends less to a slow server and so hides its worst moments ("coordinated omission"). Here latency counts
from the *intended* time, and the driver measures its own lateness: a run whose driver was late says nothing about the
server and is called invalid. One process, one thread, one event loop (several processes: `driver_pool`). A load is sent
to loopback only, unless told otherwise. It parses HTTP/1.1 by httptools, because aiohttp takes four times the CPU time,
which the server needs.
"""

import asyncio
import errno
import gc
import ipaddress
import select
import selectors
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httptools
import numpy as np

from loadtest.driver.call_encodings import Encoding, count_failed, find_answer_fault
from loadtest.driver.dialects import find_fault, find_words
from loadtest.driver.profiles import Schedule
from loadtest.driver.run_result import CACHE, LOST, NO_ANSWER, ForecastCounts, Run
from loadtest.observe.server_access import OPEN, ServerAccess
from server.contract import FORECASTS_END_BYTES, HEADER_CACHE, raw_header

if TYPE_CHECKING:
    from loadtest.driver.grpc_loop import GrpcDriver

SAMPLES = 200  #: least number of answers whose bodies are checked
IDLE_S = 2.0  #: a connection idle for longer is not used again: the server may be about to close it
NO_MORE = (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL)  #: limits of this machine, not faults of the server
CONNECT_S = 10.0
LEAD_S = 0.05  #: from the start of the loop to the start of the schedule
_CACHE_HEADER = raw_header(HEADER_CACHE)
_CACHE = {text.encode(): i for i, text in enumerate(CACHE)}


class RemoteNotAllowed(Exception):
    """The address is not on this machine, and loading it was not allowed explicitly."""


@dataclass(frozen=True, slots=True)
class LoadTarget:
    """The target of a load: an address, and one complete HTTP request, or message of gRPC, for each model.

    `forecasts` is the number of models of each call, and empty if the requests are for single models; `encoding` is
    that of the calls. `tls_name` is the name that the server's certificate must have, and None without TLS. `access`
    holds the authority that the driver trusts, and its certificate.
    """

    host: str
    port: int
    requests: Sequence[bytes] = field(repr=False)  # a token is in them
    forecasts: Sequence[int] = ()
    tls_name: str | None = None
    access: ServerAccess = OPEN
    free_form: bool = False  #: see `ClientDialect`
    method: str = ""  #: of gRPC, whose messages the requests then are; empty for HTTP
    encoding: Encoding = Encoding.JSON

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call of gRPC shows: the token, if any."""
        return tuple((name.lower(), value) for name, value in self.access.headers.items())

    def make_tls(self) -> dict[str, Any]:
        """How a connection is opened: arguments of asyncio's `create_connection`. Raises ValueError for wrong files."""
        return {} if self.tls_name is None else {"ssl": self.access.tls_context(), "server_hostname": self.tls_name}


def make_target(
    url: str,
    requests: Sequence[bytes],
    *,
    forecasts: Sequence[int] = (),
    allow_remote: bool = False,
    access: ServerAccess = OPEN,
    free_form: bool = False,
    method: str = "",
    encoding: Encoding = Encoding.JSON,
) -> LoadTarget:
    """Make a target. Raises ValueError for a URL other than http(s)://host:port, RemoteNotAllowed beyond loopback."""
    address, port, name = resolve_address(url, allow_remote=allow_remote)
    access.check_url(url)
    return LoadTarget(address, port, requests, forecasts, name, access, free_form, method, encoding)


def resolve_address(url: str, *, allow_remote: bool) -> tuple[str, int, str | None]:
    """The IP address and port of a URL, and with TLS the host's name, else None. Raises as `make_target` does."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
        raise ValueError(f"{url!r} cannot be loaded: give http://HOST:PORT or https://HOST:PORT")
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    address = str(socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)[0][4][0])
    if not allow_remote and not ipaddress.ip_address(address).is_loopback:
        raise RemoteNotAllowed(f"{parts.hostname} is {address}, not this machine: loading it takes --allow-remote")
    return address, port, parts.hostname if secure else None


def check_listener(to: LoadTarget) -> None:
    """Raises OSError that says at which address nobody listens."""
    try:
        socket.create_connection((to.host, to.port), CONNECT_S).close()
    except OSError as error:
        raise OSError(f"nobody listens at {to.host}:{to.port}: {error}") from error


def send_schedule(
    schedule: Schedule,
    to: LoadTarget,
    *,
    connections: int = 512,
    patience_s: float = 10.0,
    start: float | None = None,
) -> Run:
    """Send a schedule. Returns when all is answered, at the latest `patience_s` after the end of the schedule.

    At most `connections` connections are open; each is opened when it is needed. The schedule starts at `start` on the
    monotonic clock, which the processes of a machine share, by default at once. It blocks, so that it cannot run inside
    an event loop.
    """
    gc.collect()
    gc.freeze()  # a full collection over a large program's objects is a pause of many milliseconds
    try:
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_Punctual())) as runner:
            driver = _make_grpc_driver if to.method else _Driver
            return runner.run(driver(runner.get_loop(), schedule, to, connections).run(patience_s, start))
    finally:
        gc.unfreeze()


def _make_grpc_driver(loop: asyncio.AbstractEventLoop, schedule: Schedule, to: LoadTarget, calls: int) -> "GrpcDriver":
    from loadtest.driver.grpc_loop import GrpcDriver  # noqa: PLC0415 -- grpcio, which is an extra

    return GrpcDriver(loop, schedule, to, calls)


class _Punctual(selectors.EpollSelector):
    """A selector that wakes within about 0.1 ms of the time. epoll rounds up to whole milliseconds, uvloop spins."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0:
            select.select([self.fileno()], [], [], timeout)  # an epoll is readable when something in it is
            timeout = 0
        return super().select(timeout)


class _Driver:
    """The run of one schedule."""

    def __init__(self, loop: asyncio.AbstractEventLoop, schedule: Schedule, to: LoadTarget, connections: int) -> None:
        n = len(schedule.at)
        self.loop = loop
        self.start = 0.0
        self.samples: dict[int, bytes] = {}
        self.said: dict[int, str] = {}  #: by status that is not 200, what the first such answer said
        self._schedule, self._to, self._limit = schedule, to, connections
        self._tls = to.make_tls()
        self._at, self._model = schedule.at.tolist(), schedule.model.tolist()
        self._woken, self._sent, self._done = (np.full(n, np.nan) for _ in range(3))
        self._status, self._cache = np.full(n, NO_ANSWER), np.zeros(n, np.int64)
        self._asked = np.array(to.forecasts, np.int64)[schedule.model] if to.forecasts else None
        self._failed = np.zeros(n, np.int64) if self._asked is None else self._asked.copy()
        self._sampled = frozenset(range(0, n, max(1, n // SAMPLES)))
        self._next, self._open, self._unanswered = 0, set[_DriverConnection](), n
        self._opening: set[asyncio.Task[None]] = set()
        # the most recently used is taken first, so that the others may become idle and be closed
        self._free: list[_DriverConnection] = []
        self._waiting: deque[int] = deque()
        self._exhausted = False
        self._ended = asyncio.Event()

    def __repr__(self) -> str:
        return f"<_Driver {self._next} of {len(self._at)} due, {self._unanswered} unanswered, {len(self._open)} open>"

    async def run(self, patience_s: float, start: float | None) -> Run:
        self.start = self.loop.time() + LEAD_S if start is None else start
        self.loop.call_at(self.start, self._due)
        try:
            async with asyncio.timeout_at(self.start + self._schedule.seconds + patience_s):
                await self._ended.wait()
        except TimeoutError:
            self._next = len(self._at)  # nothing more is sent
        ended = self._now()
        await self._close()
        found = [(i, why) for i, body in self.samples.items() if (why := self._unsound(i, body))]
        arrays = (self._woken, self._sent, self._done, self._status, self._cache)
        forecasts = None if self._asked is None else ForecastCounts(self._asked, self._failed)
        return Run(self._schedule, *arrays, ended, self._exhausted, len(self.samples), found, forecasts, self.said)

    def _unsound(self, request: int, body: bytes) -> str | None:
        if self._asked is not None:
            return find_answer_fault(body, self._to.encoding, int(self._asked[request]))
        return find_fault(body, free_form=self._to.free_form)

    def _now(self) -> float:
        return self.loop.time() - self.start

    # --- requests -------------------------------------------------------------------------------------------------

    def _due(self) -> None:
        """Send what is due and come back when the next one is."""
        now = self._now()
        while self._next < len(self._at) and self._at[self._next] <= now:
            request, self._next = self._next, self._next + 1
            self._woken[request] = self._now()
            connection = self._take()
            if connection is None:
                self._waiting.append(request)
                self._grow()
            else:
                self._send(connection, request)
        if self._next < len(self._at):
            self.loop.call_at(self.start + self._at[self._next], self._due)

    def _send(self, connection: "_DriverConnection", request: int) -> None:
        connection.ask(request, self._to.requests[self._model[request]], sampled=request in self._sampled)
        self._sent[request] = self._now()

    @property
    def of_calls(self) -> bool:
        """Whether the requests are calls for many models."""
        return self._asked is not None

    @property
    def of_tables(self) -> bool:
        """Whether answers are tables, which only as a whole say what failed."""
        return self.of_calls and self._to.encoding is not Encoding.JSON

    def counted(self, request: int, answer: bytes) -> None:
        """Count the failed forecasts of a call by its answer, or its end; without that information all have failed."""
        if (failed := count_failed(answer, self._to.encoding)) is not None:
            self._failed[request] = failed

    def settled(self, request: int, status: int, cache: int = 0) -> None:
        """Record that a request is answered or lost."""
        self._done[request], self._status[request], self._cache[request] = self._now(), status, cache
        self._unanswered -= 1
        if not self._unanswered:
            self._ended.set()

    # --- connections ----------------------------------------------------------------------------------------------

    async def _close(self) -> None:
        self._waiting.clear()
        opening = list(self._opening)
        for task in opening:
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)
        for connection in self._open:
            connection.abandon()
        await asyncio.sleep(0)  # in which the sockets are closed

    def _take(self) -> "_DriverConnection | None":
        while self._free:
            connection = self._free.pop()
            if connection.fresh():
                return connection
        return None

    def _grow(self) -> None:
        if len(self._open) + len(self._opening) >= self._limit:
            self._exhausted = True
        else:
            task = asyncio.ensure_future(self._connect())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _connect(self) -> None:
        """Open a connection for waiting requests; each failure settles one of them."""
        while self._waiting:
            try:
                await self.loop.create_connection(
                    lambda: _DriverConnection(self), self._to.host, self._to.port, **self._tls
                )
            except OSError as error:
                if error.errno in NO_MORE:
                    self._exhausted = True
                    return
                if self._waiting:
                    self.settled(self._waiting.popleft(), LOST)
            else:
                return

    def opened(self, connection: "_DriverConnection") -> None:
        """Take a connection that has opened, and give it its first request."""
        self._open.add(connection)
        self.free(connection)

    def free(self, connection: "_DriverConnection") -> None:
        """Take a connection that is free, and give it another request."""
        if self._waiting:
            self._send(connection, self._waiting.popleft())
        else:
            self._free.append(connection)

    def closed(self, connection: "_DriverConnection") -> None:
        """Forget a closed connection; waiting requests may need another."""
        self._open.discard(connection)
        if self._waiting:
            self._grow()


class _DriverConnection(asyncio.Protocol):
    """One keep-alive connection: one request at a time."""

    def __init__(self, driver: _Driver) -> None:
        self._driver = driver
        self._parser = httptools.HttpResponseParser(self)
        self._request: int | None = None
        self._parts: list[bytes] | None = None
        self._sampled = False
        self._tail = b""
        self._cache = 0
        self._since = 0.0

    def __repr__(self) -> str:
        return f"<_DriverConnection {'idle' if self._request is None else f'waits for answer {self._request}'}>"

    def fresh(self) -> bool:
        """Return whether the connection can be used; close it if not."""
        if not self._transport.is_closing() and self._driver.loop.time() - self._since < IDLE_S:
            return True
        self._transport.close()
        return False

    def ask(self, request: int, data: bytes, *, sampled: bool) -> None:
        self._request, self._cache, self._tail = request, 0, b""
        self._sampled, self._parts = sampled, [] if sampled or self._driver.of_tables else None
        self._transport.write(data)

    def abandon(self) -> None:
        """Close the connection at the end of the run, and ignore any response that is still to come."""
        self._request = None
        self._transport.abort()

    # --- asyncio's calls ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._since = self._driver.loop.time()
        self._driver.opened(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 -- asyncio's name
        if self._request is not None:
            self._driver.settled(self._request, LOST)
        self._driver.closed(self)

    # --- httptools' calls -----------------------------------------------------------------------------------------

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status != HTTPStatus.OK and self._parts is None and status not in self._driver.said:
            self._parts = []  # for what it says

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == _CACHE_HEADER:
            self._cache = _parse_cache_header(value)

    def on_body(self, part: bytes) -> None:
        if self._driver.of_calls and not self._driver.of_tables:
            self._tail = (self._tail + part[-FORECASTS_END_BYTES:])[-FORECASTS_END_BYTES:]
        if self._parts is not None:
            self._parts.append(part)

    def on_message_complete(self) -> None:
        request, status = self._request, self._parser.get_status_code()
        if request is None:  # a response without a request: the server is closing the connection
            self._transport.close()
            return
        self._request, self._since = None, self._driver.loop.time()
        answer = b"" if self._parts is None else b"".join(self._parts)
        is_good = status == HTTPStatus.OK
        self._driver.settled(request, status, self._cache)
        if is_good and self._driver.of_calls:
            self._driver.counted(request, answer if self._driver.of_tables else self._tail)
        if is_good and self._sampled:
            self._driver.samples[request] = answer
        elif not is_good and self._parts is not None:
            self._driver.said.setdefault(status, find_words(answer))
        if self._parser.should_keep_alive():
            self._driver.free(self)
        else:
            self._transport.close()


def _parse_cache_header(said: bytes) -> int:
    """Parse the cache result as an index into CACHE; for a call for many (`hit=44, miss=1`) it is the slowest one."""
    if (found := _CACHE.get(said)) is not None:
        return found
    did = {part.partition(b"=")[0].strip() for part in said.split(b",")}
    return next((_CACHE[each] for each in (b"miss", b"coalesced", b"hit") if each in did), 0)
