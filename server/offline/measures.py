"""The scores of a backtest: their names, headings and formats. Imports no torch."""

from math import isnan
from typing import Literal

#: Field of `handlers.evaluation.scores.Scores` -> heading.
HEADINGS = {
    "pinball": "pinball", "wql": "wQL", "wape": "WAPE", "mase": "MASE", "rmae": "rMAE", "crps": "CRPS",
    "coverage": "coverage",
}  # fmt: skip
MEASURES = tuple(HEADINGS)
#: the scores of which lower is better, which a gate can use
Score = Literal["pinball", "wql", "wape", "mase", "rmae", "crps"]


def format_score(measure: str, value: float | None) -> str:
    """Format a score for a table: `0.213`, coverage as `78.1%`, and `-` where it is undefined."""
    if value is None or isnan(value):
        return "-"
    return f"{value:.1%}" if measure == "coverage" else f"{value:.3f}"
