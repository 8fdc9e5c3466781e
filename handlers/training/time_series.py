"""Time series for training and evaluation: evenly spaced columns of a CSV file. No torch.

Their steps are the slots of a zone's wall clock, without daylight-saving jumps, as in requests;
`handlers.training.stamps` makes them of stamps with an offset, and of those of a local clock.
"""

import csv
import gzip
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from handlers.codecs.clock import Float64, find_zone
from handlers.training.stamps import PLAIN, FileRules, SeriesInvalid, find_axis, name_step, parse_stamp

__all__ = ["FileRules", "Float64", "Series", "SeriesInvalid", "read_csv", "read_header"]

MISSING = {"", "-", "nan", "null", "none", "na", "n/a", "n/e"}
#: Columns that tell several series of one file apart, as libraries name them.
ITEMS = ("unique_id", "item_id", "series_id", "ts_id")
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d{1,2}")  #: with three digits it could be a thousand


@dataclass(frozen=True, slots=True)
class Series:
    """Values [T] at `start`, `start + step`, ..., NaN if missing; known-future covariates [K, T], none missing.

    Stamps are on the wall clock of `zone`; `notes` say in words what was assumed when the file was read.
    """

    name: str
    start: datetime
    step: timedelta
    values: Float64
    known: Float64
    known_names: tuple[str, ...] = ()
    zone: str = "UTC"
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Series {self.name} {len(self.values)} steps of {self.frequency} from {self.start}>"

    @property
    def frequency(self) -> str:
        """The step as a pandas offset alias: `1h`, `30min`, `1D`."""
        return name_step(round(self.step.total_seconds()))

    def stamp(self, at: int) -> str:
        """Return the time of step `at` in the notation of requests."""
        return (self.start + at * self.step).isoformat(sep=" ", timespec="seconds")

    def first_at(self, moment: datetime) -> int:
        """Return the first step at or after a moment, T if there is none; one without offset is of the zone's clock."""
        if moment.tzinfo is not None:
            moment = moment.astimezone(find_zone(self.zone)).replace(tzinfo=None)
        return min(max(0, -((self.start - moment) // self.step)), len(self.values))

    def before(self, moment: datetime) -> "Series":
        """Return the series of the steps before the moment."""
        end = self.first_at(moment)
        return replace(self, values=self.values[:end], known=self.known[:, :end])

    def without_gaps(self, name: str) -> "Series":
        """Return the series with a covariate that the values are deviations from, made complete.

        Where it is missing stands its last known number, or the first; the value there becomes missing, because its
        deviation is not known. Raises SeriesInvalid if it has no numbers.
        """
        at = self.known_names.index(name)
        missing = np.isnan(self.known[at])
        if not missing.any():
            return self
        if missing.all():
            raise SeriesInvalid(f"column {name!r} has no values, so that {self.name} has no deviations from it")
        places = np.maximum.accumulate(np.where(missing, -1, np.arange(len(missing))))
        known = self.known.copy()
        known[at] = self.known[at][np.where(places < 0, int(np.argmin(missing)), places)]
        note = f"{int(missing.sum())} steps have no {name}; prices there are left out"
        return replace(self, values=np.where(missing, np.nan, self.values), known=known, notes=(*self.notes, note))

    def instance(self, start: int, end: int, horizon: int) -> dict[str, object]:
        """Make the instance of a request: history from `start` to `end`, and covariates for `horizon` more steps."""
        found: dict[str, object] = {
            "start": self.stamp(start),
            "target": [None if math.isnan(value) else value for value in self.values[start:end].tolist()],
        }
        if self.known_names:
            found["dynamic_feat"] = self.known[:, start : end + horizon].tolist()
        return found


def read_csv(
    path: Path,
    time: str,
    targets: Sequence[str],
    known_future: Sequence[str] = (),
    rules: FileRules = PLAIN,
    residual_to: str = "",
) -> list[Series]:
    """Read one series per target column, all with the same stamps; `.gz` is unpacked.

    Empty cells of a target are missing. A known-future column whose name contains `{target}` belongs to that target.
    Only `residual_to`, one of these, may have empty cells, for `Series.without_gaps`.

    Raises:
        SeriesInvalid: names file, line and column of the fault. OSError: the file cannot be read.
    """
    known = [[name.replace("{target}", target) for name in known_future] for target in targets]
    wanted = {*targets, *(n for names in known for n in names)}
    with _open_rows(path) as reader:
        stamps, lines, columns = _read_columns(reader, time, wanted, rules)
        axis = find_axis(stamps, lines, rules)
        gappy = {residual_to.replace("{target}", target) for target in targets}
        for name in {n for names in known for n in names} - gappy:
            _require_complete(name, columns[name], lines)
    step = timedelta(seconds=axis.step_s)
    ahead = {n: axis.place(columns[n], complete=n not in gappy) for names in known for n in names}
    return [
        Series(
            target,
            axis.start,
            step,
            axis.place(columns[target]),
            _stack_columns([ahead[n] for n in names], axis.count),
            tuple(names),
            rules.zone,
            axis.notes,
        )
        for target, names in zip(targets, known, strict=True)
    ]


def read_header(path: Path) -> list[str]:
    """Read the names of the columns. Raises SeriesInvalid, OSError."""
    with _open_rows(path) as reader:
        return [name.strip() for name in next(iter(reader), [])]


@contextmanager
def _open_rows(path: Path) -> Iterator[Iterable[list[str]]]:
    """Open a CSV file, with or without a byte order mark; errors name the file."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", newline="", encoding="utf-8-sig") as file:
        try:
            yield csv.reader(file)
        except (csv.Error, UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise SeriesInvalid(f"{path.name}: not a CSV file: {error}") from error
        except SeriesInvalid as error:
            raise SeriesInvalid(f"{path.name}, {error}") from None


def _read_columns(
    reader: Iterable[list[str]], time: str, wanted: Iterable[str], rules: FileRules
) -> tuple[list[datetime], list[int], dict[str, Float64]]:
    """Read stamps, their line numbers and the wanted columns."""
    rows = _number_rows(reader)
    _, header = next(rows, (0, []))
    names = [name.strip() for name in header]
    item, value = rules.item
    for name in (time, *sorted(wanted), *([item] if item else ())):
        if names.count(name) != 1:
            raise SeriesInvalid(f"line 1: {names.count(name)} columns {name!r}; the columns are {', '.join(names)}")
    places = {name: names.index(name) for name in wanted}
    at_time, at_item = names.index(time), names.index(item) if item else _find_item_column(names, time, places)
    stamps, lines, cells = list[datetime](), list[int](), list[list[float]]()
    for line, row in rows:
        if len(row) != len(names):
            raise SeriesInvalid(f"line {line}: {len(row)} cells, but the header has {len(names)}")
        if at_item is not None and row[at_item].strip() != (value := value or row[at_item].strip()):
            if item:
                continue
            what = f"column {names[at_item]!r} has several items, {value[:40]!r} and {row[at_item].strip()[:40]!r}"
            raise SeriesInvalid(f"line {line}: {what}; read one by --item {names[at_item]}={value[:40]}")
        stamps.append(parse_stamp(row[at_time], line, time, rules.time_format))
        lines.append(line)
        cells.append([_parse_number(row[at], line, name) for name, at in places.items()])
    values = np.array(cells, np.float64).reshape(len(cells), len(places))
    return stamps, lines, {name: np.ascontiguousarray(values[:, i]) for i, name in enumerate(places)}


def _find_item_column(names: Sequence[str], time: str, places: Iterable[str]) -> int | None:
    """Return the column that tells several series of a file apart, if there is one by the names of libraries."""
    return next((i for i, name in enumerate(names) if name.lower() in ITEMS and name not in {time, *places}), None)


def _number_rows(reader: Iterable[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows with the line on which each ends; blank lines are left out."""
    for row in reader:
        if row:
            yield getattr(reader, "line_num", 0), row


def _parse_number(text: str, line: int, column: str) -> float:
    if text.strip().lower() in MISSING:
        return math.nan
    if DECIMAL_COMMA.fullmatch(text.strip()):
        text = text.replace(",", ".")
    try:
        number = float(text)
    except ValueError:
        number = math.inf
    if math.isinf(number):
        what = f"line {line}, column {column!r}: {text[:40]!r} is not a finite number; leave a missing one empty"
        raise SeriesInvalid(what)
    return number


def _require_complete(name: str, values: Float64, lines: Sequence[int]) -> None:
    missing = np.flatnonzero(np.isnan(values))
    if len(missing):
        what = "a known-future value is missing; fill it, as every request must bring it"
        raise SeriesInvalid(f"line {lines[missing[0]]}, column {name!r}: {what}")


def _stack_columns(columns: Sequence[Float64], rows: int) -> Float64:
    return np.stack(columns) if columns else np.empty((0, rows))
