"""The book of `server.bands` on disk: a snapshot and a journal of what has happened since. Runs in the supervisor.

`snapshot` holds the book as it was before `journal-N` began, and N. A record is a u32 length, a u32 CRC and msgpack.
A snapshot is written beside the old one and renamed; the new journal exists before it, so that after a crash at any
moment the snapshot that is there and all journals from its N on give the book again. INVARIANT: what was appended with
`sync` is there after a SIGKILL and after a loss of power; a record that is not whole is cut off at the next start.
"""

import contextlib
import fcntl
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from struct import Struct as Layout

import msgspec
import structlog
from msgspec import Struct

from model_store.stores.disk_cache import UnsafeDiskCache, check_private
from server.bands.book import Book, Price
from server.bands.market import AnsweredForecast

SNAPSHOT, JOURNAL, LOCK = "snapshot", "journal-{:08}", "lock"
MOST_JOURNAL_BYTES = 4 * 1024 * 1024  #: or as many as the snapshot has; then a new snapshot is written
_HEAD = Layout("<II")

log = structlog.get_logger()


class JournalUnreadable(Exception):
    """The folder cannot be used as it is; the message names the file and says what to do."""


class ForecastsAnswered(Struct, frozen=True, tag=1, array_like=True):
    """Clients got these forecasts."""

    forecasts: list[AnsweredForecast]
    most_models: int


class PricesObserved(Struct, frozen=True, tag=2, array_like=True):
    """Prices of one market came; `model` is its name in the book."""

    model: str
    prices: list[Price]


class RecordReset(Struct, frozen=True, tag=3, array_like=True):
    """An operator has an archive forgotten, with all of its products."""

    model: str


Event = ForecastsAnswered | PricesObserved | RecordReset


class _Snapshot(Struct):
    journal: int  #: the first one that the book lacks
    book: Book


_encode = msgspec.msgpack.Encoder().encode
_decode_event = msgspec.msgpack.Decoder(Event).decode
_decode_snapshot = msgspec.msgpack.Decoder(_Snapshot).decode


def apply_event(book: Book, event: Event) -> None:
    """Let an event change the book. The same events always give the same book."""
    match event:
        case ForecastsAnswered(forecasts, most_models):
            for each in forecasts:
                book.note_forecast(each, most_models)
        case PricesObserved(model, prices):
            for price in prices:
                book.pair(model, price)
        case RecordReset(model):
            book.reset(model)


