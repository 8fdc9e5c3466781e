"""The replay of a backtest with adaptive bands: narrow bands come to hold what they promise, by the past alone."""

import json
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from handlers.codecs.scenarios import CorrelationModel, load_correlation
from handlers.evaluation.conformal import shift_levels
from handlers.evaluation.correlation import estimate_gaussian
from handlers.model import open_model
from handlers.training.time_series import Series
from model_store.archives.archive import DEFAULT_LIMITS, open_archive, read_offsets
from model_store.archives.manifest import Tails
from model_store.names import ModelName
from server.offline.calibration import calibrate_archive, pack_calibrated
from server.offline.online_bands import OnlineScores, replay_windows, score_replay
from server.offline.rolling_windows import (
    ArchiveVersion,
    InProcess,
    Rolling,
    Unfit,
    WindowForecasts,
    forecast_windows,
    list_hours_of_windows,
    open_unpublished,
)
from server.offline.scenario_scores import measure_outside
from tests.server.markets import HISTORY, HORIZON, START, make_forecast, open_market
from tests.server.offline.test_calibration import make_series, pack_constant, pack_narrow


def forecast_days(model: ArchiveVersion, series: Series, most: int = 0) -> WindowForecasts:
    """The forecasts of all windows."""
    return forecast_windows(InProcess(), model, series, Rolling(most=most).origins(series, [model.forecast]))


def score_online(
    model: ArchiveVersion, found: WindowForecasts, correlation: CorrelationModel | None = None
) -> OnlineScores:
    """The scores of a replay on top of the archive's own offsets."""
    raw = forecast_windows(InProcess(), model.without_calibration(), found.series, found.origins)
    return score_replay(model, found, raw, read_offsets(model.archive), correlation)


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


@pytest.mark.slow
def test_paths_are_replayed_by_their_quantiles() -> None:
    """Twenty narrow paths come to cover what they promise, and what is replayed is nearly what a server answers: its
    codec shifts each path by its rank.
    """
    paths = np.random.default_rng(5).permutation(np.linspace(-0.25, 0.25, 20)).tolist()
    model = open_unpublished(pack_constant(paths, paths=20), ModelName("m.mar"), DEFAULT_LIMITS)
    series = make_series()
    series = replace(series, values=60 + (series.values - 60) / 2)
    found = forecast_days(model, series)
    scores = score_online(model, found)
    assert scores.bands[0].fixed < 0.7
    assert scores.bands[0].adaptive == pytest.approx(0.8, abs=0.04)
    learnt = np.array(replay_windows(found, model.forecast, None).record.offsets, np.float32).reshape(24, 3)
    shifted = shift_levels(found.quantiles[-4:], found.levels, learnt, list_hours_of_windows(found)[-4:])
    opened = open_model(model.archive)
    opened.built.body.codec.adaptable.adapt(learnt)  # type: ignore[union-attr]
    starts = [int(origin) for origin in found.origins[-4:]]
    instances = [series.instance(origin - HISTORY, origin, HORIZON) for origin in starts]
    asked = {"instances": instances, "configuration": {"output_types": ["quantiles"]}}
    answered = json.loads(opened.answer(json.dumps(asked).encode()))["predictions"]
    served = np.array([list(each["quantiles"].values()) for each in answered]).transpose(0, 2, 1)
    widths = shifted[..., 2:] - shifted[..., :1]
    assert (abs(served - shifted) < 0.05 * widths).all()
    assert (abs(served - found.quantiles[-4:]) > 0.2 * widths)[..., [0, 2]].any()


def test_scenarios_of_refits_have_the_tails_of_each_fit() -> None:
    """Narrow levels with flat tails leave many days outside; where each fit's own rule reaches far, none."""
    model, series = open_narrow(), make_series(60)
    estimate = estimate_gaussian(np.random.default_rng(1).standard_normal((400, 1, HORIZON)), (model.name,))
    correlation = load_correlation(estimate.record, estimate.tensors)
    found = forecast_days(model, series)
    far = make_forecast(tail="exponential", tails=Tails(low=20, high=20, band=(0.1, 0.9)))
    at = len(found.origins) // 2
    each = measure_outside(replace(found, refitted=[far] * len(found.origins)), model.forecast, correlation)
    half = measure_outside(
        replace(found, refitted=[model.forecast] * at + [far] * (len(found.origins) - at)), model.forecast, correlation
    )
    none = measure_outside(found, model.forecast, correlation)
    assert each is not None
    assert half is not None
    assert none is not None
    assert each < 0.05 < half < none
