"""KServe's time-series protocol (CONTRACTS 8): `POST /v1/timeseries/forecast`, as its documentation shows it.

A call is decoded in the front under a bound of values; each input becomes a DeepAR instance of one model. An input that
fails has its error in its output's place, and the others are answered.
"""

import math
import re
import time
import uuid
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from model_store.names import ModelName
from server.contract import JSON
from server.errors import Refused, Situation
from server.front.exchange import DialectOperation, Headers, HttpReply, HttpRequest, Limit
from server.front.fan_out import Joint
from server.front.forecasting.bodies import decode_body, require_few
from server.front.forecasting.calls import Asked, Forecast, ForecastCall, list_known, parse_model
from server.front.forecasting.misspelt_keys import cut_keys, refuse_misspelt
from server.front.forecasting.recipes import NO_CLOCK, Recipe, check_frequency, check_horizon
from server.front.inference_plane import InferencePlane
from server.front.raw_json import MAX_ITEMS
from server.front.statuses import USUAL_STATUS
from server.routes.inference import KSERVE
from server.settings import Settings

PATH, MODELS_PATH = "/v1/timeseries/forecast", "/v1/timeseries/models"
NO_BODY = 64 * 1024  #: most bytes of a body that is not read
OK, UNPROCESSABLE = 200, 422
SINGLE, SEVERAL = "univariate_time_series", "multivariate_time_series"

STATUS = USUAL_STATUS
Number = float | str | None  #: null and "NaN" are missing; other text must be a number's


class Input(msgspec.Struct):
    """One series, or one of each product, time first. From `dynamic_feat` on the fields are ours."""

    type: str
    name: str
    series: list[Number | list[Number]]
    frequency: str
    start_timestamp: str | None = None
    dynamic_feat: list[list[float]] | None = None
    cat: list[int] | None = None
    target_model: str | None = None


class Options(msgspec.Struct):
    """What is asked of every input. From `num_samples` on the fields are ours."""

    horizon: int
    quantiles: list[float] | None = None
    num_samples: int | None = None
    seed: int | None = None
    joint: bool = False
    correlation: str = ""


class Call(msgspec.Struct):
    """The body. Unknown fields are let through everywhere, unless they look like one of these."""

    inputs: Annotated[list[Input], Meta(max_length=MAX_ITEMS)]
    options: Options
    model: str = ""


class Malformed(Refused):
    """The body breaks the schema: 422, with `detail` as well."""


_decoder = msgspec.json.Decoder(Call)
_cut_inputs = msgspec.json.Decoder(list[dict[str, msgspec.Raw]]).decode
_FRACTION = re.compile(r"\.\d+")  # of a second


