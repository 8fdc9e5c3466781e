"""Traces of a real server, as a collector gets them: one tree from a request's head to the steps of its worker."""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import pytest
import tritonclient.grpc as triton

from server.access_log import Row, read_rows
from tests.e2e.collector import Collector, Seen, run_collector
from tests.e2e.models import FORECAST_TCN, pack_forecaster
from tests.e2e.server import Server, run_server, upload
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

COLD, WARM, RPC = (pack_forecaster(f"t/{name}.mar", i) for i, name in enumerate("abc"))
MANY, OTHER = (pack_forecaster(f"t/{name}.mar", i, config=FORECAST_TCN, forecast=True) for i, name in enumerate("de"))
BROKEN = "t/broken.mar"
NUMBERS = itertools.count(1)
SERVER, INTERNAL = 2, 1
STEPS = ["decode", "forward", "encode"]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """Takes the traces."""
    with run_collector() as found:
        yield found


@pytest.fixture(scope="module")
def house(s3: S3Server, collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that traces, with a gRPC listener. The test's own key for the collector is in its environment."""
    bucket, folder = s3.bucket(), tmp_path_factory.mktemp("traces")
    upload(s3, bucket, [COLD, WARM, RPC, MANY, OTHER])
    s3.put(bucket, BROKEN, b"no archive")
    variables = {
        "OTEL_EXPORTER_OTLP_HEADERS": "x-key=secret",
        "OTEL_SERVICE_NAME": "prices",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",  # the flag wins
    }
    flags = {
        "otlp_endpoint": collector.url,
        "traces_per_s": 1000,
        "grpc_port": 0,
        "workers": 1,
        "access_log": folder / "rows",
    }
    with run_server(s3, folder, f"s3://{bucket}", environment=variables, **flags) as server:
        yield server


def make_parent(flags: str = "01") -> tuple[str, str, str]:
    """The header of a client's span, its trace's id and its own."""
    trace_id, span_id = f"{next(NUMBERS):032x}", f"{next(NUMBERS):016x}"
    return f"00-{trace_id}-{span_id}-{flags}", trace_id, span_id


def check_nesting(spans: Sequence[Seen]) -> None:
    """Each span but the first lies within its parent, which is in the trace."""
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        assert span.began <= span.ended
        if span is not spans[0]:
            parent = by_id[span.parent_id]
            assert parent.began <= span.began
            assert span.ended <= parent.ended


def list_names(spans: Sequence[Seen], parent: Seen) -> list[str]:
    """The names of a span's children, in order."""
    return [span.name for span in spans if span.parent_id == parent.span_id]


def find_span(spans: Sequence[Seen], name: str) -> Seen:
    """The one span of this name."""
    (found,) = [span for span in spans if span.name == name]
    return found


def find_rows(house: Server, trace_id: str) -> list[Row]:
    """The trace's rows of the access log."""
    return [row for row in read_rows(house.log.parent / "rows") if row.trace_id == trace_id]


def test_a_cold_request_is_one_tree_from_its_head_to_its_step(house: Server, collector: Collector) -> None:
    """The store's part of the load, with its bytes, is below it; the client's span above, with its state."""
    header, trace_id, above = make_parent()
    reply = house.post(COLD.name, COLD.question(0).body, {"traceparent": header, "tracestate": "a=1, b=2"})
    assert reply.status_code == 200
    spans = collector.await_trace(trace_id)
    check_nesting(spans)
    root, infer = spans[0], find_span(spans, "infer")
    assert (root.name, root.kind) == ("POST /endpoints/{endpoint}/invocations", SERVER)
    assert (root.parent_id, root.state, root.error) == (above, "a=1,b=2", None)
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["fleetcast.request_id"] == reply.headers["x-request-id"]
    assert [name for name in list_names(spans, root) if name != "read"] == ["infer"]
    assert (infer.kind, infer.attributes["fleetcast.model"]) == (INTERNAL, COLD.name)
    assert (infer.attributes["fleetcast.cache"], infer.attributes["fleetcast.tier"]) == ("miss", "store")
    assert infer.attributes["fleetcast.model_version"] == reply.headers["x-fleetcast-model-version"]
    assert list_names(spans, infer) == ["admission", "load", "queue", *STEPS]
    load = find_span(spans, "load")
    assert list_names(spans, load) == ["load.disk", "load.store", "load.build", "load.place"]
    assert list_names(spans, find_span(spans, "load.store")) == ["load.store.get", "load.store.keep"]
    assert find_span(spans, "load.store.get").attributes["fleetcast.bytes"] == len(COLD.data)
    assert find_span(spans, "forward").attributes == {"fleetcast.rows": 1, "fleetcast.models": 1}
    rows = wait_until(lambda: find_rows(house, trace_id), "its row is in the access log")
    assert [(row.model, row.outcome) for row in rows] == [(COLD.name, "miss")]
    assert collector.resources[0]["service.name"] == "prices"
    assert collector.headers[0]["x-key"] == "secret"


def test_a_warm_request_has_no_load(house: Server, collector: Collector) -> None:
    """Its model is resident; where a client sends no trace, it begins one, of which the exemplars tell the id."""
    for _ in range(2):
        header, trace_id, _ = make_parent()
        house.post(WARM.name, WARM.question(0).body, {"traceparent": header})
    spans = collector.await_trace(trace_id)
    check_nesting(spans)
    infer = find_span(spans, "infer")
    assert infer.attributes["fleetcast.cache"] == "hit"
    assert list_names(spans, infer) == ["admission", "queue", *STEPS]
    before = {span.trace_id for span in collector.spans}
    assert house.post(WARM.name, WARM.question(0).body).status_code == 200
    (new,) = wait_until(lambda: {span.trace_id for span in collector.spans} - before, "its trace arrives")
    assert collector.find(new)[0].parent_id == ""
    accepted = {"accept": "application/openmetrics-text"}
    text = house.http.get(f"{house.addresses['metrics']}/metrics", headers=accepted).text
    assert f'trace_id="{new}"' in text


def test_the_client_decides_for_its_own_trace(house: Server, collector: Collector) -> None:
    """One that is not sampled leaves nothing; a malformed header is as none, and no error."""
    header, unsampled, _ = make_parent("00")
    assert house.post(WARM.name, WARM.question(0).body, {"traceparent": header}).status_code == 200
    for wrong in ("", "00-xyz-1-01", f"ff-{1:032x}-{1:016x}-01", f"00-{0:032x}-{1:016x}-01", "0" * 5000):
        before = {span.trace_id for span in collector.spans}
        reply = house.post(WARM.name, WARM.question(0).body, {"traceparent": wrong, "tracestate": "=" * 1000})
        assert reply.status_code == 200
        spans = _await_request(collector, reply.headers["x-request-id"])
        assert spans[0].parent_id == ""
        assert spans[0].trace_id not in before
    assert not collector.find(unsampled)


def _await_request(collector: Collector, ident: str) -> list[Seen]:
    return wait_until(lambda: _find_request(collector, ident), "its trace arrives")


def _find_request(collector: Collector, ident: str) -> list[Seen]:
    ids = {each.trace_id for each in list(collector.spans) if each.attributes.get("fleetcast.request_id") == ident}
    return [span for trace_id in ids for span in collector.find(trace_id)]


def test_a_call_by_grpc_is_traced_by_its_metadata(house: Server, collector: Collector) -> None:
    """As one over HTTP, under the conventions for RPC."""
    header, trace_id, above = make_parent()
    tensor = triton.InferInput("x", [1, *RPC.shape], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, *RPC.shape), np.float32))
    with triton.InferenceServerClient(house.grpc) as client:
        client.infer(RPC.name, [tensor], headers={"traceparent": header})
    spans = collector.await_trace(trace_id)
    check_nesting(spans)
    root = spans[0]
    assert (root.name, root.kind, root.parent_id) == ("inference.GRPCInferenceService/ModelInfer", SERVER, above)
    assert (root.attributes["rpc.system"], root.attributes["rpc.grpc.status_code"]) == ("grpc", 0)
    infer = find_span(spans, "infer")
    assert list_names(spans, infer) == ["admission", "load", "queue", *STEPS]


