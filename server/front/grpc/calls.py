"""One call of a method: who asks, until when, the message under limits, its status, and what is counted of it.

Runs in the gRPC front. The services (`open_inference`, `torchserve`) name their methods in a table and get a parsed
message each. All methods are served as streams of bytes, whatever they are on the wire: so the token is checked and a
place is found before a message is read, and the answer counts as held until the client takes it.
"""

import asyncio
import itertools
import math
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from server import contract
from server.access.tls import name_client
from server.contract import raw_header
from server.errors import Refused, Situation
from server.front.app import MAX_HEADER, parse_timeout
from server.front.auth.permissions import open_permissions
from server.front.chunks import CLIENT_GONE
from server.front.dataplane import DataPlane
from server.front.dialects.open_inference import STATUS as COUNTED
from server.front.grpc.statuses import AnsweredBadly, choose_statuses, describe_refusal, list_advice
from server.front.inference import InferStats, RefusedByWorker
from server.front.inference_plane import InferencePlane
from server.front.releases import Releases, make_plane
from server.front.tracing.descriptions import describe_rpc
from server.front.tracing.request_trace import RequestTrace
from server.front.tracing.traced_plane import trace_plane
from server.front.tracing.tracer import Tracer
from server.metrics import AnswerSeries, FrontMetrics
from server.settings import Settings

Context = grpc.aio.ServicerContext[bytes, bytes]
Send = Callable[[bytes], Awaitable[None]]

PROTOCOL = "grpc"  #: the metrics' label, of the Open Inference Protocol
OK = 200
END: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # not in the stubs
TAKEN_BYTES = 1024 * 1024  #: of an answer that a client takes within `client_timeout_s`, at least
STOPPING = "the server is stopping; try again"
LATE = "the answer was ready after the deadline"
SERVER_FAILED = "the server failed; its log says why"
_REQUEST_ID, _TIMEOUT_MS = raw_header(contract.HEADER_REQUEST_ID), raw_header(contract.HEADER_TIMEOUT_MS)
_SUBJECT_ALTERNATIVES = (("peer_email", "email"), ("peer_uri", "URI"), ("peer_dns", "DNS"))

log = structlog.get_logger()


@dataclass(slots=True)
class Call:
    """One call. `client` is named as for `InferRequest`.

    `deadline` and `started` are on the monotonic clock (s). A stream has no deadline but the client's, and `longest_s`
    is what each of its messages may take; `count` counts the answer to one of them by its HTTP status.
    """

    id: bytes
    started: float
    deadline: float
    longest_s: float
    plane: InferencePlane
    headers: Mapping[bytes, bytes]
    peer: str
    count: Callable[[int, float], None]
    certificate: str = ""  #: how its client is called by the certificate that it shows; empty without one
    client: str = ""
    stats: InferStats | None = None  #: of the answer, for the trailing metadata
    trace: RequestTrace | None = None  #: where it is sampled

    def limit(self, seconds: float = math.inf) -> float:
        """The deadline of a message that is here now and asks for an answer within so many seconds."""
        return min(self.deadline, time.monotonic() + min(seconds, self.longest_s))


@dataclass(frozen=True, slots=True)
class Method:
    """One method of a service: `answer` gives the message for a message, `stream` reads messages and sends bytes.

    `is_open`: the method is a probe, for which no token is asked and which is not counted.
    """

    path: str
    request: Any
    answer: Callable[[Any, Call], Awaitable[Any]] | None = None
    stream: Callable[[AsyncIterator[Any], Send, Call], Awaitable[None]] | None = None
    is_open: bool = False
    protocol: str = PROTOCOL