class KServeTimeSeries:
    """See the module."""

    name = "kserve"
    routes = KSERVE

    def __init__(self, settings: Settings) -> None:
        self._limit = Limit(int(settings.max_body_bytes), "max_body_bytes")
        self._forecast = DialectOperation("forecast", self._limit)
        self._models = DialectOperation("models", Limit(NO_BODY, "what this path allows"))
        self._status = {**STATUS, Situation.OVERLOADED: int(settings.overload_status)}

    def match(self, method: str, path: str, query: bytes = b"") -> DialectOperation | None:
        """A forecast by POST, the list of models by GET."""
        del query
        if path not in (PATH, MODELS_PATH):
            return None
        operation, expected = (self._forecast, "POST") if path == PATH else (self._models, "GET")
        if method != expected:
            raise Refused(Situation.BAD_METHOD, f"{path} is asked by {expected}, not {method}")
        return operation

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """One output for each input, in order; the status is 200 where one of them is a forecast, or none was asked."""
        if operation is self._models:
            return HttpReply(OK, JSON, msgspec.json.encode(list_known(plane)))
        asked = _read_call(request.body)
        plans, found = await self._forecast_inputs(asked, ForecastCall(plane, request, self._limit))
        refusals = [each for each in found if isinstance(each, Refused)]
        if refusals and len(refusals) == len(found):
            raise refusals[0]
        horizon, each_input = asked.options.horizon, zip(asked.inputs, plans, found, strict=True)
        outputs = [self._write_output(one, plan, each, horizon) for one, plan, each in each_input]
        body = {
            "id": request.id.decode("latin-1"),
            "created_at": int(time.time()),
            "status": "partial" if refusals else "completed",
            "error": None,
            "model": asked.model,
            "outputs": outputs,
            "usage": None,
        }
        counted = [self._status[each.situation] if isinstance(each, Refused) else OK for each in found]
        return HttpReply(OK, JSON, msgspec.json.encode(body), counted=counted or None)

    async def _forecast_inputs(
        self, asked: Call, call: ForecastCall
    ) -> tuple[list[Recipe | None], list[Forecast | Refused]]:
        """For each input its model's recipe, and its forecast or why there is none."""
        models = [_choose_model(asked, i) for i in range(len(asked.inputs))]
        recipes = await call.describe_all([model for model in models if not isinstance(model, Refused)])
        found: list[Forecast | Refused | None] = []
        instances, plans = list[Asked](), list[Recipe | None]()
        for i, (one, model) in enumerate(zip(asked.inputs, models, strict=True)):
            recipe = model if isinstance(model, Refused) else recipes[model]
            plans.append(None if isinstance(recipe, Refused) else recipe)
            try:
                if isinstance(model, Refused) or isinstance(recipe, Refused):
                    raise recipe if isinstance(recipe, Refused) else Refused(Situation.INTERNAL, "no recipe")
                instances.append(Asked(model, _build_instance(one, asked.options, recipe)))
                found.append(None)
            except Refused as why:
                found.append(_place(why, i))
        size = sum(0 if plan is None else len(plan.products) for plan in plans) * asked.options.horizon
        require_few(size * (1 + len(asked.options.quantiles or ()) + (asked.options.num_samples or 0)), "the answer")
        wanted, joint = _build_configuration(asked.options), _build_joint(asked.options)
        made = iter(await call.forecast(instances, wanted, joint) if instances else [])
        done: list[Forecast | Refused] = []
        for i, each in enumerate(found):
            answer = next(made) if each is None else each
            done.append(_place(answer, i) if isinstance(answer, Refused) and each is None else answer)
        return plans, done

    def _write_output(
        self, one: Input, recipe: Recipe | None, found: Forecast | Refused, horizon: int
    ) -> dict[str, Any]:
        """An output of one series, or why there is none."""
        output: dict[str, Any] = {"type": "time_series_forecast", "id": uuid.uuid4().hex}
        if isinstance(found, Refused) or recipe is None:
            error = self._build_error(found) if isinstance(found, Refused) else None
            return {**output, "status": "error", "content": [], "error": error}
        several = len(recipe.products) > 1
        content: dict[str, Any] = {
            "type": one.type,
            "name": one.name,
            "mean_forecast": _turn(found.mean, horizon, one, several=several),
            "frequency": one.frequency,
            "start_timestamp": _write_start(one.start_timestamp, found.start),
            "quantiles": {level: _turn(each, horizon, one, several=several) for level, each in found.quantiles.items()}
            or None,
        }
        if found.samples is not None:
            content["samples"] = [_turn(each, horizon, one, several=several) for each in found.samples]
        return {**output, "status": "completed", "content": [content], "error": None}

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """The documented error object; with `detail` where the body breaks the schema."""
        del request
        status = UNPROCESSABLE if isinstance(why, Malformed) else self._status[why.situation]
        error = self._build_error(why)
        body: dict[str, Any] = {"error": error}
        if isinstance(why, Malformed):
            place = ["body", *re.findall(r"[^.\[\]]+", why.detail.field or "")]
            body["detail"] = [{"type": "value_error", "loc": place, "msg": why.detail.message, "input": None}]
        headers: Headers = []
        if why.detail.retry_ms is not None:
            headers.append((b"retry-after", b"%d" % -(-why.detail.retry_ms // 1000)))
        return HttpReply(status, JSON, msgspec.json.encode(body), headers)

    def _build_error(self, why: Refused) -> dict[str, Any]:
        """KServe takes the status from `code`, which is text."""
        status = UNPROCESSABLE if isinstance(why, Malformed) else self._status[why.situation]
        detail = why.detail
        message = f"{detail.field}: {detail.message}" if detail.field else detail.message
        return {"code": str(status), "message": message, "param": detail.field, "type": why.situation.name.lower()}


def _read_call(body: bytes) -> Call:
    """The call. Raises Malformed for what the schema refuses."""
    try:
        asked = decode_body(_decoder, body)
    except Refused as why:
        if why.situation is not Situation.BAD_REQUEST:
            raise
        raise Malformed(why.situation, why.detail.message, None, why.detail.field) from None
    _refuse_misspelt(body)
    options = asked.options
    if options.horizon < 1:
        message = f"at least 1 step is forecast, not {options.horizon}"
        raise Malformed(Situation.BAD_REQUEST, message, None, "options.horizon")
    if any(not 0 < each < 1 for each in options.quantiles or ()):
        raise Malformed(Situation.BAD_REQUEST, "quantiles are between 0 and 1", None, "options.quantiles")
    if options.joint and not (options.num_samples and options.correlation):
        message = "joint scenarios are samples: send num_samples, and correlation, the archive that correlates them"
        raise Refused(Situation.BAD_REQUEST, message, field="options.joint")
    return asked


def _refuse_misspelt(body: bytes) -> None:
    """Raises Malformed for a key that looks like one of the protocol's: others are let through, as KServe does."""
    whole = cut_keys(body)
    try:
        refuse_misspelt(whole, (*Call.__struct_fields__, "metadata"))
        refuse_misspelt(cut_keys(whole["options"]), Options.__struct_fields__, "options.")
        for i, one in enumerate(_cut_inputs(whole["inputs"])):
            refuse_misspelt(one, (*Input.__struct_fields__, "metadata"), f"inputs[{i}].")
    except Refused as why:
        raise Malformed(why.situation, why.detail.message, None, why.detail.field) from None


def _choose_model(asked: Call, i: int) -> ModelName | Refused:
    """The model of an input. Raises Malformed where none is named."""
    name = asked.inputs[i].target_model or asked.model
    if not name:
        raise Malformed(Situation.BAD_REQUEST, "model is missing", None, "model")
    try:
        return parse_model(name, "target_model" if asked.inputs[i].target_model else "model")
    except Refused as why:
        return why


def _build_instance(one: Input, options: Options, recipe: Recipe) -> dict[str, Any]:
    """The instance of an input. Raises Refused that names the field within it."""
    if one.type not in (SINGLE, SEVERAL):
        message = f"{one.type[:80]!r} is neither {SINGLE} nor {SEVERAL}"
        raise Refused(Situation.BAD_REQUEST, message, field="type")
    check_frequency(recipe, one.frequency, "frequency")
    check_horizon(recipe, options.horizon, "options.horizon")
    if one.start_timestamp is None and recipe.needs_start:
        message = "the model forecasts by the clock, so it needs the time of the series' first value"
        raise Refused(Situation.BAD_REQUEST, message, field="start_timestamp")
    start = NO_CLOCK if one.start_timestamp is None else _FRACTION.sub("", one.start_timestamp)
    instance: dict[str, Any] = {"start": start, "target": _read_series(one, len(recipe.products))}
    if one.dynamic_feat is not None:
        instance["dynamic_feat"] = one.dynamic_feat
    if one.cat is not None:
        instance["cat"] = one.cat
    return instance


def _read_series(one: Input, products: int) -> list[Any]:
    """The target: [T] of one product, [D][T] of several. Raises Refused."""
    if one.type == SINGLE:
        if products > 1:
            message = f"the model forecasts {products} series together: send {SEVERAL}, [T][{products}]"
            raise Refused(Situation.BAD_REQUEST, message, field="type")
        return [_read_number(each, i) for i, each in enumerate(one.series)]
    rows = [each if isinstance(each, list) else [] for each in one.series]
    if any(len(row) != products for row in rows):
        message = f"a series of {SEVERAL} is [T][{products}] for this model, time first"
        raise Refused(Situation.BAD_REQUEST, message, field="series")
    columns = [[_read_number(row[product], i) for i, row in enumerate(rows)] for product in range(products)]
    return columns if products > 1 else columns[0]


def _read_number(value: Number | list[Number], i: int) -> float | None:
    """A number, also as text; null and NaN are missing. Raises Refused."""
    if value is None or isinstance(value, float):
        return value
    try:
        if isinstance(value, str) and len(value) <= 40 and math.isfinite(number := float(value)):  # noqa: PLR2004
            return number
        if isinstance(value, str) and value.lower() == "nan":
            return None
    except ValueError:
        pass
    raise Refused(Situation.BAD_REQUEST, f'expected a number, null or "NaN", not {value!r:.60}', field=f"series[{i}]")


def _build_configuration(options: Options) -> dict[str, Any]:
    kinds = ["mean", *(["quantiles"] if options.quantiles else []), *(["samples"] if options.num_samples else [])]
    wanted: dict[str, Any] = {"output_types": kinds}
    if options.quantiles:
        wanted["quantiles"] = [str(each) for each in dict.fromkeys(options.quantiles)]
    if options.joint:  # the models give marginals, of which the correlation draws the samples
        return {**wanted, "output_types": [*(each for each in kinds if each != "samples"), "marginal"]}
    return wanted | _list_drawn(options)


def _list_drawn(options: Options) -> dict[str, int]:
    """How samples are drawn, as far as it is said."""
    drawn = {"num_samples": options.num_samples, "seed": options.seed}
    return {name: value for name, value in drawn.items() if value is not None}


def _build_joint(options: Options) -> Joint | None:
    """How the scenarios of a call are joint; None where they are not. Raises Refused for a name that is none."""
    if not options.joint:
        return None
    drawn = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in _list_drawn(options).items()}
    return Joint(parse_model(options.correlation, "options.correlation"), drawn)


def _place(why: Refused, i: int) -> Refused:
    """The refusal with its place among the inputs."""
    field = (why.detail.field or "").removeprefix("instances[0].").replace("target", "series")
    if field == "start":
        field = "start_timestamp"
    place = field if field.startswith(("options", "model")) else f"inputs[{i}].{field}" if field else f"inputs[{i}]"
    return Refused(why.situation, why.detail.message, None, place, why.detail.retry_ms, why.detail.status)


def _turn(numbers: list[Any] | None, horizon: int, one: Input, *, several: bool) -> list[Any]:
    """The first steps, time first."""
    if numbers is None:
        raise Refused(Situation.MODEL_FAILED, "the model's answer lacks numbers that were asked")
    if several:
        return [list(step) for step in zip(*(row[:horizon] for row in numbers), strict=True)]
    return [[each] for each in numbers[:horizon]] if one.type == SEVERAL else numbers[:horizon]


def _write_start(asked: str | None, found: str | None) -> str:
    """The time of the first forecast step, in the zone and form of the one that was sent."""
    first = datetime.fromisoformat(found or NO_CLOCK)
    if asked is None:
        return first.replace(tzinfo=UTC).isoformat().replace("+00:00", "Z")
    sent = datetime.fromisoformat(asked)
    if sent.tzinfo is not None and first.tzinfo is not None:
        first = first.astimezone(sent.tzinfo)
    text = first.isoformat()
    return text.replace("+00:00", "Z") if asked.endswith("Z") else text
