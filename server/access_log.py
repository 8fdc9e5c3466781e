"""The access log: who asked for which model when, and what came of it, as CSV that the load tester replays.

A worker collects rows (`Arrivals`, on its step thread), since only it knows what a model weighs and what the cache did;
the supervisor asks for them every second and writes them (`AccessLog`, on a thread of its own). A folder holds parts of
a bounded size, `arrivals-00000001.csv`; the newest is plain, older ones are gzipped, and the oldest go when all of them
are too large. A full disk costs rows, which are counted, and never a request. The format is that of
`loadtest.driver.trace`: rows of one worker in the order in which they were answered, and a second's rows of one worker
after another's.
"""

import contextlib
import csv
import fcntl
import gzip
import os
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import IO, NamedTuple

HEADER = "time,model,bytes,outcome\n"
OUTCOMES = ("answered", "hit", "miss", "coalesced", "refused", "lost")  #: the first four by `wire.CacheResult`
REFUSED, LOST = 4, 5
MAX_CHARS = 8_000_000  #: that a worker keeps between two visits of the supervisor: some 100,000 rows
PARTS = 8  #: plain parts that would fill the log; gzipped ones are about a fifth


class Row(NamedTuple):
    """One request: seconds since 1970, the model, its bytes in the cache (0: not known), one of OUTCOMES."""

    time: float
    model: str
    bytes: int
    outcome: str


class Arrivals:
    """The rows of one worker that have not been taken yet. `wall` and `now` are what the time is read from."""

    def __init__(self, wall: Callable[[], float] = time.time, now: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._now = wall, now
        self._rows: list[str] = []
        self._chars = self._dropped = 0
        self._offset = wall() - now()

    def __repr__(self) -> str:
        """For example `<Arrivals 200 rows, 0 dropped>`."""
        return f"<Arrivals {len(self._rows)} rows, {self._dropped} dropped>"

    def note(self, model: str, arrived: float, size: int, outcome: int) -> None:
        """A request that came at `arrived` on the monotonic clock has had its outcome, an index of OUTCOMES."""
        if self._chars >= MAX_CHARS:
            self._dropped += 1
            return
        name = model if '"' not in model and "," not in model else '"' + model.replace('"', '""') + '"'
        row = f"{arrived + self._offset:.6f},{name},{size},{OUTCOMES[outcome]}\n"
        self._rows.append(row)
        self._chars += len(row)

    def take(self) -> tuple[str, int, int]:
        """The rows as text, how many they are, and how many there was no room for."""
        taken = "".join(self._rows), len(self._rows), self._dropped
        self._rows, self._chars, self._dropped = [], 0, 0
        self._offset = self._wall() - self._now()
        return taken


class AccessLog:
    """The folder and its newest part; `budget_bytes` for all. One server writes into a folder at a time.

    Raises OSError when the folder cannot be made or written, or another server has it.
    """

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self._folder, self._budget = folder, budget_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise OSError(f"another server writes its access log into {folder}") from error
        self._part: IO[bytes] | None = None
        self._size = 0
        for torn in folder.glob("arrivals-*.tmp"):
            torn.unlink()
        for left in folder.glob("arrivals-*.csv"):
            _mend(left)
            _zip(left)
        self._open()

    def __repr__(self) -> str:
        """For example `<AccessLog logs/arrivals-00000003.csv, 120000 bytes>`."""
        return f"<AccessLog {self._part.name if self._part else self._folder}, {self._size} bytes>"

    def write(self, rows: str) -> None:
        """Add whole rows. Raises OSError; what there is then ends with a whole row all the same."""
        if self._part is None:
            self._open()
        assert self._part is not None, "it has just been opened"
        try:
            self._size += _write(self._part, rows.encode())
        except OSError:
            self._part.truncate(self._size)
            self._part.seek(self._size)
            raise
        if self._size >= self._budget // PARTS:
            self._rotate()

    def used_bytes(self) -> int:
        """Of all parts."""
        return sum(part.stat().st_size for part in parts(self._folder))

    def close(self) -> None:
        """No more rows; the part stays as it is, unless it has none."""
        if self._part is not None:
            self._part.close()
            if self._size == len(HEADER):
                Path(self._part.name).unlink()
            self._part = None
        self._lock.close()

    def _open(self) -> None:
        newest = max((int(part.name.split("-")[1].split(".")[0]) for part in parts(self._folder)), default=0)
        path = self._folder / f"arrivals-{newest + 1:08}.csv"
        part = path.open("xb", buffering=0)
        try:
            self._size = _write(part, HEADER.encode())
        except OSError:
            part.close()
            path.unlink()
            raise
        self._part = part

    def _rotate(self) -> None:
        """The next rows begin a part; this one is gzipped if the disk has room for that, and the oldest go."""
        assert self._part is not None, "rows have just been written"
        part, self._part = self._part, None
        part.close()
        with contextlib.suppress(OSError):  # it stays plain until the next start; its rows are written
            _zip(Path(part.name))
        found = parts(self._folder)
        used = [each.stat().st_size for each in found]
        while found and sum(used) > self._budget - self._budget // PARTS:
            found.pop(0).unlink()
            used.pop(0)


def parts(path: Path) -> list[Path]:
    """The parts of a log's folder, oldest first; a file is its own only part."""
    if not path.is_dir():
        return [path]
    return sorted((*path.glob("arrivals-*.csv"), *path.glob("arrivals-*.csv.gz")), key=lambda part: part.name)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a log, or of one of its parts, also while a server writes it.

    Raises ValueError for a line that is no row, OSError.
    """
    with contextlib.ExitStack() as stack:  # all are open before the first is read: a server may zip them meanwhile
        files = [(part, stack.enter_context(_opened(part))) for part in parts(path)]
        for part, file in files:
            yield from _rows(part, file)


def _opened(part: Path) -> IO[str]:
    if part.suffix == ".gz":
        return gzip.open(part, "rt", encoding="utf-8", newline="")
    return part.open(encoding="utf-8", newline="")


def _rows(part: Path, file: IO[str]) -> Iterator[Row]:
    whole = takewhile(lambda line: line.endswith("\n"), file)  # but for the one that is being written
    for number, line in enumerate(csv.reader(whole), 1):
        if number == 1:
            if ",".join(line) + "\n" != HEADER:
                raise ValueError(f"{part}, line 1: an access log begins with the line {HEADER.rstrip()}")
            continue
        try:
            at, model, size, outcome = line
            row = Row(float(at), model, int(size), outcome)
        except ValueError as error:
            raise ValueError(f"{part}, line {number}: {line} is not {HEADER.rstrip()}") from error
        yield row


def _write(part: IO[bytes], data: bytes) -> int:
    """All of it, however little the system takes at a time. Raises OSError."""
    left = memoryview(data)
    while left:
        left = left[part.write(left) :]
    return len(data)


def _mend(part: Path) -> None:
    """Cut off the row that a crash has torn."""
    with part.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        back = min(size, 8192)
        file.seek(size - back)
        file.truncate(size - back + file.read().rfind(b"\n") + 1)


def _zip(part: Path) -> None:
    """Gzip a part, at whose end the plain one goes; one without a header is nothing."""
    if part.stat().st_size > len(HEADER):
        zipped = part.with_suffix(".csv.gz")
        temporary = part.with_suffix(".tmp")
        try:
            with part.open("rb") as source, gzip.open(temporary, "wb", compresslevel=6) as target:
                shutil.copyfileobj(source, target)
            temporary.rename(zipped)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    part.unlink()
