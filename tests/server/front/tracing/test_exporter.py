"""The exporter: a bounded queue in front of a collector, which may be slow, gone or back again."""

import socket
import threading
from collections.abc import Sequence
from functools import partial

import pytest
import structlog
from prometheus_client import CollectorRegistry

from server.front.tracing.exporter import MOST_QUESTIONS_WAITING, OtlpSender, TraceExporter
from server.front.tracing.request_trace import Question, RequestTrace
from server.front.tracing.spans import Span, build_spans
from server.metrics import FrontMetrics
from tests.e2e.collector import run_collector
from tests.patience import wait_until

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Sender:
    """Sends to nobody. While `gate` is closed it hangs; `why`: what it says of each batch."""

    def __init__(self) -> None:
        self.gate, self.why, self.sent = threading.Event(), "", list[list[Span]]()
        self.gate.set()

    def send(self, traces: Sequence[tuple[RequestTrace, list[Span]]]) -> str:
        """Keep the spans, or fail."""
        self.gate.wait()
        if not self.why:
            self.sent += [spans for _, spans in traces]
        return self.why

    def stop(self) -> None:
        """Hang no more."""
        self.gate.set()


def make_trace(questions: int = 1) -> RequestTrace:
    """One that is over."""
    trace = RequestTrace(TRACE, SPAN, None, 1.0)
    trace.name, trace.ended = "POST /invocations", 2.0
    trace.questions = [Question(TRACE, "a.mar", 1.0) for _ in range(questions)]
    return trace


def read_count(registry: CollectorRegistry, result: str) -> float:
    """What became of traces."""
    return registry.get_sample_value("fleetcast_traces_total", {"result": result}) or 0.0


def has_count(metrics: FrontMetrics, result: str, count: int) -> bool:
    """Whether so many traces came to this."""
    return read_count(metrics.registry, result) == count


def test_the_last_traces_leave_before_the_end() -> None:
    """What waits when the front ends is sent."""
    sender, metrics = Sender(), FrontMetrics()
    exporter = TraceExporter(lambda: sender, metrics.traces)
    exporter.put(make_trace())
    exporter.close()
    assert [[span.name for span in spans] for spans in sender.sent] == [["POST /invocations", "infer"]]
    assert read_count(metrics.registry, "exported") == 1
    exporter.put(make_trace())
    assert read_count(metrics.registry, "dropped") == 1


@pytest.mark.slow
def test_a_collector_that_hangs_costs_only_traces() -> None:
    """The queue fills up to its bound, further traces are dropped at once, and the end is not held up."""
    sender, metrics = Sender(), FrontMetrics()
    sender.gate.clear()
    exporter = TraceExporter(lambda: sender, metrics.traces)
    for _ in range(2 * MOST_QUESTIONS_WAITING):
        exporter.put(make_trace())
    dropped = read_count(metrics.registry, "dropped")
    assert dropped >= 2 * MOST_QUESTIONS_WAITING - MOST_QUESTIONS_WAITING / 2 - 256
    exporter.close()
    assert sender.gate.is_set()


@pytest.mark.slow
def test_a_collector_that_fails_is_said_seldom() -> None:
    """Each trace is counted; the log has one line, and what comes later arrives."""
    sender, metrics = Sender(), FrontMetrics()
    sender.why = "connection refused"
    with structlog.testing.capture_logs() as logs:
        exporter = TraceExporter(lambda: sender, metrics.traces)
        for failed in (1, 2, 3):
            exporter.put(make_trace())
            wait_until(partial(has_count, metrics, "failed", failed), "it is counted")
        sender.why = ""
        exporter.put(make_trace())
        exporter.close()
    assert [each["event"] for each in logs if each["log_level"] == "warning"] == ["traces_not_sent"]
    assert len(sender.sent) == 1


def test_a_wrong_variable_stops_no_front() -> None:
    """The sender cannot be made: the log says why, and all traces are dropped."""
    metrics = FrontMetrics()

    def refuse() -> Sender:
        raise ValueError("a bad variable")

    with structlog.testing.capture_logs() as logs:
        exporter = TraceExporter(refuse, metrics.traces)
        exporter.close()
        exporter.put(make_trace())
    assert [each["event"] for each in logs] == ["traces_not_exported"]
    assert read_count(metrics.registry, "dropped") == 1


def test_spans_leave_as_the_protocol_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """By OpenTelemetry's own exporter, with its variables; an unset service has our name."""
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    trace = make_trace()
    trace.status, trace.error = 503, "no room"
    with run_collector() as collector:
        sender = OtlpSender(f"{collector.url}/v1/traces", "1.2")
        assert not sender.send([(trace, build_spans(trace, 2.0, 0))])
        collector.status = 400
        assert "400" in sender.send([(trace, build_spans(trace, 2.0, 0))])
    root, infer = collector.find(TRACE)
    assert (root.span_id, root.parent_id, root.error) == (SPAN, "", "no room")
    assert (infer.parent_id, infer.began) == (SPAN, 1_000_000_000)
    (resource,) = collector.resources
    assert (resource["service.name"], resource["service.version"]) == ("fleetcast", "1.2")
    assert resource["deployment.environment"] == "test"


def test_a_collector_that_is_not_there_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens at the port: the sender says why within its time-out."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.5")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        sender = OtlpSender(f"http://127.0.0.1:{taken.getsockname()[1]}/v1/traces", "1.2")
        assert sender.send([(make_trace(), build_spans(make_trace(), 2.0, 0))])
    sender.stop()
