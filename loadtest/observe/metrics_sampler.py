"""Samples a server's /metrics and the memory of its processes while a load runs."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from server import contract
from server.contract import MetricSpec

TIERS = ("store", "disk", "host")  #: tiers of a load
MIN_SPAN_S = 0.25  #: least seconds between samples; rates over less are noise

MetricSums = defaultdict[tuple[str, str], float]  #: (series, its result, tier or "") -> sum over processes
Buckets = dict[str, dict[float, float]]  #: tier -> upper bound in seconds (inf the last) -> loads up to it
Curves = dict[str, Any]


@dataclass(frozen=True, slots=True)
class MetricsSample:
    """The server at `t` seconds from the start of the schedule."""

    t: float
    counts: MetricSums
    buckets: Buckets
    memory: Mapping[str, int]


@dataclass(slots=True)
class MetricsSampler:
    """Collects samples. `scrape` returns the text of /metrics, `memory` the bytes by process; None: not available."""

    scrape: Callable[[], str] | None = None
    memory: Callable[[], dict[str, int]] | None = None
    samples: list[MetricsSample] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<MetricsSampler {len(self.samples)} samples>"

    def look(self, t: float) -> None:
        """Take a sample; it replaces one taken just before. Raises what `scrape` and `memory` raise."""
        counts, buckets = parse_metrics(self.scrape()) if self.scrape else (defaultdict(float), {})
        if len(self.samples) > 1 and t - self.samples[-1].t < MIN_SPAN_S:
            self.samples.pop()
        self.samples.append(MetricsSample(t, counts, buckets, self.memory() if self.memory else {}))

    def gained(self) -> MetricSums | None:
        """Return the increase of each counter from the first to the last sample; None without /metrics."""
        if self.scrape is None or not self.samples:
            return None
        return _subtract_sums(self.samples[0].counts, self.samples[-1].counts)

    def load_times(self) -> Curves | None:
        """Return the histogram of load times by tier: bounds in seconds (None: infinity) and counts between them."""
        if self.scrape is None or not self.samples:
            return None
        first, last = self.samples[0].buckets, self.samples[-1].buckets
        found = {}
        for tier, ends in last.items():
            bounds = sorted(ends)
            below = [ends[bound] - first.get(tier, {}).get(bound, 0.0) for bound in bounds]
            counts = [max(0.0, b - a) for a, b in pairwise([0.0, *below])]
            if any(counts):
                found[tier] = {"le_s": [b if math.isfinite(b) else None for b in bounds], "count": counts}
        return found

    def server_over_time(self) -> Curves | None:
        """Return rates and means between samples, and levels at their ends; None without /metrics."""
        if self.scrape is None or len(self.samples) < 2:  # noqa: PLR2004 -- a span has two ends
            return None
        spans = [_SampleSpan(a, b) for a, b in pairwise(self.samples)]
        loads = contract.LOADING.count
        tiers = [tier for tier in TIERS if any(span.of(loads, tier) for span in spans)]
        return {
            "t_s": [round(span.end.t, 3) for span in spans],
            "hit_ratio": [span.hit_ratio() for span in spans],
            "loads_per_s": {tier: [span.of(loads, tier) / span.seconds for span in spans] for tier in tiers},
            "load_ms": {tier: [span.mean_ms(contract.LOADING, tier) for span in spans] for tier in tiers},
            "evictions_per_s": [span.of(contract.EVICTIONS.series, "device") / span.seconds for span in spans],
            "loaded_models": [span.end.counts[contract.LOADED_MODELS.series, ""] for span in spans],
            "cache_bytes": [span.end.counts[contract.CACHE_BYTES.series, "device"] for span in spans],
            "queue_ms": [span.mean_ms(contract.QUEUE) for span in spans],
            "batch_rows": [span.mean(contract.BATCH_ROWS) for span in spans],
        }

    def memory_over_time(self) -> Curves | None:
        """Return the bytes of each process at each sample; 0 before a process started."""
        if self.memory is None or not self.samples:
            return None
        names = sorted({name for sample in self.samples for name in sample.memory})
        found: Curves = {"t_s": [round(sample.t, 3) for sample in self.samples]}
        return found | {name: [sample.memory.get(name, 0) for sample in self.samples] for name in names}

    def last_memory(self) -> dict[str, int] | None:
        """Return the bytes by process in the last sample."""
        return None if self.memory is None or not self.samples else dict(self.samples[-1].memory)


@dataclass(frozen=True, slots=True)
class _SampleSpan:
    """The time between two samples."""

    start: MetricsSample
    end: MetricsSample

    @property
    def seconds(self) -> float:
        return max(1e-3, self.end.t - self.start.t)

    def of(self, name: str, label: str = "") -> float:
        """Return the increase of a counter; it is not negative if a process restarted and counts from 0."""
        return max(0.0, self.end.counts[name, label] - self.start.counts[name, label])

    def mean(self, metric: MetricSpec, label: str = "") -> float | None:
        count = self.of(metric.count, label)
        return self.of(metric.sum, label) / count if count else None

    def mean_ms(self, metric: MetricSpec, label: str = "") -> float | None:
        mean = self.mean(metric, label)
        return None if mean is None else mean * 1e3

    def hit_ratio(self) -> float | None:
        hits, *others = (self.of(contract.CACHE_REQUESTS.series, each) for each in contract.CACHE_RESULTS)
        asked = hits + sum(others)
        return hits / asked if asked else None


def parse_metrics(text: str) -> tuple[MetricSums, Buckets]:
    """Parse the text of /metrics into sums over processes, and the buckets of load times by tier."""
    counts: MetricSums = defaultdict(float)
    buckets: Buckets = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name, labels = sample.name, sample.labels
            if name == contract.LOADING.series + "_bucket":
                tier = buckets.setdefault(labels.get("tier", ""), defaultdict(float))
                tier[float(labels["le"])] += sample.value
            elif "le" not in labels:
                counts[name, labels.get("result") or labels.get("tier", "")] += sample.value
    return counts, buckets


def _subtract_sums(first: MetricSums, last: MetricSums) -> MetricSums:
    names: Iterable[tuple[str, str]] = last.keys()
    gained: MetricSums = defaultdict(float)
    gained.update({name: max(0.0, last[name] - first.get(name, 0.0)) for name in names})
    return gained