class Calls(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # it is generic in the stubs alone
    """The methods of all services, by their paths. See the module."""

    def __init__(
        self,
        settings: Settings,
        metrics: FrontMetrics,
        plane: DataPlane,
        releases: Releases,
        methods: Iterable[Method],
    ) -> None:
        """Raises ValueError for a file of tokens that is wrong."""
        self._draining, self._is_over = asyncio.Event(), False
        self.tracer: Tracer | None = None
        self._settings, self._metrics, self._plane, self._releases = settings, metrics, plane, releases
        self._permissions = open_permissions(settings)
        self._statuses = choose_statuses(settings)
        self._limit = int(settings.max_body_bytes)
        places = max(2, int(settings.max_inflight_bytes) // self._limit)
        self._places = asyncio.Semaphore(places)  # of messages that are being received
        self._streams, self._most_streams = 0, max(1, places // 2)
        self._running: set[asyncio.Task[Any]] = set()
        self._answered: dict[tuple[str, int], AnswerSeries] = {}
        methods = tuple(methods)
        for protocol in {method.protocol for method in methods if not method.is_open}:
            metrics.show_protocol(protocol, {OK, *COUNTED.values()})
        self._ids, self._id_prefix = itertools.count(1), os.urandom(6).hex().encode()
        self._handlers = {
            method.path: grpc.stream_stream_rpc_method_handler(partial(self._handle, method)) for method in methods
        }

    def __repr__(self) -> str:
        """For example `<Calls 3 under way of 14 methods>`."""
        return f"<Calls {len(self._running)} under way of {len(self._handlers)} methods>"

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of a path; None: grpcio says that there is no such method."""
        return self._handlers.get(handler_call_details.method)

    @property
    def is_draining(self) -> bool:
        """Whether the server stops."""
        return self._draining.is_set()

    def drain(self) -> None:
        """Read no more messages of streams: each ends when what it has read is answered."""
        self._draining.set()

    def refuse_all(self) -> None:
        """The time for running calls is over: tell their clients so."""
        self._is_over = True
        for task in self._running:
            task.cancel()

    async def _handle(self, method: Method, _: object, context: Context) -> None:
        """Answer one call, whatever happens, and count what became of it."""
        task = asyncio.current_task()
        assert task is not None, "grpcio runs each call in a task"
        call = self._open(method, context)
        self._running.add(task)
        why: Refused | None = None
        try:
            await self._answer(method, call, context)
        except asyncio.CancelledError:
            late = time.monotonic() >= call.deadline
            if not self._is_over:  # the client has left, or its deadline has passed: it is told by grpcio
                self._count(method, COUNTED[Situation.DEADLINE] if late else CLIENT_GONE, call)
                raise
            task.uncancel()
            why = Refused(Situation.NOT_READY, STOPPING)
        except Refused as error:
            why = error
        except Exception:
            log.exception("request_failed")
            why = Refused(Situation.INTERNAL, SERVER_FAILED)
        else:
            return
        finally:
            self._running.discard(task)
            if call.trace is not None:
                self._end_trace(method, call, call.trace, why or sys.exception())
        assert why is not None, "every other way returns or raises"
        status, code = self._choose_status(why)
        self._count(method, status, call)
        stats = why.stats if isinstance(why, RefusedByWorker) else None
        trailing = [*_list_trailers(call, stats), *list_advice(why)]
        await context.abort(code, describe_refusal(why), tuple(trailing))

    def _choose_status(self, why: Refused) -> tuple[int, grpc.StatusCode]:
        """The HTTP status that is counted, and gRPC's."""
        if isinstance(why, AnsweredBadly):
            return why.status, why.code
        return COUNTED[why.situation], self._statuses[why.situation]

    def _end_trace(self, method: Method, call: Call, trace: RequestTrace, error: BaseException | None) -> None:
        """Hand over the trace of a call, which `error` has ended; None where it was answered."""
        assert self.tracer is not None, "it has begun the trace"
        status, code = OK, grpc.StatusCode.OK
        if error is not None:
            trace.note_error(error)
            status, code = CLIENT_GONE, grpc.StatusCode.CANCELLED
        if isinstance(error, Refused):
            status, code = self._choose_status(error)
        describe_rpc(trace, method.path, call.id, code.value[0])
        self.tracer.end(trace, status)
        series = self._answered.get((method.protocol, status))
        if series is not None and method.stream is None:
            series.seconds.show_trace(time.monotonic() - call.started, call.id, trace.trace_id)

    async def _answer(self, method: Method, call: Call, context: Context) -> None:
        """Raises Refused."""
        if not method.is_open:
            self._admit(call)
        if method.answer is not None:
            call.deadline = call.limit()
            reply = await method.answer(await self._receive(method, context), call)
            raw = reply.SerializeToString()
            del reply
            context.set_trailing_metadata(tuple(_list_trailers(call, call.stats)))
            if not method.is_open and time.monotonic() > call.deadline:
                raise Refused(Situation.DEADLINE, LATE)
            self._count(method, OK, call)
            await self._send(context, raw)
        elif method.stream is not None:
            await self._answer_stream(method, call, context)

    async def _answer_stream(self, method: Method, call: Call, context: Context) -> None:
        assert method.stream is not None, "the caller has looked"
        if self._streams >= self._most_streams:
            message = f"{self._streams} streams are open, as many as max_inflight_bytes and max_body_bytes allow"
            raise Refused(Situation.OVERLOADED, message)
        self._streams += 1
        try:
            context.set_trailing_metadata(tuple(_list_trailers(call, None)))
            await method.stream(self._read_all(method, context), partial(self._send, context), call)
        finally:
            self._streams -= 1
        if self.is_draining:  # the client must not take it for the end that it asked for
            raise Refused(Situation.NOT_READY, STOPPING)

    def _open(self, method: Method, context: Context) -> Call:
        """What is known of a call from its head."""
        headers = {_encode(key): _encode(value) for key, value in context.invocation_metadata() or ()}
        given = headers.get(_REQUEST_ID, b"")
        ident = given if 0 < len(given) <= MAX_HEADER else b"%s-%d" % (self._id_prefix, next(self._ids))
        now, longest_s = time.monotonic(), self._settings.request_timeout_s
        left_s: float | None = context.time_remaining()
        count = partial(self._note, method.protocol)
        deadline = math.inf if left_s is None else now + left_s
        certificate = "" if self._settings.tls_client_ca is None else _name_peer(context)
        return Call(ident, now, deadline, longest_s, self._plane, headers, context.peer(), count, certificate)

    def _admit(self, call: Call) -> None:
        """Find who asks, and what it may. Raises Refused."""
        if self.tracer is not None:
            call.trace = self.tracer.begin(call.headers, call.started)
        wanted = call.headers.get(_TIMEOUT_MS)
        if wanted is not None:
            call.longest_s = min(call.longest_s, parse_timeout(wanted))
        token = None if self._permissions is None else self._permissions.find_token(call.headers)
        if self._permissions is not None and token is None:
            raise Refused(Situation.UNAUTHORIZED, "calls by gRPC are not signed: send authorization: Bearer TOKEN")
        call.client = call.certificate if token is None else token.name
        call.plane = make_plane(self._plane, token, self._releases)
        if call.trace is not None:
            call.plane = trace_plane(call.plane, call.trace, call.started)
        self._plane.held.check()

    # --- messages ---------------------------------------------------------------------------------------------------

    async def _receive(self, method: Method, context: Context) -> Any:
        """The one message of a call. Raises Refused."""
        patience_s = self._settings.client_timeout_s
        try:
            async with asyncio.timeout(patience_s), self._places:
                raw = await context.read()
        except TimeoutError:
            message = f"the message did not arrive within {patience_s:g} s (client_timeout_s)"
            raise Refused(Situation.SLOW_CLIENT, message) from None
        if raw is END:  # grpcio has told the client of one that is too large
            message = f"there is no message, or it is larger than {self._limit} bytes (max_body_bytes)"
            raise Refused(Situation.TOO_LARGE, message)
        return _parse(method, raw)

    async def _read_all(self, method: Method, context: Context) -> AsyncIterator[Any]:
        """Yield the messages of a stream, until its client or the server ends it."""
        draining = asyncio.create_task(self._draining.wait())
        reading: asyncio.Future[Any] | None = None
        try:
            while not draining.done():
                reading = asyncio.ensure_future(context.read())
                await asyncio.wait({reading, draining}, return_when=asyncio.FIRST_COMPLETED)
                if reading.done() and (raw := reading.result()) is END:
                    return
                if reading.done():
                    yield _parse(method, raw)
        finally:
            draining.cancel()
            if reading is not None:
                reading.cancel()

    async def _send(self, context: Context, raw: bytes) -> None:
        """Send a message. Its bytes are held until the client has taken it."""
        self._plane.held.size += len(raw)
        patience_s = self._settings.client_timeout_s * (1 + len(raw) // TAKEN_BYTES)
        try:
            async with asyncio.timeout(patience_s):
                await context.write(raw)
        except TimeoutError:
            message = f"the client did not take {len(raw)} bytes within {patience_s:g} s (client_timeout_s)"
            raise Refused(Situation.SLOW_CLIENT, message) from None
        finally:
            self._plane.held.size -= len(raw)

    # --- counting ---------------------------------------------------------------------------------------------------

    def _count(self, method: Method, status: int, call: Call) -> None:
        """Count a call; those of a stream are counted by what it answers each message."""
        if not method.is_open and (method.stream is None or status != CLIENT_GONE):
            self._note(method.protocol, status, time.monotonic() - call.started, call.id)

    def _note(self, protocol: str, status: int, seconds: float, request_id: bytes = b"") -> None:
        series = self._answered.get((protocol, status))
        if series is None:
            series = self._answered[protocol, status] = self._metrics.bind_answers(protocol, status)
        series.answers.inc()
        series.seconds.observe_request(seconds, request_id)


def _parse(method: Method, raw: bytes) -> Any:
    try:
        return method.request.FromString(raw)
    except DecodeError:
        name = method.request.DESCRIPTOR.full_name
        raise Refused(Situation.BAD_REQUEST, f"the message is not a {name} of Protocol Buffers") from None


def _encode(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


def _name_peer(context: Context) -> str:
    """The name of the client's certificate as the log has it; empty without one."""
    found = context.auth_context()
    if "x509_pem_cert" not in found:
        return ""
    names = [(kind, _first(found[key])) for key, kind in _SUBJECT_ALTERNATIVES if found.get(key)]
    subject = ((("commonName", _first(found.get("x509_common_name", ()))),),)
    return name_client({"subject": subject, "subjectAltName": names}) or ""


def _first(values: Iterable[bytes]) -> str:
    return next(iter(values), b"").decode(errors="replace")


def _list_trailers(call: Call, stats: InferStats | None) -> list[tuple[str, str]]:
    """What the headers of an HTTP answer say, as trailing metadata."""
    trailers = [(contract.HEADER_REQUEST_ID.lower(), call.id.decode("latin-1"))]
    if stats is None:
        return trailers
    times = f"queue;dur={stats.queue_us / 1e3:.3f}, inference;dur={stats.inference_us / 1e3:.3f}"
    if stats.load_us is not None:
        times += f", load;dur={stats.load_us / 1e3:.3f}" + (f';desc="{stats.tier}"' if stats.tier else "")
    trailers.append((contract.HEADER_SERVER_TIMING.lower(), times))
    if stats.cache is not None:
        trailers.append((contract.HEADER_CACHE.lower(), stats.cache))
    for name, value in (
        (contract.HEADER_MODEL_VERSION, stats.version),
        (contract.HEADER_QUALITY, stats.quality),
        (contract.HEADER_WARNING, stats.warnings),
    ):
        if value:
            trailers.append((name.lower(), value))
    return trailers
