"""The inference listener: bare ASGI, one class, no torch, no protocol of its own.

Runs in a front process. It finds the dialect that a request is in, reads the body under limits, sends what the dialect
replies with the headers that every answer carries, and counts it.
"""

import asyncio
import itertools
import os
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import structlog

from server import contract
from server.access.tls import CLIENT_NAME
from server.contract import raw_header
from server.errors import Refused, Situation
from server.front.asynchronous.journal import Journal
from server.front.auth.permissions import open_permissions
from server.front.chunks import CLIENT_GONE, PIECE_BYTES, Chunks, list_statuses
from server.front.content_coding import find_coding, unpack
from server.front.dialects import MakeDialect, choose_dialects
from server.front.dialects.health import Health
from server.front.dialects.sagemaker_streams import SageMakerStreams
from server.front.exchange import Dialect, Headers, HttpReply, HttpRequest, Limit
from server.front.inference import ClientGone, InferStats, RefusedByWorker
from server.front.inference_plane import InferencePlane
from server.front.plane_settings import open_plane
from server.front.releases import Releases, make_plane
from server.front.tracing.descriptions import describe_http
from server.front.tracing.request_trace import RequestTrace
from server.front.tracing.traced_plane import trace_plane
from server.front.tracing.tracer import Tracer
from server.front.worker_client import WorkerLost
from server.http_exchange import BODY_FOLLOWS, CLOSE, REASON, WHOLE_BODY
from server.metrics import AnswerSeries, FrontMetrics
from server.request_head import HEADERS_BY_NAME
from server.settings import Settings

log = structlog.get_logger()

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

MAX_HEADER = 1024
HASHED_HERE = 1024 * 1024  #: bytes of a signed body; a longer one is hashed in a thread, without the interpreter's lock
_TIMEOUT_MS = raw_header(contract.HEADER_TIMEOUT_MS)
_REQUEST_ID = raw_header(contract.HEADER_REQUEST_ID)
_CACHE = raw_header(contract.HEADER_CACHE)
_MODEL_VERSION = raw_header(contract.HEADER_MODEL_VERSION)
_SERVER_TIMING = raw_header(contract.HEADER_SERVER_TIMING)
_QUALITY, _WARNING = raw_header(contract.HEADER_QUALITY), raw_header(contract.HEADER_WARNING)


