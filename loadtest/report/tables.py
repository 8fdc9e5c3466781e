"""The verdict and the tables of the report, of one run or of two compared. Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from loadtest.report.charts import NOTHING, TAGS, format_number, name_latency_row
from loadtest.report.results_schema import Record, Results

Percentile = Literal["count", "p50_ms", "p90_ms", "p99_ms", "p99.9_ms", "max_ms"]
PERCENTILES: tuple[tuple[str, Percentile], ...] = (
    ("p50", "p50_ms"),
    ("p90", "p90_ms"),
    ("p99", "p99_ms"),
    ("p99.9", "p99.9_ms"),
    ("max", "max_ms"),
)
KINDS = ("all", "hit", "miss", "coalesced", "failed")
TIERS: tuple[Literal["store", "disk"], ...] = ("store", "disk")
LIKE = 0.02  #: largest difference of a ratio from one that counts as equal

Good = Literal["less", "more", "neither"]  #: which of two values is better; a count is neither


@dataclass(frozen=True, slots=True)
class ReportTable:
    """Headings and rows; the first column names the row. `words`: the cells are text to wrap, not numbers."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    says: str = ""
    words: bool = False


@dataclass(frozen=True, slots=True)
class RunFact:
    """One number of each run, and which of two is better."""

    what: str
    values: Sequence[float | None]
    unit: str = ""
    good: Good = "neither"
    compare: bool = True  #: false: one of the runs says nothing about its server

    def cells(self) -> list[str]:
        """The cells of the row: each value, and for two runs the ratio B/A and a verdict."""
        shown = [f"{format_number(value)}{self.unit if value is not None else ''}" for value in self.values]
        return [*shown, *self.compared()] if len(self.values) > 1 else shown

    def compared(self) -> tuple[str, str]:
        """The ratio B/A and which run is better."""
        a, b = self.values
        if a is None or b is None or not self.compare:
            return NOTHING, NOTHING
        ratio = NOTHING if a == 0 else f"{b / a:.2f}" if b / a < 100 else f"{b / a:,.0f}"  # noqa: PLR2004
        if a == b or (a != 0 and abs(b / a - 1) <= LIKE):
            return ratio, "same"
        if self.good == "neither":
            return ratio, "more" if b > a else "less"
        return ratio, "B better" if (b < a) == (self.good == "less") else "B worse"


def are_comparable(runs: Sequence[Results]) -> bool:
    """Whether all runs are valid: the driver of an invalid one did not keep its schedule, so that its numbers lie."""
    return not any(run["invalid"] for run in runs)


def judge_run(run: Results) -> tuple[Literal["good", "bad", "plain"], str]:
    """Say in a sentence whether the run is valid and whether the SLO was met."""
    if run["invalid"]:
        return "bad", "Not valid: this run says nothing about the server."
    if run["answered_per_s"] == 0:
        return "bad", "Valid run, but nothing was answered."
    if (slo := run["slo"]) is None:
        return "plain", "Valid run. No service level was set."
    missed = sum(not check["met"] for check in slo["checks"])
    if slo["met"]:
        return (
            "good",
            f"Valid run, and the service level was met ({len(slo['checks'])} of {len(slo['checks'])} checks).",
        )
    return "bad", f"Valid run, but the service level was missed ({missed} of {len(slo['checks'])} checks failed)."


def list_remarks(run: Results) -> list[str]:
    """List remarks that qualify the verdict."""
    said_so = list(run["invalid"])
    if run["unsound"]:
        said_so.append(f"{len(run['unsound'])} of {run['checked']} answers that were looked into were wrong.")
    if (count := _count_failed(run)) > 0:
        said_so.append(f"{count:,} of {run['requests']:,} requests failed.")
    if (forecasts := run.get("forecasts")) and forecasts["failed"]:
        said_so.append(f"{forecasts['failed']:,} of {forecasts['asked']:,} forecasts failed.")
    missing = [
        what
        for what, there in (
            ("the server's metrics", run["metrics"] or run["server_over_time"]),
            ("the server's memory", run["memory"] or run["memory_over_time"]),
        )
        if not there
    ]
    return [*said_so, f"Not recorded: {' and '.join(missing)}."] if missing else said_so


