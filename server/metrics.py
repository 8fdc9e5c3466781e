"""The server's metrics, whose names, labels and help texts `server.contract` has, and how the supervisor merges them.

Each process counts in a registry of its own. On a scrape the supervisor asks its children for their exposition, adds
the counts of processes that ended, and sums equal series. INVARIANT: a counter does not decrease when a worker dies.
"""

import platform
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from model_store.errors import LoadError
from server import contract
from server.contract import METRIC_PREFIX, MetricSpec
from server.logs import STANDARD_ERROR
from server.single_thread_metrics import BucketExample, CounterFamily, HistogramFamily, LoopCounter, LoopHistogram

disable_created_metrics()  # type: ignore[no-untyped-call]
# A base image may set PROMETHEUS_MULTIPROC_DIR: counts would go through files in that folder, which may not exist. Ours
# never do, for the supervisor merges what its processes count.
values.ValueClass = values.MutexValue

#: Requests to resident models take fractions of a millisecond: below 5 ms a bound is at most 1.7 times the one before,
#: so that a percentile read from the buckets is at most so wrong.
_HITS = (
    0.00005, 0.0001, 0.00015, 0.00025, 0.0004, 0.0005, 0.00075, 0.001, 0.0015, 0.0025, 0.0035, 0.005, 0.0075, 0.01,
    0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60,
)  # fmt: skip
_FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_AGES = (1, 10, 60, 300, 900, 3600, 4 * 3600, 24 * 3600, 7 * 24 * 3600)
_MEMORY = tuple(float(1 << bits) for bits in range(20, 37))  # bytes: 1 MiB to 64 GiB
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

_NAMING = (
    "model",
    "target",
    "model_name",
    "ModelName",
)  #: labels that name models: such series end with their process
_RESULTS = ("ok", "failed")  #: of requests by a name in the table of releases
_GAUGE = "gauge"  #: the type of the families that are dropped when their process ends


def _make_counter(spec: MetricSpec, registry: CollectorRegistry, common: tuple[str, ...] = ()) -> Counter:
    return Counter(METRIC_PREFIX + spec.name, spec.help, (*common, *spec.labels), registry=registry)


def _make_gauge(spec: MetricSpec, registry: CollectorRegistry, common: tuple[str, ...] = ()) -> Gauge:
    return Gauge(METRIC_PREFIX + spec.name, spec.help, (*common, *spec.labels), registry=registry)


def _make_histogram(
    spec: MetricSpec, registry: CollectorRegistry, common: tuple[str, ...] = (), buckets: tuple[float, ...] = _FAST
) -> Histogram:
    return Histogram(METRIC_PREFIX + spec.name, spec.help, (*common, *spec.labels), registry=registry, buckets=buckets)


def list_load_failures() -> list[str]:
    """The reasons for which a load can fail in this process, sorted."""
    kinds, found = [LoadError], set[str]()
    while kinds:
        kind = kinds.pop()
        found.add(kind.reason)
        kinds += kind.__subclasses__()
    return sorted(found)


class DroppedLogLines(Collector):
    """Log lines of this process that were dropped: standard error's reader stopped, or has gone."""

    def collect(self) -> Iterator[Metric]:
        """One counter."""
        spec = contract.LOG_LINES_DROPPED
        yield CounterMetricFamily(METRIC_PREFIX + spec.name, spec.help, STANDARD_ERROR.dropped)


