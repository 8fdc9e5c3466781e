"""Renders a backtest as one self-contained HTML file: the verdict, scores, fan charts, calibration, errors by hour.

Needs the extra `load`: jinja2 for the page, and uPlot for its charts, which the package `uplot-python` carries.
"""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from server.offline.backtest_verdict import (
    BandHeld,
    Verdict,
    judge_market,
    make_verdict,
    measure_bands,
)
from server.offline.evaluation import ByHour, Calibration, FanChart, MarketScore
from server.offline.fleet_evaluation import Backtest
from server.offline.measures import COMPARED, HEADINGS, IN_UNIT, MEASURES, format_score, list_comparison
from server.sdk import __version__

HERE = Path(__file__).parent
MOST_CHARTED = 12  #: most markets with charts; the table has all
DIGITS = 5  #: digits of a number in a chart
TOLD_STEPS = 24  #: last steps of a chart that are a table as well
MIDDLE = 0.5  #: the level of the median
NEEDED = "a report needs jinja2 and uPlot: pip install 'fleetcast[load]'"


class Bar(NamedTuple):
    """A bar of the calibration histogram in picture units: 100 wide, and 100 high at twice the calibrated share."""

    x: float
    y: float
    width: float
    height: float
    says: str


class LegendBand(NamedTuple):
    """A band in the legend of a fan chart. `layers` is how many bands lie over one another in it."""

    low: int
    high: int
    name: str
    layers: int


class LegendLevel(NamedTuple):
    """The middle level of a fan chart, which is a line."""

    series: int
    name: str


@dataclass(frozen=True, slots=True)
class MarketSection:
    """The section of one market in the page."""

    market: MarketScore
    verdict: Verdict
    unit: str  #: in words, for axes
    clock: str  #: in words, for axes
    fan: dict[str, Any]
    bands: Sequence[LegendBand]
    middle: LegendLevel | None
    spoken: str  #: the fan chart in a sentence
    steps: Sequence[tuple[str, ...]]  #: the last of the fan chart, by the columns `heads`
    heads: Sequence[str]
    by_hour: dict[str, Any]
    hours: Sequence[tuple[str, str, str]]
    bars: Sequence[Bar]


class ScoreRow(NamedTuple):
    """A market's row in the table of scores: its name, and its cells by their headings."""

    name: str
    standing: str
    cells: Sequence[tuple[str, str]]


def render_page(found: Backtest, command: str = "", made: datetime | None = None) -> str:
    """Render the page; `command` has made it, at `made` (None: now).

    Raises ModuleNotFoundError that says what to install, ValueError if no market was scored.
    """
    if not found.markets:
        raise ValueError(f"no market was scored: {'; '.join(f'{name}: {why}' for name, why in found.failed.items())}")
    drawn = [_make_market_section(*each) for each in _find_worst_markets(found)]
    library = _find_uplot()
    style = "\n".join((_read_text(library / "uPlot.min.css"), _read_text(HERE / "backtest.css")))
    script = "\n".join((_read_text(library / "uPlot.iife.js"), _read_text(HERE / "backtest.js")))
    compared = [
        (each, list(zip(COMPARED, list_comparison(each.against), strict=True)))
        for each in found.markets
        if each.against is not None
    ]
    html: str = load_template("backtest.html").render(
        style=style,
        script=script,
        style_hash=hash_for_csp(style),
        script_hash=hash_for_csp(script),
        data=_embed_json([chart for each in drawn for chart in (each.fan, each.by_hour)]),
        found=found,
        verdict=make_verdict(found.markets),
        clock=" and ".join(sorted({each.time_zone for each in found.markets})),
        first=min(each.first for each in found.markets)[:16],
        last=max(each.last for each in found.markets)[:16],
        drawn=drawn,
        rows=[_make_score_row(found, each) for each in found.markets],
        means=[format_score(name, found.mean(name)) for name in MEASURES],
        compared=compared,
        compared_heads=COMPARED,
        command=command,
        made=f"{made or datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        version=__version__,
    )
    return html


def _find_worst_markets(found: Backtest) -> list[tuple[MarketScore, FanChart]]:
    """Return the markets with the highest rMAE."""

    def rmae(pair: tuple[MarketScore, FanChart]) -> float:
        value = pair[0].scores.rmae
        return float("-inf") if isnan(value) else value

    return sorted(zip(found.markets, found.fans, strict=True), key=rmae, reverse=True)[:MOST_CHARTED]


def _make_score_row(found: Backtest, market: MarketScore) -> ScoreRow:
    """Make a row of scores. The unit stands in the headings where all markets have the same, else in a column."""
    units = {each.unit for each in found.markets}
    unit = market.unit if len(units) == 1 else ""
    scores = [
        (f"{HEADINGS[name]}, {unit}" if unit and name in IN_UNIT else HEADINGS[name],
         format_score(name, getattr(market.scores, name)))
        for name in MEASURES
    ]  # fmt: skip
    cells = [
        *([] if len(units) == 1 else [("unit", market.unit or "not known")]),
        *scores,
        ("promised", f"{market.scores.nominal:.0%}"),
        ("windows", f"{market.windows:,}"),
        ("steps", f"{market.scores.observed:,}"),
        ("from", market.first[:16]),
        ("to", market.last[:16]),
        ("version", market.version[:12]),
    ]
    return ScoreRow(market.target, judge_market(market), cells)


