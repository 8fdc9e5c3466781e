"""Summarizes a load run as numbers for a record and as tables for the terminal."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from loadtest.driver.profiles import Float64
from loadtest.driver.run_result import CACHE, LOST, NO_ANSWER, Run, name_status
from loadtest.observe.metrics_sampler import MetricsSampler, MetricSums
from loadtest.observe.server_access import ADVICE
from server import contract

try:
    from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError("the load tester needs hdrhistogram: pip install 'fleetcast[load]'") from missing

PERCENTILES = (50, 90, 99, 99.9)
HIGHEST_US, DIGITS = 3_600_000_000, 3  #: range of a histogram in microseconds, and its significant digits
BARS, SLOTS = "▁▂▃▄▅▆▇█", 60
TIERS = ("store", "disk")
NO_STATUSES: Mapping[int, str] = {}

Results = dict[str, Any]
MIN_SPAN_S, MAX_SPANS = 0.5, 240  #: least seconds and most spans of a curve over time


@dataclass(frozen=True, slots=True)
class Slo:
    """The limits of a run; None means no limit. Latencies are in ms from the intended time, shares of all requests."""

    p50_ms: float | None = None
    p99_ms: float | None = None
    failed: float | None = None
    hit_ratio: float | None = None

    def verdict(self, found: Results) -> Results | None:
        """Compare each limit with the result; None without limits. An invalid run meets none."""
        latency, (what, failed) = found["latency"]["all"], _compute_failed_share(found)
        checks = [
            _check_limit("p50 latency", self.p50_ms, latency["p50_ms"], "{:.4g} ms", most=True),
            _check_limit("p99 latency", self.p99_ms, latency["p99_ms"], "{:.4g} ms", most=True),
            _check_limit(what, self.failed, failed, "{:.4%}", most=True),
            _check_limit("hit ratio", self.hit_ratio, found["hit_ratio"], "{:.4f}", most=False),
        ]
        asked = [check for check in checks if check]
        if not asked:
            return None
        return {"met": not found["invalid"] and all(check["met"] for check in asked), "checks": asked}


def summarize_run(
    run: Run, watch: MetricsSampler, slo: Slo | None = None, statuses: Mapping[int, str] = NO_STATUSES
) -> Results:
    """Summarize a run, and the server during it, as the results of a record. `statuses`: what failures mean there."""
    answered, counts = run.status == 200, watch.gained()  # noqa: PLR2004
    by_cache = {name: int((answered & (run.cache == i)).sum()) for i, name in enumerate(CACHE) if name}
    rows = {"all": np.ones(len(answered), np.bool_)}
    rows |= {name: answered & (run.cache == i) for i, name in enumerate(CACHE) if name}
    rows["failed"] = ~answered
    found = {
        "invalid": run.invalid(),
        "requests": len(answered),
        "seconds": run.schedule.seconds,
        "answered_per_s": float(answered.sum()) / max(run.schedule.seconds, run.ended),
        "hit_ratio": by_cache["hit"] / max(1, sum(by_cache.values())),
        "latency": {name: compute_distribution(run.latency[row]) for name, row in rows.items() if row.any()},
        "lag": compute_distribution(run.lag),
        "worst_ms": compute_slowest(run.schedule.at, run.latency, run.schedule.seconds),
        "over_time": compute_curves(run),
        "failures": _count_failures(run.status, statuses),
        "said": {name_status(status): words for status, words in sorted(run.said.items()) if words},
        "forecasts": _summarize_forecasts(run),
        "checked": run.checked,
        "unsound": [f"request {i}: {why}" for i, why in run.unsound],
        "metrics": None if counts is None else _summarize_metrics(counts),
        "server_over_time": watch.server_over_time(),
        "load_time": watch.load_times(),
        "memory": watch.last_memory(),
        "memory_over_time": watch.memory_over_time(),
    }
    return {**found, "slo": (slo or Slo()).verdict(found), "steps": None}


def compute_curves(run: Run) -> Results:
    """Compute curves over intended time: rates a second and latencies in ms; None for spans without requests."""
    seconds = run.schedule.seconds
    n = int(np.clip(seconds / MIN_SPAN_S, 1, MAX_SPANS))
    span = (run.schedule.at * n / seconds).astype(int).clip(0, n - 1)
    order = np.argsort(span, kind="stable")
    parts = np.split(order, np.searchsorted(span[order], np.arange(1, n)))
    answered, hit = run.status == 200, run.cache == CACHE.index("hit")  # noqa: PLR2004
    known = answered & (run.cache > 0)
    width, latency = seconds / n, run.latency * 1e3

    def each(value: Callable[[npt.NDArray[np.intp]], float]) -> list[float | None]:
        return [round(float(value(part)), 4) if len(part) else None for part in parts]

    return {
        "t_s": [round((i + 0.5) * width, 3) for i in range(n)],
        "due_per_s": [len(part) / width for part in parts],
        "answered_per_s": [int(answered[part].sum()) / width for part in parts],
        "failed_per_s": [int((~answered[part]).sum()) / width for part in parts],
        "p50_ms": each(lambda part: np.percentile(latency[part], 50)),
        "p99_ms": each(lambda part: np.percentile(latency[part], 99)),
        "max_ms": each(lambda part: latency[part].max()),
        "hit_ratio": [
            int((hit & known)[part].sum()) / count if (count := int(known[part].sum())) else None for part in parts
        ],
    }


def compute_distribution(seconds: Float64) -> Results:
    """Compute percentiles in milliseconds, to three digits, and the encoded HDR histogram of microseconds."""
    histogram = HdrHistogram(1, HIGHEST_US, DIGITS)
    for value in (seconds * 1e6).round().clip(1, HIGHEST_US).astype(int).tolist():
        histogram.record_value(value)
    found = {f"p{p:g}_ms": histogram.get_value_at_percentile(p) / 1e3 for p in PERCENTILES}
    return {"count": len(seconds), **found, "max_ms": float(seconds.max()) * 1e3, "hdr": histogram.encode().decode()}


def compute_slowest(at: Float64, latency: Float64, seconds: float) -> list[float]:
    """Return the slowest latency (ms) in each of SLOTS equal spans of intended time; 0 for spans without requests."""
    slots: Float64 = np.zeros(SLOTS)
    np.maximum.at(slots, (at * SLOTS / seconds).astype(int).clip(0, SLOTS - 1), latency * 1e3)
    return [round(value, 3) for value in slots.tolist()]


def draw_sparkline(values: list[float]) -> str:
    """Draw bars on a logarithmic scale from the smallest to the largest value; 0 is a blank."""
    logs = np.log([value for value in values if value] or [1.0])
    low, span = logs.min(), max(float(np.ptp(logs)), 1e-9)
    return "".join(BARS[round((np.log(v) - low) / span * (len(BARS) - 1))] if v else " " for v in values)


def build_latency_table(found: Results) -> Table:
    """Make a table with rows for all requests, each cache result, failures, and the lateness of the driver."""
    table = Table("ms from the intended time", "requests", *(f"p{p:g}" for p in PERCENTILES), "max")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in {**found["latency"], "left late by": found["lag"]}.items():
        values = [*(row[f"p{p:g}_ms"] for p in PERCENTILES), row["max_ms"]]
        table.add_row(name, str(row["count"]), *(f"{value:.2f}" for value in values))
    return table


def build_facts_table(found: Results) -> Table:
    """Make the table of all results that are not latencies."""
    table = Table(show_header=False)
    for row in _list_facts(found):
        table.add_row(*row)
    return table


def _list_facts(found: Results) -> Iterator[tuple[str, str]]:
    unit = "requests" if found["forecasts"] is None else "calls"
    yield "answered", f"{found['answered_per_s']:.1f} {unit}/s"
    if (forecasts := found["forecasts"]) is not None:
        alone = forecasts["per_call"] / found["latency"]["all"]["p50_ms"] * 1e3
        yield "forecasts", f"{forecasts['per_s']:.1f}/s, in calls for {forecasts['per_call']:.4g} models"
        yield "within a median call", f"{alone:.0f} forecasts/s"
        yield "failed forecasts", f"{forecasts['failed']} of {forecasts['asked']}, in {forecasts['calls']} calls"
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
    for check in (found["slo"] or {"checks": []})["checks"]:
        yield check["what"], f"{check['found']}, asked {check['limit']}: {'met' if check['met'] else 'MISSED'}"
    for process, size in (found["memory"] or {}).items():
        yield f"memory of {process}", f"{size / 1e6:.1f} MB (PSS)"


def _summarize_metrics(counts: MetricSums) -> Results:
    hits, misses, joined = (counts[contract.CACHE_REQUESTS.series, result] for result in contract.CACHE_RESULTS)
    found: Results = {"hit_ratio": hits / max(1.0, hits + misses + joined)}
    for tier in TIERS:
        found[f"loads_from_{tier}"] = counts[contract.LOADING.count, tier]
        found[f"load_seconds_from_{tier}"] = counts[contract.LOADING.sum, tier]
    return {**found, "evictions": counts[contract.EVICTIONS.series, "device"]}


def _summarize_forecasts(run: Run) -> Results | None:
    """Summarize the forecasts of calls for many models: requested, failed (alone or with their call), answered."""
    if run.forecasts is None:
        return None
    asked, failed = int(run.forecasts.asked.sum()), int(run.forecasts.failed.sum())
    per_s = (asked - failed) / max(run.schedule.seconds, run.ended)
    calls = len(run.status)
    return {"calls": calls, "asked": asked, "failed": failed, "per_s": per_s, "per_call": asked / calls}


def _compute_failed_share(found: Results) -> tuple[str, float]:
    """Return what can fail (requests or forecasts), and the share that failed."""
    if (forecasts := found.get("forecasts")) is not None:
        return "failed forecasts", forecasts["failed"] / forecasts["asked"]
    return "failed requests", sum(found["failures"].values()) / found["requests"]


def _count_failures(status: npt.NDArray[np.int64], statuses: Mapping[int, str]) -> dict[str, int]:
    """Count the failures by status or reason."""
    said = {NO_ANSWER: "no answer in time", LOST: "connection refused or lost"}
    said |= {code: f"status {name_status(code)}, {meaning}" for code, meaning in {**statuses, **ADVICE}.items()}
    counted = Counter(status[status != 200].tolist())  # noqa: PLR2004
    return {said.get(code, f"status {name_status(code)}"): count for code, count in counted.most_common()}


def _check_limit(what: str, limit: float | None, found: float, form: str, *, most: bool) -> Results | None:
    if limit is None:
        return None
    met = found <= limit if most else found >= limit
    bound = "at most" if most else "at least"
    return {"what": what, "limit": f"{bound} {form.format(limit)}", "found": form.format(found), "met": met}
