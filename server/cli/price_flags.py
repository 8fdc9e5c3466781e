"""The arguments that several commands take about price files, fits and gates. No torch."""

from pathlib import Path
from typing import Annotated

import typer

from server.offline.measures import Score

PriceFile = Annotated[
    Path, typer.Argument(metavar="CSV", help="price file (.csv or .csv.gz) with a header and one row per time step")
]
TimeColumn = Annotated[str, typer.Option(help="column of the time stamps, which are evenly spaced")]
ArchivedTargets = Annotated[
    list[str] | None, typer.Option(help="price column (repeatable); default: all columns that have an archive")
]
NameTemplate = Annotated[str, typer.Option(help="name of a column's archive in the store")]
Epochs = Annotated[
    float, typer.Option(min=0, help="maximum number of passes over the prices; 0: 20, more for a short series")
]
FitSeed = Annotated[int, typer.Option(min=0, help="random seed: the same seed gives the same archives")]
FitThreads = Annotated[int, typer.Option(min=1, max=256, help="cores to use, at most one per target")]
GateScore = Annotated[Score, typer.Option(help="score that the gate compares; lower is better")]
GateMargin = Annotated[float, typer.Option(min=0, help="percent by which the new archive may be worse")]

NAME_TEMPLATE = "{target}.mar"
GATE_MARGIN, GATE_WINDOWS = 2.0, 28
