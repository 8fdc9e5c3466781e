"""What the fleet is doing, in numbers that a page and a terminal draw: `GET /fleet/overview`.

Counts go on from the server's start, so that a viewer takes two answers and divides by the seconds between them. An
answer is made at most once a second, however many viewers ask: it asks every process for its metrics.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, Generic, TypeVar

from prometheus_client.metrics_core import Metric

from server import contract
from server.contract import METRIC_PREFIX, MetricSpec
from server.metrics import MergedMetrics

FRESH_S = 1.0  #: for how long an answer serves all viewers

Made = TypeVar("Made")
Series = dict[str, float]  #: values by the label that a viewer tells apart
Buckets = dict[str, Any]  #: `bounds` in seconds or rows, `counts` up to and with each (the last: all), `sum`


class SharedReading(Generic[Made]):
    """An answer that is made at most once in FRESH_S, for all who ask within it."""

    def __init__(self, make: Callable[[], Coroutine[Any, Any, Made]], clock: Callable[[], float]) -> None:
        self._make, self._clock = make, clock
        self._made: asyncio.Task[Made] | None = None
        self._made_at = 0.0

    def __repr__(self) -> str:
        return f"<SharedReading made at {self._made_at:.1f}>"

    async def read(self) -> Made:
        """The answer for now, at most FRESH_S old. Viewers that ask meanwhile wait for the one that is made."""
        made = self._made
        if made is None or (made.done() and self._clock() - self._made_at >= FRESH_S):
            self._made_at = self._clock()
            made = self._made = asyncio.create_task(self._make())
        return await asyncio.shield(made)  # a viewer that leaves does not take it from the others


class Overview:
    """Makes the answers of `GET /fleet/overview`, one for all who ask within a second."""

    def __init__(
        self,
        read_metrics: Callable[[], Awaitable[MergedMetrics]],
        describe_server: Callable[[], Mapping[str, object]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`describe_server` says what no metric does: version, store, readiness, processes."""
        self._read_metrics, self._describe_server = read_metrics, describe_server
        self._shared = SharedReading(self._make, clock)

    def __repr__(self) -> str:
        return f"<Overview {self._shared!r}>"

    async def read(self) -> dict[str, object]:
        """The answer for now."""
        return await self._shared.read()

    async def _make(self) -> dict[str, object]:
        merged = await self._read_metrics()
        return {"at": time.time(), **self._describe_server(), **summarise_metrics(merged.collect())}


def summarise_metrics(families: Iterable[Metric]) -> dict[str, object]:
    """Sum the families over processes, and over the labels that a viewer does not tell apart."""
    by_name = {family.name: family for family in families}

    def find(spec: MetricSpec) -> Metric | None:
        return by_name.get(METRIC_PREFIX + spec.name)

    return {
        "requests": _sum_events_by(find(contract.INFERENCE_REQUESTS), "code"),
        "requests_by_protocol": _sum_events_by(find(contract.INFERENCE_REQUESTS), "protocol"),
        "forwarded": _sum_by(find(contract.FORWARDED), "").get("", 0.0),
        "request_seconds": _sum_buckets(find(contract.INFERENCE_SECONDS)),
        "queue_seconds": _sum_buckets(find(contract.QUEUE)),
        "under_way": _sum_by(find(contract.UNDER_WAY), "worker"),
        "cache_requests": _sum_by(find(contract.CACHE_REQUESTS), "result"),
        "loaded_models": _sum_by(find(contract.LOADED_MODELS), "worker"),
        "cache_bytes": _sum_by(find(contract.CACHE_BYTES), "tier"),
        "cache_capacity_bytes": _sum_by(find(contract.CACHE_CAPACITY), "tier"),
        "evictions": _sum_events_by(find(contract.EVICTIONS), "tier"),
        "load_seconds": _sum_buckets_by(find(contract.LOADING), "tier"),
        "load_failures": _sum_events_by(find(contract.LOAD_FAILURES), "reason"),
        "loads_under_way": _sum_by(find(contract.LOADS_UNDER_WAY), "state"),
        "swaps": _sum_events_by(find(contract.SWAPS), "result"),
        "prefetch": _sum_events_by(find(contract.PREFETCH), "result"),
        "batch_rows": _sum_buckets(find(contract.BATCH_ROWS)),
        "batch_models": _sum_buckets(find(contract.BATCH_MODELS)),
        "step_seconds": _sum_by(find(contract.STEP_SECONDS), "part"),
        "store_checks": _sum_by(find(contract.STORE_CHECKS), "result"),
        "restarts": _sum_by(find(contract.WORKER_RESTARTS), "worker"),
        "download_seconds": _sum_buckets(find(contract.DOWNLOADING)),
        "eviction_age_seconds": _sum_buckets(find(contract.AGE_AT_EVICTION)),
        "shortfall_bytes": _sum_buckets(find(contract.CACHE_SHORTFALL)),
        "quarantined_models": _sum_by(find(contract.QUARANTINED), ""),
        "process_cpu_seconds": _sum_by(find(contract.PROCESS_CPU), "process"),
        "process_open_files": _sum_by(find(contract.PROCESS_OPEN_FILES), "process"),
        "process_most_files": _sum_by(find(contract.PROCESS_MOST_FILES), "process"),
    }


def _sum_by(family: Metric | None, label: str) -> Series:
    """The samples of a counter or gauge by the value of one label."""
    sums: defaultdict[str, float] = defaultdict(float)
    for sample in family.samples if family is not None else ():
        sums[sample.labels.get(label, "")] += sample.value
    return dict(sums)


def _sum_events_by(family: Metric | None, label: str) -> Series:
    """The same without what has never happened: a viewer lists the codes and reasons that there were."""
    return {key: value for key, value in _sum_by(family, label).items() if value}


def _sum_buckets(family: Metric | None) -> Buckets:
    """One histogram over all labels of a family."""
    return _sum_buckets_by(family, "").get("", {"bounds": [], "counts": [], "sum": 0.0})


def _sum_buckets_by(family: Metric | None, label: str) -> dict[str, Buckets]:
    """A histogram for each value of a label that has counted any; with an empty label one over all."""
    counts: defaultdict[str, defaultdict[float, float]] = defaultdict(lambda: defaultdict(float))
    sums: defaultdict[str, float] = defaultdict(float)
    for sample in family.samples if family is not None else ():
        key = sample.labels.get(label, "")
        if sample.name.endswith("_bucket"):
            counts[key][float(sample.labels["le"])] += sample.value
        elif sample.name.endswith("_sum"):
            sums[key] += sample.value
    return {key: _make_buckets(found, sums[key]) for key, found in counts.items() if not label or any(found.values())}


def _make_buckets(counts: Mapping[float, float], total: float) -> Buckets:
    bounds = sorted(counts)
    return {"bounds": bounds[:-1], "counts": [counts[bound] for bound in bounds], "sum": total}
