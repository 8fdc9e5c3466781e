"""Adaptive offsets: they stay within their bounds whatever prices come, and bands come to hold what they say."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.codecs.calibration import count_rows, find_unit_band
from server.bands.adaptive_offsets import (
    BOUND,
    DAY,
    HOUR,
    MOST_STEP,
    Band,
    BandShape,
    choose_steps,
    choose_unit,
    list_bands,
    make_state,
    move_offsets,
    sum_offsets,
)

NINE = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
STEPS_S = st.sampled_from([60, 300, 900, HOUR, 5 * HOUR, 6 * HOUR, DAY, 7 * DAY])
LEVELS = st.lists(st.floats(1e-6, 1 - 1e-6), min_size=2, max_size=12, unique=True).map(
    lambda found: tuple(sorted(found))
)
PRICES = st.floats(-1e12, 1e12)


@pytest.mark.slow
@given(LEVELS, STEPS_S, st.lists(st.tuples(st.integers(0, 2**33), PRICES), max_size=60))
def test_no_price_moves_an_offset_far(levels: tuple[float, ...], step_s: int, prices: list[tuple[int, float]]) -> None:
    """An adversary who chooses all prices moves an offset by MOST_STEP at a time, and never beyond BOUND."""
    shape = BandShape(levels, step_s, "UTC")
    state, steps, answered = make_state(shape), choose_steps(shape), [float(i) for i in range(len(levels))]
    offsets = sum_offsets(state, shape)
    for at, price in prices:
        before = offsets
        move_offsets(state, shape, steps, at, answered, price)
        offsets = sum_offsets(state, shape)
        assert max(abs(a - b) for a, b in zip(before, offsets, strict=True)) <= MOST_STEP * (1 + 1e-9)
        assert all(abs(each) <= BOUND and math.isfinite(each) for each in offsets)


@pytest.mark.slow
def test_constant_misses_end_at_the_bound() -> None:
    """Prices that always lie above push all levels up, as far as the bound and no further."""
    shape = BandShape(NINE, HOUR, "UTC")
    state, steps = make_state(shape), choose_steps(shape)
    for hour in range(24 * 2000):
        move_offsets(state, shape, steps, hour * HOUR, [0.0] * 9, 1.0)
    assert set(sum_offsets(state, shape)) == {BOUND}


def test_a_price_at_a_level_moves_nothing_there() -> None:
    """A level at a floor, at which prices lie, is neither too high nor too low."""
    shape = BandShape((0.1, 0.5, 0.9), HOUR, "UTC")
    state = make_state(shape)
    move_offsets(state, shape, choose_steps(shape), 0, [0.0, 0.0, 5.0], 0.0)
    offsets = sum_offsets(state, shape)
    assert offsets[:3] == [0.0, 0.0, offsets[2]]
    assert offsets[2] < 0


@given(st.lists(st.integers(1, 999), min_size=2, max_size=12, unique=True))
def test_the_unit_is_that_of_the_codec(thousandths: list[int]) -> None:
    """What the server learns in widths of a band, the codec applies in widths of the same band."""
    levels = [each / 1000 for each in sorted(thousandths)]
    unit = choose_unit(levels)
    assert unit is not None
    assert (unit.low, unit.high) == find_unit_band(np.array(levels))


@given(STEPS_S)
def test_rows_are_those_of_the_codec(step_s: int) -> None:
    """A row for each hour, where the codec looks for one."""
    assert BandShape(NINE, step_s, "UTC").rows == count_rows(step_s)


def test_bands_are_the_symmetric_pairs() -> None:
    """The widest first; a level without its opposite has none."""
    assert list_bands((0.05, 0.25, 0.5, 0.75, 0.9)) == [Band(1, 3, 0.5)]
    assert [band.nominal for band in list_bands(NINE)] == [0.98, 0.9, 0.8, 0.5]
    assert choose_unit((0.5,)) is None


@pytest.mark.slow
def test_bands_come_to_hold_what_they_promise() -> None:
    """Prices are wider than forecast, with a bias: after two months bands cover what they say, within 2 points."""
    shape = BandShape(NINE, HOUR, "UTC")
    state, steps = make_state(shape), choose_steps(shape)
    rng = np.random.default_rng(1)
    levels = np.array([-2.33, -1.64, -1.28, -0.67, 0, 0.67, 1.28, 1.64, 2.33]) * 10
    inside = {band.nominal: 0 for band in list_bands(NINE)}
    days, learnt = 400, 60
    for day in range(days):
        now = np.array(sum_offsets(state, shape)).reshape(24, 9)
        for hour in range(24):
            answered = np.sort(levels + now[hour] * (levels[6] - levels[2]))
            price = float(rng.normal(5, 15))
            if day >= learnt:
                for band in list_bands(NINE):
                    inside[band.nominal] += int(answered[band.low] <= price <= answered[band.high])
            move_offsets(state, shape, steps, (day * 24 + hour) * HOUR, answered.tolist(), price)
    for nominal, count in inside.items():
        assert abs(count / (24 * (days - learnt)) - nominal) < 0.02, nominal
