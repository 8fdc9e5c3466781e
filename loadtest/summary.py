"""A load's results as numbers to keep, and as tables for the terminal."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from loadtest.outcome import CACHE, LOST, NO_ANSWER, Run
from loadtest.profiles import Float64

try:
    from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("the load tester needs hdrhistogram: pip install 'fleetcast[load]'") from missing

PERCENTILES = (50, 90, 99, 99.9)
HIGHEST_US, DIGITS = 3_600_000_000, 3  #: what a histogram holds, in microseconds, and how exactly
BARS, SLOTS = "▁▂▃▄▅▆▇█", 60
TIERS = ("store", "disk")

Counts = defaultdict[tuple[str, str], float]  #: (metric without prefix, its result or tier) -> sum over processes
Results = dict[str, Any]


def results(run: Run, counts: Counts | None, memory: Mapping[str, int] | None) -> Results:
    """Everything a record keeps. `counts`: what the run added to the server's metrics; `memory`: bytes by process."""
    answered = run.status == 200  # noqa: PLR2004
    by_cache = {name: int((answered & (run.cache == i)).sum()) for i, name in enumerate(CACHE) if name}
    rows = {"all": np.ones(len(answered), np.bool_)}
    rows |= {name: answered & (run.cache == i) for i, name in enumerate(CACHE) if name}
    rows["failed"] = ~answered
    return {
        "invalid": run.invalid(),
        "requests": len(answered),
        "seconds": run.schedule.seconds,
        "answered_per_s": float(answered.sum()) / max(run.schedule.seconds, run.ended),
        "hit_ratio": by_cache["hit"] / max(1, sum(by_cache.values())),
        "latency": {name: distribution(run.latency[row]) for name, row in rows.items() if row.any()},
        "lag": distribution(run.lag),
        "worst_ms": worst(run.schedule.at, run.latency, run.schedule.seconds),
        "failures": _failures(run.status),
        "checked": run.checked,
        "unsound": list(run.unsound),
        "metrics": None if counts is None else _metrics(counts),
        "memory": memory,
    }


def distribution(seconds: Float64) -> Results:
    """Percentiles in milliseconds, to three digits, and the whole HDR histogram (of microseconds), encoded."""
    histogram = HdrHistogram(1, HIGHEST_US, DIGITS)
    for value in (seconds * 1e6).round().clip(1, HIGHEST_US).astype(int).tolist():
        histogram.record_value(value)
    found = {f"p{p:g}_ms": histogram.get_value_at_percentile(p) / 1e3 for p in PERCENTILES}
    return {"count": len(seconds), **found, "max_ms": float(seconds.max()) * 1e3, "hdr": histogram.encode().decode()}


def worst(at: Float64, latency: Float64, seconds: float) -> list[float]:
    """The slowest request of each of SLOTS equal spans of intended time, in milliseconds; 0 where none was due."""
    slots: Float64 = np.zeros(SLOTS)
    np.maximum.at(slots, (at * SLOTS / seconds).astype(int).clip(0, SLOTS - 1), latency * 1e3)
    return [round(value, 3) for value in slots.tolist()]


def sparkline(values: list[float]) -> str:
    """Bars on a logarithmic scale from the smallest to the largest value; a blank for 0."""
    logs = np.log([value for value in values if value] or [1.0])
    low, span = logs.min(), max(float(np.ptp(logs)), 1e-9)
    return "".join(BARS[round((np.log(v) - low) / span * (len(BARS) - 1))] if v else " " for v in values)


def latency_table(found: Results) -> Table:
    """A row for all requests, for each thing the cache did, for failures, and for how late the driver was itself."""
    table = Table("ms from the intended time", "requests", *(f"p{p:g}" for p in PERCENTILES), "max")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in {**found["latency"], "left late by": found["lag"]}.items():
        values = [*(row[f"p{p:g}_ms"] for p in PERCENTILES), row["max_ms"]]
        table.add_row(name, str(row["count"]), *(f"{value:.2f}" for value in values))
    return table


def facts_table(found: Results) -> Table:
    """What is not latency."""
    table = Table(show_header=False)
    for row in _facts(found):
        table.add_row(*row)
    return table


def _facts(found: Results) -> Iterator[tuple[str, str]]:
    yield "answered", f"{found['answered_per_s']:.1f} requests/s"
    for what, count in found["failures"].items():
        yield f"failed: {what}", str(count)
    yield "sound answers", f"{found['checked'] - len(found['unsound'])} of {found['checked']} looked into"
    yield "hit ratio", f"{found['hit_ratio']:.3f}"
    if (metrics := found["metrics"]) is not None:
        yield "hit ratio by /metrics", f"{metrics['hit_ratio']:.3f}"
        for tier in TIERS:
            loads, seconds = metrics[f"loads_from_{tier}"], metrics[f"load_seconds_from_{tier}"]
            mean = f", {seconds / loads * 1e3:.2f} ms each" if loads else ""
            yield f"loads from {tier}", f"{loads:.0f}{mean}"
        yield "evictions", f"{metrics['evictions']:.0f}"
    for process, size in (found["memory"] or {}).items():
        yield f"memory of {process}", f"{size / 1e6:.1f} MB (PSS)"


def _metrics(counts: Counts) -> Results:
    hits, misses, joined = (counts["model_cache_requests_total", result] for result in ("hit", "miss", "coalesced"))
    found: Results = {"hit_ratio": hits / max(1.0, hits + misses + joined)}
    for tier in TIERS:
        found[f"loads_from_{tier}"] = counts["model_loading_seconds_count", tier]
        found[f"load_seconds_from_{tier}"] = counts["model_loading_seconds_sum", tier]
    return {**found, "evictions": counts["model_evictions_total", "device"]}


def _failures(status: npt.NDArray[np.int64]) -> dict[str, int]:
    """Status or reason -> how many."""
    said = {NO_ANSWER: "no answer in time", LOST: "connection refused or lost"}
    counted = Counter(status[status != 200].tolist())  # noqa: PLR2004
    return {said.get(code, f"status {code}"): count for code, count in counted.most_common()}
