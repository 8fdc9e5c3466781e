"""Time series for training and evaluation: evenly spaced columns of a CSV file. No torch.

Stamps are wall-clock times without daylight-saving jumps, as in requests; stamps with an offset are converted to UTC.
"""

import csv
import gzip
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

MISSING = {"", "nan", "null", "none", "na", "n/a"}
UNITS = (("W", 604_800), ("D", 86_400), ("h", 3600), ("min", 60), ("s", 1))


class SeriesInvalid(ValueError):
    """The data cannot be used; the message names the file, line and column, and what to do."""


@dataclass(frozen=True, slots=True)
class Series:
    """Values [T] at `start`, `start + step`, ..., NaN if missing; known-future covariates [K, T], none missing."""

    name: str
    start: datetime
    step: timedelta
    values: Float64
    known: Float64
    known_names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Series {self.name} {len(self.values)} steps of {self.frequency} from {self.start}>"

    @property
    def frequency(self) -> str:
        """The step as a pandas offset alias: `1h`, `30min`, `1D`."""
        seconds = round(self.step.total_seconds())
        unit, size = next((unit, size) for unit, size in UNITS if seconds % size == 0)
        return f"{seconds // size}{unit}"

    def stamp(self, at: int) -> str:
        """Return the time of step `at` in the notation of requests."""
        return (self.start + at * self.step).isoformat(sep=" ", timespec="seconds")

    def first_at(self, moment: datetime) -> int:
        """Return the first step at or after the moment, T if there is none."""
        return min(max(0, -((self.start - moment) // self.step)), len(self.values))

    def before(self, moment: datetime) -> "Series":
        """Return the series of the steps before the moment."""
        end = self.first_at(moment)
        return Series(self.name, self.start, self.step, self.values[:end], self.known[:, :end], self.known_names)

    def instance(self, start: int, end: int, horizon: int) -> dict[str, object]:
        """Make the instance of a request: history from `start` to `end`, and covariates for `horizon` more steps."""
        found: dict[str, object] = {
            "start": self.stamp(start),
            "target": [None if math.isnan(value) else value for value in self.values[start:end].tolist()],
        }
        if self.known_names:
            found["dynamic_feat"] = self.known[:, start : end + horizon].tolist()
        return found


def read_csv(path: Path, time: str, targets: Sequence[str], known_future: Sequence[str] = ()) -> list[Series]:
    """Read one series per target column, all with the same stamps; `.gz` is unpacked.

    Empty cells of a target are missing. A known-future column whose name contains `{target}` belongs to that target.

    Raises:
        SeriesInvalid: names file, line and column of the fault. OSError: the file cannot be read.
    """
    known = [[name.replace("{target}", target) for name in known_future] for target in targets]
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as file:
        try:
            stamps, lines, columns = _read_columns(
                csv.reader(file), time, {*targets, *(n for names in known for n in names)}
            )
        except (csv.Error, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise SeriesInvalid(f"{path.name}: not a CSV file: {error}") from error
        except SeriesInvalid as error:
            raise SeriesInvalid(f"{path.name}, {error}") from None
    try:
        step = _find_step(stamps, lines)
        for name in {n for names in known for n in names}:
            _require_complete(name, columns[name], lines)
    except SeriesInvalid as error:
        raise SeriesInvalid(f"{path.name}, {error}") from None
    rows = len(stamps)
    return [
        Series(
            target, stamps[0], step, columns[target], _stack_columns([columns[n] for n in names], rows), tuple(names)
        )
        for target, names in zip(targets, known, strict=True)
    ]


def read_header(path: Path) -> list[str]:
    """Read the names of the columns. Raises SeriesInvalid, OSError."""
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="") as file:
        try:
            return [name.strip() for name in next(csv.reader(file), [])]
        except (csv.Error, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise SeriesInvalid(f"{path.name}: not a CSV file: {error}") from error


def _read_columns(
    reader: Iterable[list[str]], time: str, wanted: Iterable[str]
) -> tuple[list[datetime], list[int], dict[str, Float64]]:
    """Read stamps, their line numbers and the wanted columns."""
    rows = _number_rows(reader)
    _, header = next(rows, (0, []))
    names = [name.strip() for name in header]
    for name in (time, *sorted(wanted)):
        if names.count(name) != 1:
            raise SeriesInvalid(f"line 1: {names.count(name)} columns {name!r}; the columns are {', '.join(names)}")
    places = {name: names.index(name) for name in wanted}
    stamps, lines, cells = [], [], []
    for line, row in rows:
        if len(row) != len(names):
            raise SeriesInvalid(f"line {line}: {len(row)} cells, but the header has {len(names)}")
        stamps.append(_parse_stamp(row[names.index(time)], line, time))
        lines.append(line)
        cells.append([_parse_number(row[at], line, name) for name, at in places.items()])
    values = np.array(cells, np.float64).reshape(len(cells), len(places))
    return stamps, lines, {name: np.ascontiguousarray(values[:, i]) for i, name in enumerate(places)}


def _number_rows(reader: Iterable[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows with the line on which each ends; blank lines are left out."""
    for row in reader:
        if row:
            yield getattr(reader, "line_num", 0), row


def _parse_stamp(text: str, line: int, column: str) -> datetime:
    try:
        stamp = datetime.fromisoformat(text.strip())
    except ValueError:
        raise SeriesInvalid(
            f"line {line}, column {column!r}: expected a time such as 2024-01-31 13:00, not {text[:40]!r}"
        ) from None
    return stamp if stamp.tzinfo is None else stamp.astimezone(UTC).replace(tzinfo=None)


def _parse_number(text: str, line: int, column: str) -> float:
    if text.strip().lower() in MISSING:
        return math.nan
    try:
        number = float(text)
    except ValueError:
        number = math.inf
    if math.isinf(number):
        what = f"line {line}, column {column!r}: {text[:40]!r} is not a finite number; leave a missing one empty"
        raise SeriesInvalid(what)
    return number


def _find_step(stamps: Sequence[datetime], lines: Sequence[int]) -> timedelta:
    """Find the distance between stamps, which must be the same for all."""
    if len(stamps) < 2:  # noqa: PLR2004 - a distance needs two
        raise SeriesInvalid(f"{len(stamps)} rows of data, which is too few")
    step = stamps[1] - stamps[0]
    for i in range(1, len(stamps)):
        found = stamps[i] - stamps[i - 1]
        if found == step and step > timedelta(0) and step % timedelta(seconds=1) == timedelta(0):
            continue
        if found == timedelta(0):
            raise SeriesInvalid(
                f"line {lines[i]}: {stamps[i]} appears twice; keep one row a step (local time? use UTC)"
            )
        what = f"line {lines[i]}: {stamps[i]} comes {found} after the row before; "
        if found < timedelta(0):
            raise SeriesInvalid(what + "sort the rows by time")
        raise SeriesInvalid(what + f"steps are {step}; add the missing rows with empty cells (local time? use UTC)")
    return step


def _require_complete(name: str, values: Float64, lines: Sequence[int]) -> None:
    missing = np.flatnonzero(np.isnan(values))
    if len(missing):
        what = "a known-future value is missing; fill it, as every request must bring it"
        raise SeriesInvalid(f"line {lines[missing[0]]}, column {name!r}: {what}")


def _stack_columns(columns: Sequence[Float64], rows: int) -> Float64:
    return np.stack(columns) if columns else np.empty((0, rows))
