"""The charts of the report: each is a title, two axes and lines. Pure."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, NamedTuple

from loadtest.report.results_schema import Buckets, Column, Latency, OverTime, Results, ServerOverTime, decode_histogram

TAGS = ("A", "B")  #: names of two runs
CACHE = ("all", "hit", "miss", "coalesced")
MAX_LINES = 6  #: most lines of a chart: the page has as many colours and dashes
PER_DECADE = 20  #: points of a distribution
NOTHING = "—"  #: shown for a missing number


class ChartLine(NamedTuple):
    """A named curve; `y` is None where it has a gap."""

    name: str
    x: list[float]
    y: Column


@dataclass(frozen=True, slots=True)
class Axis:
    """`kind` decides the format of a value; `top` is the end of a linear axis, by default just above its data.

    A linear axis begins at 0, or `near` its data, for lines that are told apart by a few percent.
    """

    title: str
    kind: Literal["number", "percent", "one in"] = "number"
    log: bool = False
    top: float | None = None
    near: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over one x axis. `hues` [lines]: which colour; lines of one run share one where two are compared."""

    title: str
    says: str
    x: Axis
    y: Axis
    lines: list[ChartLine]
    hues: list[int]
    rows: list[list[float | None]] = field(init=False)  #: the table behind the chart: x, then the y of each line

    def __post_init__(self) -> None:
        rows: dict[float, list[float | None]] = {}
        for i, line in enumerate(self.lines):
            for x, y in zip(line.x, line.y, strict=True):
                rows.setdefault(x, [x] + [None] * len(self.lines))[i + 1] = y
        object.__setattr__(self, "rows", [rows[x] for x in sorted(rows)])

    def spoken(self) -> str:
        """The chart in words, for screen readers: each line from its smallest to its largest value."""
        return f"{self.title}, {self.says}. " + "; ".join(
            f"{line.name} between {format_number(min(known))} and {format_number(max(known))}"
            for line in self.lines
            if (known := [y for y in line.y if y is not None])
        )


TIME = Axis("seconds into the run")
ONE_IN = Axis("share of requests that were faster", "one in", log=True)
Lines = Callable[[Results], Iterable[ChartLine]]


def format_number(value: float | None) -> str:
    """Format about three digits, with commas between thousands; a dash for a missing number."""
    if value is None:
        return NOTHING
    size = abs(value)
    if size >= 100 or value == int(value):  # noqa: PLR2004
        return f"{value:,.0f}"
    return f"{value:.3g}"


def build_charts(runs: Sequence[Results]) -> list[Chart]:
    """Build the charts of one run, or of two overlaid, without charts that have no data."""
    drawn = [*_from_the_driver(runs), *_from_the_server(runs), *_of_a_ramp(runs)]
    return [chart for chart in drawn if chart.lines]


def _make_chart(runs: Sequence[Results], title: str, says: str, x: Axis, y: Axis, lines: Lines) -> Chart:
    """Make a chart of at most MAX_LINES lines that have values; a logarithmic axis cannot show 0."""
    kept: list[ChartLine] = []
    hues = []
    for i, run in enumerate(runs):
        for name, xs, ys in lines(run):
            shown = [None if v is None or (y.log and v <= 0) else v for v in ys]
            if any(v is not None for v in shown):
                hues.append(i if len(runs) > 1 else len(kept))
                kept.append(ChartLine(f"{TAGS[i]} {name}" if len(runs) > 1 else name, xs, shown))
    return Chart(title, says, x, y, kept[:MAX_LINES], hues[:MAX_LINES])


def _from_the_driver(runs: Sequence[Results]) -> Iterator[Chart]:
    alone, ms = len(runs) == 1, Axis("ms", log=True)
    yield _make_chart(
        runs, "Latency over time", "ms from the intended time, logarithmic", TIME, ms, _make_latency_lines(alone=alone)
    )
    for names in [CACHE] if alone else [(name,) for name in CACHE]:
        title = "Latency distribution" if alone else f"Latency distribution: {name_latency_row(names[0])}"
        yield _make_chart(runs, title, "ms by percentile, both logarithmic", ONE_IN, ms, _make_distributions(names))
    yield _make_chart(runs, "Throughput", "requests per second", TIME, Axis("per s"), _make_rate_lines(alone=alone))
    yield _make_chart(
        runs, "Hit ratio", "% of answers from a loaded model", TIME, Axis("%", "percent", top=100), _make_hit_lines
    )


def _make_latency_lines(*, alone: bool) -> Lines:
    def lines(run: Results) -> Iterator[ChartLine]:
        over: OverTime = run["over_time"]
        yield ChartLine("p50", over["t_s"], over["p50_ms"])
        yield ChartLine("p99", over["t_s"], over["p99_ms"])
        if alone:  # the maxima of two runs hide their percentiles
            yield ChartLine("max", over["t_s"], over["max_ms"])

    return lines


def _make_rate_lines(*, alone: bool) -> Lines:
    def lines(run: Results) -> Iterator[ChartLine]:
        over: OverTime = run["over_time"]
        if alone:
            yield ChartLine("due", over["t_s"], over["due_per_s"])
        yield ChartLine("answered", over["t_s"], over["answered_per_s"])
        if any(over["failed_per_s"]):
            yield ChartLine("failed", over["t_s"], over["failed_per_s"])

    return lines


def _make_hit_lines(run: Results) -> Iterator[ChartLine]:
    yield ChartLine("seen by clients", run["over_time"]["t_s"], _scale_column(run["over_time"]["hit_ratio"], 100))
    if (server := run["server_over_time"]) is not None:
        yield ChartLine("server's metrics", server["t_s"], _scale_column(server["hit_ratio"], 100))


