"""Scores equal those of `fev` and `scoringrules`, and are defined in edge cases."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.codecs.features import Float64
from handlers.evaluation.scores import (
    Scores,
    compute_calibration,
    compute_crps,
    compute_pinball,
    compute_seasonal_errors,
    find_outer_levels,
    interpolate_median,
    make_naive_forecast,
    make_weekly_forecast,
    score_windows,
)
from handlers.training.time_series import read_csv

HOUR, DAY = 3600, 86_400
LEVELS = np.array([0.1, 0.25, 0.5, 0.75, 0.9])


def read_fixture() -> dict[str, Any]:
    """What `make_scores.py` wrote."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("scores.json").read_text())
    return found


def score_fixture(data: dict[str, Any]) -> Scores:
    """The fixture by our own functions, from its values on."""
    values, q = np.array(data["values"], np.float64), np.array(data["quantiles"])
    origins = np.array(data["origins"])
    start = int(np.datetime64(data["start"], "s").astype(np.int64))
    seconds = start + HOUR * np.arange(len(values))
    y = values[origins[:, None] + np.arange(q.shape[1])]
    before = make_naive_forecast(values, seconds, origins, q.shape[1])
    return score_windows(y, q, np.array(data["levels"]), before, compute_seasonal_errors(values, origins, 24))


@pytest.mark.parametrize("name", ["pinball", "wql", "wape", "mase", "rmae", "coverage"])
def test_scores_are_those_of_fev_and_scoringrules(name: str) -> None:
    """With missing values, zeros, and a forecast whose quantiles are all equal."""
    data = read_fixture()
    assert getattr(score_fixture(data), name) == pytest.approx(data["expected"][name], rel=1e-12)


def test_crps_is_that_of_what_samples_are_drawn_from() -> None:
    """The closed form meets `scoringrules` on an ensemble of 5,000 evenly spread draws of the same distribution."""
    data = read_fixture()
    assert score_fixture(data).crps == pytest.approx(data["expected"]["crps"], rel=1e-5)
    assert 2 * score_fixture(data).pinball == pytest.approx(data["expected"]["twice_pinball"], rel=1e-12)


@given(
    st.lists(st.floats(-500, 500), min_size=5, max_size=5).map(sorted),
    st.floats(-600, 600),
    st.sampled_from([1, 2, 3, 5]),
)
def test_crps_is_the_integral_of_twice_the_pinball_loss(quantiles: list[float], y: float, count: int) -> None:
    """Whatever the quantiles, equal ones included: the sum over 20,000 levels is the closed form."""
    levels, q = LEVELS[:count], np.array(quantiles[:count])
    fine = (np.arange(20_000) + 0.5) / 20_000
    summed = 2 * compute_pinball(np.array(y), np.interp(fine, levels, q), fine).mean()
    assert compute_crps(np.array(y), q, levels) == pytest.approx(summed, rel=1e-3, abs=1e-3)


def test_what_cannot_be_scored_is_nan() -> None:
    """Nothing observed; levels without a middle; a series that never changes."""
    y, q = np.full((2, 3), np.nan), np.zeros((2, 3, 2))
    nothing = score_windows(y, q, np.array([0.1, 0.9]), y, np.zeros(2))
    assert nothing.observed == 0
    assert np.isnan([nothing.pinball, nothing.wql, nothing.crps, nothing.coverage, nothing.rmae]).all()
    upper = score_windows(np.ones((1, 1)), np.ones((1, 1, 2)), np.array([0.6, 0.9]), np.ones((1, 1)), np.zeros(1))
    assert np.isnan([upper.wape, upper.mase, upper.rmae]).all()
    assert upper.pinball == 0


