"""The journal: what was acknowledged is there after any kill, half a record is cut off, and damage is said."""

import os
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import msgspec
import pytest

from server.bands.adaptive_offsets import DAY, HOUR, BandShape
from server.bands.book import Book, Price
from server.bands.market import AnsweredForecast
from server.supervisor.actuals.journal import (
    Event,
    ForecastsAnswered,
    Journal,
    JournalUnreadable,
    PricesObserved,
    RecordReset,
    apply_event,
)
from tests.patience import PATIENCE_S

SHAPE = BandShape((0.1, 0.5, 0.9), HOUR, "UTC")
ROOT = Path(__file__).parents[4]


def make_day(day: int) -> list[Event]:
    """A forecast of a day, and its prices."""
    levels = struct.pack("<3f", 10.0, 20.0, 30.0) * 24
    answered = AnsweredForecast("m", "v", "", day, SHAPE, day * DAY, levels)
    prices = [Price(day * DAY + hour * HOUR, False, 5.0 * hour) for hour in range(24)]
    return [ForecastsAnswered([answered], 10), PricesObserved("m", prices)]


def make_book(days: int) -> Book:
    """The book after so many days."""
    book = Book()
    for day in range(days):
        for event in make_day(day):
            apply_event(book, event)
    return book


def write_days(folder: Path) -> None:
    """Append day after day until killed, with many snapshots; say each when it is acknowledged."""
    journal = Journal(folder)
    book, day = journal.open(), 0
    day = book.records["m"][0].total // 24 if book.records else 0
    while True:
        events = make_day(day)
        journal.append(events, sync=True)
        sys.stdout.write(f"{day}\n")
        sys.stdout.flush()
        for event in events:
            apply_event(book, event)
        if day % 3 == 2:
            journal.write_snapshot(book)
        day += 1


def read_book(folder: Path) -> Book:
    """What a server would start with."""
    journal = Journal(folder)
    try:
        return journal.open()
    finally:
        journal.close()


def find_journal(folder: Path) -> Path:
    """The newest journal."""
    return max(folder.glob("journal-*"))