def name_latency_row(name: str) -> str:
    """Name a kind of request in words for a heading."""
    return {"all": "all requests", "hit": "hits", "miss": "misses"}.get(name, name)


def _make_distributions(names: Sequence[str]) -> Lines:
    def lines(run: Results) -> Iterator[ChartLine]:
        for name in names:
            if name in run["latency"]:
                yield ChartLine(name_latency_row(name), *_by_rarity(run["latency"][name]))

    return lines


def _by_rarity(row: Latency) -> tuple[list[float], Column]:
    """x: one request in so many took at least y ms; from 1 (the fastest) to the number of requests (the slowest)."""
    rarities: list[float] = []
    while (rarity := 10 ** (len(rarities) / PER_DECADE)) < row["count"]:
        rarities.append(rarity)
    percentiles = [*(100 * (1 - 1 / rarity) for rarity in rarities), 100.0]
    values = decode_histogram(row).get_percentile_to_value_dict(percentiles)
    return [*rarities, float(row["count"])], [values[p] / 1e3 for p in percentiles]


def _from_the_server(runs: Sequence[Results]) -> Iterator[Chart]:
    def server(lines: Callable[[ServerOverTime], Iterable[tuple[str, Column]]]) -> Lines:
        def of(run: Results) -> Iterator[ChartLine]:
            if (over := run["server_over_time"]) is not None:
                yield from (ChartLine(name, over["t_s"], column) for name, column in lines(over))

        return of

    def tiers(columns: dict[str, Column]) -> Iterator[tuple[str, Column]]:
        return ((f"from {tier}", column) for tier, column in columns.items())

    ms, rate = Axis("ms", log=True), Axis("per s")
    loads = server(lambda over: tiers(over["loads_per_s"]))
    yield _make_chart(runs, "Model loads", "per second, by tier", TIME, rate, loads)
    load_ms = server(lambda over: tiers(over["load_ms"]))
    yield _make_chart(runs, "Load time over time", "mean ms of a load by tier, logarithmic", TIME, ms, load_ms)
    share = Axis("%", "percent", top=100)
    yield _make_chart(
        runs, "Load time", "% of loads done within so many ms, by tier", Axis("ms", log=True), share, _load_times
    )
    evictions = server(lambda over: [("evictions", over["evictions_per_s"])])
    yield _make_chart(runs, "Evictions", "models evicted per second", TIME, rate, evictions)
    models = server(lambda over: [("models", over["loaded_models"])])
    yield _make_chart(runs, "Loaded models", "models ready to answer", TIME, Axis("models"), models)
    cache = server(lambda over: [("cache", _scale_column(over["cache_bytes"], 1e-6))])
    yield _make_chart(runs, "Cache size", "MB of loaded models", TIME, Axis("MB"), cache)
    queue = server(lambda over: [("queue", over["queue_ms"])])
    yield _make_chart(runs, "Time in the queue", "mean ms a request waits in its worker, logarithmic", TIME, ms, queue)
    batch = server(lambda over: [("rows", over["batch_rows"])])
    yield _make_chart(runs, "Batch size", "mean rows of a step", TIME, Axis("rows"), batch)
    yield _make_chart(runs, "Memory", "MB (PSS)", TIME, Axis("MB"), _make_memory_lines(in_all=len(runs) > 1))


def _load_times(run: Results) -> Iterator[ChartLine]:
    for tier, buckets in (run["load_time"] or {}).items():
        if sum(buckets["count"]) > 0:
            yield ChartLine(f"from {tier}", *_share_within(buckets))


def _share_within(buckets: Buckets) -> tuple[list[float], Column]:
    """x: ms; y: % of the loads done by then; from the last bucket limit that has 0 % to the first that has all."""
    total, done = sum(buckets["count"]), accumulate(buckets["count"])
    points = [(1e3 * le, 100 * n / total) for le, n in zip(buckets["le_s"], done, strict=True) if le]
    first = max(0, sum(share == 0 for _, share in points) - 1)
    last = sum(share < 100 for _, share in points)  # noqa: PLR2004
    kept = points[first : last + 1]
    return [ms for ms, _ in kept], [share for _, share in kept]


def _make_memory_lines(*, in_all: bool) -> Lines:
    """Make a line per process, or their sum if that would be too many lines."""

    def lines(run: Results) -> Iterator[ChartLine]:
        columns = dict(run["memory_over_time"] or {})
        times = [t for t in columns.pop("t_s", []) if t is not None]
        if columns and (in_all or len(columns) > MAX_LINES):
            together = zip(*columns.values(), strict=True)
            columns = {"all processes": [sum(v for v in row if v is not None) for row in together]}
        yield from (ChartLine(name, times, _scale_column(column, 1e-6)) for name, column in columns.items())

    return lines


def _of_a_ramp(runs: Sequence[Results]) -> Iterator[Chart]:
    def rates(run: Results) -> Iterator[ChartLine]:
        asked = [step["rate"] for step in run["steps"] or []]
        if len(runs) == 1:
            yield ChartLine("asked", asked, [*asked])
        yield ChartLine("answered", asked, [step["answered_per_s"] for step in run["steps"] or []])

    def latency(run: Results) -> Iterator[ChartLine]:
        asked = [step["rate"] for step in run["steps"] or []]
        yield ChartLine("p50", asked, [step["p50_ms"] for step in run["steps"] or []])
        yield ChartLine("p99", asked, [step["p99_ms"] for step in run["steps"] or []])

    asked = Axis("requests/s asked")
    yield _make_chart(runs, "Ramp: throughput", "requests answered per second by rate", asked, Axis("per s"), rates)
    yield _make_chart(runs, "Ramp: latency", "ms by rate, logarithmic", asked, Axis("ms", log=True), latency)


def _scale_column(column: Column, by: float) -> Column:
    return [None if value is None else value * by for value in column]
