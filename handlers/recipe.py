"""Which inputs a forecaster gets: from a series and an architecture to the archive's `Forecast` record, and to rows.

The rows for training come out of `DeepAr.decode`, the code that serves requests, so both are the same numbers.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec
import numpy as np

from handlers.base import Float32
from handlers.deepar import DeepAr
from handlers.inputs import Float64
from handlers.series import Series, SeriesInvalid
from model_store.manifest import Channel, Forecast, Scaler

HOUR, DAY, WEEK = 3600, 86_400, 604_800
LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
IQR_OF_NORMAL = 1.349  #: the interquartile range of a normal distribution, in standard deviations

Scaling = Literal["asinh", "linear"]
CalendarFeature = Literal["hour_sin", "hour_cos", "weekday_sin", "weekday_cos", "weekend", "year_sin", "year_cos"]


def default_prediction(step_s: int) -> int:
    """Below 15 minutes an hour, below a day a day, of days a week, above 4 steps."""
    if step_s < HOUR / 4:
        return max(1, HOUR // step_s)
    if step_s < DAY:
        return DAY // step_s
    return max(4, WEEK // step_s)


def default_context(step_s: int) -> int:
    """Hourly and finer: 168 steps; coarser: 84, twelve weeks of days."""
    return 168 if step_s <= HOUR else 84


def naive_lag(step_s: int, prediction: int) -> int:
    """The steps back to the same time of the last known day (of the week, for days; else to the last known step)."""
    season = DAY // step_s if step_s < DAY else WEEK // step_s if step_s < WEEK else 1
    return -(-prediction // season) * season


def recipe(
    series: Series,
    reach: int,
    *,
    context_length: int,
    prediction_length: int,
    levels: Sequence[float] = LEVELS,
    scaling: Scaling = "asinh",
    unit: str = "",
    time_zone: str = "UTC",
) -> Forecast:
    """The record for a network that reads the last `reach` steps of its context; scalers from all of `series`.

    Channels: the target; where the reach does not see them, the target lagged so that its last `prediction_length`
    steps are the values one day and one week before the forecast ones; calendar and known-future covariates of the
    forecast steps.
    """
    step_s = round(series.step.total_seconds())
    scalers = [robust_scaler(row, "linear", name) for row, name in zip(series.known, series.known_names, strict=True)]
    channels = [
        *[Channel(source="target", lag=lag) for lag in _lags(step_s, prediction_length, reach)],
        *[Channel(source="calendar", feature=each, shift=prediction_length) for each in _calendar(step_s)],
        *[
            Channel(source="dynamic_feat", index=index, shift=prediction_length, scaler=scaler)
            for index, scaler in enumerate(scalers)
        ],
    ]
    return Forecast(
        frequency=series.frequency,
        context_length=context_length,
        prediction_length=prediction_length,
        quantile_levels=tuple(levels),
        inputs=tuple(channels),
        time_zone=time_zone,
        dynamic_feat=series.known_names,
        unit=unit,
        scaler=robust_scaler(series.values, scaling, series.name),
        tail="clamp",
    )


def robust_scaler(values: Float64, kind: Scaling, name: str) -> Scaler:
    """Median and interquartile range (as of a normal), which spikes do not move. Raises SeriesInvalid: no values."""
    known = values[~np.isnan(values)]
    if not len(known):
        raise SeriesInvalid(f"{name}: no values to learn from")
    low, center, high = np.percentile(known, [25, 50, 75])
    scale = (high - low) / IQR_OF_NORMAL or known.std() or 1.0
    return Scaler(kind=kind, center=float(center), scale=float(scale))


def rows(series: Series, forecast: Forecast) -> Float32:
    """The channels along the series [channels, T - prediction - longest lag], from step `longest lag` on.

    The row of a forecast from step s on is the slice of `context_length` steps that ends before s.
    """
    past = len(series.values) - forecast.prediction_length
    lag = forecast.history_length - forecast.context_length
    whole = DeepAr(msgspec.structs.replace(forecast, context_length=past - lag))
    body = {"instances": [series.instance(0, past, forecast.prediction_length)]}
    found: Float32 = whole.decode(msgspec.json.encode(body))[0][0]
    return found


def _lags(step_s: int, prediction: int, reach: int) -> list[int]:
    """0, and what makes the value of one day and of one week before each forecast step visible."""
    lags = [0]
    for period_s in (DAY, WEEK):
        period, rest = divmod(period_s, step_s)
        lag = -(-prediction // max(period, 1)) * period - prediction
        if not rest and period > 1 and lag + prediction > lags[-1] + reach:
            lags.append(lag)
    return lags


def _calendar(step_s: int) -> Iterator[CalendarFeature]:
    """What changes from step to step."""
    if step_s < DAY:
        yield from ("hour_sin", "hour_cos")
    if step_s < WEEK:
        yield from ("weekday_sin", "weekday_cos", "weekend")
    yield from ("year_sin", "year_cos")
