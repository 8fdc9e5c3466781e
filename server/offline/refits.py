"""Fits an archive's recipe anew to what was known: for `retrain`, and for backtests of a fleet that is refitted. Torch.

A refit of a backtest is what `retrain` publishes on that day: the same lengths, levels, architecture and terms, fitted
to all rows before the first window that it forecasts.
"""

from collections.abc import Iterator

import numpy as np
from msgspec import UNSET
from msgspec.structs import replace

from handlers.codecs.features import DAY
from handlers.evaluation.scores import Steps
from handlers.kinds import ArchiveParts, find_kind, pack_model
from handlers.training.fit import Fitting, fit_forecasters
from handlers.training.history_rules import learn_history_rules
from handlers.training.input_recipe import fit_robust_scaler, subtract_base
from handlers.training.time_series import Float64, Series
from model_store.archives.archive import DEFAULT_LIMITS
from model_store.archives.manifest import ForecastSpec, InputChannel, Kind, Scaler
from server.offline.rolling_windows import (
    ArchiveVersion,
    InProcess,
    Unfit,
    WindowForecasts,
    forecast_windows,
    open_unpublished,
)


def forecast_refitted(model: ArchiveVersion, series: Series, origins: Steps, days: int) -> WindowForecasts:
    """Forecast every window by the recipe of an archive, fitted anew every so many days to the rows before.

    Refits have no calibration. Raises Unfit, LoadError; SeriesInvalid where the rows before are too few.
    """
    parts, records = [], list[ForecastSpec]()
    for block in split_by_days(origins, round(series.step.total_seconds()), days):
        fitted = refit_archive(model, series.before(series.start + int(block[0]) * series.step))
        parts.append(forecast_windows(InProcess(), fitted, series, block))
        records += [fitted.forecast] * len(block)
    levels, quantiles = parts[0].levels, np.concatenate([each.quantiles for each in parts])
    return WindowForecasts(series, model.name, model.version, origins, levels, quantiles, records)


def split_by_days(origins: Steps, step_s: int, days: int) -> Iterator[Steps]:
    """Split the first steps of windows where so many days have passed since the first."""
    spans = (origins - origins[0]) * step_s // (days * DAY)
    yield from np.split(origins, np.flatnonzero(np.diff(spans)) + 1)


def refit_archive(model: ArchiveVersion, series: Series) -> ArchiveVersion:
    """Fit the recipe of an archive to all of a series. Raises Unfit, LoadError, SeriesInvalid."""
    spec = model.archive.spec
    if spec is None or not spec.architecture:
        what = "only architectures that Fleetcast knows can be fitted anew; leave out --refit"
        raise Unfit(f"{model.name} is a {find_kind(model.archive).kind} archive; {what}")
    fitting = Fitting(epochs=spec.trained_epochs or 0.0, half_life_days=spec.trained_half_life or 0.0)
    inputs = [refit_scalers(model.forecast, series)]
    (fitted,) = fit_forecasters([series], inputs, spec.architecture, dict(spec.config), fitting)
    parts = ArchiveParts(
        tensors=fitted.tensors,
        architecture=fitted.architecture,
        config=fitted.config,
        forecast=fitted.forecast,
        trained_until=series.stamp(len(series.values) - 1),
        trained_epochs=fitting.epochs,
        trained_half_life=fitting.half_life_days or UNSET,
    )
    packed = pack_model(Kind.FORECASTER, parts, model_name="refit", golden=fitted.golden)
    return open_unpublished(packed, model.name, DEFAULT_LIMITS)


def refit_scalers(forecast: ForecastSpec, series: Series) -> ForecastSpec:
    """Return the same inputs with scalers fitted to these values. Raises SeriesInvalid if there are none."""

    def scaler(of: Scaler, values: Float64, name: str) -> Scaler:
        return of if of.kind == "identity" else fit_robust_scaler(values, of.kind, name)

    def channel(of: InputChannel) -> InputChannel:
        if of.source != "dynamic_feat":
            return of
        return replace(of, scaler=scaler(of.scaler, series.known[of.index], series.known_names[of.index]))

    own = scaler(forecast.scaler, subtract_base(series, forecast.residual_to), series.name)
    fitted = replace(forecast, scaler=own, inputs=tuple(channel(each) for each in forecast.inputs))
    if not (rules := forecast.history):
        return fitted
    values = subtract_base(series, forecast.residual_to)
    learnt = learn_history_rules(series, values, fitted, rules.max_missing, fallback=bool(rules.fallback))
    return replace(fitted, history=replace(learnt, fill=rules.fill))
