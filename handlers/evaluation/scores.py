"""Scores of quantile forecasts against actual values. Pure numpy; each function gives the definition of its score.

Arrays: `y` actuals, NaN if missing; `q` quantiles with one more axis, rising along it; `levels` [Q] of that axis. A
missing actual is not counted, and a score without values is NaN. Lower is better, except for `coverage`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from handlers.codecs.features import Float64
from handlers.training.input_recipe import DAY, WEEK, compute_naive_lag

Steps = npt.NDArray[np.int64]

MONDAY, SATURDAY = 0, 5
MIDDLE = 0.5
NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one market over its windows, NaN if undefined. `coverage` should be near `nominal`."""

    pinball: float
    wql: float
    wape: float
    mase: float
    rmae: float
    crps: float
    coverage: float
    nominal: float
    observed: int  #: number of scored steps
    mae: float = NAN
    rmse: float = NAN
    mape: float = NAN
    smape: float = NAN
    rmae_weekly: float = NAN


def score_windows(
    y: Float64, q: Float64, levels: Float64, naive: Float64, seasonal: Float64, weekly: Float64 | None = None
) -> Scores:
    """Compute all scores of windows: y, naive and weekly [W, H], q [W, H, Q], seasonal [W].

    pinball: mean over steps and levels, as in `fleetcast train`. wql: twice that, divided by the mean of |y|. wape: the
    sum of absolute errors of the median, divided by the sum of |y|. mase: the absolute error of the median, divided by
    the `seasonal` error of the window, mean over steps (Hyndman and Koehler 2006); steps whose seasonal error is 0 or
    unknown are left out. rmae: the mean absolute error of the median, divided by that of `naive`, over the steps that
    both have (Lago et al. 2021). wql, wape and mase are those of `fev` with the median as point forecast.

    mae, rmse, mape and smape are of the median f too: means of |y - f|, of its square (the root of that), of
    |y - f| / |y| where y is not 0, and of 2 |y - f| / (|y| + |f|) where one is not 0. rmae_weekly: rmae with the naive
    forecast `weekly`.
    """
    losses = _compute_mean(compute_pinball(y, q, levels))
    median = interpolate_median(q, levels)
    size, error = _compute_mean(np.abs(y)), np.abs(y - median)
    sizes = np.abs(y) + np.abs(median)
    scaled = error / np.where(seasonal > 0, seasonal, np.nan)[:, None]
    weeks = np.full_like(y, NAN) if weekly is None else weekly
    low, high = find_outer_levels(levels)
    return Scores(
        pinball=losses,
        wql=_compute_ratio(2 * losses, size),
        wape=_compute_ratio(_compute_mean(error), size),
        mase=_compute_mean(scaled),
        rmae=_compute_rmae(y, error, naive),
        crps=_compute_mean(compute_crps(y, q, levels)),
        coverage=_compute_mean(np.where(np.isnan(y), np.nan, (q[..., low] <= y) & (y <= q[..., high]))),
        nominal=float(levels[high] - levels[low]),
        observed=int((~np.isnan(y)).sum()),
        mae=_compute_mean(error),
        rmse=float(np.sqrt(_compute_mean(error**2))),
        mape=_compute_mean(error / np.where(y == 0, NAN, np.abs(y))),
        smape=_compute_mean(2 * error / np.where(sizes == 0, NAN, sizes)),
        rmae_weekly=_compute_rmae(y, error, weeks),
    )


def compute_pinball(y: Float64, q: Float64, levels: Float64) -> Float64:
    """Y [...] and q [..., Q] -> [..., Q]: max(l e, (l - 1) e) for the error e = y - q (Koenker and Bassett 1978)."""
    error = y[..., None] - q
    return np.maximum(levels * error, (levels - 1) * error)


def compute_crps(y: Float64, q: Float64, levels: Float64) -> Float64:
    """Y [...] and q [..., Q] -> [...]: the continuous ranked probability score, exact for what samples are drawn from.

    That is the quantile function which is linear between the levels and flat outside them (an archive's `clamp`). The
    score is the integral of twice the pinball loss over all levels (Laio and Tamea 2007), in closed form by piece:
    where it runs from u to v between levels a and b, the loss changes its branch at the level c at which it is y.
    """
    a, b = np.concatenate([[0.0], levels]), np.concatenate([levels, [1.0]])
    u, v = np.concatenate([q[..., :1], q], -1), np.concatenate([q, q[..., -1:]], -1)
    width, rise, start = b - a, v - u, u - y[..., None]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # infinite values are clipped
        part = np.where(rise > 0, np.clip(-start / rise, 0, 1), start <= 0)  # share of the piece below y
    above = width * (rise * (1 - part**2) / 2 + start * (1 - part))  # the integral of (quantile - y) from c to b
    every = width * (a * (rise / 2 + start) + width * (rise / 3 + start / 2))  # ... of level (quantile - y) from a to b
    found: Float64 = 2 * (above - every).sum(-1)
    return found


