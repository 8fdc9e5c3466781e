"""Recorded traces: time, model, size and outcome of each request. Written by a server or after a load run; read as
arrays, by the driver to replay them and by the planner.

A trace is CSV (RFC 4180) in UTF-8, plain or gzipped:

    time,model,bytes,outcome
    1767225600.000125,au/nsw1/energy.mar,70412,hit

`time`     seconds when the request came, since any moment; digits with at most 9 behind the point. Rows may be out of
           order: a server writes a row when it has answered
`model`    the model's name, quoted when it has a comma or a quote
`bytes`    size of the model in the cache; 0 if it is not known
`outcome`  hit, miss, coalesced: as X-Fleetcast-Cache says; answered: the same without that; refused: any other status
           than 200; lost: no answer at all

The format is CSV, because rows are small and other tools can read it: `duckdb: FROM read_csv('load.csv.gz')`, pandas:
`read_csv("load.csv.gz", dtype={"model": str}, keep_default_na=False)`. More rows are appended by writing
them, to a gzip file as another member; a crash damages at most the last row; and reading it runs no code. JSON Lines
are twice as long, Parquet cannot be appended to, and zstd is not in Python 3.11's library.

A folder is a trace too: its files `*.csv` and `*.csv.gz` in the order of their names, as a server with `--access-log`
leaves them.

Reading is strict, because a row that it skipped would be missing from a replay without notice. It keeps a few arrays
and one name per model, whatever the file contains, and stops at `max_rows` rows and MAX_NAMES models.
"""

import csv
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadtest.driver.profiles import Float64, Int64, Schedule
from loadtest.driver.run_result import Run
from model_store.names import ModelName, parse_model_name
from server.contract import ACCESS_LOG_HEADER, ACCESS_LOG_OUTCOMES, REPLAY_HEADER

Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]

MAX_ROWS, MAX_NAMES = 50_000_000, 1_000_000
CHUNK = 65_536  #: most rows that are Python objects at one time
MAX_TIME = 1e11  #: seconds; a time in milliseconds is larger
MAX_LINE = 8_192  #: bytes; a row with the longest name of any characters fits

_TIME, _MODEL, _SIZE = r"\d{1,11}(?:\.\d{1,18})?(?:e-\d\d)?", r'"(?:[^"]|"")*"|[^",]*', r"\d{1,18}"
_COLUMNS = f"({_TIME}),({_MODEL}),({_SIZE}),({'|'.join(ACCESS_LOG_OUTCOMES)})"
#: A row below each of the headers that a file may begin with; what traces requests were in is of no use here.
_ROWS = {
    REPLAY_HEADER: re.compile(f"{_COLUMNS}\n", re.ASCII),
    ACCESS_LOG_HEADER: re.compile(f"{_COLUMNS},[0-9a-f]{{0,32}}\n", re.ASCII),
}
_NUMBER = {text: i for i, text in enumerate(ACCESS_LOG_OUTCOMES)}
_GZIP = b"\x1f\x8b"


