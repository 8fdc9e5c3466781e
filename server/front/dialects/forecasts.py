"""Many models in one call: `POST /v1/forecasts` (CONTRACTS 5), DeepAR instances that each name their model.

An item that fails carries its error and the others are answered. With `joint` the models are asked for marginals, and
the correlation that the call names turns these into everybody's samples.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import msgspec

from model_store.names import InvalidModelName, parse_model_name
from server.contract import FORECASTS_END, FORECASTS_PATH, JSON, NPY
from server.errors import Refused, Situation
from server.front.dataplane import DataPlane, InferStats
from server.front.exchange import DialectOperation, HttpReply, HttpRequest, Limit, wrong_method
from server.front.fan_out import FanOut, Item, Joint, MultiModelCall, Prediction, put_samples, require_all
from server.front.raw_json import split_fields
from server.settings import Settings

MAX_ITEMS = 10_000
MAX_CONFIGURATION_BYTES = 256 * 1024  #: its fields become objects in a joint call, some hundred bytes each
OK, TOO_MANY = 200, 429

#: The status of a call that fails as a whole, and the one that an item is counted with.
STATUS: Mapping[Situation, int] = {
    Situation.BAD_NAME: 400,
    Situation.NO_TARGET: 400,
    Situation.BAD_REQUEST: 400,
    Situation.TOO_LARGE: 413,
    Situation.NOT_FOUND: 400,
    Situation.MODEL_FAILED: 424,
    Situation.ARCHIVE_FAILED: 424,
    Situation.STORE_FAILED: 503,
    Situation.NO_ROOM: 424,
    Situation.OVERLOADED: 503,
    Situation.NOT_READY: 503,
    Situation.WORKER_LOST: 503,
    Situation.DEADLINE: 424,
    Situation.INTERNAL: 500,
    Situation.NO_ROUTE: 404,
    Situation.BAD_METHOD: 405,
    Situation.SLOW_CLIENT: 408,
    Situation.BAD_SIGNATURE: 403,
    Situation.UNSUPPORTED_CODING: 415,
    Situation.UNAUTHORIZED: 401,
    Situation.FORBIDDEN: 403,
}
#: When a client should come back: all that is short of room or of a worker is over within a second.
RETRY_AFTER = (Situation.STORE_FAILED, Situation.OVERLOADED, Situation.NOT_READY, Situation.WORKER_LOST)


#: The items, as a record of so many optional fields: msgspec refuses an array with one more at that place. A list would
#: be built before its length is checked, and 64 MiB of `[1,1,1]` would become gigabytes of objects.
_Items: Any = msgspec.defstruct(
    "_Items",
    [(f"item{i}", msgspec.Raw, msgspec.Raw()) for i in range(MAX_ITEMS)],
    array_like=True,
    forbid_unknown_fields=True,
)
_TOO_MANY_ITEMS = "Expected `array` of at most length"  #: how msgspec begins to say so


class _Body(msgspec.Struct):
    requests: _Items
    configuration: msgspec.Raw = msgspec.Raw(b"{}")


class _Target(msgspec.Struct):
    target_model: str


class _Configuration(msgspec.Struct):
    """What concerns the call as a whole; the models check the rest."""

    joint: bool = False


class _JointConfiguration(msgspec.Struct):
    """What else does where scenarios are joint."""

    correlation: str | None = None
    output_types: tuple[str, ...] = ("samples",)


_BODY, _TARGET = msgspec.json.Decoder(_Body), msgspec.json.Decoder(_Target)
_CONFIGURATION, _JOINT_CONFIGURATION = msgspec.json.Decoder(_Configuration), msgspec.json.Decoder(_JointConfiguration)
#: Of the configuration, what the models do not get when scenarios are joint, and what the correlation gets.
_NOT_FOR_MODELS, _DRAWN = ("joint", "correlation", "num_samples", "seed"), ("num_samples", "seed")


class Forecasts:
    """See the module."""

    name = "forecasts"
    paths = f"{FORECASTS_PATH} (many models in one call)"

    def __init__(self, settings: Settings) -> None:
        self._limit = Limit(int(settings.max_forecasts_bytes), "max_forecasts_bytes")
        self._forecast = DialectOperation("forecast", self._limit)
        self._status = {**STATUS, Situation.OVERLOADED: int(settings.overload_status)}

    def match(self, method: str, path: str) -> DialectOperation | None:
        """POST to `/v1/forecasts`."""
        if path != FORECASTS_PATH:
            return None
        if method != "POST":
            raise wrong_method(method)
        return self._forecast

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: DataPlane) -> HttpReply:
        """All predictions in order; with `joint` and `Accept: application/x-npy`, their samples as one array."""
        del operation
        call = parse_call(request.body)
        with FanOut(plane, call, self._limit, request.deadline, request.client_gone) as fan_out:
            return await self._answer(call, fan_out, request)

    async def _answer(self, call: MultiModelCall, fan_out: FanOut, request: HttpRequest) -> HttpReply:
        found = await fan_out.infer()
        counted, stats = self.statuses(found), summarise_items(found)
        if call.joint is not None and any(isinstance(each, Prediction) for each in found):
            accept = NPY if NPY in request.accept.lower() else JSON
            if accept == NPY:
                require_all(found)
            scenarios = await fan_out.draw(call.joint, found, accept)
            if accept == NPY:
                return HttpReply(OK, NPY, scenarios, stats=stats, counted=counted)
            found = put_samples(found, scenarios)
        return HttpReply(OK, JSON, build_answer(found), stats=stats, counted=counted)

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """The call's error, as an item's is."""
        del request
        headers = [(b"retry-after", b"1")] if why.situation in RETRY_AFTER else []
        return HttpReply(self._status[why.situation], JSON, build_error(why), headers)

    def statuses(self, found: Iterable[Prediction | Refused]) -> list[int]:
        """For each item the status that the metrics count."""
        return [self._status[each.situation] if isinstance(each, Refused) else OK for each in found]


def parse_call(body: bytes) -> MultiModelCall:
    """The call. Raises Refused for a body that is none, with the place."""
    try:
        call = _BODY.decode(body)
        joint = _CONFIGURATION.decode(call.configuration).joint
        size = len(memoryview(call.configuration))
        if joint and size > MAX_CONFIGURATION_BYTES:
            message = f"the configuration has {size} bytes, more than {MAX_CONFIGURATION_BYTES} of a joint call"
            raise Refused(Situation.TOO_LARGE, message, field="configuration")
        wanted = _JOINT_CONFIGURATION.decode(call.configuration) if joint else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        if str(error).startswith(_TOO_MANY_ITEMS):
            raise _wrong_count("more") from None
        raise Refused(Situation.BAD_REQUEST, f"not a call for forecasts: {error}") from None
    requests = takewhile(memoryview, msgspec.structs.astuple(call.requests))  # those that were not sent are empty
    items = [_parse_item(raw) for raw in requests]
    if not items:
        raise _wrong_count("0")
    if wanted is None:
        return MultiModelCall(items, bytes(call.configuration), None, len(body))
    fields = split_fields(call.configuration)
    kinds = [kind for kind in wanted.output_types if kind not in ("samples", "marginal")]
    kept = {name: value for name, value in fields.items() if name not in _NOT_FOR_MODELS}
    configuration = msgspec.json.encode({**kept, "output_types": [*kinds, "marginal"]})
    return MultiModelCall(items, configuration, _parse_joint(wanted, fields), len(body))


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


def _wrong_count(found: str) -> Refused:
    return Refused(Situation.BAD_REQUEST, f"a call has 1 to {MAX_ITEMS} requests, not {found}", field="requests")


def _parse_item(raw: msgspec.Raw) -> Item | Refused:
    try:
        return Item(parse_model_name(_TARGET.decode(raw).target_model), raw)
    except InvalidModelName as error:
        return Refused(Situation.BAD_NAME, str(error), field="target_model")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return Refused(Situation.BAD_REQUEST, f"the request names no model: {error}", field="target_model")


def build_answer(found: Sequence[Prediction | Refused]) -> bytes:
    """The whole answer."""
    parts = [build_error(each) if isinstance(each, Refused) else each.body for each in found]
    failed = sum(isinstance(each, Refused) for each in found)
    return b'{"predictions":[' + b",".join(parts) + FORECASTS_END % failed


def build_error(refused: Refused) -> bytes:
    """An item's error or the call's: what was wrong, and where."""
    detail = refused.detail
    error: dict[str, object] = {"code": refused.situation.name.lower(), "message": detail.message}
    if detail.instance is not None:
        error["instance"] = detail.instance
    if detail.field is not None:
        error["field"] = detail.field
    return msgspec.json.encode({"error": error})


def summarise_items(found: Iterable[Prediction | Refused]) -> InferStats:
    """For the headers: how many the cache had, and the longest times."""
    stats = [each.stats for each in found if isinstance(each, Prediction)]
    cache = Counter(each.cache for each in stats if each.cache)
    return InferStats(
        ", ".join(f"{name}={count}" for name, count in cache.items()),
        max((each.queue_us for each in stats), default=0),
        max((each.load_us or 0 for each in stats), default=0),
        max((each.inference_us for each in stats), default=0),
    )
