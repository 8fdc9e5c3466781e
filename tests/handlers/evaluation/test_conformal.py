"""Offsets learnt from past errors bring levels to where they hold their promise, and never use what came later."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.codecs.calibration import BandCalibration
from handlers.evaluation.conformal import calibrate_rolling, estimate_offsets, shift_levels
from handlers.training.tails import TooFewScores, choose_band
from model_store.archives.manifest import ForecastSpec, InputChannel

LEVELS = np.array([0.1, 0.25, 0.5, 0.75, 0.9])
NORMAL = np.array([-1.2816, -0.6745, 0.0, 0.6745, 1.2816])
HOURS = np.tile(np.arange(24), (200, 1))


def make_windows(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Days of prices whose noise is ten times as wide at noon, and forecasts of bands half as wide as needed."""
    rng = np.random.default_rng(seed)
    spread = 2 + 9 * np.sin(HOURS / 24 * np.pi) ** 2
    actuals = 50 + spread * rng.standard_normal(HOURS.shape)
    return actuals, np.broadcast_to(50 + 3 * NORMAL, (*HOURS.shape, 5)).copy()


def measure_coverage(y: np.ndarray, q: np.ndarray) -> float:
    """The share of actuals between the outer levels."""
    return float(((q[..., 0] <= y) & (y <= q[..., -1])).mean())


def test_the_shifted_levels_hold_their_promise_on_later_windows() -> None:
    """Offsets of the first windows on the later ones: each level is met within two points, also hour by hour."""
    y, q = make_windows()
    offsets = estimate_offsets(y[:91], q[:91], LEVELS, HOURS[:91], 24)
    after = shift_levels(q[91:], LEVELS, offsets, HOURS[91:])
    assert measure_coverage(y[91:], q[91:]) < 0.6
    assert measure_coverage(y[91:], after) == pytest.approx(0.8, abs=0.02)
    assert (y[91:, :, None] <= after).mean((0, 1)) == pytest.approx(LEVELS, abs=0.02)
    by_hour = [measure_coverage(y[91:, hour : hour + 1], after[:, hour : hour + 1]) for hour in range(24)]
    assert min(by_hour) > 0.65


@pytest.mark.slow
def test_a_rolling_calibration_knows_nothing_of_later_windows() -> None:
    """What comes after a round leaves the round's levels as they were."""
    y, q = make_windows()
    changed = y.copy()
    changed[70:] += 500
    first, second = (calibrate_rolling(each, q, LEVELS, HOURS, 24, 56, 7) for each in (y, changed))
    assert len(first) == len(q) - 56
    assert (first[:14] == second[:14]).all()
    assert (first[14:21] == second[14:21]).all()  # the round of windows 70 to 76 has seen windows 14 to 69
    assert (first[21:28] != second[21:28]).any()


def test_an_hour_with_few_prices_takes_the_offsets_of_all() -> None:
    """Two years of nights without a price are no reason for a band of nothing."""
    y, q = make_windows()
    y[:, :5] = np.nan
    offsets = estimate_offsets(y, q, LEVELS, HOURS, 24)
    whole = estimate_offsets(y, q, LEVELS, HOURS, 1)
    assert (offsets[2] == whole[0]).all()
    assert (offsets[12] != whole[0]).any()
    with pytest.raises(TooFewScores, match="0 actual values with a band"):
        estimate_offsets(np.full_like(y, np.nan), q, LEVELS, HOURS, 24)
    with pytest.raises(TooFewScores, match="49 actual values"):
        estimate_offsets(np.zeros((1, 49)), q[0, :1].repeat(49, 0)[None], LEVELS, HOURS[:1, :1].repeat(49, 1), 1)


def test_the_band_is_the_one_nearest_to_eighty_percent() -> None:
    """The outer levels of one percent are too uncertain to be a unit."""
    assert choose_band(np.array([0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99])) == (2, 6)
    assert choose_band(np.array([0.2, 0.5, 0.7])) == (0, 2)
    with pytest.raises(TooFewScores, match="the only level"):
        choose_band(np.array([0.5]))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-3, 3), min_size=24 * 5, max_size=24 * 5),
    st.lists(st.tuples(st.integers(0, 23), st.integers(0, 3)), min_size=1, max_size=3),
)
def test_the_codec_shifts_as_the_estimate_does(numbers: list[float], starts: list[tuple[int, int]]) -> None:
    """For any offsets and starts, also those within an hour: the same numbers, once they are sorted."""
    forecast = ForecastSpec(
        frequency="15min",
        context_length=4,
        prediction_length=7,
        quantile_levels=tuple(LEVELS.tolist()),
        inputs=(InputChannel(source="target"),),
    )
    offsets = np.array(numbers, np.float32).reshape(24, 5)
    prices = np.sort(np.random.default_rng(1).normal(50, 20, (len(starts), 7, 5)), axis=-1)
    codec = BandCalibration(forecast, offsets, 0.1, 0.9)
    stamps = [f"2024-03-04 {hour:02}:{15 * quarter:02}:00" for hour, quarter in starts]
    hours = np.array([[(4 * hour + quarter + i) // 4 % 24 for i in range(7)] for hour, quarter in starts])
    for _ in range(2):  # the second one is remembered
        found = np.sort(codec.shift(prices, stamps), axis=-1)
        assert found == pytest.approx(shift_levels(prices, LEVELS, offsets, hours))