def interpolate_median(q: Float64, levels: Float64) -> Float64:
    """Q [..., Q] -> [...]: linear between the levels around 0.5; NaN if all levels are on one side of it."""
    if not levels[0] <= MIDDLE <= levels[-1]:
        return np.full(q.shape[:-1], np.nan)
    above = int(np.searchsorted(levels, MIDDLE))
    below = max(0, above - 1)
    gap = levels[above] - levels[below]
    weight = (MIDDLE - levels[below]) / gap if gap else 0.0
    found: Float64 = q[..., below] + weight * (q[..., above] - q[..., below])
    return found


def find_outer_levels(levels: Float64) -> tuple[int, int]:
    """Return the indices of the widest symmetric pair of levels, else of the first and last level."""
    for low, level in enumerate(levels):
        high = int(np.argmin(np.abs(levels - (1 - level))))
        if high > low and np.isclose(levels[high], 1 - level):
            return low, high
    return 0, len(levels) - 1


def compute_calibration(y: Float64, q: Float64, levels: Float64) -> Float64:
    """Compute the shares [Q + 1] of actuals below, between and above the quantiles; ideal are the levels' differences.

    They are the histogram of the probability integral transform with the levels as edges. An actual that equals
    quantiles (a floor, a zero price) is shared by the cells on both sides.
    """
    y, q = y[~np.isnan(y)], q[~np.isnan(y)]
    if not len(y):
        return np.full(len(levels) + 1, np.nan)
    below = ((y[:, None] < q).mean(0) + (y[:, None] <= q).mean(0)) / 2
    return np.diff(np.concatenate([[0.0], below, [1.0]]))


def compute_seasonal_errors(values: Float64, origins: Steps, season: int) -> Float64:
    """Compute the mean |value - value a season before| of all steps before each origin [W], the scale of MASE."""
    steps = np.abs(values[season:] - values[:-season])
    sums = np.concatenate([[0.0], np.cumsum(np.nan_to_num(steps))])
    counts = np.concatenate([[0], np.cumsum(~np.isnan(steps))])
    before = np.clip(origins - season, 0, len(steps))
    with np.errstate(invalid="ignore"):
        found: Float64 = sums[before] / counts[before]
    return found


def make_naive_forecast(values: Float64, seconds: Steps, origins: Steps, horizon: int) -> Float64:
    """Make the naive forecast of rMAE [W, H], NaN if its value is missing; `seconds` [T] are stamps since 1970.

    For steps that divide a day it is the value a week before on Saturday, Sunday and Monday, else a day before (the
    standard naive forecast of electricity prices, the default of `epftoolbox`); a longer forecast repeats the last
    known ones. For other steps it is the value one season, or several, before: `compute_naive_lag(step, 1)`, of days a
    week.
    """
    step_s, ahead = int(seconds[1] - seconds[0]), np.arange(1, horizon + 1)
    places = origins[:, None] + ahead - 1
    if step_s < DAY and DAY % step_s == 0:
        weekday = (seconds[places] // DAY + 3) % 7  # 1970-01-01 was a Thursday
        by_week = (weekday == MONDAY) | (weekday >= SATURDAY)
        lag = np.where(by_week, _round_to_seasons(ahead, WEEK // step_s), _round_to_seasons(ahead, DAY // step_s))
    else:
        lag = np.broadcast_to(_round_to_seasons(ahead, compute_naive_lag(step_s, 1)), places.shape)
    return np.where(places >= lag, values[np.maximum(places - lag, 0)], np.nan)


def make_weekly_forecast(values: Float64, seconds: Steps, origins: Steps, horizon: int) -> Float64:
    """Make the naive forecast whose rMAE papers print [W, H]: the value a week before, for longer ones more weeks.

    NaN where it is missing or a week is no whole number of steps.
    """
    step_s, ahead = int(seconds[1] - seconds[0]), np.arange(1, horizon + 1)
    places = origins[:, None] + ahead - 1
    if WEEK % step_s:
        return np.full(places.shape, NAN)
    lag = _round_to_seasons(ahead, WEEK // step_s)
    return np.where(places >= lag, values[np.maximum(places - lag, 0)], NAN)


def average_by_group(errors: Float64, group: Steps, groups: Sequence[int]) -> list[float]:
    """Return the mean error of each group; both arrays have one shape."""
    return [_compute_mean(errors[group == each]) for each in groups]


def _round_to_seasons(ahead: Steps, season: int) -> Steps:
    return -(-ahead // season) * season


def _compute_mean(values: npt.NDArray[np.floating]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _compute_rmae(y: Float64, error: Float64, naive: Float64) -> float:
    """Compute the mean error divided by that of a naive forecast, over the steps that both have."""
    both = ~np.isnan(naive - y)
    return _compute_ratio(_compute_mean(error[both]), _compute_mean(np.abs(y - naive)[both]))


def _compute_ratio(above: float, below: float) -> float:
    return above / below if below else float("nan")