@pytest.mark.parametrize(
    ("levels", "expected"), [([0.5], 7.0), ([0.25, 0.5, 0.75], 2.0), ([0.25, 0.75], 2.0), ([0.4, 0.9], 1.6)]
)
def test_the_median_is_between_the_levels_around_it(levels: list[float], expected: float) -> None:
    """Whether 0.5 is a level or lies between two."""
    q = {1: [7.0], 2: [1.0, 3.0] if levels[0] < 0.4 else [1.0, 4.0], 3: [1.0, 2.0, 9.0]}[len(levels)]
    assert interpolate_median(np.array(q), np.array(levels)) == pytest.approx(expected)


def test_the_interval_is_the_widest_with_equal_tails() -> None:
    """0.05 has no partner here; without any pair first and last level make the interval."""
    assert find_outer_levels(np.array([0.05, 0.1, 0.5, 0.9])) == (1, 3)
    assert find_outer_levels(np.array([0.2, 0.5, 0.9])) == (0, 2)


@pytest.mark.parametrize(
    ("levels", "nominal"), [([0.1, 0.25, 0.5, 0.75, 0.9], 0.8), ([0.05, 0.25, 0.5, 0.75], 0.5), ([0.2, 0.5, 0.9], 0.7)]
)
def test_nominal_is_what_the_interval_of_the_coverage_promises(levels: list[float], nominal: float) -> None:
    """The outer level less the inner one of the very pair that the coverage counts: one step of three lies within."""
    low, high = find_outer_levels(np.array(levels))
    q = np.broadcast_to(np.arange(float(len(levels))), (1, 3, len(levels)))
    y = np.array([[low - 0.5, (low + high) / 2, high + 0.5]])
    found = score_windows(y, q, np.array(levels), np.ones((1, 3)), np.ones(1))
    assert found.nominal == pytest.approx(nominal)
    assert found.coverage == pytest.approx(1 / 3)


def test_the_pit_of_a_right_forecast_is_the_levels_distance() -> None:
    """Actuals drawn from the forecast itself fill the cells as wide as they are."""
    y = np.random.default_rng(0).random(200_000)
    shares = compute_calibration(y, np.broadcast_to(LEVELS, (len(y), 5)), LEVELS)
    np.testing.assert_allclose(shares, [0.1, 0.15, 0.25, 0.25, 0.15, 0.1], atol=0.005)


def test_the_pit_shares_ties() -> None:
    """A price at the floor that three quantiles lie on belongs to the cells on both sides; a missing one to none."""
    q = np.array([[0.0, 0.0, 0.0, 5.0, 9.0]])
    np.testing.assert_array_equal(compute_calibration(np.zeros(1), q, LEVELS), [0.5, 0, 0, 0.5, 0, 0])
    np.testing.assert_array_equal(
        compute_calibration(np.array([np.nan, 7.0]), q.repeat(2, 0), LEVELS), [0, 0, 0, 0, 1, 0]
    )