def test_what_fails_says_why(house: Server, collector: Collector) -> None:
    """A model that is not there, and an archive that is none: the load and the question failed, with the cause."""
    for model, status, reason, part in (
        ("t/none.mar", 404, "not_found", "load.store.get"),
        (BROKEN, 424, "archive_failed", "load.store"),
    ):
        header, trace_id, _ = make_parent()
        reply = house.post(model, COLD.question(0).body, {"traceparent": header})
        spans = collector.await_trace(trace_id)
        check_nesting(spans)
        root, infer, load = spans[0], find_span(spans, "infer"), find_span(spans, "load")
        assert root.attributes["http.response.status_code"] == reply.status_code
        assert reply.status_code in (status, 400)
        assert root.attributes["error.type"] == infer.attributes["error.type"] == reason
        assert model in str(infer.error)
        assert model in str(load.error)
        assert find_span(spans, part).error is not None


def test_a_call_for_many_shows_each_item(house: Server, collector: Collector) -> None:
    """Items run at once, each with its own model, cache result and cause."""
    header, trace_id, _ = make_parent()
    asked = json.loads(MANY.question(1).body)
    names = [MANY.name, OTHER.name, "t/gone.mar"]
    items = [{"target_model": name, **asked["instances"][0]} for name in names]
    body = json.dumps({"requests": items, "configuration": asked["configuration"]})
    reply = house.http.post(f"{house.url}/v1/forecasts", content=body, headers={"traceparent": header})
    assert reply.status_code == 200, reply.text
    spans = collector.await_trace(trace_id)
    check_nesting(spans)
    root = spans[0]
    questions = [span for span in spans if span.name == "infer"]
    assert (root.attributes["fleetcast.items"], root.attributes["http.response.status_code"]) == (3, 200)
    assert {span.attributes["fleetcast.model"] for span in questions} == set(names)
    assert [span.attributes["fleetcast.model"] for span in questions if span.error] == ["t/gone.mar"]


def count_failed(house: Server) -> float:
    """Traces that the collector did not take."""
    return house.total("fleetcast_traces_total", result="failed")


def has_failed(house: Server, count: float) -> bool:
    """Whether these are so many."""
    return count_failed(house) == count


def test_a_collector_that_takes_nothing_delays_nobody(house: Server, collector: Collector) -> None:
    """Requests are answered, the loss is counted and said once; the next traces arrive when it takes them again."""
    collector.status = 400
    failed = count_failed(house)
    try:
        for lost_so_far in (1, 2, 3):
            header, lost, _ = make_parent()
            assert house.post(WARM.name, WARM.question(0).body, {"traceparent": header}).status_code == 200
            wait_until(partial(has_failed, house, failed + lost_so_far), "it is counted")
    finally:
        collector.status = 200
    header, trace_id, _ = make_parent()
    house.post(WARM.name, WARM.question(0).body, {"traceparent": header})
    collector.await_trace(trace_id)
    assert not collector.find(lost)
    wait_until(lambda: "traces_sent_again" in house.said(), "the log says that it answers again")
    assert len(re.findall("traces_not_sent", house.said())) == 1