class WorkerMetrics:
    """What one worker counts. Every series has the labels `worker` and `device` (contract.WORKER_LABELS)."""

    def __init__(self, worker: int, device: str, per_model: int = 0) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(DroppedLogLines())
        self._labels = dict(zip(contract.WORKER_LABELS, (str(worker), device), strict=True))
        self.per_model = per_model
        self._shown: set[str] = set()
        bind, each = self._labels, tuple(self._labels.values())
        # What is counted with every request or step is counted on the step thread alone.
        requests = self._loop_counter(contract.CACHE_REQUESTS)
        self.hits, self.misses, self.coalesced = (requests.labels(*each, result) for result in contract.CACHE_RESULTS)
        spent = self._loop_counter(contract.STEP_SECONDS)
        self.decode_s, self.forward_s, self.encode_s = (spent.labels(*each, part) for part in contract.STEP_PARTS)
        self.queue = self._loop_histogram(contract.QUEUE, _HITS).labels(*each)
        self.batch_rows = self._loop_histogram(contract.BATCH_ROWS, _SIZES).labels(*each)
        self.batch_models = self._loop_histogram(contract.BATCH_MODELS, _SIZES).labels(*each)
        self.loading_wait = self._histogram(contract.LOADING_WAIT).labels(**bind)
        self.downloading = self._histogram(contract.DOWNLOADING).labels(**bind)
        self.loading = self._histogram(contract.LOADING)
        self._loading: dict[str, Histogram] = {}  # its series by tier
        self.unloading = self._histogram(contract.UNLOADING).labels(**bind)
        self.loaded = self._gauge(contract.LOADED_MODELS).labels(**bind)
        used, capacity = self._gauge(contract.CACHE_BYTES), self._gauge(contract.CACHE_CAPACITY)
        self.bytes, self.capacity = (gauge.labels(**bind, tier="device") for gauge in (used, capacity))
        self.host_bytes, self.host_capacity = (gauge.labels(**bind, tier="host") for gauge in (used, capacity))
        self.evictions = self._counter(contract.EVICTIONS)
        self.age = self._histogram(contract.AGE_AT_EVICTION, _AGES).labels(**bind)
        self.shortfall = self._loop_histogram(contract.CACHE_SHORTFALL, _MEMORY).labels(*each)
        loads = self._gauge(contract.LOADS_UNDER_WAY)
        self.disk_lane, self.store_lane = (
            tuple(loads.labels(**bind, lane=lane, state=state) for state in contract.LOAD_STATES)
            for lane in contract.LANES
        )
        self.failures = self._counter(contract.LOAD_FAILURES)
        self.swaps = self._counter(contract.SWAPS)
        surviving = self._counter(contract.SURVIVING_ROWS)
        self.adopted, self.damaged = (self.labelled(surviving, result=each) for each in contract.SURVIVING_RESULTS)
        self.prefetch = self._counter(contract.PREFETCH)
        self.rhythms = self._gauge(contract.PREFETCH_MODELS).labels(**bind)
        self._model_requests = self._counter(contract.MODEL_REQUESTS)
        self._doubtful = self._counter(contract.DOUBTFUL_HISTORIES)
        waiting = self._gauge(contract.WAITING_REQUESTS)
        self.waiting = tuple(waiting.labels(**bind, waiting_for=what) for what in contract.WAITING_FOR)
        self.failed = self._gauge(contract.FAILED_MODELS).labels(**bind)
        self.stale = self._gauge(contract.STALE_MODELS).labels(**bind)
        self.store_failing = self._gauge(contract.STORE_FAILING).labels(**bind)
        self._show_zeros()

    def _show_zeros(self) -> None:
        """Have every series from the start: of one that appears with its first event, Prometheus sees no increase."""
        for tier in contract.TIERS[1:]:
            self.loading.labels(**self._labels, tier=tier)
        for reason in contract.EVICTION_REASONS:
            self.labelled(self.evictions, tier="device", reason=reason)
        self.labelled(self.evictions, tier="host", reason="budget")
        for reason in list_load_failures():
            self.labelled(self.failures, reason=reason)
        for result in _RESULTS:
            self.labelled(self.swaps, result=result)
        for result in contract.PREFETCH_RESULTS:
            self.labelled(self.prefetch, result=result)
        for code in contract.DOUBT_CODES:
            self.labelled(self._doubtful, code=code)

    def _counter(self, spec: MetricSpec) -> Counter:
        return _make_counter(spec, self.registry, contract.WORKER_LABELS)

    def _loop_counter(self, spec: MetricSpec) -> CounterFamily:
        family = CounterFamily(spec, contract.WORKER_LABELS)
        self.registry.register(family)
        return family

    def _loop_histogram(self, spec: MetricSpec, bounds: tuple[float, ...]) -> HistogramFamily:
        family = HistogramFamily(spec, bounds, contract.WORKER_LABELS)
        self.registry.register(family)
        return family

    def _gauge(self, spec: MetricSpec) -> Gauge:
        return _make_gauge(spec, self.registry, contract.WORKER_LABELS)

    def _histogram(self, spec: MetricSpec, buckets: tuple[float, ...] = _FAST) -> Histogram:
        return _make_histogram(spec, self.registry, contract.WORKER_LABELS, buckets)

    def labelled(self, metric: Counter, **labels: str) -> Counter:
        """The series of a counter with these labels beside the worker's."""
        return metric.labels(**self._labels, **labels)

    def load_seconds(self, tier: str, seconds: float) -> None:
        """Record the duration of a load from `tier`."""
        series = self._loading.get(tier)
        if series is None:  # to look a series up by its labels costs more than to observe
            series = self._loading[tier] = self.loading.labels(**self._labels, tier=tier)
        series.observe(seconds)

    def model_request(self, model: str, count: int = 1) -> None:
        """Count requests in the model's own series, unless as many models as the setting allows have one already."""
        if not self.per_model:
            return
        if model not in self._shown:
            if len(self._shown) >= self.per_model:
                return
            self._shown.add(model)
        self._model_requests.labels(**self._labels, model=model).inc(count)

    def count_doubts(self, quality: str) -> None:
        """Count what `X-Fleetcast-Quality` says of an answer; its codes are DOUBT_CODES."""
        for part in quality.split(", "):
            code, _, count = part.partition("=")
            self._doubtful.labels(**self._labels, code=code).inc(int(count))

    def model_gone(self, model: str) -> None:
        """Remove the series of a model that is no longer resident."""
        if model in self._shown:
            self._shown.discard(model)
            self._model_requests.remove(*self._labels.values(), model)

    def text(self) -> str:
        """The exposition as text, for the supervisor."""
        return generate_latest(self.registry).decode()