def find_lags(start: str, step_s: int, horizon: int, origin: int) -> list[int]:
    """How far the naive forecast looks back, step by step: the values are their own places."""
    values: Float64 = np.arange(60 * 7 * DAY // step_s, dtype=np.float64)
    seconds = int(np.datetime64(start, "s").astype(np.int64)) + step_s * np.arange(len(values))
    found = make_naive_forecast(values, seconds, np.array([origin]), horizon)[0]
    return [int(lag) for lag in origin + np.arange(horizon) - found]


def test_the_naive_forecast_of_hours_follows_the_weekday() -> None:
    """2024-03-04 is a Monday: a week back there and on Saturday and Sunday, a day from Tuesday to Friday."""
    found = [find_lags("2024-03-04", HOUR, 24, 24 * day) for day in range(14, 21)]
    assert [set(each) for each in found] == [{168}, {24}, {24}, {24}, {24}, {168}, {168}]


def test_the_naive_forecast_knows_only_the_past() -> None:
    """Beyond a day it takes the last day that is known, and by five minutes or days it looks as far as it must."""
    assert find_lags("2024-03-04", HOUR, 48, 24 * 15) == [24] * 24 + [48] * 24
    assert find_lags("2024-03-04", 300, 12, 288 * 15 + 7) == [288] * 12
    assert find_lags("2024-03-04", DAY, 9, 30) == [7] * 7 + [14] * 2
    assert find_lags("2024-03-04", 7 * DAY, 3, 30) == [1, 2, 3]
    early = make_naive_forecast(np.zeros(400), HOUR * np.arange(400), np.array([12]), 24)
    assert np.isnan(early[0, :12]).all()


def test_published_forecasts_get_their_published_error() -> None:
    """The DNN ensemble of Lago et al. 2021 on Nord Pool: absolute error 1.683 over 728 days, half the naive's."""
    folder = Path(os.environ.get("FLEETCAST_DATA", ""), "epf")
    if not folder.joinpath("NP.csv.gz").is_file():
        pytest.skip("FLEETCAST_DATA names no folder with epf/NP.csv.gz")
    (prices,) = read_csv(folder / "NP.csv.gz", "datetime_local", ["price"])
    (ensemble,) = read_csv(folder / "NP_reference_forecasts.csv.gz", "datetime_local", ["dnn_ensemble"])
    origins = np.arange(prices.first_at(ensemble.start), len(prices.values), 24)
    seconds = int(np.datetime64(prices.start, "s").astype(np.int64)) + HOUR * np.arange(len(prices.values))
    found = score_windows(
        prices.values[origins[:, None] + np.arange(24)],
        ensemble.values.reshape(-1, 24, 1),
        np.array([0.5]),
        make_naive_forecast(prices.values, seconds, origins, 24),
        compute_seasonal_errors(prices.values, origins, 24),
    )
    assert 2 * found.pinball == pytest.approx(1.683, abs=5e-4)  # of the median alone it is half the absolute error
    assert found.rmae == pytest.approx(0.532, abs=5e-4)
    assert found.observed == 17_472


def test_point_scores_by_hand() -> None:
    """MAE, RMSE, MAPE without prices of 0, sMAPE, and the rMAE of the naive forecast of a week before."""
    y, median = np.array([[10.0, 0.0, -20.0, np.nan]]), np.array([[12.0, 3.0, -10.0, 5.0]])
    q = np.stack([median - 1, median, median + 1], axis=-1)
    naive, weekly = np.array([[11.0, 1.0, -21.0, 0.0]]), np.array([[5.0, np.nan, -10.0, 0.0]])
    found = score_windows(y, q, np.array([0.1, 0.5, 0.9]), naive, np.array([1.0]), weekly)
    assert found.mae == pytest.approx(15 / 3)
    assert found.rmse == pytest.approx(np.sqrt((4 + 9 + 100) / 3))
    assert found.mape == pytest.approx((0.2 + 0.5) / 2)
    assert found.smape == pytest.approx((4 / 22 + 2 + 20 / 30) / 3)
    assert (found.rmae, found.rmae_weekly) == pytest.approx((15 / 3, 12 / 15))
    assert np.isnan(score_windows(y, q, np.array([0.1, 0.5, 0.9]), naive, np.array([1.0])).rmae_weekly)


def test_the_weekly_forecast_is_the_value_a_week_before() -> None:
    """Also on a Tuesday; beyond a week it repeats the last known one, and steps that do not divide a week have none."""
    values = np.arange(24.0 * 30)
    origins = np.array([24 * 20, 24 * 2])
    found = make_weekly_forecast(values, 3600 * np.arange(len(values)), origins, 24 * 8)
    np.testing.assert_array_equal(found[0, : 24 * 7], values[24 * 13 : 24 * 20])
    np.testing.assert_array_equal(found[0, 24 * 7 :], values[24 * 13 : 24 * 14])
    assert np.isnan(found[1, :24]).all()
    assert np.isnan(make_weekly_forecast(values, 25_000 * np.arange(len(values)), origins, 3)).all()
