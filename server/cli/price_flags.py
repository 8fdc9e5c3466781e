"""The arguments that several commands take about price files, fits and gates. No torch."""

import re
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.offline.measures import Score
from server.shell.escaping import escape_text

if TYPE_CHECKING:
    from handlers.training.stamps import FileRules

PriceFile = Annotated[
    Path, typer.Argument(metavar="CSV", help="price file (.csv or .csv.gz) with a header and one row per time step")
]
IntervalEnding = Annotated[
    bool, typer.Option("--interval-ending", help="stamps name the end of their interval, as AEMO's and `hour ending`")
]
StampsZone = Annotated[
    str, typer.Option(metavar="ZONE", help="zone of stamps without an offset; default: that of the archive")
]
TimeFormat = Annotated[
    str, typer.Option(metavar="FORMAT", help="notation of the stamps, such as '%d/%m/%Y %H:%M'; default: ISO 8601")
]
Item = Annotated[str, typer.Option(metavar="COLUMN=VALUE", help="read only the rows of one item of a file of several")]
TimeColumn = Annotated[str, typer.Option(help="column of the time stamps, which are evenly spaced")]
ArchivedTargets = Annotated[
    list[str] | None,
    typer.Option(
        help="price column, or pattern such as 'NSW*' (repeatable); default: all columns that have an archive"
    ),
]
NameTemplate = Annotated[str, typer.Option(help="name of a column's archive in the store")]
Epochs = Annotated[
    float, typer.Option(min=0, help="maximum number of passes over the prices; 0: 20, more for a short series")
]
HalfLife = Annotated[
    float,
    typer.Option(min=0, metavar="DAYS", help="prices so many days older count half in the fit; 0: all count alike"),
]
FitSeed = Annotated[int, typer.Option(min=0, help="random seed: the same seed gives the same archives")]
FitThreads = Annotated[int, typer.Option(min=1, max=256, help="cores to use, at most one per target")]
ResidualTo = Annotated[
    str,
    typer.Option(metavar="COLUMN", help="column that forecasts the price, whose error is learnt; may contain {target}"),
]
GateScore = Annotated[Score, typer.Option(help="score that the gate compares; lower is better")]
GateMargin = Annotated[float, typer.Option(min=0, help="percent by which the new archive may be worse")]

PATTERN = re.compile(r"[*?\[]")  #: what tells a pattern of columns from a name
NAME_TEMPLATE = "{target}.mar"
GATE_MARGIN, GATE_WINDOWS = 2.0, 28
CALIBRATION_DAYS = 91


def expand_targets(csv: Path, targets: Sequence[str], others: Iterable[str], patterns: Iterable[str] = ()) -> list[str]:
    """Replace patterns of --target such as `NSW*` by the file's columns that they match, in the file's order.

    A name that is a column stays as it is. `others` and what matches `patterns` are columns that are no
    prices. Raises ValueError for a pattern that matches no column; SeriesInvalid, OSError.
    """
    if not any(PATTERN.search(each) for each in targets):
        return list(targets)
    from handlers.training.time_series import read_header  # noqa: PLC0415 -- numpy

    columns, apart, ahead = read_header(csv), set(others), list(patterns)
    prices = [name for name in columns if name not in apart and not any(fnmatchcase(name, each) for each in ahead)]
    found = [each for each in targets if each in columns or not PATTERN.search(each)]
    for pattern in (each for each in targets if each not in found):
        matched = [name for name in prices if fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"--target {pattern}: no price column of {csv.name} matches; they are {', '.join(prices)}")
        found += [name for name in matched if name not in found]
    return found


def make_file_rules(interval_ending: bool, stamps_zone: str, time_format: str, item: str) -> "FileRules":
    """Make the rules by which a price file is read. Raises ValueError that names the flag."""
    from handlers.codecs.clock import check_zone_name  # noqa: PLC0415 -- numpy
    from handlers.training.stamps import FileRules  # noqa: PLC0415

    column, equals, value = item.partition("=")
    if item and not (column and equals and value):
        raise ValueError(f"--item: expected COLUMN=VALUE, not {item!r}")
    zone = check_zone_name(stamps_zone) if stamps_zone else ""
    return FileRules(stamps_zone=zone, ending=interval_ending, time_format=time_format, item=(column, value))


def print_notes(csv: Path, notes: Iterable[str]) -> None:
    """Print to stderr what was assumed when a file was read, each note once."""
    for note in dict.fromkeys(notes):
        print(escape_text(f"note: {csv.name}: {note}"), file=sys.stderr)  # noqa: T201
