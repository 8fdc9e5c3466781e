"""The scores of a backtest: their names, headings and formats. Imports no torch."""

from math import isnan
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from handlers.evaluation.point_scores import PointComparison

#: Field of `handlers.evaluation.scores.Scores` -> heading.
HEADINGS = {
    "pinball": "pinball", "wql": "wQL", "wape": "WAPE", "mase": "MASE", "rmae": "rMAE", "crps": "CRPS",
    "coverage": "coverage",
}  # fmt: skip
MEASURES = tuple(HEADINGS)
#: Those of the median, of which a table of their own is printed.
POINTS = {"mae": "MAE", "rmse": "RMSE", "mape": "MAPE", "smape": "sMAPE", "rmae": "rMAE", "rmae_weekly": "rMAE (week)"}
IN_UNIT = frozenset({"pinball", "crps", "mae", "rmse"})  #: scores in the unit of the prices
SHARES = frozenset({"coverage", "mape", "smape"})
#: the scores of which lower is better, which a gate can use
Score = Literal["pinball", "wql", "wape", "mase", "rmae", "crps"]


#: Headings of a comparison with a column, in the order of `list_comparison`.
COMPARED = ("MAE", "its MAE", "RMSE", "its RMSE", "skill", "DM", "p")


def list_comparison(found: "PointComparison") -> list[str]:
    """List the cells of a comparison with a column, by the headings `COMPARED`."""
    errors = (found.mae, found.other_mae, found.rmse, found.other_rmse)
    cells = [format_score("mae", each) for each in errors]
    skill = "-" if isnan(found.skill) else f"{found.skill:+.0%}"
    p_value = "-" if isnan(found.p_value) else f"{found.p_value:.2g}"
    statistic = "-" if isnan(found.statistic) else f"{found.statistic:.1f}"
    return [*cells, skill, statistic, p_value]


def format_score(measure: str, value: float | None) -> str:
    """Format a score for a table: `0.213`, coverage as `78.1%`, and `-` where it is undefined."""
    if value is None or isnan(value):
        return "-"
    return f"{value:.1%}" if measure in SHARES else f"{value:.3f}"
