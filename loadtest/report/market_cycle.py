"""Renders a turn of a market's cycle as one HTML file: fans, scenarios, correlations and times."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtest.driver.market_client import BUDGET_S, JOINT, STAGES, TICK, Turn
from loadtest.report import render_standalone
from loadtest.report.charts import format_number
from loadtest.report.tables import ReportTable

Float64 = npt.NDArray[np.float64]

MOST_CHARTED = 9  #: most products with charts
MOST_MAPPED = 200  #: most products in the map
MOST_POINTS = 1_000_000  #: most numbers of scenarios in the page; beyond it, fewer scenarios are drawn
PAIRS = 8  #: pairs of either kind that are named beside the map
DIGITS = 5  #: digits of a price


@dataclass(frozen=True, slots=True, eq=False)
class CycleResults:
    """The contents of the page. `prices` [products, 2 * steps] from `start` lie before and during the last forecast.

    `together` [products, products] are correlations. `calls` are the calls, and the commands that repeat them.
    """

    title: str
    unit: str
    products: Sequence[str]
    start: datetime
    step: timedelta
    prices: Float64
    turns: Sequence[Turn]
    together: Float64
    calls: Sequence[tuple[str, str]]


def render_cycle_page(drawn: CycleResults) -> str:
    """Render the page."""
    last = drawn.turns[-1]
    alike, opposed = find_extremes(drawn.products, drawn.together, PAIRS)
    kept = last.scenarios[:, choose_charted(drawn.products)]
    most = max(2, MOST_POINTS // kept[0].size)
    return render_standalone(
        "page.cycle.html",
        ["page.css", "page.cycle.css"],
        "page.cycle.js",
        _encode_data(drawn, most),
        title=drawn.title,
        total_ms=last.total_ms,
        share=last.total_ms / BUDGET_S / 1e3,
        budget_ms=BUDGET_S * 1e3,
        headlines=_list_headlines(drawn),
        scenarios=min(len(last.scenarios), most),
        stages=_make_stage_table(drawn.turns),
        said=[(call, turn, each.said[call]) for call in (TICK, JOINT) for turn, each in _name_ends(drawn.turns)],
        pairs=_make_pair_table("Move together", alike) if alike else None,
        against=_make_pair_table("Move against each other", opposed) if opposed else None,
        levels=" to ".join(f"{100 * level:g} %" for level in (last.levels[0], last.levels[-1])),
        mapped=min(len(drawn.products), MOST_MAPPED),
        calls=drawn.calls,
    )


def choose_charted(products: Sequence[str]) -> list[int]:
    """Choose the charted products: the first of each group (`region/`, `region.`), the last, the second, and so on."""
    groups: dict[str, list[int]] = {}
    for i, product in enumerate(products):
        groups.setdefault(product.rpartition("/" if "/" in product else ".")[0], []).append(i)
    ranked = [
        (rank, i) for group in groups.values() for rank, i in enumerate([group[0], *group[:0:-1][:1], *group[1:-1]])
    ]
    return sorted(i for _, i in sorted(ranked)[:MOST_CHARTED])


def format_budget_share(ms: float) -> str:
    """Format milliseconds as a share of the time of the market."""
    percent = ms / BUDGET_S / 10
    return f"{percent:.2f} %" if percent >= 0.01 else "< 0.01 %"  # noqa: PLR2004 -- the last digit shown


def find_extremes(
    products: Sequence[str], together: Float64, most: int
) -> tuple[list[tuple[str, str, float]], list[tuple[str, str, float]]]:
    """Find the pairs with the highest positive correlations, and those with the lowest negative ones."""
    pairs = ((float(together[i, j]), i, j) for i, j in combinations(range(len(products)), 2))
    found = [(products[i], products[j], value) for value, i, j in sorted(pairs, key=lambda pair: -pair[0])]
    alike = [pair for pair in found[:most] if pair[2] > 0]
    return alike, [pair for pair in found[::-1][:most] if pair[2] < 0]


def _list_headlines(drawn: CycleResults) -> list[tuple[str, str]]:
    last, count = drawn.turns[-1], len(drawn.products)
    scenarios, _, steps = last.scenarios.shape
    per_s = count / (last.ms[TICK] / 1e3)
    return [
        ("from prices to numbers", f"{last.total_ms:.0f} ms"),
        ("of 20 seconds", format_budget_share(last.total_ms)),
        ("first turn", f"{drawn.turns[0].total_ms:.0f} ms"),
        ("forecasts", f"{count} x {steps} steps"),
        ("scenarios", f"{scenarios} x {count} x {steps}"),
        ("quantile forecasts", f"{format_number(per_s)}/s"),
    ]


def _name_ends(turns: Sequence[Turn]) -> list[tuple[str, Turn]]:
    return [("first", turns[0]), (f"turn {len(turns)}", turns[-1])]


def _make_stage_table(turns: Sequence[Turn]) -> ReportTable:
    """Make a table of the milliseconds of the first and the last turn, and the share of the budget of the last."""
    rows = [
        [stage, *(f"{each.ms[stage]:.1f}" for _, each in _name_ends(turns)), format_budget_share(turns[-1].ms[stage])]
        for stage in STAGES
    ]
    total = [f"{each.total_ms:.1f}" for _, each in _name_ends(turns)]
    rows.append(["together", *total, format_budget_share(turns[-1].total_ms)])
    return ReportTable("Stages", ["ms", "first turn", f"turn {len(turns)}", "of 20 s"], rows)


def _make_pair_table(title: str, pairs: Sequence[tuple[str, str, float]]) -> ReportTable:
    return ReportTable(
        title, ["", "and", "rank correlation"], [[one, other, f"{value:+.2f}"] for one, other, value in pairs]
    )


def _encode_data(drawn: CycleResults, most: int) -> dict[str, Any]:
    """Encode the data of the page's script. Times are seconds, prices to DIGITS digits, correlations in percent."""
    last, seconds = drawn.turns[-1], drawn.step.total_seconds()
    begin = drawn.start.replace(tzinfo=drawn.start.tzinfo or UTC).timestamp()
    steps, count = drawn.prices.shape[1], min(len(drawn.products), MOST_MAPPED)
    return {
        "times": [begin + seconds * i for i in range(steps)],
        "unit": drawn.unit,
        "levels": last.levels,
        "charts": [
            {
                "name": drawn.products[i],
                "prices": _round_numbers(drawn.prices[i]),
                "quantiles": _round_numbers(last.quantiles[i].T),
                "scenarios": _round_numbers(last.scenarios[:most, i]),
            }
            for i in choose_charted(drawn.products)
        ],
        "names": list(drawn.products[:count]),
        "together": (100 * drawn.together[:count, :count]).round().astype(int).tolist(),
    }


def _round_numbers(values: npt.NDArray[Any]) -> Any:
    """Round to nested lists of short numbers; None for missing ones."""
    if values.ndim > 1:
        return [_round_numbers(each) for each in values]
    return [float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None for value in values.tolist()]
