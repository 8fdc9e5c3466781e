"""Forecast errors of a store's archives over rolling windows, as the probability integral transforms of prices."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from handlers.codecs.features import Float64
from handlers.evaluation.correlation import compute_pit
from handlers.training.stamps import PLAIN, FileRules
from handlers.training.time_series import Series, read_csv
from model_store.names import ModelName
from server.offline.rolling_windows import (
    ArchiveVersion,
    InProcess,
    Rolling,
    Unfit,
    add_known_series,
    explain_seen_windows,
    explain_unused_rows,
    fetch_version,
    forecast_windows,
)
from server.settings import Settings
from server.worker.model_loader import open_store

HELD_OUT = 0.1  #: last share of the rows that is used without a date; what was fitted to it too is noted as in-sample


@dataclass(frozen=True, slots=True, eq=False)
class Residuals:
    """Probability integral transforms [windows, products, steps], NaN where the price is missing or not forecast."""

    values: Float64
    first: str  #: stamp of the first forecast step of the first window
    last: str  #: stamp of the first forecast step of the last window
    notes: tuple[str, ...] = ()  #: what limits them, in words: rows that no window uses, windows that are in-sample

    def __repr__(self) -> str:
        windows, products, steps = self.values.shape
        return f"<Residuals of {windows} windows, {products} products, {steps} steps>"


def measure_errors(
    settings: Settings,
    csv: Path,
    time: str,
    models: Mapping[str, ModelName],
    since: datetime | None,
    every: int,
    told: Callable[[int, int], None],
    rules: FileRules = PLAIN,
) -> Residuals:
    """Forecast every window of each target's model from `since` on (None: the last tenth of the rows).

    The windows are the same for all targets, one every `every` steps (0: without overlap). Covariates are the columns
    that the archives name. `told` gets the number of new forecasts, and the number of all.

    Raises:
        Unfit: an archive and the prices do not fit together. LoadError, SeriesInvalid, OSError.
    """
    source, limits = open_store(settings)
    found = {target: fetch_version(source, name, limits) for target, name in models.items()}
    pairs = _match_series(csv, time, found, rules)
    horizon = max(model.forecast.prediction_length for model, _ in pairs)
    first = pairs[0][1]
    begin = since or first.start + round((1 - HELD_OUT) * len(first.values)) * first.step
    origins = Rolling(every=every, first=begin).origins(first, [model.forecast for model, _ in pairs])
    values, answers = np.full((len(origins), len(pairs), horizon), np.nan), InProcess()
    for place, (model, series) in enumerate(pairs):
        made = forecast_windows(answers, model, series, origins, lambda count: told(count, len(origins) * len(pairs)))
        values[:, place, : made.horizon] = compute_pit(made.levels, made.quantiles, made.actuals)
    bound = next((model.forecast for model, _ in pairs if model.forecast.origin), pairs[0][0].forecast)
    notes = [*first.notes, explain_unused_rows(first, bound, int(origins[-1]) + horizon - 1)]
    for model, series in pairs:
        if seen := explain_seen_windows(model, series, origins):
            notes.append(f"{model.name}: {seen}")
    return Residuals(values, first.stamp(int(origins[0])), first.stamp(int(origins[-1])), tuple(filter(None, notes)))


def _match_series(
    csv: Path, time: str, models: Mapping[str, ArchiveVersion], rules: FileRules
) -> list[tuple[ArchiveVersion, Series]]:
    """Match each model with its prices and covariates; the file is read once. Raises Unfit for different clocks."""
    clocks = {rules.for_archive(model.forecast): model for model in models.values()}
    if len(clocks) > 1:
        one, other, *_ = clocks.values()
        what = [
            f"{each.name} forecasts {each.forecast.frequency} in {each.forecast.time_zone}" for each in (one, other)
        ]
        raise Unfit(f"{' and '.join(what)}; their windows are the same only if step and zone are")
    rules = next(iter(clocks))
    known = {name for model in models.values() for name in model.forecast.dynamic_feat}
    columns = {each.name: each for each in read_csv(csv, time, sorted({*models, *known}), (), rules)}
    return [(model, add_known_series(columns, target, model.forecast.dynamic_feat)) for target, model in models.items()]