class Journal:
    """One folder, which one process uses at a time. Its calls block: they run on a thread, one after another."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number, self._size, self._snapshot_bytes = 0, 0, 0
        self._file = -1
        self._lock = -1

    def __repr__(self) -> str:
        """For example `<Journal state/actuals, 3 of 812 bytes>`."""
        return f"<Journal {self._folder}, {self._number} of {self._size} bytes>"

    @property
    def is_long(self) -> bool:
        """Whether it is time for a snapshot."""
        return self._size > max(MOST_JOURNAL_BYTES, self._snapshot_bytes)

    def open(self) -> Book:
        """Lock the folder and read the book. Raises JournalUnreadable."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            check_private(self._folder, self._folder.lstat())
            self._lock = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise JournalUnreadable(f"{self._folder}: another server uses this folder of actuals") from None
            return self._read()
        except (OSError, UnsafeDiskCache) as error:
            raise JournalUnreadable(f"{self._folder}: the folder of actuals cannot be used: {error}") from error

    def append(self, events: Sequence[Event], *, sync: bool) -> None:
        """Write events, all or none; with `sync` they are on the disk when this returns. Raises OSError."""
        data = b"".join(_frame(_encode(event)) for event in events)
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._file, left) :]
            if sync:
                os.fdatasync(self._file)
        except OSError:
            with contextlib.suppress(OSError):  # then the next start cuts it off
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(data)

    def write_snapshot(self, book: Book) -> None:
        """Write the book, and begin a new journal. Raises OSError; the old ones then go on."""
        data = _frame(_encode(_Snapshot(self._number + 1, book)))
        file, size, before = self._file, self._size, self._number
        self._begin_journal(before + 1)
        draft = self._folder / f"{SNAPSHOT}.draft"
        try:
            with draft.open("wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            draft.replace(self._folder / SNAPSHOT)
            self._sync_folder()
        except OSError:
            os.close(self._file)
            self._file, self._size, self._number = file, size, before
            with contextlib.suppress(OSError):
                draft.unlink()
            with contextlib.suppress(OSError):
                self._path(before + 1).unlink()
            raise
        os.close(file)
        self._snapshot_bytes = len(data)
        for number in range(max(0, before - 1), before + 1):
            with contextlib.suppress(OSError):
                self._path(number).unlink()

    def close(self) -> None:
        """End the use of the folder."""
        for descriptor in (self._file, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._lock = -1

    # --- reading ----------------------------------------------------------------------------------------------------

    def _read(self) -> Book:
        snapshot = self._read_snapshot()
        number, book = snapshot.journal, snapshot.book
        while self._path(number + 1).exists():
            self._replay(number, book, is_last=False)
            number += 1
        self._replay(number, book, is_last=True)
        self._begin_journal(number)
        return book

    def _read_snapshot(self) -> _Snapshot:
        path = self._folder / SNAPSHOT
        if not path.exists():
            return _Snapshot(0, Book())
        data = path.read_bytes()
        self._snapshot_bytes = len(data)
        if len(data) >= _HEAD.size:
            size, checksum = _HEAD.unpack_from(data)
            payload = memoryview(data)[_HEAD.size :]
            if size == len(payload) and checksum == zlib.crc32(payload):
                try:
                    return _decode_snapshot(payload)
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    raise _refuse(path, f"it is of another version: {error}") from error
        raise _refuse(path, "its checksum is wrong")

    def _replay(self, number: int, book: Book, *, is_last: bool) -> None:
        """Apply the journal to the book; cut off what a crash left at the end of the last one."""
        path = self._path(number)
        if not path.exists():
            return
        data, end = path.read_bytes(), 0
        for event, end in _read_events(path, data):  # noqa: B007 -- the last end is where the journal is whole
            apply_event(book, event)
        if end < len(data):
            if not is_last:
                raise _refuse(path, f"it is damaged at byte {end}")
            log.warning("actuals_cut", file=path.name, bytes=len(data) - end)
            with path.open("r+b") as file:
                file.truncate(end)
                os.fsync(file.fileno())

    def _begin_journal(self, number: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self._path(number), flags, 0o600)
        self._number, self._size = number, os.fstat(self._file).st_size
        self._sync_folder()

    def _sync_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _path(self, number: int) -> Path:
        return self._folder / JOURNAL.format(number)


def _frame(payload: bytes) -> bytes:
    return _HEAD.pack(len(payload), zlib.crc32(payload)) + payload


def _read_events(path: Path, data: bytes) -> Iterator[tuple[Event, int]]:
    """The whole records, each with where it ends. Raises JournalUnreadable for one that is damaged before the end.

    A crash leaves the last record short, or zeros where it should be; anything else is damage, and what follows it was
    acknowledged, so it is not cut off in silence.
    """
    view, at = memoryview(data), 0
    while at < len(data):
        if len(data) - at < _HEAD.size:
            return
        size, checksum = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + size
        payload = view[at + _HEAD.size : end]
        if end > len(data) or not any(view[at:]):
            return
        if not size or zlib.crc32(payload) != checksum:
            if not any(view[end:]):  # nothing follows, or zeros
                return
            raise _refuse(path, f"the checksum of its record at byte {at} is wrong")
        try:
            event = _decode_event(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise _refuse(path, f"its record at byte {at} is of another version: {error}") from error
        yield event, end
        at = end


def _refuse(path: Path, why: str) -> JournalUnreadable:
    return JournalUnreadable(
        f"{path}: {why}; restore the folder from a copy, or move it away: bands are then learnt anew"
    )
