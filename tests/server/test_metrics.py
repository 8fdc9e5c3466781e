"""The metrics, and what remains of them when processes start and end."""

from itertools import pairwise
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from handlers.codecs.gaps import CODES
from model_store.errors import CodeNoMemory, LoadError, ModelNotFound
from server import contract
from server.metrics import FrontMetrics, HostMetrics, MergedMetrics, WorkerMetrics
from server.settings import Settings
from server.supervisor.actuals.market_metrics import MarketFamilies
from server.supervisor.actuals.rollout import ActualsRollout
from server.supervisor.actuals.service import ActualsService
from server.supervisor.host_measures import HostMeasures
from server.supervisor.workers import Workers
from server.worker.prefetch.prefetcher import PrefetchOutcome
from tests.server.contributing import copied_tree, read_steps, run_in


def scrape(merged: MergedMetrics) -> dict[str, float]:
    """What Prometheus reads: series as text -> value, through a real exposition."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(merged)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {
        f"{sample.name}{{{','.join(f'{k}={v}' for k, v in sorted(sample.labels.items()))}}}": sample.value
        for family in families
        for sample in family.samples
    }


HITS = "fleetcast_model_cache_requests_total{device=cpu,result=hit,worker=0}"
GONE = "fleetcast_model_evictions_total{device=cpu,reason=budget,tier=device,worker=0}"


def evict(worker: WorkerMetrics) -> None:
    """Count one."""
    worker.labelled(worker.evictions, tier="device", reason="budget").inc()


def test_equal_series_of_two_fronts_are_summed() -> None:
    """Fronts have no label of their own: counters and all histogram buckets are the sum; different codes stay apart."""
    merged = MergedMetrics()
    for process, codes in (("front-0", [200, 200, 503]), ("front-1", [200])):
        front = FrontMetrics()
        for code in codes:
            front.bind_answers("sagemaker", code).answers.inc()
            front.bind_answers("sagemaker", code).seconds.observe(0.002)
        merged.update(process, front.text())
    seen = scrape(merged)
    assert seen["fleetcast_inference_requests_total{code=200,protocol=sagemaker}"] == 3
    assert seen["fleetcast_inference_requests_total{code=503,protocol=sagemaker}"] == 1
    assert seen["fleetcast_inference_request_seconds_count{protocol=sagemaker}"] == 4
    assert seen["fleetcast_inference_request_seconds_bucket{le=0.001,protocol=sagemaker}"] == 0
    assert seen["fleetcast_inference_request_seconds_bucket{le=0.0025,protocol=sagemaker}"] == 4
    assert seen["fleetcast_inference_request_seconds_bucket{le=+Inf,protocol=sagemaker}"] == 4


def test_of_times_under_other_names_the_largest_is_shown() -> None:
    """Two workers' last times have no sum: TorchServe's gauges and handlers'. Counters of handlers are summed."""
    merged = MergedMetrics()
    for process, value in (("worker-0", 3), ("worker-1", 8), ("worker-2", 5)):
        text = f'# TYPE QueueTime gauge\nQueueTime{{Level="Host"}} {value}\n# TYPE Asked untyped\nAsked {value}\n'
        merged.update(process, text)
    seen = scrape(merged)
    assert (seen["QueueTime{Level=Host}"], seen["Asked{}"]) == (8, 16)


def test_tiers_of_workers_and_host_share_a_family() -> None:
    """The disk's bytes come from the supervisor, the device's from a worker: one family, one series each."""
    worker, host, merged = WorkerMetrics(0, "cpu"), HostMetrics(), MergedMetrics()
    worker.bytes.set(10)
    host.disk_bytes.set(20)
    merged.update("worker-0", worker.text())
    merged.update("host", host.text())
    seen = scrape(merged)
    assert seen["fleetcast_model_cache_bytes{device=cpu,tier=device,worker=0}"] == 10
    assert seen["fleetcast_model_cache_bytes{tier=disk}"] == 20


def test_a_scrape_replaces_the_last_one() -> None:
    """The same process seen twice counts once."""
    worker, merged = WorkerMetrics(0, "cpu"), MergedMetrics()
    for _ in range(2):
        worker.hits.inc()
        merged.update("worker-0", worker.text())
    assert scrape(merged)[HITS] == 2


