"""The scores of a backtest: their names, how reports head their columns, and how one is written. Imports no torch."""

from math import isnan
from typing import Literal

#: Field of `handlers.evaluation.scores.Scores` -> heading.
HEADINGS = {
    "pinball": "pinball", "wql": "wQL", "wape": "WAPE", "mase": "MASE", "rmae": "rMAE", "crps": "CRPS",
    "coverage": "coverage",
}  # fmt: skip
MEASURES = tuple(HEADINGS)
Score = Literal["pinball", "wql", "wape", "mase", "rmae", "crps"]  #: those where lower is better: a gate can use them


def format_score(measure: str, value: float | None) -> str:
    """A score in a table's cell: `0.213`, coverage as `78.1%`, and `-` where it is undefined."""
    if value is None or isnan(value):
        return "-"
    return f"{value:.1%}" if measure == "coverage" else f"{value:.3f}"
