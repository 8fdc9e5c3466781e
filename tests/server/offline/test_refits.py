"""Refits of a backtest: what forecasts a window was fitted to the rows before it, and is what `train` would make."""

from dataclasses import replace
from datetime import timedelta

import msgspec
import numpy as np
import pytest
from msgspec import UNSET

from handlers.training.time_series import Series
from model_store.archives.archive import DEFAULT_LIMITS, read_tensors
from model_store.archives.manifest import Kind
from model_store.names import ModelName
from server.offline.refits import forecast_refitted, refit_archive, split_by_days
from server.offline.rolling_windows import (
    ArchiveVersion,
    InProcess,
    Rolling,
    Unfit,
    forecast_windows,
    open_unpublished,
)
from tests.server.markets import START, open_market, pack_market

DAYS = 60


def make_series() -> Series:
    """Hourly prices with the rhythm of a day, noise, and a level that doubles after 50 days."""
    hours = np.arange(24 * DAYS)
    noise = np.random.default_rng(1).normal(0, 2, len(hours))
    values = (40 + 10 * np.sin(hours / 24 * 2 * np.pi) + noise) * np.where(hours < 24 * 50, 1, 2)
    return Series("M00", START, timedelta(hours=1), values, np.empty((0, len(hours))))


@pytest.fixture(scope="module")
def recipe() -> ArchiveVersion:
    """An untrained archive, of which only the recipe is used: a fit of a few steps."""
    model = open_unpublished(pack_market(trained_until="2024-03-05 00:00:00"), ModelName("M00.mar"), DEFAULT_LIMITS)
    assert model.archive.spec is not None
    spec = msgspec.structs.replace(model.archive.spec, trained_epochs=1.0)
    return replace(model, archive=replace(model.archive, spec=spec))


def test_windows_are_split_where_the_days_have_passed() -> None:
    """Blocks of seven days of a window every six hours; the last one has what is left."""
    origins = np.arange(240, 240 + 24 * 17, 6)
    blocks = list(split_by_days(origins, 3600, 7))
    assert [len(each) for each in blocks] == [28, 28, 12]
    np.testing.assert_array_equal(np.concatenate(blocks), origins)
    assert [int(each[0]) for each in blocks] == [240, 240 + 168, 240 + 336]


@pytest.mark.slow
def test_a_block_is_forecast_by_a_fit_to_the_rows_before_it(recipe: ArchiveVersion) -> None:
    """The second block's forecasts are those of `refit_archive` on what was known then; the first knows less."""
    series = make_series()
    origins = Rolling(most=2 * 4 * 7).origins(series, [recipe.forecast])
    found = forecast_refitted(recipe, series, origins, 7)
    half = len(origins) // 2
    known = series.before(series.start + int(origins[half]) * series.step)
    own = refit_archive(recipe, known)
    assert own.trained_until == known.start + (len(known.values) - 1) * known.step
    alone = forecast_windows(InProcess(), own, series, origins[half:])
    np.testing.assert_array_equal(found.quantiles[half:], alone.quantiles)
    assert list(found.refitted[half:]) == [own.forecast] * half
    assert found.refitted[0] != own.forecast
    first = forecast_windows(InProcess(), own, series, origins[:half])
    assert (found.quantiles[:half] != first.quantiles).any()
    later = series.values.copy()
    later[int(origins[half]) :] += 100
    changed = forecast_refitted(recipe, replace(series, values=later), origins, 7)
    np.testing.assert_array_equal(changed.quantiles[: half + 1], found.quantiles[: half + 1])


def test_a_refit_has_learnt_from_the_rows(recipe: ArchiveVersion) -> None:
    """Its numbers are not the recipe's, its scaler is of the new rows, and it has no calibration."""
    fitted = refit_archive(recipe, make_series())
    old, new = (read_tensors(each.archive) for each in (recipe, fitted))
    assert all(name in new for name in old)
    assert any((old[name] != new[name]).any() for name in old)
    assert fitted.forecast.scaler.center != recipe.forecast.scaler.center
    assert fitted.forecast.quantile_levels == recipe.forecast.quantile_levels
    assert fitted.calibration is None


def test_only_known_architectures_are_fitted_anew() -> None:
    """A graph of one's own has no recipe here."""
    model = open_market()
    assert model.archive.spec is not None
    spec = msgspec.structs.replace(model.archive.spec, kind=Kind.GRAPH, architecture="", config={}, calibration=UNSET)
    with pytest.raises(Unfit, match="only architectures that Fleetcast knows can be fitted anew"):
        refit_archive(replace(model, archive=replace(model.archive, spec=spec)), make_series())