@pytest.mark.slow
def test_counters_of_the_dead_go_on_and_gauges_vanish() -> None:
    """A restarted worker adds to what its predecessors counted, life after life; what they held is gone with them."""
    merged, counts = MergedMetrics(), []
    for life in range(3):
        worker = WorkerMetrics(0, "cpu")
        worker.hits.inc(10)
        worker.bytes.set(100)
        worker.queue.observe(0.002)
        merged.update(f"worker-0.{life}", worker.text())
        counts.append(scrape(merged)[HITS])
        assert scrape(merged)["fleetcast_model_cache_bytes{device=cpu,tier=device,worker=0}"] == 100
        merged.retire(f"worker-0.{life}")
        counts.append(scrape(merged)[HITS])
    assert counts == [10, 10, 20, 20, 30, 30]
    seen = scrape(merged)
    assert not any(series.startswith(("fleetcast_model_cache_bytes", "fleetcast_loaded_models")) for series in seen)
    assert seen["fleetcast_inference_queue_seconds_count{device=cpu,worker=0}"] == 3
    assert seen["fleetcast_inference_queue_seconds_bucket{device=cpu,le=0.0025,worker=0}"] == 3


def test_a_series_its_successor_has_not_counted_yet_stays() -> None:
    """The dead worker's count must not disappear until the new one has counted too."""
    old, new, merged = WorkerMetrics(0, "cpu"), WorkerMetrics(0, "cpu"), MergedMetrics()
    evict(old)
    merged.update("old", old.text())
    merged.retire("old")
    merged.update("new", new.text())
    assert scrape(merged)[GONE] == 1
    evict(new)
    merged.update("new", new.text())
    assert scrape(merged)[GONE] == 2


def test_a_worker_and_a_front_show_zeros_from_the_start() -> None:
    """Every result, reason and tier that a worker can count, and the answers of a protocol that none has asked yet."""
    merged, front = MergedMetrics(), FrontMetrics()
    front.show_protocol("sagemaker", [200, 503])
    merged.update("worker-0", WorkerMetrics(0, "cpu").text())
    merged.update("front-0", front.text())
    merged.update("host", HostMetrics("1.2.3").text())
    seen = scrape(merged)
    for spec, label, values in (
        (contract.EVICTIONS, "reason", contract.EVICTION_REASONS),
        (contract.LOAD_FAILURES, "reason", [ModelNotFound.reason, CodeNoMemory.reason, LoadError.reason]),
        (contract.PREFETCH, "result", [*PrefetchOutcome]),
        (contract.SWAPS, "result", ["ok", "failed"]),
        (contract.WAITING_REQUESTS, "waiting_for", contract.WAITING_FOR),
        (contract.INFERENCE_REQUESTS, "code", ["200", "503"]),
    ):
        shown = {series for series, value in seen.items() if series.startswith(f"{spec.series}{{") and value == 0}
        assert all(any(f"{label}={value}" in series for series in shown) for value in values), spec
    for tier in ("host", "disk", "store"):
        assert seen[f"fleetcast_model_loading_seconds_count{{device=cpu,tier={tier},worker=0}}"] == 0
    assert [series for series in seen if "build_info" in series and "version=1.2.3" in series]


def test_buckets_tell_fractions_of_a_millisecond_apart() -> None:
    """Between 0.1 and 5 ms a bound is at most 1.7 times the one before: so wrong can a percentile be at most."""
    front = FrontMetrics()
    front.bind_answers("sagemaker", 200)
    found = [
        float(sample.labels["le"])
        for family in text_string_to_metric_families(front.text())
        for sample in family.samples
        if sample.name == f"{contract.INFERENCE_SECONDS.series}_bucket"
    ]
    fine = [bound for bound in found if 0.0001 <= bound <= 0.005]
    assert len(fine) > 8
    assert all(after / before < 1.7 for before, after in pairwise(fine))


def test_burying_a_process_that_was_never_scraped_changes_nothing() -> None:
    """A worker that died at its start has said nothing."""
    merged = MergedMetrics()
    merged.retire("worker-0")
    assert scrape(merged) == {}


def series_of_models(worker: WorkerMetrics) -> dict[str, float]:
    """Model -> requests, as exposed."""
    return {
        sample.labels["model"]: sample.value
        for family in text_string_to_metric_families(worker.text())
        for sample in family.samples
        if "model" in sample.labels
    }


def test_models_have_series_up_to_the_cap_and_only_while_they_are_here() -> None:
    """By default none; with a cap the first so many; one that leaves takes its series along and makes room."""
    silent = WorkerMetrics(0, "cpu")
    silent.model_request("a")
    silent.model_gone("a")
    assert series_of_models(silent) == {}
    worker = WorkerMetrics(0, "cpu", per_model=2)
    for model in "aabc":
        worker.model_request(model)
    assert series_of_models(worker) == {"a": 2, "b": 1}
    worker.model_gone("a")
    worker.model_gone("c")
    worker.model_request("c", 3)
    assert series_of_models(worker) == {"b": 1, "c": 3}


