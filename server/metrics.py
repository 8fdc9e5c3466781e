"""Every metric, once (CONTRACTS 7), and how the supervisor merges what its children count.

Each process counts in a registry of its own. On a scrape the supervisor asks the children for their exposition, adds
what their dead predecessors had counted, and sums equal series. So counters never fall when a worker dies.
"""

from collections.abc import Iterable, Iterator
from itertools import chain

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from server.logs import STANDARD_ERROR

disable_created_metrics()  # type: ignore[no-untyped-call]

_FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_AGES = (1, 10, 60, 300, 900, 3600, 4 * 3600, 24 * 3600, 7 * 24 * 3600)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

#: Series of living things only: what a dead process last said of these is forgotten.
_GAUGE = "gauge"


class DroppedLogLines(Collector):
    """Log lines of this process that were dropped: standard error's reader stopped, or has gone."""

    def collect(self) -> Iterator[Metric]:
        """One counter."""
        yield CounterMetricFamily(
            "fleetcast_log_lines_dropped",
            "Log lines dropped because standard error was not read",
            STANDARD_ERROR.dropped,
        )


class WorkerMetrics:
    """What a worker counts. The labels `worker` and `device` are on every series."""

    def __init__(self, worker: int, device: str, per_model: int = 0) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(DroppedLogLines())
        self._labels = {"worker": str(worker), "device": device}
        self._per_model = per_model
        self._shown: set[str] = set()
        count = self._counter("model_cache_requests", "Requests that reached a worker, by what the cache did", "result")
        self.hits, self.misses, self.coalesced = (
            count.labels(**self._labels, result=result) for result in ("hit", "miss", "coalesced")
        )
        bind = self._labels
        self.loading_wait = self._histogram("model_loading_wait_seconds", "Wait of a request for its model").labels(
            **bind
        )
        self.downloading = self._histogram("model_downloading_seconds", "Store requests of a load").labels(**bind)
        self.loading = self._histogram("model_loading_seconds", "A load from its start until the model serves", "tier")
        self.unloading = self._histogram("model_unloading_seconds", "Forgetting a model").labels(**bind)
        self.loaded = self._gauge("loaded_models", "Resident models").labels(**bind)
        held = self._gauge("model_cache_bytes", "Bytes held", "tier")
        self.bytes = held.labels(**bind, tier="device")
        capacity = self._gauge("model_cache_capacity_bytes", "Bytes that may be held", "tier")
        self.capacity = capacity.labels(**bind, tier="device")
        self.host_bytes, self.host_capacity = held.labels(**bind, tier="host"), capacity.labels(**bind, tier="host")
        self.evictions = self._counter("model_evictions", "Models that left", "tier", "reason")
        self.age = self._histogram(
            "model_age_at_eviction_seconds", "Time since the load of an evicted model", buckets=_AGES
        ).labels(**bind)
        self.failures = self._counter("model_load_failures", "Loads that failed, by reason", "reason")
        self.swaps = self._counter("model_swaps", "Replacements of a serving version", "result")
        self.prefetch = self._counter(
            "prefetch", "Models loaded before they were asked for, by what came of it", "result"
        )
        self.rhythms = self._gauge("prefetch_models", "Models whose next call is foreseen").labels(**bind)
        self.queue = self._histogram("inference_queue_seconds", "Wait of a request for its step").labels(**bind)
        self.batch_rows = self._histogram("inference_batch_rows", "Rows of a step", buckets=_SIZES).labels(**bind)
        self.batch_models = self._histogram("inference_batch_models", "Models of a step", buckets=_SIZES).labels(**bind)
        spent = self._counter("step_seconds", "Where the time of steps goes", "part")
        self.decode_s, self.forward_s, self.encode_s = (
            spent.labels(**bind, part=part) for part in ("decode", "forward", "encode")
        )
        self._model_requests = self._counter("model_requests", "Requests by resident model", "model")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"fleetcast_{name}", text, [*self._labels, *labels], registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"fleetcast_{name}", text, [*self._labels, *labels], registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str, buckets: tuple[float, ...] = _FAST) -> Histogram:
        return Histogram(f"fleetcast_{name}", text, [*self._labels, *labels], registry=self.registry, buckets=buckets)

    def labelled(self, metric: Counter, **labels: str) -> Counter:
        """One series of a counter that has labels beside the worker's."""
        return metric.labels(**self._labels, **labels)

    def load_seconds(self, tier: str, seconds: float) -> None:
        """A load from `tier` took so long."""
        self.loading.labels(**self._labels, tier=tier).observe(seconds)

    def model_request(self, model: str, count: int = 1) -> None:
        """Count under the model's own name, where the setting allows and the cap has room."""
        if not self._per_model:
            return
        if model not in self._shown:
            if len(self._shown) >= self._per_model:
                return
            self._shown.add(model)
        self._model_requests.labels(**self._labels, model=model).inc(count)

    def model_gone(self, model: str) -> None:
        """The model left: so does its series."""
        if model in self._shown:
            self._shown.discard(model)
            self._model_requests.remove(*self._labels.values(), model)

    def text(self) -> str:
        """The exposition, for the supervisor."""
        return generate_latest(self.registry).decode()


