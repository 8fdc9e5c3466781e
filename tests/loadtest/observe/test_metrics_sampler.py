"""Samples of the metrics of a server under load."""

from pathlib import Path

import pytest
import urllib3

from loadtest.fleets.fleet import make_fleet
from loadtest.fleets.network_shape import make_request
from loadtest.observe.local_server import LocalServer, run_local_server
from loadtest.observe.metrics_sampler import MetricsSampler, parse_metrics
from loadtest.observe.processes import read_pss
from server import contract

TEXT = """# TYPE fleetcast_model_cache_requests counter
fleetcast_model_cache_requests_total{{worker="0",device="cpu",result="hit"}} {hits}
fleetcast_model_cache_requests_total{{worker="1",device="cpu",result="hit"}} 2.0
fleetcast_model_cache_requests_total{{worker="0",device="cpu",result="miss"}} {misses}
# TYPE fleetcast_model_loading_seconds histogram
fleetcast_model_loading_seconds_bucket{{worker="0",tier="disk",le="0.01"}} {quick}
fleetcast_model_loading_seconds_bucket{{worker="0",tier="disk",le="0.1"}} {all}
fleetcast_model_loading_seconds_bucket{{worker="0",tier="disk",le="+Inf"}} {all}
fleetcast_model_loading_seconds_count{{worker="0",tier="disk"}} {all}
fleetcast_model_loading_seconds_sum{{worker="0",tier="disk"}} {sum}
# TYPE fleetcast_loaded_models gauge
fleetcast_loaded_models{{worker="0"}} {resident}
"""


def make_text(hits: int, misses: int, quick: int, loads: int, seconds: float, resident: int) -> str:
    """A server's /metrics."""
    return TEXT.format(hits=hits, misses=misses, quick=quick, all=loads, sum=seconds, resident=resident)


def test_samples_become_curves() -> None:
    """Counters become rates and means between samples, gauges stay levels; one that restarts never goes below 0."""
    pages = iter([make_text(10, 2, 5, 5, 0.05, 7), make_text(16, 4, 6, 8, 0.35, 9), make_text(0, 0, 0, 0, 0.0, 1)])
    watch = MetricsSampler(lambda: next(pages))
    for t in (0.0, 2.0, 4.0):
        watch.look(t)
    curves = watch.server_over_time()
    assert curves is not None
    assert curves["t_s"] == [2.0, 4.0]
    assert curves["hit_ratio"] == [0.75, None]
    assert curves["loads_per_s"] == {"disk": [1.5, 0.0]}
    assert curves["load_ms"]["disk"] == [pytest.approx(100.0), None]
    assert curves["loaded_models"] == [9.0, 1.0]
    assert watch.gained() is not None
    assert watch.load_times() == {}


def test_load_times_by_bucket() -> None:
    """Cumulative buckets become counts between bounds, of the run alone; the last bound is open."""
    pages = iter([make_text(0, 0, 5, 5, 0.05, 7), make_text(0, 0, 6, 8, 0.35, 9)])
    watch = MetricsSampler(lambda: next(pages))
    watch.look(0.0)
    watch.look(1.0)
    assert watch.load_times() == {"disk": {"le_s": [0.01, 0.1, None], "count": [1.0, 2.0, 0.0]}}
    gained = watch.gained()
    assert gained is not None
    assert gained[contract.LOADING.count, "disk"] == 3


def test_a_last_look_is_no_span_of_its_own() -> None:
    """The sample at the end of a run comes just after another and takes its place: a rate over 1 ms is noise."""
    pages = iter([make_text(hits, 0, 0, 0, 0, 1) for hits in (0, 10, 20, 21)])
    watch = MetricsSampler(lambda: next(pages))
    for t in (0.0, 1.0, 2.0, 2.001):
        watch.look(t)
    curves = watch.server_over_time()
    assert curves is not None
    assert curves["t_s"] == [1.0, 2.001]


def test_nothing_to_see() -> None:
    """Without /metrics and memory everything is None, and looking costs nothing."""
    watch = MetricsSampler()
    watch.look(0.0)
    assert [watch.gained(), watch.load_times(), watch.server_over_time()] == [None] * 3
    assert [watch.memory_over_time(), watch.last_memory()] == [None] * 2


@pytest.mark.e2e
def test_a_real_server(tmp_path: Path) -> None:
    """The names it looks for are those a real server has: requests, loads, models, bytes, queue and batches."""
    (name, *_) = make_fleet(str(tmp_path), 2)
    with run_local_server(str(tmp_path), ["--workers", "1"]) as server:
        worker = next(each["pid"] for each in server.processes() if each["kind"] == "worker")

        def scrape() -> str:
            return str(LocalServer.get(f"{server.metrics}/metrics").data, "utf-8")

        watch = MetricsSampler(scrape, lambda: {"worker 0": read_pss(worker)})
        watch.look(0.0)
        for _ in range(3):
            headers = {"X-Amzn-SageMaker-Target-Model": name}
            reply = urllib3.request("POST", f"{server.inference}/invocations", json=make_request(0), headers=headers)
            assert reply.status == 200
        watch.look(1.0)
        counts, buckets = parse_metrics(scrape())
    curves = watch.server_over_time()
    assert curves is not None
    assert curves["hit_ratio"] == [pytest.approx(2 / 3)]
    assert curves["loads_per_s"] == {"store": [1.0]}
    assert curves["loaded_models"] == [1.0]
    assert curves["cache_bytes"][0] > 70_000
    assert curves["batch_rows"] == [1.0]
    assert curves["queue_ms"][0] >= 0
    assert curves["evictions_per_s"] == [0.0]
    memory = watch.memory_over_time()
    assert memory is not None
    assert memory["worker 0"][1] > 20_000_000
    assert counts[contract.CACHE_CAPACITY.series, "device"] > 0
    assert sum(buckets["store"].values()) >= 1
