"""Where the windows of a call of Nixtla's begin, and how their forecasts become its answer (CONTRACTS 10). Pure."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from server.front.forecasting.calls import Forecast
from server.front.forecasting.nixtla_series import Level, NixtlaRequest, Plan
from server.front.forecasting.recipes import level_quantiles

# --- where windows begin, by the size of a series -----------------------------------------------------------------

Cuts = Callable[[int], Sequence[int]]


def _cut_at_end(asked: NixtlaRequest, horizon: int, history: int) -> Cuts:
    """One window, after all that is known."""
    del asked, horizon, history
    return lambda size: (size,)


def _cut_windows(asked: NixtlaRequest, horizon: int, history: int) -> Cuts:
    """`n_windows` windows, the last of which ends with the series. ValueError for a series that is too short."""
    del history
    step = asked.step_size or horizon

    def list_cuts(size: int) -> Sequence[int]:
        first = size - horizon - (asked.n_windows - 1) * step
        if first < 1:
            needed = size - first + 1
            raise ValueError(f"{asked.n_windows} windows need at least {needed} steps, the series has {size}")
        return range(first, size - horizon + 1, step)

    return list_cuts


def _cut_history(asked: NixtlaRequest, horizon: int, history: int) -> Cuts:
    """Windows one after another from the first that has its whole history. ValueError where none has."""
    del asked

    def list_cuts(size: int) -> Sequence[int]:
        count = (size - history) // horizon
        if count < 1:
            needed = history + horizon
            raise ValueError(f"anomalies are found in series of at least {needed} steps, this one has {size}")
        return range(size - count * horizon, size, horizon)

    return list_cuts


def _cut_detection(asked: NixtlaRequest, horizon: int, history: int) -> Cuts:
    """Windows one after another that cover the last `detection_size` steps."""
    windows = msgspec.structs.replace(asked, n_windows=-(-asked.detection_size // horizon), step_size=horizon)
    return _cut_windows(windows, horizon, history)


CUTS: Mapping[str, Callable[[NixtlaRequest, int, int], Cuts]] = {
    "forecast": _cut_at_end,
    "simulate": _cut_at_end,
    "backtest": _cut_windows,
    "anomalies": _cut_history,
    "online_anomalies": _cut_detection,
}


# --- what is answered ---------------------------------------------------------------------------------------------


def _list_intervals(plan: Plan, levels: Sequence[Level], found: Sequence[Forecast]) -> dict[str, list[float]] | None:
    """The ends of each interval, under the level as it was sent; None where none was."""
    intervals: dict[str, list[float]] = {}
    for level in levels:
        low, high = level_quantiles(level)
        for name, end in (("lo", low), ("hi", high)):
            intervals[f"{name}-{level}"] = plan.lay_out(found, lambda each, end=end: each.quantiles.get(end))  # type: ignore[misc]
    return intervals or None


def _answer_forecast(asked: NixtlaRequest, plan: Plan, found: Sequence[Forecast]) -> dict[str, Any]:
    intervals = _list_intervals(plan, asked.levels, found)
    return {"mean": plan.lay_out(found, _take_mean), "intervals": intervals, "weights_x": None}


def _answer_backtest(asked: NixtlaRequest, plan: Plan, found: Sequence[Forecast]) -> dict[str, Any]:
    answer = _answer_forecast(asked, plan, found)
    return {**answer, "sizes": plan.list_sizes(), "idxs": plan.list_places()}


def _answer_anomalies(asked: NixtlaRequest, plan: Plan, found: Sequence[Forecast]) -> dict[str, Any]:
    """A point outside of its interval is an anomaly; one that is missing is none."""
    answer = _answer_backtest(asked, plan, found)
    low, high = _find_interval(asked, answer)
    values = [asked.series.y[place] for place in answer["idxs"]]
    answer["anomaly"] = [
        value is not None and not least <= value <= most for value, least, most in zip(values, low, high, strict=True)
    ]
    return answer


def _answer_online(asked: NixtlaRequest, plan: Plan, found: Sequence[Forecast]) -> dict[str, Any]:
    """The last `detection_size` points of each series; a score above 1 is as far from the mean as is an anomaly's."""
    answer = _answer_anomalies(asked, plan, found)
    kept, at = list[int](), 0
    for size in answer["sizes"]:
        kept += range(at + size - asked.detection_size, at + size)
        at += size
    scores = _score(asked, answer)
    intervals = {name: [values[i] for i in kept] for name, values in answer["intervals"].items()}
    chosen = {name: [answer[name][i] for i in kept] for name in ("mean", "idxs", "anomaly")}
    sizes = [asked.detection_size] * len(answer["sizes"])
    return {**chosen, "sizes": sizes, "anomaly_score": [scores[i] for i in kept], "intervals": intervals}


def _score(asked: NixtlaRequest, answer: Mapping[str, Any]) -> list[float]:
    """How far each point is from its mean, in widths of its interval on that side; 0 for a missing one."""
    low, high = _find_interval(asked, answer)
    scores = list[float]()
    for place, mean, least, most in zip(answer["idxs"], answer["mean"], low, high, strict=True):
        value = asked.series.y[place]
        away = 0.0 if value is None else value - mean
        width = (most - mean) if away > 0 else (mean - least)
        scores.append(0.0 if away == 0 else abs(away) / max(width, abs(away) * 1e-6))
    return scores


def _find_interval(asked: NixtlaRequest, answer: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """The ends of the one interval."""
    (level,) = asked.levels
    return answer["intervals"][f"lo-{level}"], answer["intervals"][f"hi-{level}"]


def _take_mean(forecast: Forecast) -> list[Any] | None:
    return forecast.mean


ANSWERS: Mapping[str, Callable[[NixtlaRequest, Plan, Sequence[Forecast]], dict[str, Any]]] = {
    "forecast": _answer_forecast,
    "backtest": _answer_backtest,
    "anomalies": _answer_anomalies,
    "online_anomalies": _answer_online,
}