def list_headlines(runs: Sequence[Results]) -> list[RunFact]:
    """List the most important numbers."""
    every = [run["latency"].get("all") for run in runs]
    facts = [
        RunFact("answered", [run["answered_per_s"] for run in runs], "/s", "more"),
        RunFact("p50 latency", [row and row["p50_ms"] for row in every], " ms", "less"),
        RunFact("p99 latency", [row and row["p99_ms"] for row in every], " ms", "less"),
        RunFact("hit ratio", [_hit_percent(run) for run in runs], " %", "more"),
        RunFact("failed", [100 * _count_failed(run) / max(1, run["requests"]) for run in runs], " %", "less"),
    ]
    if any(run.get("forecasts") for run in runs):
        calls = [run.get("forecasts") for run in runs]
        facts.append(RunFact("forecasts", [call and call["per_s"] for call in calls], "/s", "more"))
        failed = [call and 100 * call["failed"] / call["asked"] for call in calls]
        facts.append(RunFact("failed forecasts", failed, " %", "less"))
    if any(run["steps"] for run in runs):
        facts.append(RunFact("highest rate sustained", [_get_sustained(run) for run in runs], "/s", "more"))
    return [replace(fact, compare=are_comparable(runs)) for fact in facts]


def _hit_percent(run: Results) -> float | None:
    """Return the hit ratio in percent; None if no answer could have been a hit."""
    return None if run["hit_ratio"] is None or run["answered_per_s"] == 0 else 100 * run["hit_ratio"]


def _count_failed(run: Results) -> int:
    return sum(run["failures"].values())


def _get_sustained(run: Results) -> float | None:
    return max((step["rate"] for step in run["steps"] or [] if step["sustained"]), default=None)


def build_tables(records: Sequence[Record]) -> list[ReportTable]:
    """Build every table of the report; tables without rows are left out."""
    runs = [record["results"] for record in records]
    found = [
        _make_latency_table(runs) if len(runs) == 1 else _make_fact_table(runs, "Latency", _latency_facts(runs)),
        *(_make_step_table(run, f" of {TAGS[i]}" if len(runs) > 1 else "") for i, run in enumerate(runs)),
        _make_fact_table(runs, "Failures", _list_failures(runs)),
        *(_make_unsound_table(run, f" of {TAGS[i]}" if len(runs) > 1 else "") for i, run in enumerate(runs)),
        _make_fact_table(runs, "Loads and evictions", _list_loads(runs), "From the server's metrics, over the run."),
        _make_fact_table(
            runs, "Memory at the end", _list_memory(runs), "Proportional set size: shared pages counted once."
        ),
        _make_run_table(records),
    ]
    return [table for table in found if table.rows]


def _make_fact_table(runs: Sequence[Results], title: str, facts: Iterator[RunFact], says: str = "") -> ReportTable:
    head = ["", *TAGS, "B/A", ""] if len(runs) > 1 else ["", "value"]
    compare = are_comparable(runs)
    return ReportTable(title, head, [[fact.what, *replace(fact, compare=compare).cells()] for fact in facts], says)


def _make_latency_table(runs: Sequence[Results]) -> ReportTable:
    """Make a table with a row per kind of request, and one for the lateness of the driver."""
    rows = []
    (run,) = runs
    for name, row in [*((kind, run["latency"].get(kind)) for kind in KINDS), ("driver late by", run["lag"])]:
        if row is not None:
            rows.append(
                [
                    name_latency_row(name),
                    format_number(row["count"]),
                    *(format_number(row[key]) for _, key in PERCENTILES),
                ]
            )
    return ReportTable(
        "Latency", ["ms", "requests", *(name for name, _ in PERCENTILES)], rows, "From the intended time."
    )


def _latency_facts(runs: Sequence[Results]) -> Iterator[RunFact]:
    for kind in KINDS:
        found = [run["latency"].get(kind) for run in runs]
        if any(found):
            yield RunFact(f"{name_latency_row(kind)}: requests", [row["count"] if row else 0 for row in found])
            for name, key in PERCENTILES:
                good: Good = "neither" if kind == "failed" else "less"
                yield RunFact(f"{name_latency_row(kind)}: {name}", [row and row[key] for row in found], " ms", good)
    for name, key in PERCENTILES[2:3]:
        yield RunFact(f"driver late by: {name}", [run["lag"][key] for run in runs], " ms", "less")


def _make_step_table(run: Results, whose: str) -> ReportTable:
    head = ["requests/s asked", "answered/s", "p50 ms", "p99 ms", "failed", "sustained", "why not"]
    rows = [
        [
            *(format_number(value) for value in (step["rate"], step["answered_per_s"], step["p50_ms"], step["p99_ms"])),
            format_number(step["failed"]),
            "yes" if step["sustained"] else "no",
            step["why"],
        ]
        for step in run["steps"] or []
    ]
    return ReportTable(f"Ramp{whose}", head, rows)


