"""Two point forecasts side by side: errors by hand, and a test that finds differences only where there are any."""

from math import isnan

import numpy as np
import pytest

from handlers.evaluation.point_scores import compare_points, diebold_mariano


def test_errors_are_those_of_the_steps_that_both_have() -> None:
    """Missing actuals and missing forecasts of the other count for neither."""
    y = np.array([[10.0, 20.0, np.nan, 40.0]])
    ours, other = np.array([[11.0, 22.0, 30.0, 99.0]]), np.array([[14.0, 26.0, 30.0, np.nan]])
    found = compare_points("operator", y, ours, other, 4)
    assert (found.mae, found.other_mae, found.observed) == (1.5, 5.0, 2)
    assert found.rmse == pytest.approx(2.5**0.5)
    assert found.other_rmse == pytest.approx(26**0.5)
    assert found.skill == pytest.approx(0.7)
    assert isnan(found.p_value), "one window says nothing of significance"


def test_the_test_finds_what_is_there_and_nothing_else() -> None:
    """Clearly smaller errors are significant, errors of one distribution are not, and signs follow who is better."""
    rng = np.random.default_rng(0)
    y = np.zeros((200, 24))
    small, large = rng.normal(0, 1, y.shape), rng.normal(0, 2, y.shape)
    better, worse, same = (
        compare_points("c", y, ours, other, 24)
        for ours, other in ((small, large), (large, small), (small, rng.normal(0, 1, y.shape)))
    )
    assert better.p_value < 1e-6
    assert worse.p_value > 1 - 1e-6
    assert better.statistic == pytest.approx(-worse.statistic)
    assert 0.01 < same.p_value < 0.99


def test_overlapping_windows_are_not_counted_as_independent() -> None:
    """Every hour a day ahead: the same differences 24 times over are no stronger evidence than once a day."""
    rng = np.random.default_rng(1)
    daily = rng.normal(0.1, 1, 400)
    hourly = np.repeat(daily, 24)
    once, ignored, honest = diebold_mariano(daily, 0), diebold_mariano(hourly, 0), diebold_mariano(hourly, 23)
    assert ignored[0] == pytest.approx(once[0] * 24**0.5)
    assert abs(honest[0] - once[0]) < 0.3 * abs(once[0])


def test_equal_forecasts_have_no_statistic() -> None:
    """No variation, no test."""
    assert all(isnan(each) for each in diebold_mariano(np.zeros(50), 0))
