"""Nixtla's API, as `NixtlaClient` 0.7 to 0.9 speaks it with `base_url` (CONTRACTS 10). What it does not do is 501.

A call's series lie end to end in one list and become DeepAR instances here, in the front, under a bound of values.
Backtests and the detection of anomalies are forecasts too: of windows, each an instance that is cut where it begins.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

import msgspec

from server.contract import JSON
from server.errors import Refused, Situation
from server.front.dataplane import InferencePlane
from server.front.exchange import DialectOperation, Headers, HttpReply, HttpRequest, Limit
from server.front.forecasting.bodies import decode_body, say_place
from server.front.forecasting.calls import Forecast, ForecastCall, list_known, parse_model, require_forecasts
from server.front.forecasting.nixtla_series import Level, NixtlaRequest, Plan
from server.front.forecasting.recipes import check_frequency, level_quantiles
from server.front.statuses import USUAL_STATUS
from server.routes.inference import NIXTLA
from server.settings import Settings

NO_BODY = 64 * 1024  #: most bytes of a body that is not read
OK, NOT_IMPLEMENTED = 200, 501
PREFIX = "/nixtla"  #: a `base_url` may have this path, where another dialect's paths are the same
NO_COUNT = {"consumed": 0, "limit": 0}

#: The client repeats 408, 409, 429, 502, 503 and 504, each time after 10 s: what a repetition does not heal is another.
STATUS: Mapping[Situation, int] = {
    **USUAL_STATUS,
    Situation.NO_ROOM: 424,
    Situation.DEADLINE: 424,
}
_REFUSED = ("finetune", "explain", "simulate", "finetuned_models")  #: below /v2: each is 501, as is what ends in /async
_decoder = msgspec.json.Decoder(NixtlaRequest)


@dataclass(frozen=True)
class Refusal(DialectOperation):
    """What is not done, and why."""

    why: str = ""


class Nixtla:
    """See the module."""

    name = "nixtla"
    routes = NIXTLA

    def __init__(self, settings: Settings) -> None:
        limit, nothing = Limit(int(settings.max_body_bytes), "max_body_bytes"), Limit(NO_BODY, "what this path allows")
        self._limit, self._default = limit, settings.default_model
        self._status = {**STATUS, Situation.OVERLOADED: int(settings.overload_status)}
        gets = {"/validate_api_key": "key", "/usage": "usage", "/v2/models": "models", "/model_params": "parameters"}
        posts = {
            "/v2/forecast": "forecast",
            "/v2/cross_validation": "backtest",
            "/v2/anomaly_detection": "anomalies",
            "/v2/online_anomaly_detection": "online_anomalies",
        }
        self._operations = {path: ("GET", DialectOperation(name, nothing)) for path, name in gets.items()}
        self._operations |= {path: ("POST", DialectOperation(name, limit)) for path, name in posts.items()}

    def match(self, method: str, path: str, query: bytes = b"") -> DialectOperation | None:
        """What is asked, with or without the prefix; paths of jobs and of training are refused in this dialect."""
        del query
        path = path.removeprefix(PREFIX)
        found = self._operations.get(path)
        if found is None:
            head, _, rest = path.removeprefix("/v2/").partition("/")
            jobs = path.startswith("/v2/") and (head in _REFUSED or (f"/v2/{head}" in self._operations and rest))
            if not jobs or head == "models":
                return None
            why = f"{path[:80]} is not done here: models are not trained by requests, and no jobs are kept"
            return Refusal("refused", self._limit, why)
        expected, operation = found
        if method != expected:
            raise Refused(Situation.BAD_METHOD, f"{path} is asked by {expected}, not {method}")
        return operation

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """JSON for whatever is asked; 501 with `detail` for what no model here does."""
        if isinstance(operation, Refusal):
            return _reply({"detail": operation.why}, NOT_IMPLEMENTED)
        if operation.name == "key":
            return _reply({"detail": "this server takes the key"})
        if operation.name == "usage":
            return _reply({"minute": NO_COUNT, "month": NO_COUNT})
        if operation.name == "models":
            return _reply({"models": [{"name": name} for name in list_known(plane)]})
        call = ForecastCall(plane, request, self._limit)
        if operation.name == "parameters":
            return await self._describe(call, request)
        asked = decode_body(_decoder, request.body)
        refusal = _find_refusal(asked, operation.name)
        if refusal:
            return _reply({"detail": refusal}, NOT_IMPLEMENTED)
        if operation.name.endswith("anomalies") and len(asked.levels) != 1:
            raise Refused(Situation.BAD_REQUEST, "anomalies are outside of one interval: send one level", field="level")
        model = parse_model(self._choose_model(asked.model), "model")
        models, recipe = await call.describe_each(model, len(asked.series.sizes))
        check_frequency(recipe, asked.freq, "freq")
        horizon = recipe.prediction_length if operation.name == "anomalies" else asked.h
        plan = Plan(asked, recipe, horizon, backtest=operation.name != "forecast")
        plan.cut(_CUTS[operation.name](asked, plan.horizon, recipe.history_length))
        found = await call.forecast(list(plan.list_instances(models)), plan.build_configuration())
        return _reply(_ANSWERS[operation.name](asked, plan, require_forecasts(found)))

    async def _describe(self, call: ForecastCall, request: HttpRequest) -> HttpReply:
        """How many steps the client shall send, and how many it may ask."""
        query = parse_qs(request.query.decode("latin-1"), max_num_fields=20)
        named, frequency = query.get("model"), query.get("freq")
        if not named:
            raise Refused(Situation.NO_TARGET, "the query names no model: /model_params?model=au/NSW1.mar&freq=h")
        _, recipe = await call.describe_each(parse_model(self._choose_model(named[0]), "model"))
        if frequency:
            check_frequency(recipe, frequency[0], "freq")
        detail = {"input_size": recipe.history_length, "horizon": recipe.prediction_length}
        return _reply({"detail": detail})

    def _choose_model(self, named: str) -> str:
        """The client's own default is a name like any other, unless the operator has said what it stands for."""
        return self._default if self._default and named.startswith("timegpt") else named

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """`detail`, one sentence with the place: the client shows the body, and no header."""
        del request
        message = say_place(why, "series")
        if why.situation is Situation.NOT_FOUND:
            message += "; pass the model's name to the client, such as model='au/NSW1.mar'"
        headers: Headers = []
        if why.detail.retry_ms is not None:
            headers.append((b"retry-after", b"%d" % -(-why.detail.retry_ms // 1000)))
        return HttpReply(self._status[why.situation], JSON, msgspec.json.encode({"detail": message}), headers)


def _reply(body: Mapping[str, object], status: int = OK) -> HttpReply:
    return HttpReply(status, JSON, msgspec.json.encode(body))


def _find_refusal(asked: NixtlaRequest, name: str) -> str:
    """What of a request is not done by any model here; empty where all is."""
    if asked.finetune_steps or asked.finetuned_model_id:
        return "models are not trained by requests: leave out finetune_steps and finetuned_model_id"
    if asked.feature_contributions:
        return "feature contributions are not computed: leave out feature_contributions"
    if name == "online_anomalies" and asked.step_size not in (None, asked.h):
        return f"windows of the detection follow one another: leave out step_size, or set it to h ({asked.h})"
    return ""


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


_CUTS: Mapping[str, Callable[[NixtlaRequest, int, int], Cuts]] = {
    "forecast": _cut_at_end,
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


_ANSWERS: Mapping[str, Callable[[NixtlaRequest, Plan, Sequence[Forecast]], dict[str, Any]]] = {
    "forecast": _answer_forecast,
    "backtest": _answer_backtest,
    "anomalies": _answer_anomalies,
    "online_anomalies": _answer_online,
}