class FrontMetrics:
    """What a front counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(DroppedLogLines())
        self._requests = Counter(
            "fleetcast_inference_requests",
            "Answers by protocol and status code",
            ["protocol", "code"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "fleetcast_inference_request_seconds",
            "From request body to answer, in the front",
            ["protocol"],
            registry=self.registry,
            buckets=_FAST,
        )
        self._bound: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    def answered(self, protocol: str, code: int, seconds: float) -> None:
        """One answer went out."""
        bound = self._bound.get((protocol, code))
        if bound is None:
            pair = (self._requests.labels(protocol, str(code)), self._seconds.labels(protocol))
            bound = self._bound[protocol, code] = pair
        bound[0].inc()
        bound[1].observe(seconds)

    def text(self) -> str:
        """The exposition, for the supervisor."""
        return generate_latest(self.registry).decode()


class HostMetrics:
    """What the supervisor knows itself: who is up, and the disk tier, which the host's workers share."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(DroppedLogLines())
        self.up = Gauge(
            "fleetcast_worker_up", "1: the worker takes requests", ["worker", "device"], registry=self.registry
        )
        self.restarts = Counter(
            "fleetcast_worker_restarts", "Workers started again", ["worker", "device"], registry=self.registry
        )
        held = Gauge("fleetcast_model_cache_bytes", "Bytes held", ["tier"], registry=self.registry)
        room = Gauge("fleetcast_model_cache_capacity_bytes", "Bytes that may be held", ["tier"], registry=self.registry)
        self.disk_bytes, self.disk_capacity = held.labels("disk"), room.labels("disk")
        self.disk_evictions = Counter(
            "fleetcast_model_evictions", "Models that left", ["tier", "reason"], registry=self.registry
        ).labels("disk", "budget")
        rows = Counter(
            "fleetcast_access_log_rows",
            "Requests by whether the access log has them",
            ["result"],
            registry=self.registry,
        )
        self.logged, self.not_logged = rows.labels("written"), rows.labels("dropped")

    def text(self) -> str:
        """The exposition."""
        return generate_latest(self.registry).decode()


class Merged:
    """A collector over the last word of every process, living and dead."""

    def __init__(self) -> None:
        self._living: dict[str, str] = {}
        self._dead: list[Metric] = []

    def update(self, process: str, text: str) -> None:
        """The latest exposition of a living process."""
        self._living[process] = text

    def buried(self, process: str) -> None:
        """The process is gone: what it had counted stays, what it said of its state and of single models does not."""
        families = text_string_to_metric_families(self._living.pop(process, ""))
        counted = [family for family in families if family.type != _GAUGE]
        for family in counted:
            family.samples = [sample for sample in family.samples if "model" not in sample.labels]
        self._dead = merge([*self._dead, *counted])

    def collect(self) -> Iterator[Metric]:
        """The families of all processes, equal series summed."""
        living = map(text_string_to_metric_families, self._living.values())
        yield from merge(chain(self._dead, *living))


def merge(families: Iterable[Metric]) -> list[Metric]:
    """Families of equal name in one; their samples of equal name and labels are summed."""
    merged: dict[str, Metric] = {}
    sums: dict[str, dict[tuple[str, frozenset[tuple[str, str]]], float]] = {}
    for family in families:
        merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        values = sums.setdefault(family.name, {})
        for sample in family.samples:
            series = (sample.name, frozenset(sample.labels.items()))
            values[series] = values.get(series, 0.0) + sample.value
    for name, values in sums.items():
        for (sample_name, labels), value in values.items():
            merged[name].add_sample(sample_name, dict(sorted(labels)), value)
    return list(merged.values())
