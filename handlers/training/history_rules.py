"""Learns the rules of `handlers.codecs.history` from the rows that an archive is fitted to. Pure numpy.

A rule's threshold is what is exceeded at one of 1000 times in these rows, so that so many alarms are false on rows like
them; `docs/quality.md` has what was measured on later ones.
"""

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np

from handlers.codecs.features import DAY, HOUR, Float64, to_network
from handlers.codecs.gaps import Flags
from handlers.codecs.history import HOURS, compute_shift_gains, count_season, measure_courses, turn_profile
from handlers.training.time_series import Series
from model_store.archives.manifest import Fallback, ForecastSpec, HistoryRules

ALARMS = 0.001  #: share of the training rows at which a rule alarms
LEAST_FLAT = 6  #: least number of equal steps that are unusual
LEAST_GAIN = 0.02  #: least gain of a fit at another hour that is unusual
MARGIN = 1.0  #: how far beyond the range of all prices a price is unusual, in distances of its end from the median
LEAST_SPAN = 0.5  #: share of the least distance between highest and lowest price of a history
LEAST_FIT = 0.6  #: median correlation of histories with the mean course, below which days have none
LEAST_DAYS = 2  #: days of a history that have a mean course
FAR_DAYS = 7  #: lag of the naive forecast whose errors are those of a day further back
LEAST_ERRORS = 20  #: errors for quantiles


