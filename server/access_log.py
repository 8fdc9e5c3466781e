"""The access log: time, model, size and outcome of every request, as CSV files that the load tester replays.

A worker collects rows (`ArrivalBuffer`, on its step thread), because only the worker knows the size of a model and the
cache result; the supervisor fetches the rows every second and writes them (`AccessLog`, on a thread of its own). What
it has fetched stays the worker's until the supervisor says by a receipt, with its next question, that it has it. A
folder has parts of bounded size, `arrivals-00000001.csv`; the newest part is plain, older ones are gzipped, and the
oldest are deleted when the parts exceed the budget. `server.contract` has the columns. The rows of one worker are in
the order of its responses; each second's rows of one worker follow those of another.

INVARIANT: a full disk drops rows, which are counted; it never fails a request.
"""

import contextlib
import csv
import fcntl
import gzip
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from itertools import takewhile
from pathlib import Path
from typing import IO, NamedTuple

from server.contract import ACCESS_LOG_FILE, ACCESS_LOG_FILES, ACCESS_LOG_HEADER, ACCESS_LOG_OUTCOMES, REPLAY_HEADER

REFUSED, LOST = map(ACCESS_LOG_OUTCOMES.index, ("refused", "lost"))
MAX_CHARS = 8_000_000  #: characters that a worker keeps until the supervisor fetches them: about 100,000 rows
PARTS = 8  #: number of plain parts that fill the budget; a gzipped part takes about a fifth


class Row(NamedTuple):
    """One request: seconds since 1970, the model, its bytes in the cache (0: not known), one of ACCESS_LOG_OUTCOMES.

    `trace_id`: of its trace, where it was sampled.
    """

    time: float
    model: str
    bytes: int
    outcome: str
    trace_id: str = ""


class Receipt(NamedTuple):
    """That rows have arrived: all of this buffer's first `rows` rows, and that it dropped its first `dropped` ones."""

    buffer: str
    rows: int
    dropped: int


class Arrivals(NamedTuple):
    """Rows as text, their number, the number of rows dropped for lack of room, and the receipt for both."""

    rows: str
    number: int
    dropped: int
    receipt: Receipt


