"""The record of one archive: which forecasts count, which prices are paired, and that it is bounded and repeatable."""

import struct

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.bands.adaptive_offsets import BOUND, DAY, HOUR, BandShape
from server.bands.market import (
    MOST_DAYS,
    MOST_FORECAST_BYTES,
    MOST_FORECASTS,
    AnsweredForecast,
    MarketRecord,
    Outcome,
    open_record,
)

SHAPE = BandShape((0.1, 0.5, 0.9), HOUR, "UTC")


def make_answer(start: int, levels: tuple[float, ...] = (10.0, 20.0, 30.0), steps: int = 24) -> AnsweredForecast:
    """A forecast of the same levels at each step."""
    return AnsweredForecast("m", "v1", "desk", 1, SHAPE, start, struct.pack("<3f", *levels) * steps)


def test_a_price_is_paired_once() -> None:
    """The first price of a step counts; one that no forecast has, or between two steps, changes nothing."""
    record = open_record(SHAPE)
    assert record.note_forecast(make_answer(0))
    assert record.pair(HOUR, 35.0) == Outcome.PAIRED
    before = list(record.offsets)
    assert record.pair(HOUR, 35.0) == Outcome.REPEATED
    assert record.pair(HOUR + 60, 35.0) == Outcome.UNMATCHED
    assert record.pair(DAY, 35.0) == Outcome.UNMATCHED
    assert record.offsets == before
    assert (record.total, record.inside) == (1, [0])


def test_the_last_answer_counts_until_a_price_has_come() -> None:
    """A forecast that is asked again, with newer history, takes the place of the one before; later it does not."""
    record = open_record(SHAPE)
    record.note_forecast(make_answer(0, (0.0, 0.0, 1.0)))
    assert record.note_forecast(make_answer(0, (50.0, 60.0, 70.0)))
    record.pair(0, 60.0)
    assert record.inside == [1]
    assert not record.note_forecast(make_answer(0))
    assert not record.note_forecast(make_answer(5 * HOUR)), "it overlaps"
    assert record.note_forecast(make_answer(DAY))


def test_scores_are_those_of_the_definition() -> None:
    """Pinball loss over the levels, and the naive forecast's where the price a day or a week before is known."""
    record = open_record(SHAPE)
    for day in range(9):
        record.note_forecast(make_answer(day * DAY))
        record.pair(day * DAY, 40.0 + day)
    scores = record.days[1]  # 2 January 1970 is a Friday: naive is the day before, one below
    assert scores.pinball == pytest.approx((0.1 * 31 + 0.5 * 21 + 0.9 * 11) / 3)
    assert scores.naive == pytest.approx((0.1 + 0.5 + 0.9) / 3)
    assert scores.beside == scores.pinball
    assert record.days[2].naive == 0, "a Saturday looks a week back"
    assert record.days[0].naive == 0


def test_flat_bands_do_not_wind_offsets_up() -> None:
    """Where all levels are at a cap no offset could move them, so none is learnt."""
    record = open_record(SHAPE)
    record.note_forecast(make_answer(0, (30.0, 30.0, 30.0)))
    record.pair(0, 10.0)
    assert set(record.offsets) == {0.0}
    assert record.total == 1


@settings(max_examples=50)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("ask"), st.integers(-(2**40), 2**40), st.integers(1, 400)),
            st.tuples(st.just("price"), st.integers(0, 2000), st.floats(-1e12, 1e12)),
        ),
        max_size=80,
    )
)
def test_whatever_comes_the_record_is_bounded_and_survives_its_file(calls: list[tuple[str, int, float]]) -> None:
    """Any forecasts and prices: bounds hold, and a record that was written and read goes on exactly as the other."""
    record, starts = open_record(SHAPE), [0]
    for kind, number, value in calls:
        copy = msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=MarketRecord)
        for each in (record, copy):
            if kind == "ask":
                each.note_forecast(make_answer(number * HOUR, steps=int(value)))
            else:
                each.pair(starts[number % len(starts)] + number % 400 * HOUR, value)
        if kind == "ask":
            starts.append(number * HOUR)
        assert copy == record
        assert len(record.forecasts) <= MOST_FORECASTS
        assert len(record.days) <= MOST_DAYS
        assert sum(len(each.quantiles) for each in record.forecasts) <= MOST_FORECAST_BYTES
        assert all(abs(each) <= BOUND for each in record.offsets)
