"""Sends traces to a collector as OTLP/HTTP, from a thread of its own: OpenTelemetry's SDK and exporter.

The event loop only puts traces that are over into a bounded queue. Spans are made of them, encoded and sent here. A
collector that is slow or gone fills the queue, and then traces are dropped and counted; no request waits for it, and
the log says it once and then at most each LOG_S.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import structlog

from server.front.tracing.request_trace import RequestTrace
from server.front.tracing.spans import Span, build_spans
from server.metrics import TraceSeries

MOST_QUESTIONS_WAITING = 4096  #: of the traces that wait, each trace one more: a few MB
BATCH_QUESTIONS = 256  #: of the traces that leave in one request, about; a question has ten spans
BATCH_S = 1.0  #: for which traces are collected
LOG_S = 60.0  #: between two lines on a collector that does not answer
CLOSE_S = 2.0  #: for the last traces when the front ends

log = structlog.get_logger()


class SendSpans(Protocol):
    """What sends: OpenTelemetry's exporter behind it."""

    def send(self, traces: Sequence[tuple[RequestTrace, list[Span]]]) -> str:
        """Send the spans of some traces; why they did not arrive, empty where they did. It blocks."""

    def stop(self) -> None:
        """Let a `send` that tries again give up. From any thread."""


class TraceExporter:
    """See the module. `open_sender` runs on the thread: what it imports takes a while."""

    def __init__(self, open_sender: Callable[[], SendSpans], counted: TraceSeries) -> None:
        self._open_sender, self._counted = open_sender, counted
        self._waiting: deque[RequestTrace] = deque()
        self._size = 0  # their questions, and one more for each
        self._changed, self._is_closing = threading.Condition(), False
        self._sender: SendSpans | None = None
        self._said_at, self._is_failing = float("-inf"), False
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        """For example `<TraceExporter 3 traces wait>`."""
        return f"<TraceExporter {len(self._waiting)} traces wait>"

    def put(self, trace: RequestTrace) -> None:
        """Take a trace that is over, or drop it where too many wait. It returns at once."""
        size = 1 + len(trace.questions)
        with self._changed:
            if self._is_closing or self._size + size > MOST_QUESTIONS_WAITING:
                self._counted.dropped.inc()
                return
            self._waiting.append(trace)
            self._size += size
            self._changed.notify()

    def close(self) -> None:
        """Send what waits, for at most CLOSE_S, and end the thread. It blocks."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(CLOSE_S / 2)
        if self._thread.is_alive() and self._sender is not None:
            self._sender.stop()
            self._thread.join(CLOSE_S / 2)

    def _run(self) -> None:
        try:
            sender = self._sender = self._open_sender()
        except Exception:  # a variable of OpenTelemetry's is wrong, most likely: requests are answered all the same
            log.exception("traces_not_exported")
            with self._changed:
                self._is_closing = True
            return
        while (batch := self._take()) is not None:
            if batch:
                self._send(sender, batch)

    def _take(self) -> list[RequestTrace] | None:
        """The next traces, after those that come within BATCH_S; None: it is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or bool(self._waiting))
            self._changed.wait_for(lambda: self._is_closing or self._size >= BATCH_QUESTIONS, BATCH_S)
            batch, size = list[RequestTrace](), 0
            while self._waiting and size < BATCH_QUESTIONS:
                batch.append(self._waiting.popleft())
                size += 1 + len(batch[-1].questions)
            self._size -= size
            return batch if batch or not self._is_closing else None

    def _send(self, sender: SendSpans, batch: Sequence[RequestTrace]) -> None:
        try:
            offset_ns = time.time_ns() - time.monotonic_ns()
            spans = [(trace, build_spans(trace, trace.ended or trace.began, offset_ns)) for trace in batch]
            why = sender.send(spans)
        except Exception as error:  # a thread that ended would drop all later traces
            why = repr(error)
        (self._counted.failed if why else self._counted.exported).inc(len(batch))
        self._tell(why)

    def _tell(self, why: str) -> None:
        """Say that the collector does not answer, seldom, and that it does again."""
        now = time.monotonic()
        if why and now - self._said_at >= LOG_S:
            self._said_at = now
            log.warning("traces_not_sent", why=why[:300])
        elif not why and self._is_failing:
            self._said_at = float("-inf")
            log.info("traces_sent_again")
        self._is_failing = bool(why)


class OtlpSender:
    """OpenTelemetry's exporter. It reads the variables OTEL_EXPORTER_OTLP_* and OTEL_SERVICE_NAME itself."""

    def __init__(self, url: str, version: str) -> None:
        """Imports OpenTelemetry. Raises whatever it raises, such as for variables that are wrong."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope  # noqa: PLC0415

        self._messages = _LastMessage()
        logger = logging.getLogger("opentelemetry")
        logger.addHandler(self._messages)
        logger.propagate = False  # it says each failure several times; we say it seldom
        self._exporter = OTLPSpanExporter(endpoint=url)
        named = Resource.create()  # of OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
        ours: dict[str, Any] = {"service.version": version}
        if str(named.attributes.get("service.name", "")).startswith("unknown_service"):
            ours["service.name"] = "fleetcast"
        self._resource, self._scope = named.merge(Resource(ours)), InstrumentationScope("fleetcast", version)

    def __repr__(self) -> str:
        """For example `<OtlpSender <OTLPSpanExporter ...>>`."""
        return f"<OtlpSender {self._exporter!r}>"

    def send(self, traces: Sequence[tuple[RequestTrace, list[Span]]]) -> str:
        """See SendSpans."""
        from opentelemetry.sdk.trace.export import SpanExportResult  # noqa: PLC0415

        self._messages.text = "the collector does not answer"
        found = self._exporter.export([self._convert(trace, span) for trace, spans in traces for span in spans])
        return "" if found is SpanExportResult.SUCCESS else self._messages.text

    def stop(self) -> None:
        """See SendSpans."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _convert(self, trace: RequestTrace, span: Span) -> Any:
        """The SDK's record of a span."""
        from opentelemetry.sdk.trace import ReadableSpan  # noqa: PLC0415
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState  # noqa: PLC0415

        state = TraceState.from_header([trace.parent.state]) if trace.parent and trace.parent.state else None
        trace_id, flags = int(trace.trace_id, 16), TraceFlags(TraceFlags.SAMPLED)
        own = SpanContext(trace_id, int(span.span_id, 16), is_remote=False, trace_flags=flags, trace_state=state)
        above = None
        if span.parent_id:
            parent_id, is_remote = int(span.parent_id, 16), span.is_remote_child
            above = SpanContext(trace_id, parent_id, is_remote=is_remote, trace_flags=flags, trace_state=state)
        return ReadableSpan(
            span.name,
            own,
            above,
            self._resource,
            span.attributes,
            kind=SpanKind.SERVER if span.is_server else SpanKind.INTERNAL,
            status=Status(StatusCode.UNSET) if span.error is None else Status(StatusCode.ERROR, span.error),
            start_time=span.began_ns,
            end_time=span.ended_ns,
            instrumentation_scope=self._scope,
        )


class _LastMessage(logging.Handler):
    """Keeps the last line that OpenTelemetry logs: only there it says why a batch did not arrive."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """See logging."""
        self.text = record.getMessage()
