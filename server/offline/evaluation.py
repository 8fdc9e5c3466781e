"""The evaluation of one market's backtest: scores, calibration, errors by hour, and the windows of its chart."""

from dataclasses import dataclass

import numpy as np

from handlers.codecs.features import Float64
from handlers.evaluation.point_scores import PointComparison, compare_points
from handlers.evaluation.scores import (
    Scores,
    Steps,
    average_by_group,
    compute_calibration,
    compute_seasonal_errors,
    interpolate_median,
    make_naive_forecast,
    make_weekly_forecast,
    score_windows,
)
from handlers.training.input_recipe import DAY, HOUR, compute_naive_lag
from handlers.training.time_series import Series
from server.offline.online_bands import OnlineScores
from server.offline.rolling_windows import WindowForecasts

FAN_STEPS = 14 * 24  #: most steps of a chart, which shows the last ones


@dataclass(frozen=True, slots=True)
class Calibration:
    """The share of actuals in each cell between two levels [cells], and the share that a calibrated forecast has."""

    edges: list[float]  #: levels, with 0 and 1 around them
    share: list[float]
    right: list[float]


@dataclass(frozen=True, slots=True)
class ByHour:
    """Mean absolute errors of the median and the naive forecast by hour of the day, or for days by step ahead."""

    what: str
    group: list[int]
    model: list[float]
    naive: list[float]


@dataclass(frozen=True, slots=True)
class FanChart:
    """The windows of a chart, one after another without overlap [steps]; missing steps are NaN."""

    seconds: list[int]
    actual: list[float]
    levels: list[float]
    quantiles: list[list[float]]  #: [levels][steps]


@dataclass(frozen=True, slots=True)
class MarketScore:
    """The scores of one market. `first` and `last` are the stamps of the first and last forecast steps.

    `notes` say in words what limits the scores, such as rows that no window uses. `uncalibrated`: the coverage of the
    same windows before the archive's calibration; None if it has none. `outside_scenarios`: the share of windows whose
    mean lies outside all joint scenarios of the archive's own levels; None if there are none. `online`: what adaptive
    bands would change, of these scenarios too; None if that was not asked. `beside_naive`: the median beside the naive
    forecast, over the steps that both have. `time_zone`: the clock of all stamps.
    """

    target: str
    model: str
    version: str
    frequency: str
    unit: str
    first: str
    last: str
    windows: int
    scores: Scores
    calibration: Calibration
    by_hour: ByHour
    notes: tuple[str, ...] = ()
    uncalibrated: float | None = None
    against: PointComparison | None = None  #: the archive's median beside a column of the file, if one was asked for
    outside_scenarios: float | None = None
    online: OnlineScores | None = None
    beside_naive: PointComparison | None = None
    time_zone: str = ""


def score_forecasts(
    found: WindowForecasts,
    unit: str,
    notes: tuple[str, ...] = (),
    uncalibrated: float | None = None,
    against: Series | None = None,
    outside: float | None = None,
) -> MarketScore:
    """Evaluate the forecasts of a market, without the chart."""
    series, levels = found.series, found.levels
    edges = np.concatenate([[0.0], levels, [1.0]])
    shares = compute_calibration(found.actuals, found.quantiles, levels)
    return MarketScore(
        target=series.name,
        model=found.model,
        version=found.version,
        frequency=series.frequency,
        unit=unit,
        first=series.stamp(int(found.origins[0])),
        last=series.stamp(int(found.steps[-1, -1])),
        windows=len(found.origins),
        scores=compute_scores(found),
        calibration=Calibration(edges.tolist(), shares.tolist(), np.diff(edges).tolist()),
        by_hour=_by_hour(found),
        notes=notes,
        uncalibrated=uncalibrated,
        against=None if against is None else compare_with_column(found, against),
        outside_scenarios=outside,
        beside_naive=_compare_points("naive", found, _make_naive_forecast(found)),
    )


def compare_with_column(found: WindowForecasts, column: Series) -> PointComparison:
    """Compare the median of the forecasts with a column of the same file, by the steps that both have."""
    return _compare_points(column.name, found, column.values[found.steps])


def _compare_points(name: str, found: WindowForecasts, other: Float64) -> PointComparison:
    stride = int(found.origins[1] - found.origins[0]) if len(found.origins) > 1 else found.horizon
    median = interpolate_median(found.quantiles, found.levels)
    return compare_points(name, found.actuals, median, other, stride)


def compute_scores(found: WindowForecasts) -> Scores:
    """Compute the scores. The season of MASE is a day, for daily steps a week, for weekly steps one step."""
    season = compute_naive_lag(round(found.series.step.total_seconds()), 1)
    scale = compute_seasonal_errors(found.series.values, found.origins, season)
    seconds = _convert_to_seconds(found)
    weekly = make_weekly_forecast(found.series.values, seconds, found.origins, found.horizon)
    return score_windows(found.actuals, found.quantiles, found.levels, _make_naive_forecast(found), scale, weekly)


def make_fan_chart(found: WindowForecasts) -> FanChart:
    """Make a chart of the last windows, counted back from the last one."""
    kept: list[int] = []
    for at in range(len(found.origins) - 1, -1, -1):
        apart = not kept or found.origins[at] + found.horizon <= found.origins[kept[-1]]
        if apart and (len(kept) + 1) * found.horizon <= max(FAN_STEPS, found.horizon):
            kept.append(at)
    kept.reverse()
    steps = found.steps[kept].ravel()
    quantiles = found.quantiles[kept].reshape(len(steps), -1)
    actual = found.series.values[steps]
    return FanChart(
        _convert_to_seconds(found)[steps].tolist(), actual.tolist(), found.levels.tolist(), quantiles.T.tolist()
    )


def _by_hour(found: WindowForecasts) -> ByHour:
    step_s = round(found.series.step.total_seconds())
    if step_s < DAY:
        what, group, groups = "hour of the day", _convert_to_seconds(found)[found.steps] % DAY // HOUR, list(range(24))
    else:
        ahead = np.arange(1, found.horizon + 1)
        what, group, groups = "steps ahead", np.broadcast_to(ahead, found.steps.shape), ahead.tolist()
    actuals = found.actuals
    errors = np.abs(actuals - interpolate_median(found.quantiles, found.levels))
    theirs = np.abs(actuals - _make_naive_forecast(found))
    return ByHour(what, groups, average_by_group(errors, group, groups), average_by_group(theirs, group, groups))


def _make_naive_forecast(found: WindowForecasts) -> Float64:
    return make_naive_forecast(found.series.values, _convert_to_seconds(found), found.origins, found.horizon)


def _convert_to_seconds(found: WindowForecasts) -> Steps:
    """Convert stamps [T] to seconds since 1970."""
    start = np.datetime64(found.series.start, "s").astype(np.int64)
    seconds: Steps = start + round(found.series.step.total_seconds()) * np.arange(len(found.series.values))
    return seconds
