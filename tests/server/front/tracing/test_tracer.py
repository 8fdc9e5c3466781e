"""A front's tracer: what it begins, counts, and hands to the exporter; and the app that it traces."""

import asyncio
import subprocess
import sys

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from server.errors import Situation
from server.front.app import App
from server.front.tracing.descriptions import describe_rpc, find_route
from server.front.tracing.plan import TracingPlan
from server.front.tracing.request_trace import RequestTrace
from server.front.tracing.sampling import Sampler
from server.front.tracing.spans import build_spans
from server.front.tracing.tracer import Tracer, make_id
from server.ipc.frames import Stage
from server.metrics import FrontMetrics
from server.routes.inference import SAGEMAKER
from server.settings import Settings
from tests.server.front.answering import JSON, Worker, ask, attach

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
TARGET = {"x-amzn-sagemaker-target-model": "a.mar"}


class Taken:
    """Takes traces."""

    def __init__(self) -> None:
        self.traces: list[RequestTrace] = []

    def put(self, trace: RequestTrace) -> None:
        """Keep it."""
        self.traces.append(trace)


def make_tracer(metrics: FrontMetrics, taken: Taken, ratio: float = 1.0, per_second: float = 10.0) -> Tracer:
    """A tracer of all requests, at a clock that stands."""
    plan = TracingPlan("http://c", Sampler(follows_parent=True, ratio=ratio), per_second)
    return Tracer(plan, taken, metrics.traces, lambda: 5.0)


def read_count(registry: CollectorRegistry, result: str) -> float | None:
    """What became of traces."""
    return registry.get_sample_value("fleetcast_traces_total", {"result": result})


def test_a_trace_continues_the_clients_or_begins() -> None:
    """Ids are random, and not zero."""
    tracer = make_tracer(FrontMetrics(), taken := Taken())
    inherited = tracer.begin({b"traceparent": PARENT["traceparent"].encode()}, 1.0)
    assert inherited is not None
    assert inherited.parent is not None
    assert (inherited.trace_id, inherited.parent.span_id) == (TRACE, SPAN)
    first, second = (tracer.begin({}, 1.0) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.trace_id != second.trace_id
    assert first.parent is None
    tracer.end(first, 200)
    assert (taken.traces, first.status, first.ended) == ([first], 200, 5.0)
    assert len(make_id(16)) == 32


def test_traces_beyond_the_budget_are_counted_and_not_begun() -> None:
    """Whatever the clients' flags say. What no sampler wants is not counted."""
    metrics = FrontMetrics()
    tracer = make_tracer(metrics, Taken(), ratio=0.0, per_second=1.0)
    parent = {b"traceparent": PARENT["traceparent"].encode()}
    assert sum(tracer.begin(parent, 1.0) is not None for _ in range(8)) == 5
    assert read_count(metrics.registry, "skipped") == 3
    assert tracer.begin({}, 1.0) is None
    assert read_count(metrics.registry, "skipped") == 3


@pytest.mark.parametrize("status", [200, 503])
def test_the_app_notes_what_became_of_a_request(status: int) -> None:
    """With the worker's stages; a refusal is told with its situation."""
    metrics, taken = FrontMetrics(), Taken()

    async def scenario() -> None:
        app = App(Settings.model_validate({"store": "models"}), metrics)
        app.tracer = make_tracer(metrics, taken)
        refusal = (Situation.OVERLOADED, msgspec.json.encode({"message": "too many"}))
        worker = Worker(lambda _: refusal if status == 503 else b"{}")
        worker.stages = [Stage("forward", 2**62, 2**62)]
        attach(app.plane, worker)
        reply = await ask(app, "POST", "/invocations", b"{}", {**TARGET, **PARENT, "content-type": JSON})
        assert reply.status == status
        await ask(app, "GET", "/ping")  # a probe is not traced
        await ask(app, "POST", "/invocations", b"{}", {"traceparent": PARENT["traceparent"][:-1] + "0", **TARGET})

    asyncio.run(scenario())
    (trace,) = taken.traces
    assert (trace.trace_id, trace.status, trace.name) == (TRACE, status, "POST /invocations")
    assert trace.attributes["http.response.status_code"] == status
    (question,) = trace.questions
    assert (question.model, question.cache, question.version) == ("a.mar", "hit", "v1")
    assert [stage.name for stage in question.stages] == ["forward"]
    assert question.reason == trace.reason == ("overloaded" if status == 503 else "")
    assert [span.name for span in build_spans(trace, 9e9, 0)] == ["POST /invocations", "infer", "forward"]
    (example,) = [example for _, example in metrics.list_examples() if example.trace_id]
    assert example.trace_id == TRACE


def test_a_client_that_leaves_is_noted() -> None:
    """Its span has the status that the metrics count."""
    metrics, taken = FrontMetrics(), Taken()

    async def scenario() -> None:
        app = App(Settings.model_validate({"store": "models"}), metrics)
        app.tracer = make_tracer(metrics, taken)

        async def leave() -> dict[str, object]:
            return {"type": "http.disconnect"}

        async def send(_: object) -> None:
            raise AssertionError("nobody is there")

        scope = {"type": "http", "method": "POST", "path": "/invocations", "headers": [], "query_string": b""}
        await app(scope, leave, send)

    asyncio.run(scenario())
    assert [trace.status for trace in taken.traces] == [499]


@pytest.mark.slow
def test_a_front_that_does_not_trace_imports_nothing_of_it() -> None:
    """OpenTelemetry's modules take a third of a second and megabytes: only the exporter's thread imports them."""
    code = "import sys, server.front.main, server.front.grpc.main; print(*(m for m in sys.modules if 'opentelem' in m))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not found.stdout.strip()


def test_names_of_spans_are_few() -> None:
    """A route's template stands for all paths of it; a call by gRPC is its method."""
    assert find_route(SAGEMAKER, "POST", "/endpoints/anything/invocations") == "/endpoints/{endpoint}/invocations"
    assert find_route(SAGEMAKER, "POST", "/invocations") == "/invocations"
    trace = RequestTrace(TRACE, SPAN, None, 0.0)
    describe_rpc(trace, "/inference.GRPCInferenceService/ModelInfer", b"id", 8)
    assert trace.name == "inference.GRPCInferenceService/ModelInfer"
    assert trace.attributes["rpc.service"] == "inference.GRPCInferenceService"
    assert trace.attributes["rpc.grpc.status_code"] == 8