def learn_history_rules(
    series: Series, values: Float64, forecast: ForecastSpec, max_missing: float, *, fallback: bool
) -> HistoryRules:
    """Learn the rules of a series; its recipe has scaler, lengths and levels. The fallback is left out without errors.

    `values`: its prices, or what the network learns of them. `max_missing`: the share of a history that may be missing.
    """
    series, step_s = replace(series, values=values), round(series.step.total_seconds())
    season, known = count_season(step_s), values[~np.isnan(values)]
    center, low, high = np.median(known), known.min(), known.max()
    repeats = np.zeros(len(values), bool)
    repeats[season:] = values[season:] == values[:-season]
    same = np.concatenate([[False], values[1:] == values[:-1]])
    profile, gain = _learn_course(series, forecast, step_s)
    rules = HistoryRules(
        max_missing=max_missing,
        flat_steps=max(LEAST_FLAT, 2 + _count_usual(same)),
        stale_steps=max(2, season // 2, 1 + _count_usual(repeats & ~same)),
        low=_round(low - MARGIN * max(center - low, forecast.scaler.scale)),
        high=_round(high + MARGIN * max(high - center, forecast.scaler.scale)),
        least_span=_round(LEAST_SPAN * _measure_least_span(values, forecast.history_length, season)),
        profile=profile,
        shift_gain=gain,
    )
    learnt = _learn_fallback(series, forecast, step_s) if fallback else None
    return rules if learnt is None else msgspec.structs.replace(rules, fallback=learnt)


def _measure_least_span(values: Float64, length: int, season: int) -> float:
    """Measure the least distance between highest and lowest price of the windows [length], one a season; 0 without."""
    whole = [values[at : at + length] for at in range(0, len(values) - length + 1, season)]
    spans = [each.max() - each.min() for each in whole if not np.isnan(each).any()]
    return float(min(spans, default=0.0))


def _count_usual(holds: Flags) -> int:
    """Count the steps [T] in a row that hold, as many as at all but ALARMS of the steps."""
    steps = np.arange(1, len(holds) + 1)
    runs = steps - np.maximum.accumulate(np.where(holds, 0, steps))
    return int(np.quantile(runs, 1 - ALARMS, method="higher"))


def _learn_course(series: Series, forecast: ForecastSpec, step_s: int) -> tuple[tuple[float, ...], float]:
    """Learn the mean course of a day as a unit vector, and the unusual gain of a fit at another hour.

    There is none for steps that do not divide an hour, for short histories, and where days have no course.
    """
    days_read = forecast.history_length * step_s // DAY
    if step_s > HOUR or HOUR % step_s or days_read < LEAST_DAYS:
        return (), 2.0
    days = _cut_days(series, forecast, step_s)
    if len(days) <= days_read:
        return (), 2.0
    profile = np.nanmean(days, axis=0)
    profile = profile - profile.mean()
    size = float(np.sqrt((profile**2).sum()))
    if not size > 0:  # also where an hour is never observed
        return (), 2.0
    sums = np.cumsum(np.concatenate([np.zeros((1, HOURS)), days]), axis=0)
    courses = (sums[days_read:] - sums[:-days_read]) / days_read
    courses = courses[~np.isnan(courses).any(axis=1)]
    unit = profile / size
    if not _follows(courses, unit):
        return (), 2.0
    gains = compute_shift_gains(courses, turn_profile(unit.tolist()), [0] * len(courses))
    unusual = max(LEAST_GAIN, float(np.quantile(gains, 1 - ALARMS, method="higher")) * 1.05)
    return tuple(round(each, 5) for each in unit.tolist()), _round(unusual)


def _follows(courses: Float64, profile: Float64) -> bool:
    """Whether most of the courses [n, 24] have a correlation with the profile that tells an hour from another."""
    apart = courses - courses.mean(axis=1, keepdims=True)
    sizes = np.sqrt((apart**2).sum(axis=1))
    fits = apart @ profile / np.where(sizes > 0, sizes, 1.0)
    return bool(len(fits)) and float(np.median(fits)) >= LEAST_FIT


def _cut_days(series: Series, forecast: ForecastSpec, step_s: int) -> Float64:
    """Cut the series into courses of days [D, 24] in network numbers; missing hours take those of a day before."""
    start = series.start
    begin = -(start.hour * HOUR + start.minute * 60 + start.second) % DAY
    if begin % step_s:
        return np.empty((0, HOURS))
    values = to_network(series.values[begin // step_s :], forecast.scaler)
    steps = DAY // step_s
    rows = values[: len(values) // steps * steps].reshape(-1, steps)
    courses = measure_courses(rows, step_s)
    for day in range(1, len(courses)):
        gaps = np.isnan(courses[day])
        courses[day, gaps] = courses[day - 1, gaps]
    return courses[~np.isnan(courses).any(axis=1)]


def _learn_fallback(series: Series, forecast: ForecastSpec, step_s: int) -> Fallback | None:
    """Learn the errors of the naive forecasts; None where there are too few, or the network samples."""
    levels = np.array(forecast.quantile_levels)
    values, season = to_network(series.values, forecast.scaler), count_season(step_s)
    near = -(-forecast.prediction_length // season) * season
    errors = [values[lag:] - values[:-lag] for lag in (near, max(near, FAR_DAYS * season))]
    if forecast.paths or any(np.count_nonzero(~np.isnan(each)) < LEAST_ERRORS for each in errors):
        return None
    start = series.start
    seconds = start.hour * HOUR + start.minute * 60 + start.second + step_s * np.arange(len(values))
    hours = seconds // HOUR % HOURS if step_s <= HOUR else np.zeros(len(values), np.int64)
    rows = [values[hours == hour] for hour in range(HOURS if step_s <= HOUR else 1)]
    if any(np.count_nonzero(~np.isnan(each)) < LEAST_ERRORS for each in rows):
        rows = [values]
    return Fallback(
        near=_take_levels(errors[0], levels),
        far=_take_levels(errors[1], levels),
        usual=tuple(_take_levels(each, levels) for each in rows),
    )


def _take_levels(values: Float64, levels: Float64) -> tuple[float, ...]:
    """Return the quantiles of known values at the levels, rounded so that they still rise."""
    found: Sequence[float] = np.quantile(values[~np.isnan(values)], levels).tolist()
    return tuple(_round(each) for each in found)


def _round(value: float) -> float:
    return float(f"{value:.4g}")