class ArrivalBuffer:
    """The rows of one worker that have not arrived yet. `wall` and `now` are its wall and monotonic clocks.

    INVARIANT: a row is handed over until a receipt for it comes. All of them together have at most `MAX_CHARS`.
    """

    def __init__(self, wall: Callable[[], float] = time.time, now: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._now = wall, now
        self._rows: list[str] = []
        self._chars = self._dropped = 0
        self._arrived = Receipt(uuid.uuid4().hex, 0, 0)
        self._offset = wall() - now()

    def __repr__(self) -> str:
        """For example `<ArrivalBuffer 200 rows, 0 dropped>`."""
        return f"<ArrivalBuffer {len(self._rows)} rows, {self._dropped} dropped>"

    def note(self, model: str, arrived: float, size: int, outcome: int, trace_id: str = "") -> None:
        """Add a row: a request that came at `arrived` on the monotonic clock, and its index in ACCESS_LOG_OUTCOMES."""
        if self._chars >= MAX_CHARS:
            self._dropped += 1
            return
        name = model if '"' not in model and "," not in model else '"' + model.replace('"', '""') + '"'
        row = f"{arrived + self._offset:.6f},{name},{size},{ACCESS_LOG_OUTCOMES[outcome]},{trace_id}\n"
        self._rows.append(row)
        self._chars += len(row)

    def hand_over(self, receipts: Collection[Receipt]) -> Arrivals:
        """All rows that have not arrived, in their order. `receipts`: what has, of whichever buffers.

        A receipt counts from the buffer's start, so that questions whose answers were late may come in any order.
        """
        for receipt in receipts:
            if receipt.buffer == self._arrived.buffer:
                self._let_go(receipt)
        self._offset = self._wall() - self._now()
        buffer, rows, dropped = self._arrived
        receipt = Receipt(buffer, rows + len(self._rows), dropped + self._dropped)
        return Arrivals("".join(self._rows), len(self._rows), self._dropped, receipt)

    def _let_go(self, receipt: Receipt) -> None:
        """Forget what has arrived, which an older receipt may have said before."""
        count, dropped = receipt.rows - self._arrived.rows, receipt.dropped - self._arrived.dropped
        if min(count, dropped) < 0:
            return
        self._chars -= sum(map(len, self._rows[:count]))
        del self._rows[:count]
        self._dropped -= dropped
        self._arrived = receipt


class AccessLog:
    """The folder and its newest part; all parts take at most `budget_bytes`. One server at a time writes into a folder.

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
        for torn in folder.glob(ACCESS_LOG_FILES.replace(".csv", ".tmp")):
            torn.unlink()
        for left in folder.glob(ACCESS_LOG_FILES):
            _cut_torn_row(left)
            _gzip_part(left)
        self._open()

    def __repr__(self) -> str:
        """For example `<AccessLog logs/arrivals-00000003.csv, 120000 bytes>`."""
        return f"<AccessLog {self._part.name if self._part else self._folder}, {self._size} bytes>"

    def write(self, rows: str) -> None:
        """Append whole rows. Raises OSError; the part then still ends with a whole row."""
        if self._part is None:
            self._open()
        assert self._part is not None, "it has just been opened"
        try:
            self._size += _write_all(self._part, rows.encode())
        except OSError:
            self._part.truncate(self._size)
            self._part.seek(self._size)
            raise
        if self._size >= self._budget // PARTS:
            self._rotate()

    def used_bytes(self) -> int:
        """Bytes of all parts together."""
        return sum(part.stat().st_size for part in list_log_parts(self._folder))

    def close(self) -> None:
        """Close the newest part, which is deleted if it has no rows, and release the folder."""
        if self._part is not None:
            self._part.close()
            if self._size == len(ACCESS_LOG_HEADER):
                Path(self._part.name).unlink()
            self._part = None
        self._lock.close()

    def _open(self) -> None:
        newest = max((int(part.name.split("-")[1].split(".")[0]) for part in list_log_parts(self._folder)), default=0)
        path = self._folder / ACCESS_LOG_FILE.format(newest + 1)
        part = path.open("xb", buffering=0)
        try:
            self._size = _write_all(part, ACCESS_LOG_HEADER.encode())
        except OSError:
            part.close()
            path.unlink()
            raise
        self._part = part

    def _rotate(self) -> None:
        """End the newest part and gzip it; the next row starts another. Delete the oldest parts over the budget."""
        assert self._part is not None, "rows have just been written"
        part, self._part = self._part, None
        part.close()
        with contextlib.suppress(OSError):  # the part stays plain until the next start
            _gzip_part(Path(part.name))
        found = list_log_parts(self._folder)
        used = [each.stat().st_size for each in found]
        while found and sum(used) > self._budget - self._budget // PARTS:
            found.pop(0).unlink()
            used.pop(0)


def list_log_parts(path: Path) -> list[Path]:
    """The parts of a log's folder, oldest first; of a single file the file itself."""
    if not path.is_dir():
        return [path]
    return sorted((*path.glob(ACCESS_LOG_FILES), *path.glob(ACCESS_LOG_FILES + ".gz")), key=lambda part: part.name)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a log or of one of its parts; safe while a server writes to it.

    Raises ValueError for a line that is not a row, OSError.
    """
    with contextlib.ExitStack() as stack:  # open all before reading the first: a server may gzip one meanwhile
        files = [(part, stack.enter_context(_open_part(part))) for part in list_log_parts(path)]
        for part, file in files:
            yield from _read_rows(part, file)


def _open_part(part: Path) -> IO[str]:
    if part.suffix == ".gz":
        return gzip.open(part, "rt", encoding="utf-8", newline="")
    return part.open(encoding="utf-8", newline="")


def _read_rows(part: Path, file: IO[str]) -> Iterator[Row]:
    columns = 0
    whole = takewhile(lambda line: line.endswith("\n"), file)  # leaves out a row that is being written
    for number, line in enumerate(csv.reader(whole), 1):
        if number == 1:
            columns = len(line)
            if ",".join(line) + "\n" not in (ACCESS_LOG_HEADER, REPLAY_HEADER):
                raise ValueError(f"{part}, line 1: an access log begins with the line {ACCESS_LOG_HEADER.rstrip()}")
            continue
        try:
            at, model, size, outcome, *trace_id = line
            row = Row(float(at), model, int(size), outcome, *trace_id)
            if len(line) != columns:
                raise ValueError(f"{len(line)} columns")  # noqa: TRY301 -- said below with the line
        except (ValueError, TypeError) as error:
            raise ValueError(f"{part}, line {number}: {line} is not {ACCESS_LOG_HEADER.rstrip()}") from error
        yield row


def _write_all(part: IO[bytes], data: bytes) -> int:
    """Write all of `data`, in as many calls as the system needs; its length. Raises OSError."""
    left = memoryview(data)
    while left:
        left = left[part.write(left) :]
    return len(data)


def _cut_torn_row(part: Path) -> None:
    """Cut off the incomplete row that a crash left at the end."""
    with part.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        back = min(size, 8192)
        file.seek(size - back)
        file.truncate(size - back + file.read().rfind(b"\n") + 1)


def _gzip_part(part: Path) -> None:
    """Gzip a part and delete the plain file; a part without rows is only deleted."""
    if part.stat().st_size > len(ACCESS_LOG_HEADER):
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