@pytest.mark.slow
def test_no_acknowledged_price_is_lost_by_sigkill(tmp_path: Path) -> None:
    """A writer is killed at 12 moments, amid appends and snapshots: each time the book is exactly that of all days that
    it had acknowledged, or of one more that it had no time to say.
    """
    acknowledged = 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for turn in range(12):
        with subprocess.Popen(
            [sys.executable, "-m", __name__, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        ) as writer:
            assert writer.stdout is not None
            for _ in range(1 + turn):
                acknowledged = int(writer.stdout.readline()) + 1
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().split()
            writer.wait(PATIENCE_S)
        acknowledged = max([acknowledged, *(int(day) + 1 for day in rest)])
        book = read_book(tmp_path)
        written = book.records["m"][0].total // 24
        assert written - acknowledged in (0, 1)
        assert book == make_book(written)


@pytest.mark.slow
def test_half_a_record_is_cut_off_wherever_it_ends(tmp_path: Path) -> None:
    """A journal that is cut at any byte gives the book of the whole records before, and goes on."""
    journal = Journal(tmp_path)
    journal.open()
    journal.append(make_day(0), sync=True)
    whole = find_journal(tmp_path).read_bytes()
    journal.append(make_day(1)[:1], sync=False)
    data = find_journal(tmp_path).read_bytes()
    journal.close()
    for end in [*range(len(whole), len(data), 7), *range(len(data) - 9, len(data))]:
        for zeros in (0, 9):  # which may reach beyond the end of the record
            find_journal(tmp_path).write_bytes(data[:end] + bytes(zeros))
            assert read_book(tmp_path) == make_book(1)
            assert find_journal(tmp_path).read_bytes() == whole


def test_damage_before_the_end_is_said(tmp_path: Path) -> None:
    """A byte that changed in a record with others after it, or in a snapshot, stops the start and names the file."""
    journal = Journal(tmp_path)
    book = journal.open()
    journal.append(make_day(0), sync=True)
    path = find_journal(tmp_path)
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    journal.close()
    with pytest.raises(JournalUnreadable, match=r"journal-00000000: the checksum of its record at byte 0 is wrong"):
        read_book(tmp_path)
    path.unlink()
    journal = Journal(tmp_path)
    journal.open()
    journal.write_snapshot(book)
    journal.close()
    (tmp_path / "snapshot").write_bytes(b"x" * 40)
    with pytest.raises(JournalUnreadable, match="snapshot: its checksum is wrong"):
        read_book(tmp_path)


@pytest.mark.slow
def test_a_snapshot_takes_the_place_of_its_journal(tmp_path: Path) -> None:
    """The old journal goes; so do events before it. A snapshot that cannot be written leaves all as it was."""
    journal = Journal(tmp_path)
    book = journal.open()
    for event in make_day(0):
        apply_event(book, event)
    journal.append(make_day(0), sync=False)
    journal.write_snapshot(book)
    assert [each.name for each in sorted(tmp_path.glob("journal-*"))] == ["journal-00000001"]
    (tmp_path / "snapshot.draft").mkdir()  # so that no file can be written there
    with pytest.raises(OSError, match="draft"):
        journal.write_snapshot(book)
    journal.append([RecordReset("m")], sync=True)
    journal.close()
    assert read_book(tmp_path).records == {}


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    """A second one is told so; a folder that others may write to is refused."""
    journal = Journal(tmp_path)
    journal.open()
    with pytest.raises(JournalUnreadable, match="another server uses this folder"):
        Journal(tmp_path).open()
    journal.close()
    tmp_path.chmod(0o777)
    with pytest.raises(JournalUnreadable, match="cannot be used"):
        Journal(tmp_path).open()
    tmp_path.chmod(0o700)


if __name__ == "__main__":
    write_days(Path(sys.argv[1]))


def test_what_was_written_before_archives_had_products_is_read(tmp_path: Path) -> None:
    """A snapshot without products and a journal whose forecasts name none give the same book, which goes on."""
    journal = Journal(tmp_path)
    journal.open()
    old = [msgspec.msgpack.decode(msgspec.msgpack.encode(each)) for each in (make_book(1), *make_day(1))]
    del old[0]["products"]
    (answered,) = old[1][1]
    assert answered.pop() == []
    for name, content in (("snapshot", {"journal": 0, "book": old[0]}), ("journal-00000000", old[1:])):
        parts = content if isinstance(content, list) else [content]
        framed = (msgspec.msgpack.encode(part) for part in parts)
        data = b"".join(struct.pack("<II", len(each), zlib.crc32(each)) + each for each in framed)
        (tmp_path / name).write_bytes(data)
    journal.close()
    assert read_book(tmp_path) == make_book(2)


def test_products_are_read_again(tmp_path: Path) -> None:
    """Each product's record and the names of them all, from a journal and from a snapshot."""
    levels = struct.pack("<3f", 10.0, 20.0, 30.0) * 48
    answered = AnsweredForecast("lu", "v", "", 0, SHAPE, 0, levels, ("energy", "reserve"))
    events: list[Event] = [ForecastsAnswered([answered], 10), PricesObserved("lu#energy", [Price(0, False, 50.0)])]
    journal, expected = Journal(tmp_path), Book()
    journal.open()
    journal.append(events, sync=True)
    for event in events:
        apply_event(expected, event)
    journal.close()
    assert (book := read_book(tmp_path)) == expected
    assert book.products == {"lu": ["energy", "reserve"]}
    assert [book.records[f"lu#{product}"][0].total for product in book.products["lu"]] == [1, 0]
    journal = Journal(tmp_path)
    journal.write_snapshot(journal.open())
    journal.append([RecordReset("lu")], sync=True)
    journal.close()
    book = read_book(tmp_path)
    assert (book.records, book.products, book.observed) == ({}, {}, [1, 0, 0])
