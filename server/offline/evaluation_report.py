"""Renders a backtest as one self-contained HTML file: fan charts, calibration, errors by hour, a table of markets.

Needs the extra `load`: jinja2 for the page, and uPlot for its charts, which the package `uplot-python` carries.
"""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import isnan
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from server.offline.evaluation import ByHour, Calibration, FanChart, MarketScore
from server.offline.fleet_evaluation import Backtest
from server.offline.measures import COMPARED, HEADINGS, MEASURES, format_score, list_comparison

HERE = Path(__file__).parent
MOST_CHARTED = 12  #: most markets with charts; the table has all
DIGITS = 5  #: digits of a number in a chart
NEEDED = "a report needs jinja2 and uPlot: pip install 'fleetcast[load]'"


class Bar(NamedTuple):
    """A bar of the calibration histogram in picture units: 100 wide, and 100 high at twice the calibrated share."""

    x: float
    y: float
    width: float
    height: float
    says: str


@dataclass(frozen=True, slots=True)
class MarketSection:
    """The section of one market in the page."""

    market: MarketScore
    fan: dict[str, Any]
    by_hour: dict[str, Any]
    bars: Sequence[Bar]


def render_page(found: Backtest) -> str:
    """Render the page. Raises ModuleNotFoundError that says what to install, ValueError if no market was scored."""
    if not found.markets:
        raise ValueError(f"no market was scored: {'; '.join(f'{name}: {why}' for name, why in found.failed.items())}")
    drawn = [_make_market_section(*each) for each in _find_worst_markets(found)]
    library = _find_uplot()
    style = "\n".join((_read_text(library / "uPlot.min.css"), _read_text(HERE / "backtest.css")))
    script = "\n".join((_read_text(library / "uPlot.iife.js"), _read_text(HERE / "backtest.js")))
    html: str = load_template("backtest.html").render(
        style=style,
        script=script,
        style_hash=hash_for_csp(style),
        script_hash=hash_for_csp(script),
        data=_embed_json([chart for each in drawn for chart in (each.fan, each.by_hour)]),
        found=found,
        drawn=drawn,
        heads=list(HEADINGS.values()),
        rows=list(_score_rows(found)),
        compared=[(each, list_comparison(each.against)) for each in found.markets if each.against is not None],
        compared_heads=COMPARED,
        means=[format_score(name, found.mean(name)) for name in MEASURES],
    )
    return html


def _find_worst_markets(found: Backtest) -> list[tuple[MarketScore, FanChart]]:
    """Return the markets with the highest rMAE."""

    def rmae(pair: tuple[MarketScore, FanChart]) -> float:
        value = pair[0].scores.rmae
        return float("-inf") if isnan(value) else value

    return sorted(zip(found.markets, found.fans, strict=True), key=rmae, reverse=True)[:MOST_CHARTED]


def _score_rows(found: Backtest) -> Iterator[tuple[MarketScore, list[str]]]:
    for each in found.markets:
        yield each, [format_score(name, getattr(each.scores, name)) for name in MEASURES]


def _make_market_section(market: MarketScore, fan: FanChart) -> MarketSection:
    return MarketSection(
        market, _encode_fan(fan), _by_hour(market.by_hour), list(_make_calibration_bars(market.calibration))
    )


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
        says = f"{share:.1%} of the actuals from {low:g} to {high:g}, {right:.1%} would be right"
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
