"""Judges whether memory, latency or any count grows at scale: records, verdicts and tables. Pure."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from rich.table import Table

from loadtest.observe.resource_counts import PLACES, Census

SWEEP_S = 6.0  #: seconds for which the disk cache may exceed its budget
LOCKS = 4096  #: most lock files of the disk cache, for any names


@dataclass(frozen=True, slots=True)
class TrafficSpan:
    """One span of traffic and the resources of the server after it. Times are milliseconds; CPU time is per request."""

    seconds: float
    requests: int
    failed: int
    hit_ratio: float
    hit_p50_ms: float
    hit_p99_ms: float
    miss_p50_ms: float
    miss_p99_ms: float
    cpu_us: Mapping[str, float]
    census: Census
    invalid: Sequence[str]


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a hit and of a page of a hundred models, for a number of archives and of resident models."""

    archives: int
    resident: int
    front_us: float
    hit_p50_ms: float
    page_ms: float


@dataclass(frozen=True, slots=True)
class Crowd:
    """One worker with more and more resident models; each field has a value for each step."""

    resident: Sequence[int]
    memory: Sequence[int]
    page_ms: Sequence[float]
    bytes_per_model: float
    hit_ratio: float
    hit_p99_ms: float


@dataclass(frozen=True, slots=True)
class GrowthVerdict:
    """A value that must not exceed `limit`."""

    what: str
    found: float
    limit: float
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the value is within its limit; False for a value that was not measured (NaN)."""
        return self.found <= self.limit


def compute_trend(values: Sequence[float]) -> float:
    """Compute the growth from one value to the next: the median slope of all pairs (Theil, Sen), robust to outliers."""
    slopes = [(b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(values), 2)]
    return statistics.median(slopes) if slopes else float("nan")


def judge_flat(what: str, values: Sequence[float], most: float, share: float = 0.0, unit: str = "") -> GrowthVerdict:
    """Judge that the later values grow by at most `most`, or by `share` of their level if that is more."""
    growth, level = compute_trend(values) * (len(values) - 1), statistics.median(values)
    return GrowthVerdict(f"{what}: growth", growth, max(most, share * level), unit)


def judge_no_slower(what: str, ms: Sequence[float]) -> GrowthVerdict:
    """Compare the best of the later half with the best of the earlier, since disturbances only add to a latency."""
    half = len(ms) // 2
    if not half:
        return GrowthVerdict(what, math.nan, math.nan, "ms")
    return GrowthVerdict(f"{what}: best later", min(ms[half:]), 1.3 * min(ms[:half]) + 0.5, "ms")


def judge_spans(spans: Sequence[TrafficSpan], disk: int) -> Iterator[GrowthVerdict]:
    """Judge the traffic with a disk cache of `disk` archives: no request fails, and no resource grows at the end."""
    late = spans[len(spans) // 3 :]
    yield from judge_counts(spans, disk)
    for process in late[0].census.memory:
        sizes = [span.census.memory[process] / 1e6 for span in late]
        yield judge_flat(f"memory of {process}", sizes, 3.0, 0.03, "MB")
        yield judge_flat(
            f"processor time of {process} per request", [span.cpu_us[process] for span in late], 50, 0.25, "us"
        )
    valid = [span for span in late if not span.invalid]
    yield GrowthVerdict("spans whose driver was late", len(late) - len(valid), len(late) // 2)
    for name in ("hit_p50_ms", "hit_p99_ms", "miss_p50_ms", "miss_p99_ms"):
        kind, percentile, _ = name.split("_")
        values = [value for span in valid if not math.isnan(value := getattr(span, name))]
        yield judge_no_slower(f"{percentile} of a {kind}", values)


def judge_counts(spans: Sequence[TrafficSpan], disk: int) -> Iterator[GrowthVerdict]:
    """Verdicts that noise does not affect: failures, and what is open, running, on disk and in /metrics at rest."""
    yield GrowthVerdict("requests failed or wrong", sum(span.failed for span in spans), 0)
    counts = [dict(span.census.numbers()) for span in spans[len(spans) // 3 :]]
    for name in counts[0]:
        if not name.startswith("files in disk cache/"):
            yield judge_flat(name, [count[name] for count in counts], 3)
    fetched = max((1 - span.hit_ratio) * span.requests / span.seconds for span in spans)
    blobs, index, locks, drafts = ([n[f"files in disk cache/{each}"] for n in counts] for each in PLACES)
    yield GrowthVerdict("archives in the disk cache", max(blobs), disk + fetched * SWEEP_S)
    yield GrowthVerdict("archives without a name there, or the reverse", max(map(_measure_distance, blobs, index)), 0)
    yield GrowthVerdict("lock files there", max(locks), LOCKS)
    yield GrowthVerdict("drafts left there", max(drafts), 0)


def _measure_distance(a: float, b: float) -> float:
    return abs(a - b)


def judge_costs(costs: Sequence[Cost]) -> Iterator[GrowthVerdict]:
    """Judge that more archives in the store do not cost more: routing against the smallest, pages at equal load."""
    first, last = costs[0], costs[-1]
    alike = next(cost for cost in costs if cost.resident >= 0.9 * last.resident)
    yield GrowthVerdict(
        f"front's time per hit, {last.archives} archives", last.front_us, 1.3 * first.front_us + 20, "us"
    )
    yield GrowthVerdict(f"a page of 100, {last.archives} archives", last.page_ms, 1.5 * alike.page_ms + 2, "ms")


def judge_crowd(found: Crowd, many: int, row_bytes: int) -> Iterator[GrowthVerdict]:
    """Judge a full worker: all models are resident and hit, at little more than their weights; pages cost the same."""
    yield GrowthVerdict(f"models missing of {many} in one worker", many - found.resident[-1], 0)
    yield GrowthVerdict("asked again, not hits", round((1 - found.hit_ratio) * many), 0)
    yield GrowthVerdict("memory per resident model", found.bytes_per_model / 1e3, row_bytes / 1e3 + 50, "KB")
    yield GrowthVerdict(f"a page of 100, {many} resident", found.page_ms[-1], 2 * found.page_ms[0] + 2, "ms")


# --- tables ---------------------------------------------------------------------------------------------------------


def build_spans_table(spans: Sequence[TrafficSpan]) -> Table:
    """Make a table with a row for every span, or for every n-th of many."""
    table = Table("span", "requests", "hit ratio", "hit p50, p99 ms", "miss p50, p99 ms", "memory MB", "fds", "files")
    for i in range(0, len(spans), -(-len(spans) // 12)):
        span, counts = spans[i], spans[i].census.counts
        table.add_row(
            f"{i + 1}{' late' if span.invalid else ''}",
            str(span.requests),
            f"{span.hit_ratio:.3f}",
            f"{span.hit_p50_ms:.2f} {span.hit_p99_ms:.2f}",
            f"{span.miss_p50_ms:.2f} {span.miss_p99_ms:.2f}",
            f"{sum(span.census.memory.values()) / 1e6:.1f}",
            str(sum(counts.descriptors.values())),
            str(sum(counts.files.values())),
        )
    return table


def build_costs_table(costs: Sequence[Cost], crowded: Crowd) -> Table:
    """Make a table with a row for every size of store, and for every step of the crowd."""
    table = Table("archives", "resident", "front us per hit", "hit p50 ms", "page of 100, ms", "worker MB")
    for cost in costs:
        cells = (f"{cost.front_us:.0f}", f"{cost.hit_p50_ms:.2f}", f"{cost.page_ms:.2f}", "")
        table.add_row(str(cost.archives), str(cost.resident), *cells)
    for resident, memory, page in zip(crowded.resident, crowded.memory, crowded.page_ms, strict=True):
        table.add_row("", str(resident), "", "", f"{page:.2f}", f"{memory / 1e6:.1f}")
    return table


def build_verdicts_table(verdicts: Sequence[GrowthVerdict]) -> Table:
    """Make a table of verdicts; failed ones come last, where they are noticed."""
    table = Table("", "what", "found", "at most", title="verdicts")
    for each in sorted(verdicts, key=lambda verdict: not verdict.met, reverse=True):
        word = "[green]met[/]" if each.met else "[red]FAILED[/]"
        table.add_row(word, each.what, f"{each.found:.4g} {each.unit}", f"{each.limit:.4g} {each.unit}")
    return table