class App:
    """One front's ASGI application: `dialects` over one data plane. The last dialect answers paths that none has."""

    def __init__(
        self, settings: Settings, metrics: FrontMetrics, dialects: Sequence[MakeDialect] | None = None
    ) -> None:
        self.plane = open_plane(settings, metrics)
        self.entry: InferencePlane = self.plane  #: what requests are put to: in a cluster one of all nodes
        self.releases = Releases(metrics)
        self.tracer: Tracer | None = None
        self._settings = settings
        self._metrics = metrics
        self._answered: dict[tuple[str, int], AnswerSeries] = {}
        self._dialects = tuple(make(settings) for make in dialects or choose_dialects(settings))
        for dialect in self._dialects:
            if not isinstance(dialect, Health):  # probes are not counted
                metrics.show_protocol(dialect.name, (*dialect.routes.list_statuses(), CLIENT_GONE))
        self._permissions = open_permissions(settings)
        self._ids = itertools.count(1)
        self._id_prefix = os.urandom(6).hex().encode()

    def __repr__(self) -> str:
        """For example `<App sagemaker, forecasts, nixtla, ..., health over <DataPlane 2 links, ...>>`."""
        return f"<App {', '.join(dialect.name for dialect in self._dialects)} over {self.plane!r}>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens, and count what became of it. Only HTTP is served."""
        if scope["type"] != "http":
            return
        started = time.monotonic()
        headers = scope.get(HEADERS_BY_NAME) or dict(scope["headers"])
        request = HttpRequest(scope["method"], scope["path"], headers, receive, scope["query_string"])
        dialect = self._dialects[0]
        reply: HttpReply | None
        statuses: Sequence[int]
        try:
            for dialect in self._dialects:
                operation = dialect.match(request.method, request.path, request.query)
                if operation is not None:
                    break
            else:
                dialect = self._dialects[-1]
                operation = self._refuse_path(request.path)
            plane: InferencePlane = self.entry
            if operation.body_limit is not None:
                token = None if self._permissions is None else self._permissions.find_token(request.headers)
                request.arrived = started
                request.client = scope.get(CLIENT_NAME, "") if token is None else token.name
                await self._read(request, operation.body_limit, scope, receive, signed=token is None)
                plane = make_plane(self.entry, token, self.releases)  # as they are now: a body may have taken long
                plane = plane if request.trace is None else trace_plane(plane, request.trace, request.arrived)
            reply = _require_in_time(await dialect.answer(operation, request, plane), request)
        except ClientGone:
            reply, statuses = None, (CLIENT_GONE,)
        except (Exception, asyncio.CancelledError) as error:
            reply = self._refuse(dialect, request, error)
            statuses = await self._send(reply, request, scope, send)
        else:
            reply.marked = request.stats
            statuses = await self._send(reply, request, scope, send)
        seconds = time.monotonic() - started
        if len(statuses) == 1:
            self._count(dialect.name, statuses[0], seconds, request.id)
        else:
            self._count_many(dialect.name, statuses, seconds, request.id)
        if request.trace is not None:
            self._end_trace(request.trace, dialect, request, reply, statuses)

    def _end_trace(
        self,
        trace: RequestTrace,
        dialect: Dialect,
        request: HttpRequest,
        reply: HttpReply | None,
        statuses: Sequence[int],
    ) -> None:
        """Hand over the trace of a request; `statuses` are those that were counted of it."""
        assert self.tracer is not None, "it has begun the trace"
        status = CLIENT_GONE if reply is None or statuses == (CLIENT_GONE,) else reply.status
        describe_http(trace, request.method, request.path, dialect.routes, request.id, status, statuses)
        self.tracer.end(trace, status)
        for counted in statuses[:1]:
            series = self._answered[dialect.name, counted]
            series.seconds.show_trace(time.monotonic() - trace.began, request.id, trace.trace_id)

    def _count_many(self, protocol: str, statuses: Sequence[int], seconds: float, request_id: bytes) -> None:
        """Count the answers of a request: a call for 10,000 models has as many."""
        for status, answers in Counter(statuses).items():
            self._count(protocol, status, seconds, request_id, answers)

    def _count(self, protocol: str, status: int, seconds: float, request_id: bytes, answers: int = 1) -> None:
        """Count so many answers of a request."""
        answered = self._answered.get((protocol, status)) or self._bind_answers(protocol, status)
        answered.answers.inc(answers)
        answered.seconds.observe_request(seconds, request_id, answers)

    def _bind_answers(self, protocol: str, status: int) -> AnswerSeries:
        """The series of answers with this status, found once."""
        series = self._answered[protocol, status] = self._metrics.bind_answers(protocol, status)
        return series

    # --- asynchronous invocations -----------------------------------------------------------------------------------

    def keep_jobs(self, folder: Path) -> "asyncio.Task[None] | None":
        """Keep accepted invocations in the server's folder, and go on with those of fronts that die.

        Returns the task that looks for these; None where no dialect accepts any. Raises OSError.
        """
        for dialect in self._dialects:
            if isinstance(dialect, SageMakerStreams):
                journal = Journal(folder, self._settings.async_jobs, self._settings.async_jobs_per_client)
                jobs = dialect.keep_jobs(journal, self._metrics)
                return asyncio.create_task(jobs.take_over(self.plane.background, self._find_plane))
        return None

    def _find_plane(self, token: str) -> InferencePlane:
        """The plane of who has shown the token of this name. Raises Refused if it is none any more."""
        found = self._permissions.find_named(token) if token and self._permissions is not None else None
        return make_plane(self.entry, found, self.releases)

    # --- the request ------------------------------------------------------------------------------------------------

    async def _read(self, request: HttpRequest, limit: Limit, scope: Scope, receive: Receive, *, signed: bool) -> None:
        """Read what an operation that is not open needs, and check its signature unless a token stands for it.

        The deadline counts from the head's arrival, the queue from that of the body's end. Raises Refused, ClientGone.
        """
        headers, longest = request.headers, self._settings.request_timeout_s
        if self.tracer is not None:
            request.trace = self.tracer.begin(headers, request.arrived)
        request.id = self._identify(headers)
        wanted = headers.get(_TIMEOUT_MS)
        request.deadline = request.arrived + (longest if wanted is None else min(parse_timeout(wanted), longest))
        content_type, accept = headers.get(b"content-type", b""), headers.get(b"accept", b"")
        if len(content_type) > MAX_HEADER or len(accept) > MAX_HEADER:
            message_text = f"the header content-type or accept is longer than {MAX_HEADER} bytes"
            raise Refused(Situation.BAD_REQUEST, message_text)
        request.content_type, request.accept = content_type.decode("latin-1"), accept.decode("latin-1")
        coding = find_coding(headers) if b"content-encoding" in headers else ""
        announced = headers.get(b"content-length", b"")
        if announced.isdigit() and int(announced) > limit.bytes:
            raise limit.exceeded(int(announced))
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        request.body = message.get("body", b"")
        if message.get("more_body"):
            request.body = await self._read_rest(request.body, limit, receive)
            request.arrived = time.monotonic()
        if len(request.body) > limit.bytes:
            raise limit.exceeded(len(request.body))
        if signed and self._permissions is not None:
            query = scope.get("query_string", b"")
            signed_as = (request.method, request.path, query, headers, request.body)
            check = self._permissions.check_signature
            is_small = len(request.body) <= HASHED_HERE
            key = check(*signed_as) if is_small else await asyncio.to_thread(check, *signed_as)
            request.client = key or request.client
        if coding:
            request.body = await self._join(b"", limit, unpack(request.body, coding))

    def _identify(self, headers: Mapping[bytes, bytes]) -> bytes:
        """The client's own id of its request where it gives one, else a new one."""
        given = headers.get(_REQUEST_ID, b"")
        return given if 0 < len(given) <= MAX_HEADER else b"%s-%d" % (self._id_prefix, next(self._ids))

    async def _read_rest(self, first: bytes, limit: Limit, receive: Receive) -> bytes:
        try:
            async with asyncio.timeout(self._settings.client_timeout_s):
                return await self._join(first, limit, receive)
        except TimeoutError:
            message = f"the body did not arrive within {self._settings.client_timeout_s:g} s (client_timeout_s)"
            raise Refused(Situation.SLOW_CLIENT, message) from None

    async def _join(self, first: bytes, limit: Limit, receive: Receive) -> bytes:
        """The whole body. Its parts count as held while they arrive."""
        body, size, more = bytearray(first), len(first), True  # it grows: a join of all parts takes the loop's time
        self.plane.held.size += size
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                body += part
                size += len(part)
                self.plane.held.size += len(part)
                if size > limit.bytes:
                    raise limit.exceeded(size)
                self.plane.held.check()
                more = message.get("more_body", False)
            return cast("bytes", body)  # not copied: all that read it take any buffer
        finally:
            self.plane.held.size -= size

    # --- the reply --------------------------------------------------------------------------------------------------

    def _refuse(self, dialect: Dialect, request: HttpRequest, error: BaseException) -> HttpReply:
        """The reply to a request that ended with an exception, of which all but `Refused` are bugs or the drain's."""
        if isinstance(error, Refused):
            why = error
        elif isinstance(error, asyncio.CancelledError):  # uvicorn cancels what is left when `drain_s` is over
            why = Refused(Situation.NOT_READY, "the server is stopping; try again")
        else:
            log.error("request_failed", exc_info=error)
            why = Refused(Situation.INTERNAL, "the server failed; its log says why")
        if request.trace is not None:
            request.trace.note_error(error)
        request.id = request.id or self._identify(request.headers)  # it may be refused before its body is read
        reply = dialect.refused(why, request)
        if isinstance(why, RefusedByWorker):
            reply.stats = why.stats
        if why.situation is Situation.SLOW_CLIENT:
            reply.headers.append(CLOSE)  # the rest of its body is of no use
        elif why.situation is Situation.UNAUTHORIZED:
            reply.headers.append((b"www-authenticate", b"Bearer"))
        elif why.situation is Situation.NO_ROUTE:
            reply.counted = ()  # the path is no protocol's
        return reply

    def _refuse_path(self, path: str) -> NoReturn:
        places = ", ".join(f"{each.routes.main_path} ({each.routes.title})" for each in self._dialects)
        raise Refused(Situation.NO_ROUTE, f"no such path: {path[:200]}; requests go to {places}")

    async def _send(self, reply: HttpReply, request: HttpRequest, scope: Scope, send: Send) -> Sequence[int]:
        """Send the reply; a large one part by part, as fast as the client takes it (the listener bounds how slow).

        Returns the status codes to count.
        """
        held, stream = len(reply.body), reply.stream
        size = held if stream is None else stream.body_bytes
        head: Headers = [
            (b"content-length", b"%d" % size),
            (_REQUEST_ID, request.id or self._identify(request.headers)),
            *reply.headers,
        ]
        if reply.content_type:
            head.append((b"content-type", reply.content_type.encode()))
        if reply.stats is not None:
            _add_stats(head, reply.stats)
        _add_marks(head, reply.stats or reply.marked)
        if reply.chunks is not None:
            return await self._send_chunks(reply, reply.chunks, head[1:], send)
        start: dict[str, Any] = {"type": "http.response.start", "status": reply.status, "headers": head}
        if reply.reason is not None:
            start[REASON] = reply.reason
        self.plane.held.size += held
        try:
            if held == size <= PIECE_BYTES and WHOLE_BODY in scope.get("extensions", ()):
                start[WHOLE_BODY] = reply.body
                await send(start)
            else:
                await _send_parts(reply, start, size, send)
        except (WorkerLost, RuntimeError, asyncio.CancelledError):
            # The worker died with half of the answer; or the listener cut the client off, which uvloop says by a
            # RuntimeError; or the drain is over.
            return (CLIENT_GONE,)
        finally:
            self.plane.held.size -= held
            if stream is not None and held < size:
                stream.cancel()
        return (reply.status,) if reply.counted is None else reply.counted

    async def _send_chunks(self, reply: HttpReply, chunks: Chunks, head: Headers, send: Send) -> Sequence[int]:
        """Send a reply while it is made. Returns the status codes to count."""
        start = {"type": "http.response.start", "status": reply.status, "headers": head}
        return list_statuses(reply.counted, reply.status, await chunks.send(start, send, self.plane.held))