class TraceInvalid(ValueError):
    """A file is not a trace; the message names file and line and says what is wrong there."""


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests, columns [n]: `time` in seconds, `model` an index of `names`, `size` in bytes, `outcome` an index of
    ACCESS_LOG_OUTCOMES.
    """

    time: Float64
    model: Int32
    size: Int64
    outcome: UInt8
    names: Sequence[ModelName]

    def __repr__(self) -> str:
        return f"<Trace of {len(self.time)} requests for {len(self.names)} models>"

    def recording(self, fleet: Sequence[str] | None = None) -> Schedule:
        """Make a schedule from the first request on, for a fleet of these names (None: those of the trace).

        It ends a microsecond after the last request. Raises ValueError for models that the fleet does not have.
        """
        place = {name: i for i, name in enumerate(self.names if fleet is None else fleet)}
        if missing := [name for name in self.names if name not in place]:
            raise ValueError(f"{len(missing)} models of the trace are not in the fleet; the first is {missing[0]}")
        places = np.array([place[name] for name in self.names], np.int64)
        at = self.time - self.time[:1]
        return Schedule(at, places[self.model], float(at[-1]) + 1e-6 if len(at) else 0.0)


def make_trace(run: Run, names: Sequence[ModelName], sizes: Sequence[int] | None = None, started: float = 0.0) -> Trace:
    """Make a trace of a finished run; `time` is when each request was due, in seconds after `started`.

    `names` and `sizes` [models] are those of the schedule's models.
    """
    size = np.zeros(len(names), np.int64) if sizes is None else np.asarray(sizes, np.int64)
    asked = run.schedule.model
    refused, lost = ACCESS_LOG_OUTCOMES.index("refused"), ACCESS_LOG_OUTCOMES.index("lost")
    outcome = np.where(run.status == 200, run.cache, np.where(run.status > 0, refused, lost))  # noqa: PLR2004
    return Trace(started + run.schedule.at, asked.astype(np.int32), size[asked], outcome.astype(np.uint8), names)


# --- files ----------------------------------------------------------------------------------------------------------


def write_trace(path: Path, trace: Trace, *, append: bool = False) -> None:
    """Write a trace with microseconds, gzipped if the path ends in .gz. `append` keeps the existing rows.

    Raises ValueError for times or sizes that a trace cannot have, OSError.
    """
    if not ((trace.time >= 0) & (trace.time < MAX_TIME)).all() or (trace.size < 0).any():
        raise ValueError(f"{path} is not written: times are 0 to {MAX_TIME:g} seconds, sizes at least 0 bytes")
    names, outcomes = trace.names.__getitem__, ACCESS_LOG_OUTCOMES.__getitem__
    headed = append and path.exists() and path.stat().st_size > 0
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "at" if append else "wt", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        if not headed:
            file.write(REPLAY_HEADER)
        for start in range(0, len(trace.time), CHUNK):
            part = slice(start, start + CHUNK)
            times = (f"{time:.6f}" for time in trace.time[part].tolist())
            columns = (
                map(names, trace.model[part].tolist()),
                trace.size[part].tolist(),
                map(outcomes, trace.outcome[part].tolist()),
            )
            rows.writerows(zip(times, *columns, strict=True))


def read_trace(path: Path, max_rows: int = MAX_ROWS) -> Trace:
    """Read a file, or a folder of files, in the order of time. It takes 21 bytes a row, and briefly twice that.

    Raises TraceInvalid for an invalid row, broken gzip, and more than `max_rows` rows or MAX_NAMES models; OSError.
    """
    chunks = list(read_chunks(path, max_rows))
    columns = ([getattr(chunk, name) for chunk in chunks] for name in ("time", "model", "size", "outcome"))
    time, model, size, outcome = (np.concatenate(column) for column in columns)
    if (time[1:] < time[:-1]).any():
        order = np.argsort(time, kind="stable")
        time, model, size, outcome = time[order], model[order], size[order], outcome[order]
    return Trace(time, model, size, outcome, chunks[-1].names)


def read_chunks(path: Path, max_rows: int = MAX_ROWS) -> Iterator[Trace]:
    """Yield the rows in file order, at most CHUNK at a time; `names` grows from chunk to chunk.

    Raises as `read_trace` does, when it reaches the fault.
    """
    numbers, rows = _ModelNumbers(), 0
    for part in _list_parts(path):
        lines, before = _read_lines(part), rows
        form = _ROWS.get(next(lines, (1, ""))[1])
        if form is None:
            raise TraceInvalid(f"{part}, line 1: a trace begins with the line {REPLAY_HEADER.rstrip()}")
        while True:
            chunk = _read_chunk(part, lines, form, numbers)
            rows += len(chunk.time)
            if rows > max_rows:
                line = max_rows - before + 2
                raise TraceInvalid(f"{part}, line {line}: more than {max_rows} rows; read a part of it, or allow more")
            yield chunk
            if len(chunk.time) < CHUNK:
                break


def _list_parts(path: Path) -> list[Path]:
    """Return the file itself, or the traces of a folder by name. Raises TraceInvalid for a folder without any."""
    if not path.is_dir():
        return [path]
    found = sorted((*path.glob("*.csv"), *path.glob("*.csv.gz")), key=lambda part: part.name)
    if not found:
        raise TraceInvalid(f"{path} has no files *.csv or *.csv.gz")
    return found


def _read_chunk(path: Path, lines: Iterator[tuple[int, str]], form: re.Pattern[str], numbers: "_ModelNumbers") -> Trace:
    times, models, sizes, outcomes = [], [], [], []
    for line_number, line in itertools.islice(lines, CHUNK):
        row = form.fullmatch(line)
        if row is None:
            raise TraceInvalid(f"{path}, line {line_number}: {_explain_bad_row(line)}")
        time, model, size, outcome = row.groups()
        try:
            models.append(numbers[model])
        except ValueError as error:
            raise TraceInvalid(f"{path}, line {line_number}: {error}") from error
        times.append(float(time))
        sizes.append(int(size))
        outcomes.append(_NUMBER[outcome])
    columns = (np.array(models, np.int32), np.array(sizes, np.int64), np.array(outcomes, np.uint8))
    return Trace(np.array(times, np.float64), *columns, numbers.names)


class _ModelNumbers(dict[str, int]):
    """The number of each model by the text of its column; new models get the next number."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[ModelName] = []

    def __missing__(self, field: str) -> int:
        """Number a new model. Raises ValueError for an invalid name, and for too many names."""
        plain = field[1:-1].replace('""', '"') if field.startswith('"') else field
        if plain != field and not set(plain) & set('",'):
            self[field] = self[plain]  # quoted although no quotes are needed
        elif len(self.names) >= MAX_NAMES:
            raise ValueError(f"more than {MAX_NAMES} models")
        else:
            self.names.append(parse_model_name(plain))
            self[field] = len(self.names) - 1
        return self[field]


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the numbers and the unzipped lines of a file, at most MAX_LINE bytes each."""
    number = 0
    with path.open("rb") as file:
        zipped = file.peek(len(_GZIP)).startswith(_GZIP)
        source = io.BufferedReader(gzip.GzipFile(fileobj=file)) if zipped else file
        try:
            while line := source.readline(MAX_LINE):
                number += 1
                yield number, line.decode()
        except UnicodeDecodeError as error:
            raise TraceInvalid(f"{path}, line {number}: not UTF-8: {error.reason}") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            what = f"{path}: the gzip data is cut off or damaged ({error})"
            raise TraceInvalid(f"{what}; `gzip -dc` writes out what is whole of it") from error


def _explain_bad_row(line: str) -> str:
    if line in _ROWS:
        return "the header again: two traces were joined; take this line out"
    if not line.endswith("\n"):
        long = len(line.encode()) >= MAX_LINE
        return f"longer than {MAX_LINE} bytes" if long else "not a whole line, its writer was stopped; take it out"
    return (
        f"{line[:80]!r} is not {REPLAY_HEADER.rstrip()}: seconds in digits, at most 11 before a point; name, "
        f"quoted if it has commas or quotes; a whole number; one of {', '.join(ACCESS_LOG_OUTCOMES)}"
    )