def _list_failures(runs: Sequence[Results]) -> Iterator[RunFact]:
    for why in dict.fromkeys(why for run in runs for why in run["failures"]):
        yield RunFact(why, [run["failures"].get(why, 0) for run in runs])


def _make_unsound_table(run: Results, whose: str) -> ReportTable:
    rows = [[str(i + 1), str(what)] for i, what in enumerate(run["unsound"])]
    return ReportTable(f"Wrong answers{whose}", ["", "what was wrong"], rows, words=True)


def _list_loads(runs: Sequence[Results]) -> Iterator[RunFact]:
    metrics = [run["metrics"] for run in runs]
    if not any(metrics):
        return
    hits = [None if m is None or m["hit_ratio"] is None else 100 * m["hit_ratio"] for m in metrics]
    yield RunFact("hit ratio", hits, " %", "more")
    for tier in TIERS:
        loads = [m and m[f"loads_from_{tier}"] for m in metrics]  # type: ignore[literal-required]
        seconds = [m and m[f"load_seconds_from_{tier}"] for m in metrics]  # type: ignore[literal-required]
        yield RunFact(f"loads from {tier}", loads)
        means = [1e3 * s / n if n and s is not None else None for n, s in zip(loads, seconds, strict=True)]
        yield RunFact(f"mean load from {tier}", means, " ms", "less")
        for share in (0.5, 0.99):
            within = [_find_bucket_limit(run, tier, share) for run in runs]
            yield RunFact(f"{share:.0%} of loads from {tier} within", within, " ms", "less")
    yield RunFact("evictions", [m and m["evictions"] for m in metrics])


def _find_bucket_limit(run: Results, tier: str, share: float) -> float | None:
    """Return the limit (ms) of the bucket with the load of that rank, an upper bound; None beyond the last limit."""
    buckets = (run["load_time"] or {}).get(tier)
    if buckets is None or sum(buckets["count"]) == 0:
        return None
    done, wanted = 0.0, share * sum(buckets["count"])
    for limit, n in zip(buckets["le_s"], buckets["count"], strict=True):
        done += n
        if done >= wanted:
            return None if limit is None else 1e3 * limit
    return None


def _list_memory(runs: Sequence[Results]) -> Iterator[RunFact]:
    sizes = [run["memory"] or {} for run in runs]
    names = list(dict.fromkeys(name for size in sizes for name in size))
    for name in names:
        yield RunFact(name, [None if name not in size else size[name] / 1e6 for size in sizes], " MB", "less")
    if len(names) > 1:
        yield RunFact("all", [sum(size.values()) / 1e6 if size else None for size in sizes], " MB", "less")


def _make_run_table(records: Sequence[Record]) -> ReportTable:
    """Make a table of the conditions of each run, and for two runs whether they differ."""
    columns = [dict(_describe_run(record)) for record in records]
    rows = []
    for what in dict.fromkeys(what for column in columns for what in column):
        values = [column.get(what, NOTHING) for column in columns]
        rows.append([what, *values, *(["differs" if values[0] != values[1] else ""] if len(values) > 1 else [])])
    return ReportTable("What ran", ["", *TAGS, ""] if len(records) > 1 else ["", "value"], rows, words=True)


def _describe_run(record: Record) -> Iterator[tuple[str, str]]:
    run = record["results"]
    yield "profile", run["title"]
    yield "served", run["subject"]
    yield from _flatten_record("profile", run["profile"])
    yield "request", f"{run['dialect']}, {run['body']} body of {run['body_bytes']:,} bytes"
    yield "driver", f"{run['processes']} process{'es' if run['processes'] != 1 else ''}"
    yield "asked", f"{run['requests']:,} requests in {format_number(run['seconds'])} s"
    if forecasts := run.get("forecasts"):
        yield "forecasts", f"{forecasts['asked']:,}, in calls for {format_number(forecasts['per_call'])} models each"
    yield "checked", f"{run['checked']:,} answers looked into"
    yield "date", record["date"]
    yield "commit", record["commit"]
    yield "seed", str(record["seed"])
    yield from _flatten_record("machine", record["machine"])


def _flatten_record(prefix: str, found: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    show: Callable[[object], str] = lambda value: format_number(value) if isinstance(value, float) else str(value)  # noqa: E731
    for name, value in found.items():
        if isinstance(value, Mapping):
            yield from _flatten_record(f"{prefix} {name}", value)
        else:
            yield f"{prefix} {name}".replace("_", " "), show(value)