async def _send_parts(reply: HttpReply, start: dict[str, Any], size: int, send: Send) -> None:
    """Send the head, and a body of `size` bytes in pieces. Raises WorkerLost."""
    held, stream = len(reply.body), reply.stream
    start[BODY_FOLLOWS] = True
    await send(start)
    for at in range(0, held - PIECE_BYTES, PIECE_BYTES):
        await send({"type": "http.response.body", "body": reply.body[at : at + PIECE_BYTES], "more_body": True})
    rest = reply.body[max(0, held - 1) // PIECE_BYTES * PIECE_BYTES :] if held > PIECE_BYTES else reply.body
    await send({"type": "http.response.body", "body": rest, "more_body": held < size})
    if held < size and stream is not None:
        async for part in stream.parts():
            await send({"type": "http.response.body", "body": part, "more_body": stream.unread > 0})


def _require_in_time(reply: HttpReply, request: HttpRequest) -> HttpReply:
    """The reply. INVARIANT: no model's answer leaves as a success after its deadline. Raises Refused.

    A call for many is answered when its deadline passes, with an error for each item that was not ready; a reply that
    is sent while it is made has last words for that.
    """
    if request.deadline and reply.counted is None and time.monotonic() > request.deadline:
        if reply.chunks is not None:
            return reply
        if reply.stream is not None:
            reply.stream.cancel()
        raise Refused(Situation.DEADLINE, "the answer was ready after the deadline")
    return reply


def parse_timeout(raw: bytes) -> float:
    """What X-Request-Timeout-Ms asks for. Raises Refused."""
    if not re.fullmatch(rb"0{0,9}[1-9][0-9]{0,9}", raw):
        shown = raw[:40].decode("latin-1")
        message = f"{contract.HEADER_TIMEOUT_MS} must be a positive number of milliseconds, not {shown!r}"
        raise Refused(Situation.BAD_REQUEST, message)
    return int(raw) / 1e3


def _add_marks(head: Headers, stats: InferStats | None) -> None:
    """Headers that say what an answer is to be doubted for."""
    if stats is not None and (stats.quality or stats.warnings):
        marks = ((_QUALITY, stats.quality), (_WARNING, stats.warnings))
        head += [(name, value.encode()) for name, value in marks if value]


def _add_stats(head: Headers, stats: InferStats) -> None:
    """Headers that say what happened: cache, version, times in milliseconds."""
    if stats.load_us is None:
        times = b"queue;dur=%.3f, inference;dur=%.3f" % (stats.queue_us / 1e3, stats.inference_us / 1e3)
    else:
        tier = b';desc="%b"' % stats.tier.encode() if stats.tier else b""
        spent = (stats.queue_us / 1e3, stats.load_us / 1e3, tier, stats.inference_us / 1e3)
        times = b"queue;dur=%.3f, load;dur=%.3f%b, inference;dur=%.3f" % spent
    head.append((_SERVER_TIMING, times))
    if stats.cache is not None:
        head.append((_CACHE, stats.cache.encode()))
    if stats.version:
        head.append((_MODEL_VERSION, stats.version.encode()))
