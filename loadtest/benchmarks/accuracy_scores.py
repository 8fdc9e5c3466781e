"""Scores the fits of `rolling_refits`: recipes and mixtures over the test period, and the windows of fev-bench."""

import csv
import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from handlers.codecs.features import Float64
from handlers.evaluation.point_scores import compare_points
from handlers.evaluation.scores import (
    Steps,
    compute_pinball,
    compute_seasonal_errors,
    interpolate_median,
    make_naive_forecast,
    make_weekly_forecast,
    score_windows,
)
from handlers.training.time_series import Series
from loadtest.benchmarks.rolling_refits import (
    DAYS,
    EVERY,
    HOURS,
    Recipe,
    Refits,
    Task,
    find_period_start,
    read_market,
    schedule_refits,
)

DECILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LEAR = Recipe("lear", "lear")
WINDOWS, MORE_WINDOWS = Recipe("lear, 3 windows", "lear", 3), Recipe("lear, 5 windows", "lear", 5)
LINEAR = Recipe("lear, linear", "lear", scaling="linear")
TCN = Recipe("tcn", "tcn", 2, '{"channels": 48}', 8)
RECIPES = (LEAR, WINDOWS, MORE_WINDOWS, LINEAR, TCN)
FEV = tuple(Recipe(each.name, each.architecture, each.members, each.config, each.epochs, each.scaling, DECILES)
            for each in (LEAR, WINDOWS, TCN))  # fmt: skip
MEAN, WEIGHTED = "mean without the linear one", "all, weighted by their past"
MIXTURES = {MEAN: (LEAR, WINDOWS, MORE_WINDOWS, TCN), WEIGHTED: RECIPES}
# Power and memory were chosen by the test periods of NP and DE, fitted every 28 days; the other markets were not used.
POWER = 8  #: exponent of the earlier loss of a forecaster in its weight
REVIEW, MEMORY = 7, 91  #: days between updates of the weights, and days of losses that they use
FEV_DAYS = 20
RIVAL = "dnn_ensemble"  #: the best of the published forecasts, beside which ours are tested


def assess_market(data: Path, refits: Refits, name: str) -> dict[str, Any]:
    """Score all finished fits of one market by recipe or mixture and days between fits, and the published forecasts."""
    series = read_market(data, name)
    published = read_published(data, name)
    rows = []
    for every in EVERY:
        found = {each: refits.quantiles(name, each, every) for each in RECIPES}
        for each, quantiles in found.items():
            if quantiles is not None:
                seconds = round(refits.seconds(name, each, every), 1)
                rows.append(
                    {
                        "name": each.name,
                        "every": every,
                        "fit_s": seconds,
                        **_score_test_period(series, quantiles, rival=published[RIVAL]),
                    }
                )
        rows += [
            {"name": mixture, "every": every, **more}
            for mixture, more in _score_mixtures(refits, name, every, series, published[RIVAL])
        ]
    theirs = {peer: _score_test_period(series, each[..., None], (0.5,)) for peer, each in published.items()}
    return {"rows": rows, "published": theirs, "wql": _score_fev(refits, name, series)}


