"""The replay of a backtest with adaptive bands: narrow bands come to hold what they promise, by the past alone."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from handlers.codecs.scenarios import load_correlation
from handlers.evaluation.correlation import estimate_gaussian
from handlers.training.time_series import Series
from model_store.archives.archive import DEFAULT_LIMITS, open_archive
from model_store.names import ModelName
from server.offline.calibration import calibrate_archive, pack_calibrated
from server.offline.online_bands import replay_windows, score_online
from server.offline.rolling_windows import (
    ArchiveVersion,
    InProcess,
    Rolling,
    Unfit,
    WindowForecasts,
    forecast_windows,
    open_unpublished,
)
from server.offline.scenario_scores import measure_outside
from tests.server.markets import HORIZON, START, open_market
from tests.server.offline.test_calibration import make_series, pack_narrow


def forecast_days(model: ArchiveVersion, series: Series, most: int = 0) -> WindowForecasts:
    """The forecasts of all windows."""
    return forecast_windows(InProcess(), model, series, Rolling(most=most).origins(series, [model.forecast]))


def open_narrow() -> ArchiveVersion:
    """An archive that promises 80 % between 56 and 64."""
    return open_unpublished(pack_narrow(golden=False), ModelName("narrow.mar"), DEFAULT_LIMITS)


@pytest.mark.slow
def test_narrow_bands_come_to_hold_what_they_promise() -> None:
    """80 % of all prices, with a lower loss, where the fixed band held half."""
    model, series = open_narrow(), make_series()
    calm = Series(series.name, START, timedelta(hours=1), 60 + (series.values - 60) / 2, series.known)
    scores = score_online(model, forecast_days(model, calm))
    (band,) = scores.bands
    assert band.nominal == 0.8
    assert band.fixed < 0.65
    assert band.adaptive == pytest.approx(0.8, abs=0.04)
    assert scores.pinball_adaptive < scores.pinball_fixed


def test_a_window_knows_nothing_of_its_own_prices() -> None:
    """Other prices from a window on leave it as it was, and change later ones."""
    model, series = open_narrow(), make_series(40)
    found = forecast_days(model, series)
    at = len(found.origins) // 2
    values = series.values.copy()
    values[found.origins[at] :] -= 1000
    changed = Series(series.name, START, timedelta(hours=1), values, series.known)
    other = WindowForecasts(changed, found.model, "", found.origins, found.levels, found.quantiles)
    before, after = (replay_windows(each, model.forecast, None).quantiles for each in (found, other))
    np.testing.assert_array_equal(before[: at + 1], after[: at + 1])
    assert (after[at + 1] != before[at + 1]).any()


def test_offsets_come_on_top_of_the_archives_own() -> None:
    """The first window of a calibrated archive is as its calibration says, the fixed coverage is that of it."""
    model, series = open_narrow(), make_series(120)
    packed = pack_calibrated(model.archive, calibrate_archive(model, {"M00": series}, "M00", 60))
    calibrated = ArchiveVersion(model.name, "", open_archive(packed, model.name))
    found = forecast_days(calibrated, series, most=100)
    scores = score_online(calibrated, found)
    assert scores.bands[0].fixed > 0.7
    assert scores.bands[0].adaptive == pytest.approx(0.8, abs=0.05)


def test_archives_without_bands_are_refused() -> None:
    """One level has no band to adapt."""
    model = open_market(quantile_levels=(0.5,))
    with pytest.raises(Unfit, match="makes no band"):
        score_online(model, forecast_days(model, make_series(40)))


@pytest.mark.slow
def test_scenarios_are_of_the_levels_that_a_server_serves() -> None:
    """Bands eight times too wide: no day's mean is outside all scenarios of them, and of the adaptive ones about as
    many are as there should be; they are drawn from the very levels of the replay.
    """
    model, series = open_narrow(), make_series()
    calm = Series(series.name, START, timedelta(hours=1), 60 + (series.values - 60) / 16, series.known)
    errors = np.random.default_rng(1).standard_normal((400, 1, HORIZON))
    estimate = estimate_gaussian(errors, (model.name,))
    correlation = load_correlation(estimate.record, estimate.tensors)
    found = forecast_days(model, calm)
    fixed = measure_outside(found, model.forecast, correlation)
    scores = score_online(model, found, correlation)
    served = replace(found, quantiles=replay_windows(found, model.forecast, None).quantiles)
    assert scores.outside_scenarios == measure_outside(served, model.forecast, correlation)
    assert fixed == 0
    assert scores.outside_scenarios is not None
    assert 0.02 < scores.outside_scenarios < 0.08, "2 % and some for flat tails"
    assert score_online(model, found).outside_scenarios is None
