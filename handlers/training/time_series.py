"""Time series for training and evaluation: evenly spaced columns of a CSV file. No torch.

Their steps are the slots of a zone's wall clock, without daylight-saving jumps, as in requests;
`handlers.training.stamps` makes them of stamps with an offset, and of those of a local clock.
"""

import csv
import gzip
import math
import re
import zlib
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np

from handlers.codecs.clock import Float64, find_zone
from handlers.training.quick_columns import MISSING, Table, read_columns_quickly
from handlers.training.stamps import PLAIN, FileRules, SeriesInvalid, TimeAxis, find_axis, name_step, parse_stamp

__all__ = ["FileRules", "Float64", "Series", "SeriesInvalid", "read_csv", "read_header"]

#: Columns that tell several series of one file apart, as libraries name them.
ITEMS = ("unique_id", "item_id", "series_id", "ts_id")
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d{1,2}")  #: with three digits it could be a thousand


class _Request(NamedTuple):
    """What is read of a file; `complete`: columns without which a row is a fault."""

    time: str
    wanted: Collection[str]
    complete: Collection[str]
    rules: FileRules


class _Places(NamedTuple):
    """The places of columns in the header; `item`: of the one that tells several series apart, if there is one."""

    time: int
    values: dict[str, int]
    item: int | None


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
    gappy = {residual_to.replace("{target}", target) for target in targets}
    complete = {n for names in known for n in names} - gappy
    with _open_rows(path) as reader:
        columns, axis = _read_table(path, reader, _Request(time, wanted, complete, rules))
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


def _read_table(path: Path, reader: Iterable[list[str]], asked: _Request) -> tuple[dict[str, Float64], TimeAxis]:
    """Read the columns and find their time axis: by arrays if all is as files mostly are, else cell by cell.

    Raises SeriesInvalid that names line and column.
    """
    rows = _number_rows(reader)
    line, header = next(rows, (0, []))
    names = [name.strip() for name in header]
    places = _locate_columns(names, asked)
    if line == 1:
        item = (places.item, asked.rules.item[1])
        quick = read_columns_quickly(path, places.time, places.values, len(names), item, asked.rules.time_format)
        if quick is not None:
            try:
                return _check_table(quick, asked)
            except SeriesInvalid:
                pass  # the lines of the other reader are those of the file, whatever its cells contain
    return _check_table(_read_cells(rows, names, places, asked), asked)


def _check_table(table: Table, asked: _Request) -> tuple[dict[str, Float64], TimeAxis]:
    """Check what was read, and find its time axis. Raises SeriesInvalid that names line and column."""
    stamps, lines, columns = table
    axis = find_axis(stamps, lines, asked.rules)
    for name in sorted(asked.complete):
        _require_complete(name, columns[name], lines)
    return columns, axis


def _explain_column(name: str, names: Sequence[str]) -> str:
    """Say why a column cannot be read: it is not there, perhaps under a similar name, or more than once."""
    if name in names:
        return f"there are {names.count(name)} columns {name!r}"
    known = {each.lower(): each for each in names}
    near = get_close_matches(name.lower(), known, n=1)
    return f"there is no column {name!r}" + (f", did you mean {known[near[0]]!r}?" if near else "")


def _locate_columns(names: Sequence[str], asked: _Request) -> _Places:
    """Find the columns in the header. Raises SeriesInvalid for one that is not there once."""
    item = asked.rules.item[0]
    for name in (asked.time, *sorted(asked.wanted), *([item] if item else ())):
        if names.count(name) != 1:
            raise SeriesInvalid(f"line 1: {_explain_column(name, names)}; the columns are {', '.join(names) or 'none'}")
    places = {name: names.index(name) for name in sorted(asked.wanted, key=names.index)}
    at_item = names.index(item) if item else _find_item_column(names, asked.time, places)
    return _Places(names.index(asked.time), places, at_item)


def _read_cells(rows: Iterable[tuple[int, list[str]]], names: Sequence[str], places: _Places, asked: _Request) -> Table:
    """Read stamps, their line numbers and the wanted columns. Raises SeriesInvalid that names line and column."""
    item, value = asked.rules.item
    time, at_time, at_item, rules = asked.time, places.time, places.item, asked.rules
    stamps, lines = list[datetime](), list[int]()
    cells = [(name, at, array("d")) for name, at in places.values.items()]
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
        for name, at, values in cells:
            values.append(_parse_number(row[at], line, name))
    return stamps, lines, {name: np.frombuffer(values, np.float64) for name, _, values in cells}


def _find_item_column(names: Sequence[str], time: str, places: Iterable[str]) -> int | None:
    """Return the column that tells several series of a file apart, if there is one by the names of libraries."""
    return next((i for i, name in enumerate(names) if name.lower() in ITEMS and name not in {time, *places}), None)


def _number_rows(reader: Iterable[list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows with the line on which each ends; blank lines are left out."""
    for row in reader:
        if row:
            yield getattr(reader, "line_num", 0), row


def _parse_number(text: str, line: int, column: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.inf
    if not math.isinf(number):
        return number  # "nan" is missing
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
