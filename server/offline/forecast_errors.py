"""Forecast errors of a store's archives over rolling windows, as the probability integral transforms of prices."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np

from handlers.codecs.features import Float64
from handlers.evaluation.correlation import compute_pit
from handlers.evaluation.scores import Steps
from handlers.training.stamps import PLAIN, FileRules
from handlers.training.time_series import Series
from model_store.archives.manifest import ForecastSpec
from model_store.errors import ArchiveInvalid
from model_store.names import ModelName
from server.offline.fleet_evaluation import fetch_archives, read_columns
from server.offline.rolling_windows import (
    ArchiveVersion,
    InProcess,
    Rolling,
    Unfit,
    add_known_series,
    explain_seen_windows,
    explain_unused_rows,
    forecast_windows,
)
from server.settings import Settings

HELD_OUT = 0.1  #: last share of the rows that is used without a date; what was fitted to it too is noted as in-sample


@dataclass(frozen=True, slots=True, eq=False)
class Residuals:
    """Probability integral transforms [windows, products, steps], NaN where the price is missing or not forecast."""

    values: Float64
    first: str  #: stamp of the first forecast step of the first window
    last: str  #: stamp of the first forecast step of the last window
    targets: tuple[str, ...] = ()  #: the columns that have a row in `values`, in order
    failed: Mapping[str, str] = field(default_factory=dict)  #: why others have none
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
    that the archives name. `told` gets the number of new forecasts, and the number of all. A target that cannot be
    forecast, or of which nothing is observed, stops only itself.

    Raises:
        Unfit: no target is left, or the archives have different clocks. StoreUnavailable, StoreDenied, SeriesInvalid,
            OSError.
    """
    with ThreadPoolExecutor(settings.loader_threads) as pool:
        found, failed = fetch_archives(pool, models, settings)
    pairs, lacking = _match_series(csv, time, found, rules)
    failed |= lacking
    if not pairs:
        raise Unfit("; ".join(failed.values()))
    horizon = max(model.forecast.prediction_length for model, _ in pairs.values())
    first = next(series for _, series in pairs.values())
    begin = since or first.start + round((1 - HELD_OUT) * len(first.values)) * first.step
    origins = Rolling(every=every, first=begin).origins(first, [model.forecast for model, _ in pairs.values()])
    rows, answers = dict[str, Float64](), InProcess()
    for target, (model, series) in pairs.items():
        try:
            made = forecast_windows(
                answers, model, series, origins, lambda count: told(count, len(origins) * len(pairs))
            )
        except (Unfit, ArchiveInvalid) as error:
            failed[target] = str(error)
            continue
        if np.isnan(made.actuals).all():
            failed[target] = f"{target}: no price is observed in the {len(origins)} windows"
            continue
        rows[target] = np.full((len(origins), horizon), np.nan)
        rows[target][:, : made.horizon] = compute_pit(made.levels, made.quantiles, made.actuals)
    if not rows:
        raise Unfit("; ".join(failed.values()))
    bound = next((model.forecast for model, _ in pairs.values() if model.forecast.origin), None)
    notes = _list_notes(first, bound, [pairs[target] for target in rows], origins, horizon)
    return Residuals(
        np.stack(list(rows.values()), axis=1),
        first.stamp(int(origins[0])),
        first.stamp(int(origins[-1])),
        tuple(rows),
        failed,
        notes,
    )


def _list_notes(
    first: Series,
    bound: ForecastSpec | None,
    scored: Sequence[tuple[ArchiveVersion, Series]],
    origins: Steps,
    horizon: int,
) -> tuple[str, ...]:
    """What limits the errors. `bound`: of an archive that forecasts at one time of day only, where there is one."""
    notes = [*first.notes]
    if bound is not None:
        notes.append(explain_unused_rows(first, bound, int(origins[-1]) + horizon - 1))
    for model, series in scored:
        if seen := explain_seen_windows(model, series, origins):
            notes.append(f"{model.name}: {seen}")
    return tuple(filter(None, notes))


def _match_series(
    csv: Path, time: str, models: Mapping[str, ArchiveVersion], rules: FileRules
) -> tuple[dict[str, tuple[ArchiveVersion, Series]], dict[str, str]]:
    """Match each model with its prices and covariates, and say which lack some. Raises Unfit for different clocks."""
    clocks = {rules.for_archive(model.forecast): model for model in models.values()}
    if len(clocks) > 1:
        one, other, *_ = clocks.values()
        what = [
            f"{each.name} forecasts {each.forecast.frequency} in {each.forecast.time_zone}" for each in (one, other)
        ]
        raise Unfit(f"{' and '.join(what)}; their windows are the same only if step and zone are")
    columns, lacking = read_columns(csv, time, models, rules)
    return {
        target: (model, add_known_series(columns[target], target, model.forecast))
        for target, model in models.items()
        if target not in lacking
    }, lacking
