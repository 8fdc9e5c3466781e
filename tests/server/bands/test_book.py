"""The book: which version goes on with what was learnt, on whose clock prices come, and how many archives it has."""

import struct
from datetime import datetime, timedelta

import pytest

from server.bands.adaptive_offsets import DAY, HOUR, BandShape
from server.bands.book import MOST_SHAPES, Book, Kept, Price
from server.bands.market import AnsweredForecast, Outcome

SHAPE = BandShape((0.1, 0.5, 0.9), HOUR, "Europe/Berlin")
EPOCH = datetime.fromisoformat("1970-01-01")


def make_answer(
    day: int, *, model: str = "m", version: str = "v1", shape: BandShape = SHAPE, levels: int = 3
) -> AnsweredForecast:
    """A forecast of one day."""
    return AnsweredForecast(model, version, "", day, shape, day * DAY, struct.pack(f"<{levels}f", *range(levels)) * 24)


def find_day(text: str) -> int:
    """Days since 1970."""
    return (datetime.fromisoformat(text) - EPOCH).days


def test_a_version_of_the_same_shape_goes_on() -> None:
    """What was learnt of one version shifts the next; one with a calibration of its own begins at zero, and
    the first is there again after a rollback.
    """
    book = Book()
    book.note_forecast(make_answer(0), 10)
    book.pair("m", Price(0, False, 50.0))
    (record,) = book.records["m"]
    learnt = record.offsets
    assert any(learnt)
    book.note_forecast(make_answer(1, version="v2"), 10)
    assert len(book.records["m"]) == 1
    book.note_forecast(make_answer(2, shape=BandShape(SHAPE.levels, HOUR, SHAPE.time_zone, "calibrated")), 10)
    assert not any(book.records["m"][1].offsets)
    assert book.records["m"][0].offsets == learnt


def test_shapes_and_archives_are_bounded() -> None:
    """Of a third shape's coming the oldest goes; an archive beyond the limit has no record and costs others nothing."""
    book = Book()
    for day in range(5):
        book.note_forecast(make_answer(day, shape=BandShape(SHAPE.levels, HOUR, "UTC", str(day))), 2)
    assert [each.shape.calibration for each in book.records["m"]] == ["3", "4"]
    assert len(book.records["m"]) == MOST_SHAPES
    assert book.note_forecast(make_answer(0, model="n"), 2) == Kept.KEPT
    assert book.note_forecast(make_answer(0, model="o"), 2) == Kept.DROPPED
    assert book.note_forecast(make_answer(9, model="n", levels=3 * 500), 2) == Kept.DROPPED, "it is too long"
    assert set(book.records) == {"m", "n"}
    assert book.reset("m")
    assert not book.reset("m")
    assert book.note_forecast(make_answer(0, model="o"), 2) == Kept.KEPT


@pytest.mark.parametrize(
    ("utc", "slot"),
    [
        ("2026-01-10 23:00", "2026-01-11 00:00"),
        ("2026-07-10 22:00", "2026-07-11 00:00"),
        ("2026-10-25 00:00", "2026-10-25 02:00"),
        ("2026-10-25 01:00", "2026-10-25 02:00"),
    ],
)
def test_prices_with_an_offset_are_on_the_archives_clock(utc: str, slot: str) -> None:
    """In winter, in summer, and in the hour that comes twice, whose slot takes the first of the two prices."""
    book, wall = Book(), datetime.fromisoformat(slot)
    day = find_day(slot[:10])
    book.note_forecast(make_answer(day), 10)
    at = int((datetime.fromisoformat(utc) - EPOCH).total_seconds())
    assert book.pair("m", Price(at, True, 1.0)) == Outcome.PAIRED
    kept = book.records["m"][0].forecasts[0]
    assert list(kept.paired).index(1) == (wall - (EPOCH + timedelta(days=day))) // timedelta(hours=1)
    assert book.pair("m", Price(int((wall - EPOCH).total_seconds()), False, 2.0)) == Outcome.REPEATED


def test_what_no_clock_has_is_unmatched() -> None:
    """Times beyond the calendar, and archives that nobody knows."""
    book = Book()
    book.note_forecast(make_answer(0), 10)
    assert book.pair("m", Price(2**60, True, 1.0)) == Outcome.UNMATCHED
    assert book.pair("n", Price(0, True, 1.0)) == Outcome.UNMATCHED
    assert book.observed == [0, 0, 2]
