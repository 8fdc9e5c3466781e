"""Many models in one call: `POST /v1/forecasts` (CONTRACTS 5), DeepAR instances that each name their model.

An item that fails carries its error and the others are answered. With `joint` the models are asked for marginals, and
the correlation that the call names turns these into everybody's samples.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import msgspec

from model_store.archives.json_faults import FAULTS, explain_fault
from model_store.names import InvalidModelName, parse_model_name
from server.contract import FORECASTS_END, FORECASTS_PATH, JSON, NPY
from server.errors import Refused, Situation
from server.front.call_items import Item, list_models
from server.front.columns.answered_table import read_runs, write_arrow
from server.front.columns.arrow_reader import ARROW
from server.front.columns.npy_writer import write_npy
from server.front.columns.table_calls import choose_answer, find_table, read_table_call, replace_numbers
from server.front.exchange import DialectOperation, HttpReply, HttpRequest, Limit, wrong_method
from server.front.fan_out import (
    FanOut,
    Joint,
    JointPrediction,
    MultiModelCall,
    Prediction,
    put_samples,
    require_all,
)
from server.front.inference import InferStats
from server.front.inference_plane import InferencePlane
from server.front.json_cutter import NotJson, cut_fields, cut_items
from server.front.marks import add_marks
from server.front.raw_json import MAX_ITEMS
from server.front.slices import AT_ONCE, ITEM, Pacer, Slices, join_few
from server.front.statuses import USUAL_STATUS
from server.routes.inference import FORECASTS
from server.settings import Settings

MAX_SHOWN = 100  #: characters of a key in a message
MAX_CONFIGURATION_BYTES = 256 * 1024  #: it goes to every model, and its fields become objects in a joint call
OK, TOO_MANY = 200, 429

#: The status of a call that fails as a whole, and the one that an item is counted with.
STATUS: Mapping[Situation, int] = {
    **USUAL_STATUS,
    Situation.NOT_FOUND: 400,
    Situation.NO_ROOM: 424,
    Situation.DEADLINE: 424,
}
#: When a client should come back, where nothing is estimated: what is short of room or of a worker is over within 1 s.
RETRY_AFTER = (Situation.STORE_FAILED, Situation.OVERLOADED, Situation.NOT_READY, Situation.WORKER_LOST)


class _Target(msgspec.Struct):
    target_model: str


class _Configuration(msgspec.Struct):
    """What concerns the call as a whole; the models check the rest."""

    joint: bool = False


class _JointConfiguration(msgspec.Struct):
    """What else does where scenarios are joint."""

    correlation: str | None = None
    output_types: tuple[str, ...] = ("samples",)


_TARGET = msgspec.json.Decoder(_Target)
_CONFIGURATION, _JOINT_CONFIGURATION = msgspec.json.Decoder(_Configuration), msgspec.json.Decoder(_JointConfiguration)
_NO_CONFIGURATION = msgspec.Raw(b"{}")
#: Of the configuration, what the models do not get when scenarios are joint, and what the correlation gets.
_NOT_FOR_MODELS, _DRAWN = ("joint", "correlation", "num_samples", "seed"), ("num_samples", "seed")


class Forecasts:
    """See the module."""

    name = "forecasts"
    routes = FORECASTS

    def __init__(self, settings: Settings) -> None:
        self._limit = Limit(int(settings.max_forecasts_bytes), "max_forecasts_bytes")
        self._item_limit = Limit(int(settings.max_body_bytes), "max_body_bytes")
        self._forecast = DialectOperation("forecast", self._limit)
        self._status = {**STATUS, Situation.OVERLOADED: int(settings.overload_status)}

    def match(self, method: str, path: str, query: bytes = b"") -> DialectOperation | None:
        """POST to `/v1/forecasts`."""
        del query
        if path != FORECASTS_PATH:
            return None
        if method != "POST":
            raise wrong_method(method)
        return self._forecast

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """All predictions in order, or a table of them; with `joint` as npy, their samples as one array."""
        del operation
        pacer = Pacer()
        wanted, sent = choose_answer(request.content_type, request.accept), find_table(request.content_type)
        if sent is not None:
            call = await pacer.run(read_table_call(request.body, self._item_limit, sent))
        else:
            call = await pacer.run(parse_call(request.body, self._item_limit))
        if wanted == NPY and call.joint is not None:
            wanted = None  # their samples are one array, and no table
        if wanted is not None:
            call = replace_numbers(call)
        origin = (request.arrived, request.id, request.client)
        with FanOut(plane, call, self._limit, request.deadline, request.client_gone, *origin) as fan_out:
            if wanted is not None:
                return await self._answer_table(call, fan_out, pacer, wanted)
            return await self._answer(call, fan_out, request, pacer)

    async def _answer(self, call: MultiModelCall, fan_out: FanOut, request: HttpRequest, pacer: Pacer) -> HttpReply:
        found = await fan_out.infer()
        counted, stats = self.statuses(found), summarise_items(found)
        if call.joint is not None and any(isinstance(each, Prediction) for each in found):
            accept = NPY if NPY in request.accept.lower() else JSON
            if accept == NPY:
                require_all(found)
            scenarios = await fan_out.draw(call.joint, found, accept)
            if accept == NPY:
                return HttpReply(OK, NPY, scenarios, stats=stats, counted=counted)
            body = await pacer.run(build_answer(await pacer.run(put_samples(found, scenarios))))
        else:
            body = await pacer.run(build_answer(found))
        return HttpReply(OK, JSON, body, stats=stats, counted=counted)

    async def _answer_table(self, call: MultiModelCall, fan_out: FanOut, pacer: Pacer, wanted: str) -> HttpReply:
        """One table of all answers; an item that failed has a row with its error."""
        found = await fan_out.infer()
        runs = await pacer.run(read_runs(list_models(call.items), found))
        body = await pacer.run((write_arrow if wanted == ARROW else write_npy)(runs, self._limit))
        return HttpReply(OK, wanted, body, stats=summarise_items(found), counted=self.statuses(found))

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """The call's error, as an item's is."""
        del request
        retry_ms = why.detail.retry_ms or (1000 if why.situation in RETRY_AFTER else 0)
        headers = [(b"retry-after", b"%d" % -(-retry_ms // 1000))] if retry_ms else []
        return HttpReply(self._status[why.situation], JSON, build_error(why), headers)

    def statuses(self, found: Iterable[Prediction | Refused]) -> list[int]:
        """For each item the status that the metrics count."""
        return [self._status[each.situation] if isinstance(each, Refused) else OK for each in found]


def parse_call(body: bytes, item_limit: Limit) -> Slices[MultiModelCall]:
    """The call. Raises Refused for a body that is none, with the place."""
    try:
        fields = yield from cut_fields(body)
        configuration = fields.get("configuration", _NO_CONFIGURATION)
        wanted = _parse_configuration(configuration)
        drawing = {} if wanted is None else (yield from cut_fields(configuration))
        requests = yield from _cut_requests(fields)
        _refuse_other_keys(fields)
    except NotJson as error:
        raise Refused(Situation.BAD_REQUEST, f"not a call for forecasts: {error}") from None
    items, at_once = list[Item | Refused](), min(AT_ONCE, item_limit.bytes)
    for raw in requests:
        size = len(memoryview(raw))
        if size <= at_once:
            items.append(_read_item(raw, raw))
            yield ITEM + size
        else:
            item = yield from _parse_large_item(raw, item_limit)
            items.append(item)
            yield ITEM
    if wanted is None:
        return MultiModelCall(items, bytes(configuration), None, len(body))
    kinds = [kind for kind in wanted.output_types if kind not in ("samples", "marginal")]
    kept = {name: value for name, value in drawing.items() if name not in _NOT_FOR_MODELS}
    for_models = msgspec.json.encode({**kept, "output_types": [*kinds, "marginal"]})
    return MultiModelCall(items, for_models, _parse_joint(wanted, drawing), len(body))


def _parse_configuration(configuration: msgspec.Raw) -> _JointConfiguration | None:
    """What the front needs of it; None where scenarios are not joint. Raises Refused."""
    size = len(memoryview(configuration))
    if size > MAX_CONFIGURATION_BYTES:
        message = f"the configuration has {size} bytes, {MAX_CONFIGURATION_BYTES} are the most"
        raise Refused(Situation.TOO_LARGE, message, field="configuration")
    try:
        joint = _CONFIGURATION.decode(configuration).joint
        return _JOINT_CONFIGURATION.decode(configuration) if joint else None
    except FAULTS as error:
        fault = explain_fault(error)
        place = ".".join(filter(None, ("configuration", fault.place)))
        raise Refused(Situation.BAD_REQUEST, fault.message, field=place) from None


def _refuse_other_keys(fields: Mapping[str, msgspec.Raw]) -> None:
    """Raises Refused for keys that a call does not have: a misspelt `configuration` must not be left out in silence."""
    other = next((key for key in fields if key not in ("requests", "configuration")), None)
    if other is not None:
        message = "there is no such key; there are requests, configuration"
        raise Refused(Situation.BAD_REQUEST, message, field=other[:MAX_SHOWN])


def _cut_requests(fields: Mapping[str, msgspec.Raw]) -> Slices[list[msgspec.Raw]]:
    """The items. Raises Refused for none or too many, NotJson."""
    if "requests" not in fields:
        raise Refused(Situation.BAD_REQUEST, 'it is missing: a call is {"requests": [...]}', field="requests")
    try:
        requests = yield from cut_items(fields["requests"], MAX_ITEMS)
    except NotJson as error:
        raise Refused(Situation.BAD_REQUEST, str(error), field="requests") from None
    if not 1 <= len(requests) <= MAX_ITEMS:
        message = f"a call has 1 to {MAX_ITEMS} requests, not {'more' if requests else 0}"
        raise Refused(Situation.BAD_REQUEST, message, field="requests")
    return requests


def _parse_joint(wanted: _JointConfiguration, fields: Mapping[str, msgspec.Raw]) -> Joint:
    if "samples" not in wanted.output_types:
        message = "joint scenarios are samples: have `samples` among output_types, or leave output_types out"
        raise Refused(Situation.BAD_REQUEST, message, field="configuration.output_types")
    if wanted.correlation is None:
        message = "name the archive that knows how the models move together, e.g. au/joint.mar"
        raise Refused(Situation.BAD_REQUEST, message, field="configuration.correlation")
    try:
        name = parse_model_name(wanted.correlation)
    except InvalidModelName as error:
        raise Refused(Situation.BAD_NAME, str(error), field="configuration.correlation") from None
    return Joint(name, {field: fields[field] for field in _DRAWN if field in fields})


def _parse_large_item(raw: msgspec.Raw, limit: Limit) -> Slices[Item | Refused]:
    """An item, or why it is refused alone. Only the borders of its fields are looked for."""
    size = len(memoryview(raw))
    if size > limit.bytes:
        message = f"the request has {size} bytes, the limit of a request to one model is {limit.bytes}"
        return Refused(Situation.TOO_LARGE, f"{message} ({limit.setting})")
    try:
        fields = yield from cut_fields(raw)
    except NotJson as error:
        return Refused(Situation.BAD_REQUEST, f"the request names no model: {error}", field="target_model")
    head = msgspec.json.encode({name: fields[name] for name in fields if name == "target_model"})
    return _read_item(raw, msgspec.Raw(head))


def _read_item(raw: msgspec.Raw, head: msgspec.Raw) -> Item | Refused:
    """An item of which `head` has the name of its model, or why it is refused alone."""
    try:
        return Item(parse_model_name(_TARGET.decode(head).target_model), raw, len(memoryview(raw)))
    except InvalidModelName as error:
        return Refused(Situation.BAD_NAME, str(error), field="target_model")
    except FAULTS as error:
        message = f"the request names no model: {explain_fault(error).message}"
        return Refused(Situation.BAD_REQUEST, message, field="target_model")


def build_answer(found: Sequence[Prediction | JointPrediction | Refused]) -> Slices[bytes]:
    """The whole answer."""
    failed = sum(isinstance(each, Refused) for each in found)
    return (yield from join_few(list(_write_answer(found, failed))))


def _write_answer(found: Sequence[Prediction | JointPrediction | Refused], failed: int) -> Iterator[bytes | memoryview]:
    yield b'{"predictions":['
    for i, each in enumerate(found):
        if i:
            yield b","
        if isinstance(each, Refused):
            yield build_error(each)
        elif isinstance(each, JointPrediction):
            yield from each.parts
        else:
            yield cast("bytes", each.body)
    yield FORECASTS_END % failed


def build_error(refused: Refused) -> bytes:
    """An item's error or the call's: what was wrong, and where."""
    detail = refused.detail
    error: dict[str, object] = {"code": refused.situation.name.lower(), "message": detail.say("requests")}
    if detail.instance is not None:
        error["instance"] = detail.instance
    if detail.field is not None:
        error["field"] = detail.field
    if detail.retry_ms is not None:
        error["retry_after_ms"] = detail.retry_ms
    return msgspec.json.encode({"error": error})


def summarise_items(found: Iterable[Prediction | Refused]) -> InferStats:
    """For the headers: how many the cache had, and the longest times."""
    told = [each.stats for each in found if isinstance(each, Prediction)]
    counts, by_id = Counter(map(id, told)), dict(zip(map(id, told), told, strict=True))  # many items share one
    stats, cache, marks = list(by_id.values()), Counter[str](), list[InferStats]()
    for ident, each in by_id.items():
        if each.cache:
            cache[each.cache] += counts[ident]
        if each.quality or each.warnings:
            marks += [each] * counts[ident]
    return InferStats(
        ", ".join(f"{name}={count}" for name, count in cache.items()),
        max((each.queue_us for each in stats), default=0),
        max((each.load_us or 0 for each in stats), default=0),
        max((each.inference_us for each in stats), default=0),
        quality=add_marks(each.quality for each in marks),
        warnings=add_marks(each.warnings for each in marks),
    )
