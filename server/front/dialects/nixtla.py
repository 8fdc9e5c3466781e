"""Nixtla's API, as `NixtlaClient` 0.7 to 0.9 speaks it with `base_url` (CONTRACTS 10). What it does not do is 501.

A call's series lie end to end in one list and become DeepAR instances here, in the front, under a bound of values.
Backtests and the detection of anomalies are forecasts too: of windows, each an instance that is cut where it begins. A
job is done when its number is given: the client's next request fetches the answer.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

import msgspec

from server.contract import JSON
from server.errors import Refused, Situation
from server.front.exchange import DialectOperation, Headers, HttpReply, HttpRequest, Limit
from server.front.finished_jobs import KEEP_S
from server.front.forecasting.bodies import decode_body, say_place
from server.front.forecasting.calls import ForecastCall, list_known, parse_model, require_forecasts
from server.front.forecasting.misspelt_keys import cut_keys, refuse_misspelt
from server.front.forecasting.nixtla_answers import ANSWERS, CUTS
from server.front.forecasting.nixtla_series import OLD_CLIENT, SIMULATE, NixtlaRequest, Plan, Series
from server.front.forecasting.nixtla_simulation import NoPaths, simulate_paths
from server.front.forecasting.recipes import check_frequency
from server.front.inference_plane import InferencePlane
from server.front.statuses import USUAL_STATUS
from server.routes.inference import NIXTLA
from server.settings import Settings

NO_BODY = 64 * 1024  #: most bytes of a body that is not read
OK, ACCEPTED, NOT_IMPLEMENTED = 200, 202, 501
PREFIX = "/nixtla"  #: a `base_url` may have this path, where another dialect's paths are the same
NO_COUNT = {"consumed": 0, "limit": 0}

#: The client repeats 408, 409, 429, 502, 503 and 504, each time after 10 s: what a repetition does not heal is another.
STATUS: Mapping[Situation, int] = {
    **USUAL_STATUS,
    Situation.NO_ROOM: 424,
    Situation.DEADLINE: 424,
}
#: Of what is not done, the path below /v2, and why.
_NOT_TRAINED = "models are not trained by requests: `fleetcast train` makes archives, whose names are models"
_REFUSED: Mapping[str, str] = {
    "finetune": _NOT_TRAINED,
    "finetuned_models": _NOT_TRAINED,
    "explain": "weights of features are not computed: nixtla's `feature_contributions` and `explain` have none here",
    "simulate": "paths are drawn by a job: ask /v2/simulate/async, as NixtlaClient.simulate does",
    "execute_step": "preparing steps are not run here: send the prepared series",
}
_JOBS = {  #: by the path's word below /v2, the operation
    "simulate": "simulate",
    "forecast": "forecast_job",
    "cross_validation": "backtest_job",
    "anomaly_detection": "online_anomalies_job",  # the client's job has the newer form, unlike the call without one
}
_JOB, _CANCEL = re.compile(r"/v2/(\w+)/jobs/([^/]{1,100})"), re.compile(r"/v2/async/jobs/([^/]{1,100})/cancel")
#: What clients send and no model here needs.
IGNORED = (
    "clean_ex_first", "feature_contributions_type", "finetune_depth", "finetune_loss", "full_history", "job_options",
    "output_model_id", "quantiles", "refit",
)  # fmt: skip
_decoder = msgspec.json.Decoder(NixtlaRequest)
#: Answers that take no model, by operation.
_SIMPLE: Mapping[str, Callable[[InferencePlane], Mapping[str, object]]] = {
    "key": lambda _: {"detail": "this server takes the key"},
    "usage": lambda _: {"minute": NO_COUNT, "month": NO_COUNT},
    "models": lambda plane: {"models": [{"name": name} for name in list_known(plane)]},
}


class NotDone(Exception):
    """What of a request no model here does, and what to leave out."""


class NoJob(Refused):
    """A job that is not there."""


@dataclass(frozen=True)
class Refusal(DialectOperation):
    """What is not done, and why."""

    why: str = ""


@dataclass(frozen=True)
class NumberedJob(DialectOperation):
    """What is asked of a job that is done, by the number that its client was given."""

    number: str = ""


class Nixtla:
    """See the module."""

    name = "nixtla"
    routes = NIXTLA

    def __init__(self, settings: Settings) -> None:
        limit, nothing = Limit(int(settings.max_body_bytes), "max_body_bytes"), Limit(NO_BODY, "what this path allows")
        self._limit, self._nothing, self._default = limit, nothing, settings.default_model
        self._status = {**STATUS, Situation.OVERLOADED: int(settings.overload_status)}
        gets = {"/validate_api_key": "key", "/usage": "usage", "/v2/models": "models", "/model_params": "parameters"}
        posts = {
            "/v2/forecast": "forecast",
            "/v2/cross_validation": "backtest",
            "/v2/anomaly_detection": "anomalies",
            "/v2/online_anomaly_detection": "online_anomalies",
        }
        self._operations = {path: ("GET", DialectOperation(name, nothing)) for path, name in gets.items()}
        posts |= {f"/v2/{path}/async": name for path, name in _JOBS.items()}
        self._operations |= {path: ("POST", DialectOperation(name, limit)) for path, name in posts.items()}

    def match(self, method: str, path: str, query: bytes = b"") -> DialectOperation | None:
        """What is asked, with or without the prefix; paths of training are refused in this dialect."""
        del query
        path = path.removeprefix(PREFIX)
        expected, operation = self._operations.get(path) or self._match_job(path) or ("", None)
        if operation is None:
            return self._match_refused(path)
        if method != expected:
            raise Refused(Situation.BAD_METHOD, f"{path[:80]} is asked by {expected}, not {method}")
        return operation

    def _match_job(self, path: str) -> tuple[str, DialectOperation] | None:
        """What is asked of a job, and by which method."""
        if found := _CANCEL.fullmatch(path):
            return "POST", NumberedJob("cancel", self._nothing, found[1])
        found = _JOB.fullmatch(path)
        return ("GET", NumberedJob("job", self._nothing, found[2])) if found and found[1] in _JOBS else None

    def _match_refused(self, path: str) -> DialectOperation | None:
        """What is not done here, and why; None for a path of another dialect."""
        head, _, rest = path.removeprefix("/v2/").partition("/")
        if not path.startswith("/v2/"):
            return None
        if head in _REFUSED:
            return Refusal("refused", self._limit, f"{path[:80]}: {_REFUSED[head]}")
        if f"/v2/{head}" in self._operations and rest and head != "models":
            return Refusal("refused", self._limit, f"{path[:80]}: there are jobs of {', '.join(_JOBS)} only")
        return None

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """JSON for whatever is asked; 501 with `detail` for what no model here does."""
        if isinstance(operation, Refusal):
            return _reply({"detail": operation.why}, NOT_IMPLEMENTED)
        if isinstance(operation, NumberedJob):
            return await _answer_job(operation, request, plane)
        if operation.name in _SIMPLE:
            return _reply(_SIMPLE[operation.name](plane))
        call = ForecastCall(plane, request, self._limit)
        if operation.name == "parameters":
            return await self._describe(call, request)
        asked, name = decode_body(_decoder, request.body), operation.name.removesuffix("_job")
        _refuse_misspelt(request.body)
        try:
            found = await self._forecast(call, asked, name)
        except (NotDone, NoPaths) as refusal:
            return _reply({"detail": str(refusal)}, NOT_IMPLEMENTED)
        if operation.name not in _JOBS.values():
            return _reply(found)
        job = msgspec.json.encode({"status": "succeeded", "result": found})
        return _reply({"job_id": await plane.finished_jobs.keep(request.client, job)}, ACCEPTED)

    async def _forecast(self, call: ForecastCall, asked: NixtlaRequest, name: str) -> Mapping[str, Any]:
        """The answer to a call for series. Raises NotDone, NoPaths, Refused, ClientGone."""
        _require_done(asked, name)
        if name.endswith("anomalies") and len(asked.levels) != 1:
            raise Refused(Situation.BAD_REQUEST, "anomalies are outside of one interval: send one level", field="level")
        model = parse_model(self._choose_model(asked.model), "model")
        described = await call.describe_each(model, len(asked.series.sizes))
        recipe = described.recipe
        check_frequency(recipe, asked.freq, "freq")
        horizon = recipe.prediction_length if name == "anomalies" else asked.h
        no_time = SIMULATE if name == "simulate" else OLD_CLIENT
        backtest = name not in ("forecast", "simulate")
        plan = Plan(asked, described, horizon, backtest=backtest, no_time=no_time)
        plan.cut(CUTS[name](asked, plan.horizon, recipe.history_length))
        if name == "simulate":
            return await simulate_paths(call, asked, described, plan)
        found = await call.forecast(list(plan.list_instances()), plan.build_configuration())
        return ANSWERS[name](asked, plan, require_forecasts(found))

    async def _describe(self, call: ForecastCall, request: HttpRequest) -> HttpReply:
        """How many steps the client shall send, and how many it may ask."""
        query = parse_qs(request.query.decode("latin-1"), max_num_fields=20)
        named, frequency = query.get("model"), query.get("freq")
        if not named:
            raise Refused(Situation.NO_TARGET, "the query names no model: /model_params?model=au/NSW1.mar&freq=h")
        recipe = (await call.describe_each(parse_model(self._choose_model(named[0]), "model"))).recipe
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
        if why.situation is Situation.NOT_FOUND and not isinstance(why, NoJob):
            message += "; pass the model's name to the client, such as model='au/NSW1.mar'"
        headers: Headers = []
        if why.detail.retry_ms is not None:
            headers.append((b"retry-after", b"%d" % -(-why.detail.retry_ms // 1000)))
        return HttpReply(self._status[why.situation], JSON, msgspec.json.encode({"detail": message}), headers)


def _reply(body: Mapping[str, object], status: int = OK) -> HttpReply:
    return HttpReply(status, JSON, msgspec.json.encode(body))


async def _answer_job(operation: NumberedJob, request: HttpRequest, plane: InferencePlane) -> HttpReply:
    """The answer of a job, or that it is forgotten."""
    if operation.name == "cancel":
        if await plane.finished_jobs.drop(request.client, operation.number):
            return _reply({"job_id": operation.number, "status": "cancelled"})
    elif (answer := await plane.finished_jobs.read(request.client, operation.number)) is not None:
        return HttpReply(OK, JSON, answer)
    message = f"there is no job {operation.number[:40]!r}: they are kept for {KEEP_S:g} s, for who made them"
    raise NoJob(Situation.NOT_FOUND, message)


def _refuse_misspelt(body: bytes) -> None:
    """Raises Refused for a key that looks like one of the client's: others are let through, as they may be to come."""
    whole = cut_keys(body)
    refuse_misspelt(whole, (*NixtlaRequest.__struct_fields__, *IGNORED))
    refuse_misspelt(cut_keys(whole["series"]), (*Series.__struct_fields__, "categorical_exog"), "series.")


def _require_done(asked: NixtlaRequest, name: str) -> None:
    """Raises NotDone for what of a request is not done by any model here."""
    if asked.finetune_steps or asked.finetuned_model_id:
        raise NotDone("models are not trained by requests: leave out finetune_steps and finetuned_model_id")
    if asked.feature_contributions:
        raise NotDone("feature contributions are not computed: leave out feature_contributions")
    if asked.threshold_method == "multivariate":
        raise NotDone("anomalies are found in each series by itself: leave out threshold_method")
    if name == "online_anomalies" and asked.step_size not in (None, asked.h):
        raise NotDone(f"windows of the detection follow one another: leave out step_size, or set it to h ({asked.h})")