class AnswerSeries(NamedTuple):
    """A counter of answers, and a histogram of their times in seconds."""

    answers: LoopCounter
    seconds: LoopHistogram


class ReleaseSeries(NamedTuple):
    """Counters of requests by a name and a version, and a histogram of the times of those that succeeded."""

    ok: Counter
    failed: Counter
    seconds: Histogram


class AsyncSeries(NamedTuple):
    """Of asynchronous invocations: how many were accepted, answered and failed, and how many are under way."""

    accepted: Counter
    done: Counter
    failed: Counter
    under_way: Gauge


class TraceSeries(NamedTuple):
    """What became of sampled traces, see `contract.TRACES`. Any thread may count."""

    exported: Counter
    failed: Counter
    dropped: Counter
    skipped: Counter


class FrontMetrics:
    """What one front counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = CounterFamily(contract.INFERENCE_REQUESTS)
        self._seconds = HistogramFamily(contract.INFERENCE_SECONDS, _HITS)
        self.registry.register(self._requests)
        self.registry.register(self._seconds)
        self._under_way = _make_gauge(contract.UNDER_WAY, self.registry)
        counted = _make_counter(contract.ASYNC_INVOCATIONS, self.registry)
        accepted, done, failed = (counted.labels(result) for result in ("accepted", "done", "failed"))
        self.async_jobs = AsyncSeries(accepted, done, failed, _make_gauge(contract.ASYNC_UNDER_WAY, self.registry))
        self.forwarded = _make_counter(contract.FORWARDED, self.registry)
        traced = _make_counter(contract.TRACES, self.registry)
        self.traces = TraceSeries(*map(traced.labels, contract.TRACE_RESULTS))
        self._releases = _make_counter(contract.RELEASE_REQUESTS, self.registry)
        self._release_seconds = _make_histogram(contract.RELEASE_SECONDS, self.registry)

    def show_protocol(self, protocol: str, codes: Iterable[int]) -> None:
        """Have the counters of a protocol's answers from the start, before the first of them.

        Its histogram comes with its first request: that has 28 series a protocol, which every scrape would parse.
        """
        for code in codes:
            self._requests.labels(protocol, str(code))

    def bind_answers(self, protocol: str, code: int) -> AnswerSeries:
        """The series of answers of a protocol with a status code; to be kept, since finding them costs microseconds."""
        return AnswerSeries(self._requests.labels(protocol, str(code)), self._seconds.labels(protocol))

    def bind_release(self, name: str, version: str) -> ReleaseSeries:
        """The series of a name in the table of releases, and of one of its versions."""
        ok, failed = (self._releases.labels(name, version, result) for result in _RESULTS)
        return ReleaseSeries(ok, failed, self._release_seconds.labels(name, version))

    def drop_release(self, name: str, version: str) -> None:
        """Remove these series: the name or its version is not in the table any more."""
        for result in _RESULTS:
            self._releases.remove(name, version, result)
        self._release_seconds.remove(name, version)

    def list_examples(self) -> Iterator[tuple[dict[str, str], BucketExample]]:
        """Examples of requests, with the labels of their buckets in `inference_request_seconds`."""
        return self._seconds.list_examples()

    def show_under_way(self, counts: Mapping[int, int]) -> None:
        """The requests under way at each worker now."""
        self._under_way.clear()
        for worker, count in counts.items():
            self._under_way.labels(str(worker)).set(count)

    def text(self) -> str:
        """The exposition as text, for the supervisor."""
        return generate_latest(self.registry).decode()


class HostMetrics:
    """What the supervisor counts: which workers are up, the access log, the disk tier of all workers, the watch."""

    def __init__(self, version: str = "") -> None:
        """`version`: of Fleetcast, for `build_info`."""
        self.registry = CollectorRegistry()
        self.up = _make_gauge(contract.WORKER_UP, self.registry)
        self.restarts = _make_counter(contract.WORKER_RESTARTS, self.registry)
        self.disk_bytes = _make_gauge(contract.CACHE_BYTES, self.registry).labels("disk")
        self.disk_capacity = _make_gauge(contract.CACHE_CAPACITY, self.registry).labels("disk")
        self.disk_evictions = _make_counter(contract.EVICTIONS, self.registry).labels("disk", "budget")
        checks = _make_counter(contract.STORE_CHECKS, self.registry)
        self.checks = {result: checks.labels(result) for result in ("unchanged", "changed", "removed", "failed")}
        rows = _make_counter(contract.ACCESS_LOG_ROWS, self.registry)
        self.logged, self.not_logged = rows.labels("written"), rows.labels("dropped")
        self.quarantined = _make_gauge(contract.QUARANTINED, self.registry)
        self.pinned = _make_gauge(contract.PINNED, self.registry)
        self.store_failing = _make_gauge(contract.STORE_FAILING, self.registry)
        build = _make_gauge(contract.BUILD_INFO, self.registry)
        build.labels(version, platform.python_version()).set(1)

    def text(self) -> str:
        """The exposition as text."""
        return generate_latest(self.registry).decode()


class MergedMetrics:
    """A collector over the latest exposition of every process, and over the counters of those that ended."""

    def __init__(self) -> None:
        self._living: dict[str, str] = {}
        self._dead: list[Metric] = []

    def update(self, process: str, text: str) -> None:
        """Take the latest exposition of a running process."""
        self._living[process] = text

    def retire(self, process: str) -> None:
        """Keep the dead process's counters; drop its gauges and per-model series."""
        families = text_string_to_metric_families(self._living.pop(process, ""))
        counted = [family for family in families if family.type != _GAUGE]
        for family in counted:
            family.samples = [sample for sample in family.samples if sample.labels.keys().isdisjoint(_NAMING)]
        self._dead = merge_families([*self._dead, *counted])

    def collect(self) -> Iterator[Metric]:
        """The families of all processes, equal series summed."""
        living = map(text_string_to_metric_families, self._living.values())
        yield from merge_families(chain(self._dead, *living))


