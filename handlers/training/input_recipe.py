"""Makes the input recipe of a forecaster, the `ForecastSpec` record of a series and an architecture, and its rows.

The rows for training are made by the code that serves requests, `DeepAr`, so that both are the same numbers.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec.structs import replace

from handlers.base import Float32
from handlers.codecs.deepar import DeepAr
from handlers.codecs.features import Float64
from handlers.training.history_rules import learn_history_rules
from handlers.training.tails import UNSEEN, choose_band
from handlers.training.time_series import Series, SeriesInvalid
from model_store.archives.manifest import Feature, ForecastSpec, InputChannel, Scaler, Tails

HOUR, DAY, WEEK = 3600, 86_400, 604_800
LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)  #: of recipes that name no levels; `fleetcast train` asks for nine
IQR_OF_NORMAL = 1.349  #: the interquartile range of a normal distribution, in standard deviations

Scaling = Literal["asinh", "linear"]
Tail = Literal["clamp", "exponential"]
WEEKDAYS: tuple[Feature, ...] = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


def choose_prediction_length(step_s: int) -> int:
    """Return the default forecast length: an hour below 15 minutes, a day below a day, a week of days, else 4 steps."""
    if step_s < HOUR / 4:
        return max(1, HOUR // step_s)
    if step_s < DAY:
        return DAY // step_s
    return max(4, WEEK // step_s)


def choose_context_length(step_s: int) -> int:
    """Return the default context: 168 steps for hourly and finer data, else 84 (twelve weeks of days)."""
    return 168 if step_s <= HOUR else 84


def compute_naive_lag(step_s: int, prediction: int) -> int:
    """Return the least lag of whole days (for days: weeks; above: steps) that is known for all `prediction` steps."""
    steps = DAY // step_s if step_s < DAY else WEEK // step_s if step_s < WEEK else 1
    return -(-prediction // steps) * steps


def count_season_steps(step_s: int) -> int:
    """Count the steps of a season: of a day, for daily steps of a week, else of a year of weeks."""
    return DAY // step_s if step_s < DAY else max(2, (WEEK if step_s < WEEK else 52 * WEEK) // step_s)


def make_recipe(
    series: Series,
    reach: int,
    *,
    context_length: int,
    prediction_length: int,
    levels: Sequence[float] = LEVELS,
    scaling: Scaling = "asinh",
    unit: str = "",
    time_zone: str = "UTC",
    origin: str = "",
    weekdays: bool = False,
    paths: int = 0,
    tail: Tail = "clamp",
    max_missing: float | None = None,
    fallback: bool = False,
    residual_to: str = "",
) -> ForecastSpec:
    """Make the record for a network that reads the last `reach` steps of its context; all of `series` fits the scalers.

    The channels are: the target; if the reach does not include them, the target lagged so that its last
    `prediction_length` steps are the values whole days and whole weeks before the forecast ones; calendar and
    known-future covariates of the forecast steps, a covariate on several channels if the reach is shorter than the
    forecast. `weekdays`: the calendar has a channel for each day of the week, after the covariates. `paths`: the
    network draws so many, from a seed in the last channel. `origin`: forecasts start at this time of day only.
    `tail`: the fit learns the numbers of `exponential`; a network that draws paths or has one level has `clamp`.
    `max_missing`: the share of a history that may be missing; with it the archive has rules for histories, and with
    `fallback` a forecast for those that say too little. `residual_to`: the covariate from which the network learns the
    deviations of the target.
    """
    step_s = round(series.step.total_seconds())
    channels = choose_channels(step_s, prediction_length, reach, len(series.known_names), weekdays=weekdays)
    scalers = [
        fit_robust_scaler(row, "linear", name) for row, name in zip(series.known, series.known_names, strict=True)
    ]
    channels = [
        replace(each, scaler=scalers[each.index]) if each.source == "dynamic_feat" else each for each in channels
    ]
    channels += [InputChannel(source="seed")] if paths else []
    made = ForecastSpec(
        frequency=series.frequency,
        context_length=context_length,
        prediction_length=prediction_length,
        quantile_levels=tuple(levels),
        inputs=tuple(channels),
        time_zone=time_zone,
        dynamic_feat=series.known_names,
        unit=unit,
        scaler=fit_robust_scaler(subtract_base(series, residual_to), scaling, series.name),
        **_start_tails(tail, () if paths else levels),
        paths=paths or msgspec.UNSET,
        origin=origin or msgspec.UNSET,
        residual_to=residual_to or msgspec.UNSET,
    )
    if max_missing is None:
        return made
    values = subtract_base(series, residual_to)
    rules = learn_history_rules(series, values, made, max_missing, fallback=fallback)
    return replace(made, history=rules)


def _start_tails(tail: Tail, levels: Sequence[float]) -> dict[str, Any]:
    """Return the fields `tail` and `tails` before a fit, whose distances are those of levels that hold."""
    if tail == "clamp" or len(levels) < 2:  # noqa: PLR2004 -- one level has no band
        return {"tail": "clamp"}
    low, high = choose_band(np.array(levels))
    return {"tail": tail, "tails": Tails(low=UNSEEN, high=UNSEEN, band=(levels[low], levels[high]))}


def get_base(series: Series, residual_to: str | msgspec.UnsetType) -> Float64:
    """Return what the forecasts of a network are added to [T]: a covariate, or zeros."""
    if not residual_to:
        return np.broadcast_to(np.float64(0), len(series.values))
    base: Float64 = series.known[series.known_names.index(residual_to)]
    return base


def subtract_base(series: Series, residual_to: str | msgspec.UnsetType) -> Float64:
    """Return what a network learns [T]: the values, or their deviations from a covariate."""
    return series.values - get_base(series, residual_to) if residual_to else series.values


def choose_channels(
    step_s: int, prediction: int, reach: int, covariates: int, *, weekdays: bool = False
) -> list[InputChannel]:
    """Choose the channels of `make_recipe`, without the scalers of the covariates and without a seed."""
    calendar = [
        InputChannel(source="calendar", feature=each, shift=prediction)
        for each in (WEEKDAYS if weekdays else _choose_calendar(step_s))
    ]
    # The last `reach` columns of a covariate's channels together contain its value at each forecast step.
    known = [
        InputChannel(source="dynamic_feat", index=index, shift=shift)
        for index in range(covariates)
        for shift in range(prediction, 0, -reach)
    ]
    lags = [InputChannel(source="target", lag=lag) for lag in _choose_lags(step_s, prediction, reach)]
    return [*lags, *(known + calendar if weekdays else calendar + known)]


def merge_recipes(recipes: Sequence[ForecastSpec]) -> ForecastSpec:
    """Merge the recipes of the parts of a mixture into one that has the channels of all, each once."""
    channels = dict.fromkeys(channel for each in recipes for channel in each.inputs)
    return replace(recipes[0], inputs=tuple(channels))


def find_channels(wanted: Sequence[InputChannel], forecast: ForecastSpec) -> list[int]:
    """Find the places of channels in a recipe, whatever their scalers are. Raises ValueError where one is missing."""
    places = [replace(channel, scaler=Scaler()) for channel in forecast.inputs]
    return [places.index(channel) for channel in wanted]


def list_origins(series: Series, forecast: ForecastSpec) -> range:
    """List the possible first steps of a forecast: all, or one a day for an `origin`. Raises SeriesInvalid."""
    if not forecast.origin:
        return range(len(series.values))
    step_s, hours, minutes = round(series.step.total_seconds()), *map(int, forecast.origin.split(":"))
    start = series.start
    wait = (hours * HOUR + minutes * 60 - (start.hour * HOUR + start.minute * 60 + start.second)) % DAY
    if wait % step_s or DAY % step_s:
        what = f"no step of {series.frequency} from {start} on is at {forecast.origin} every day"
        raise SeriesInvalid(f"{series.name}: {what}; choose another origin, or any")
    return range(wait // step_s, len(series.values), DAY // step_s)


def fit_robust_scaler(values: Float64, kind: Scaling, name: str) -> Scaler:
    """Fit median and interquartile range (as of a normal), which resist spikes. Raises SeriesInvalid without values."""
    known = values[~np.isnan(values)]
    if not len(known):
        raise SeriesInvalid(f"{name}: no values to learn from")
    low, center, high = np.percentile(known, [25, 50, 75])
    scale = (high - low) / IQR_OF_NORMAL or known.std() or 1.0
    return Scaler(kind=kind, center=float(center), scale=float(scale))


def build_rows(series: Series, forecast: ForecastSpec) -> Float32:
    """Build the channels along the series [channels, T - prediction - longest lag], from step `longest lag` on.

    The row of a forecast from step s on is the slice of `context_length` steps that ends before s.
    """
    past = len(series.values) - forecast.prediction_length
    lag = forecast.history_length - forecast.context_length
    rules = forecast.history
    if rules:  # a gap of the whole series is judged by its windows, and completed as theirs are
        rules = replace(rules, fallback=msgspec.UNSET)
    whole = DeepAr(replace(forecast, context_length=past - lag, origin=msgspec.UNSET, history=rules))
    body = {"instances": [series.instance(0, past, forecast.prediction_length)]}
    found: Float32 = whole.decode(msgspec.json.encode(body))[0][0]
    return found


def _choose_lags(step_s: int, prediction: int, reach: int) -> list[int]:
    """Choose lags: 0, and those that show the value whole days and whole weeks before each forecast step."""
    lags = [0]
    for period_s in (DAY, WEEK):
        period, rest = divmod(period_s, step_s)
        lag = -(-prediction // max(period, 1)) * period - prediction
        if not rest and period > 1 and lag + prediction > lags[-1] + reach:
            lags.append(lag)
    return lags


def _choose_calendar(step_s: int) -> Iterator[Feature]:
    """Choose the calendar features that change from step to step."""
    if step_s < DAY:
        yield from ("hour_sin", "hour_cos")
    if step_s < WEEK:
        yield from ("weekday_sin", "weekday_cos", "weekend")
    yield from ("year_sin", "year_cos")