def test_series_of_single_models_die_with_their_worker() -> None:
    """A dead worker holds no model, so nothing is left under a model's name."""
    worker, merged = WorkerMetrics(0, "cpu", per_model=5), MergedMetrics()
    worker.model_request("a")
    merged.update("worker-0", worker.text())
    assert any("model=a" in series for series in scrape(merged))
    merged.retire("worker-0")
    assert not any("model=a" in series for series in scrape(merged))


def test_the_codes_of_doubtful_histories_are_those_of_the_codec() -> None:
    """A worker shows all from its start: of a series that appears with its first event nobody sees an increase."""
    assert contract.DOUBT_CODES == CODES
    text = WorkerMetrics(0, "cpu").text()
    assert all(
        f'{contract.METRIC_PREFIX}{contract.DOUBTFUL_HISTORIES.name}_total{{code="{each}"' in text for each in CODES
    )


def test_the_metrics_are_those_of_the_contract() -> None:
    """Nothing is counted that clients are not told of, nothing is promised that no process counts; labels are equal."""
    counted: dict[str, set[str]] = {}
    host = HostMetrics()
    host.registry.register(HostMeasures({}))
    host.registry.register(
        MarketFamilies(ActualsService(Settings.model_validate({"store": "x"}), ActualsRollout(Workers([], 1.0))))
    )
    for process in (WorkerMetrics(0, "cpu", per_model=1), FrontMetrics(), host):
        for collector in list(process.registry._collector_to_names):
            for family in collector.collect():
                ours: tuple[str, ...] = getattr(collector, "label_names", getattr(family, "_labelnames", ()))
                labels: tuple[str, ...] = getattr(collector, "_labelnames", ours)
                counted.setdefault(family.name, set()).update(labels)
    promised = {contract.METRIC_PREFIX + spec.name: spec for spec in contract.METRICS}
    assert counted.keys() == promised.keys()
    for name, found in counted.items():
        assert found - set(contract.WORKER_LABELS) == set(promised[name].labels) - set(contract.WORKER_LABELS)


@pytest.mark.slow
def test_a_new_metric_is_a_description_and_a_line(tmp_path: Path) -> None:
    """CONTRIBUTING's page to the letter: the metric is exposed, has its row of reference, and its name is public."""
    tree = copied_tree(tmp_path / "tree")
    spec, created = read_steps("A new metric")
    for file, mark, block in (
        ("contract", "METRICS: Final", spec),
        ("metrics", "        self._model_requests =", created),
    ):
        source = tree / "server" / f"{file}.py"
        source.write_text(source.read_text().replace(mark, f"{block}\n{mark}", 1))
    count_it = (
        "from server import contract, metrics; m = metrics.WorkerMetrics(0, 'cpu'); m.queued.set(12); print(m.text())"
    )
    exposed = run_in(tree, "-c", count_it)
    assert "# HELP fleetcast_queued_requests Queued requests\n" in exposed
    assert 'fleetcast_queued_requests{device="cpu",worker="0"} 12.0\n' in exposed
    run_in(tree, "docs/write_reference.py")
    assert "| `fleetcast_queued_requests` | Queued requests |" in (tree / "docs/reference/metrics.md").read_text()
    assert (
        run_in(tree, "-c", "from server import contract; print(contract.QUEUED.series)")
        == "fleetcast_queued_requests\n"
    )


def test_what_is_under_way_is_shown_by_worker() -> None:
    """A worker that is gone has no series any more."""
    metrics = FrontMetrics()
    metrics.show_under_way({0: 3, 1: 0})
    metrics.show_under_way({1: 2})
    lines = [line for line in metrics.text().splitlines() if line.startswith(contract.UNDER_WAY.series)]
    assert lines == ['fleetcast_requests_under_way{worker="1"} 2.0']


def test_series_of_aliases_end_with_their_front() -> None:
    """As those of single models do: else names that left the table would stay for as long as the server runs."""
    front, merged = FrontMetrics(), MergedMetrics()
    front.bind_answers("sagemaker", 200).answers.inc()
    front.bind_release("nsw1@stable", "v1").ok.inc()
    merged.update("front-0.1", front.text())
    assert any("nsw1@stable" in series for series in scrape(merged))
    merged.retire("front-0.1")
    assert not any("nsw1@stable" in series for series in scrape(merged))
    assert any("sagemaker" in series for series in scrape(merged))