def render_metrics_table() -> str:
    """Every metric as a row of Markdown, for the reference."""
    rows = ["| metric | what it is |", "|---|---|"]
    for spec in contract.METRICS:
        labels = f"{{{','.join(spec.labels)}}}" if spec.labels else ""
        rows.append(f"| `{spec.series}{labels}` | {spec.help} |")
    return "\n".join(rows)


def merge_families(families: Iterable[Metric]) -> list[Metric]:
    """Merge families of equal name into one; samples of equal name and labels are summed.

    Of gauges under names of TorchServe's and of handlers, which are times and sizes, the largest is shown.
    """
    merged: dict[str, Metric] = {}
    sums: dict[str, dict[tuple[str, frozenset[tuple[str, str]]], float]] = {}
    for family in families:
        merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        values = sums.setdefault(family.name, {})
        for sample in family.samples:
            series = (sample.name, frozenset(sample.labels.items()))
            if family.type == _GAUGE and not family.name.startswith(METRIC_PREFIX):
                values[series] = max(values.get(series, sample.value), sample.value)
            else:
                values[series] = values.get(series, 0.0) + sample.value
    for name, values in sums.items():
        for (sample_name, labels), value in values.items():
            merged[name].add_sample(sample_name, dict(sorted(labels)), value)
    return list(merged.values())