def read_published(data: Path, name: str) -> dict[str, Float64]:
    """Read the daily forecasts of Lago et al. 2021 [days, 24] by model."""
    with gzip.open(data / f"{name}_reference_forecasts.csv.gz", "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    models = [each for each in rows[0] if each not in ("datetime_local", "real_price")]
    return {model: np.array([float(row[model]) for row in rows]).reshape(DAYS, HOURS) for model in models}


def weight_parts(parts: Float64, y: Float64, levels: Float64) -> Float64:
    """Average parts [N, days, 24, levels] with weights that are updated every week from the losses of the last days."""
    losses = compute_pinball(np.broadcast_to(y, parts.shape[:3]), parts, levels).mean((2, 3))
    weights = np.ones(losses.shape)
    for day in range(REVIEW, losses.shape[1], REVIEW):
        mean = losses[:, max(0, day - MEMORY) : day].mean(1)
        weights[:, day : day + REVIEW] = ((mean / mean.min()) ** -POWER)[:, None]
    mixed: Float64 = (weights[..., None, None] * parts).sum(0) / weights.sum(0)[:, None, None]
    return mixed


def compute_wql(y: Float64, q: Float64, levels: Float64) -> float:
    """Compute WQL as fev-bench does: the mean over windows [W] of twice the mean pinball loss / max(mean |y|, 1)."""
    size = np.maximum(np.abs(y).mean(1), 1.0)
    return float((2 * compute_pinball(y, q, levels).mean((1, 2)) / size).mean())


def _score_mixtures(
    refits: Refits, name: str, every: int, series: Series, rival: Float64
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Score mixtures whose `lear` is fitted at this interval; other parts are fitted as often, or less."""
    finest = [each for each in reversed(EVERY) if each >= every]
    for mixture, recipes in MIXTURES.items():
        reached = [next((e for e in finest if _has_fits(refits, name, each, e)), 0) for each in recipes]
        if not all(reached) or every not in reached:
            continue
        found = [refits.quantiles(name, *each) for each in zip(recipes, reached, strict=True)]
        parts = np.stack([each for each in found if each is not None])
        actual, levels = series.values[find_period_start(series) :].reshape(DAYS, HOURS), np.array(LEAR.levels)
        mixed = parts.mean(0) if mixture == MEAN else weight_parts(parts, actual, levels)
        fitted = {each.name: often for each, often in zip(recipes, reached, strict=True)}
        yield mixture, {"fitted_every": fitted, **_score_test_period(series, mixed, rival=rival)}


def _has_fits(refits: Refits, name: str, recipe: Recipe, every: int) -> bool:
    return all(refits.has(task) for task in schedule_refits(name, recipe, every))


def _score_test_period(
    series: Series, q: Float64, levels: Sequence[float] = LEAR.levels, rival: Float64 | None = None
) -> dict[str, float]:
    """Score quantiles of the test period [days, 24, levels].

    `p_rival`: the p-value of the test of Diebold and Mariano that the median is better than the `rival` [days, 24].
    """
    start, values = find_period_start(series), series.values
    origins: Steps = np.arange(start, len(values), HOURS)
    began = np.datetime64(series.start, "s").astype(np.int64)
    seconds: Steps = began + 3600 * np.arange(len(values))
    y = values[start:].reshape(DAYS, HOURS)
    before, weekly = (make(values, seconds, origins, HOURS) for make in (make_naive_forecast, make_weekly_forecast))
    found = score_windows(y, q, np.array(levels), before, compute_seasonal_errors(values, origins, HOURS), weekly)
    measures = {name: getattr(found, name) for name in ("rmae", "rmae_weekly", "mae", "rmse", "smape")}
    if len(levels) > 1:
        measures |= {"pinball": found.pinball, "coverage": found.coverage}
    if rival is not None:
        median = interpolate_median(q, np.array(levels))
        measures["p_rival"] = compare_points(RIVAL, y, median, rival, HOURS).p_value
    return {measure: round(value, 4) for measure, value in measures.items()}


def list_last_fits(name: str, recipe: Recipe, every: int) -> list[Task]:
    """List the fits for the last 20 days, at the largest interval of EVERY that is no longer than `every` days."""
    return list(schedule_refits(name, recipe, max(each for each in EVERY if each <= every), DAYS - FEV_DAYS))


def score_last_days(data: Path, refits: Refits, name: str, recipe: Recipe, every: int = DAYS) -> float:
    """Fit a recipe of deciles for the last 20 days, as far as that is not done, and return its WQL there."""
    for task in list_last_fits(name, recipe, every):
        if not refits.has(task):
            refits.done(task)
    interval = max(each for each in EVERY if each <= every)
    quantiles = refits.quantiles(name, recipe, interval, DAYS - FEV_DAYS)
    assert quantiles is not None, "it was just fitted"
    y = read_market(data, name).values[-FEV_DAYS * HOURS :].reshape(FEV_DAYS, HOURS)
    return round(compute_wql(y, quantiles, np.array(recipe.levels)), 4)


def _score_fev(refits: Refits, name: str, series: Series) -> dict[str, float]:
    """Compute the WQL of the last 20 days for fits before them, for daily fits if finished, and for their mean."""
    first, found = DAYS - FEV_DAYS, {}
    y = series.values[-FEV_DAYS * HOURS :].reshape(FEV_DAYS, HOURS)
    parts = []
    for recipe in FEV:
        for every in (DAYS, 1):
            quantiles = refits.quantiles(name, recipe, every, first)
            if quantiles is not None:
                found[f"{recipe.name}, fitted {'once' if every == DAYS else 'daily'}"] = quantiles
                parts += [quantiles] if every == DAYS else []
    if len(parts) == len(FEV):
        found["their mean, fitted once"] = np.mean(parts, 0)
    return {each: round(compute_wql(y, quantiles, np.array(DECILES)), 4) for each, quantiles in found.items()}