def _make_market_section(market: MarketScore, fan: FanChart) -> MarketSection:
    unit = market.unit or "the unit of the prices"
    clock = market.time_zone or "the clock of the file"
    heads, steps = _list_last_steps(fan)
    return MarketSection(
        market=market,
        verdict=make_verdict([market]),
        unit=unit,
        clock=clock,
        fan={**_encode_fan(fan), "unit": unit, "clock": clock},
        bands=_list_legend_bands(fan.levels, measure_bands(market)),
        middle=_find_middle(fan.levels),
        spoken=_describe_fan(market, fan),
        steps=steps,
        heads=heads,
        by_hour={**_by_hour(market.by_hour), "unit": unit, "clock": clock},
        hours=_list_hours(market.by_hour),
        bars=list(_make_calibration_bars(market.calibration)),
    )


def _list_legend_bands(levels: Sequence[float], measured: Sequence[BandHeld]) -> list[LegendBand]:
    """List the bands between rising levels, the widest first; a symmetric one also says how much it has held."""
    last = len(levels) - 1
    held = {(band.low, band.high): band for band in measured}
    bands = []
    for low in range(len(levels) // 2):
        band = held.get((low, last - low))
        span = f"levels {levels[low]:g} to {levels[last - low]:g}"
        name = span if band is None else f"{band.promised:.0%} band, held {band.held:.1%} ({span})"
        bands.append(LegendBand(low + 1, last - low + 1, name, low + 1))
    return bands


def _find_middle(levels: Sequence[float]) -> LegendLevel | None:
    """Find the level that is drawn as a line, where their number is odd."""
    if len(levels) % 2 == 0:
        return None
    at = len(levels) // 2
    return LegendLevel(at + 1, "median" if levels[at] == MIDDLE else f"level {levels[at]:g}")


def _describe_fan(market: MarketScore, fan: FanChart) -> str:
    """Say in a sentence what the fan chart shows, for those who do not see it."""
    low, high = fan.quantiles[0], fan.quantiles[-1]
    seen = [at for at, actual in enumerate(fan.actual) if not isnan(actual)]
    inside = sum(low[at] <= fan.actual[at] <= high[at] for at in seen)
    span = f"{_format_time(fan.seconds[0])} to {_format_time(fan.seconds[-1])}"
    return (
        f"Forecasts of {market.target} beside its prices from {span}: {inside} of {len(seen)} prices lie between the "
        f"levels {fan.levels[0]:g} and {fan.levels[-1]:g}. Arrow keys read the values."
    )


def _list_last_steps(fan: FanChart) -> tuple[list[str], list[tuple[str, ...]]]:
    """List the last steps of a fan chart: time, actual price and every level."""
    heads = ["time", "actual", *(f"level {level:g}" for level in fan.levels)]
    rows = [
        (_format_time(fan.seconds[at]), *(_format_value(line[at]) for line in (fan.actual, *fan.quantiles)))
        for at in range(max(0, len(fan.seconds) - TOLD_STEPS), len(fan.seconds))
    ]
    return heads, rows


def _list_hours(hours: ByHour) -> list[tuple[str, str, str]]:
    return [
        (str(group), _format_value(model), _format_value(naive))
        for group, model, naive in zip(hours.group, hours.model, hours.naive, strict=True)
    ]


def _format_time(seconds: int) -> str:
    """Write seconds on the clock of the chart as a date and a time."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M}"


def _format_value(value: float) -> str:
    return "-" if isnan(value) else f"{value:,.2f}"


def _encode_fan(fan: FanChart) -> dict[str, Any]:
    """Encode a chart with rising levels: the page fills between first and last, second and next to last."""
    lines = [_round_values(line) for line in fan.quantiles]
    return {"kind": "fan", "x": fan.seconds, "actual": _round_values(fan.actual), "levels": fan.levels, "lines": lines}


def _by_hour(hours: ByHour) -> dict[str, Any]:
    lines = {"model": _round_values(hours.model), "naive": _round_values(hours.naive)}
    return {"kind": "hours", "what": hours.what, "x": hours.group, **lines}


def _make_calibration_bars(calibration: Calibration) -> Iterator[Bar]:
    """Make a bar for each cell; a calibrated share is half as high as the picture."""
    edges = calibration.edges
    for low, high, share, right in zip(edges, edges[1:], calibration.share, calibration.right, strict=False):
        height = 0.0 if isnan(share) else min(100.0, 50 * share / right)
        says = f"{share:.1%} of the prices between the levels {low:g} and {high:g}, {right:.1%} would be right"
        yield Bar(100 * low, 100 - height, 100 * (high - low), height, says)


def _round_values(values: Sequence[float]) -> list[float | None]:
    return [None if isnan(value) else float(f"{value:.{DIGITS}g}") for value in values]


def load_template(name: str) -> Any:
    """Load a template. All text is escaped; only our own style, script and encoded data are marked as safe.

    Raises ModuleNotFoundError that says what to install.
    """
    try:
        import jinja2  # noqa: PLC0415 -- an extra
    except ModuleNotFoundError:
        raise ModuleNotFoundError(NEEDED) from None
    house = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return house.get_template(name)


def _embed_json(data: Sequence[Mapping[str, Any]]) -> str:
    """Encode JSON that cannot close the script element around it."""
    return msgspec.json.encode(data).decode().replace("<", "\\u003c")


def _find_uplot() -> Path:
    """Find the uPlot (MIT licence) of `uplot-python` without importing the package, which would import IPython."""
    found = find_spec("uplot")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(NEEDED)
    return Path(found.submodule_search_locations[0], "static")


def _read_text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def hash_for_csp(text: str) -> str:
    """Hash an inline script or style for the Content-Security-Policy."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
