"""Many models in one call (`POST /v1/forecasts`, CONTRACTS 5): its body sliced, the answers spliced. Pure.

Neither re-encodes a number: an item's bytes become the one instance of a request to its model, and the prediction in
that model's answer is put into the common answer as it is. With `joint` the items are asked for marginals, and one
more request takes these to the correlation that the call names, which answers with everybody's samples.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from model_store.names import InvalidModelName, ModelName, parse_model_name
from server.errors import SAGEMAKER, Refused, Situation
from server.ipc import frames as wire

MAX_ITEMS = 10_000
HTTP_OK = 200
_CACHE = {wire.CacheResult.HIT: "hit", wire.CacheResult.MISS: "miss", wire.CacheResult.COALESCED: "coalesced"}


class _Body(msgspec.Struct):
    requests: list[msgspec.Raw]
    configuration: msgspec.Raw = msgspec.Raw(b"{}")


class _Target(msgspec.Struct):
    target_model: str


class _Configuration(msgspec.Struct):
    """What concerns the call as a whole; the models check the rest."""

    joint: bool = False


class _Jointly(msgspec.Struct):
    """What else does where scenarios are joint."""

    correlation: str | None = None
    output_types: tuple[str, ...] = ("samples",)


class _Answer(msgspec.Struct):
    predictions: list[msgspec.Raw]


class _Samples(msgspec.Struct):
    samples: list[msgspec.Raw]


_BODY, _TARGET = msgspec.json.Decoder(_Body), msgspec.json.Decoder(_Target)
_CONFIGURATION, _ANSWER = msgspec.json.Decoder(_Configuration), msgspec.json.Decoder(_Answer)
_JOINTLY = msgspec.json.Decoder(_Jointly)
_SAMPLES, _FIELDS = msgspec.json.Decoder(_Samples), msgspec.json.Decoder(dict[str, msgspec.Raw])
#: Of the configuration, what the models do not hear when scenarios are joint, and what the correlation hears.
_JOINT, _DRAWN = ("joint", "correlation", "num_samples", "seed"), ("num_samples", "seed")


@dataclass(frozen=True, slots=True)
class Item:
    """One forecast of the call: whom to ask, and the whole request."""

    model: ModelName
    body: bytes


@dataclass(frozen=True, slots=True)
class Joint:
    """The common part of a call for joint scenarios: which archive correlates them, and how they are drawn."""

    correlation: ModelName
    drawn: Mapping[str, msgspec.Raw]


@dataclass(frozen=True, slots=True)
class Sliced:
    """A call's items in order; one that names no model is refused alone."""

    items: Sequence[Item | Refused]
    joint: Joint | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """What came of an item: the prediction's JSON, and what the worker says of it."""

    body: bytes
    response: wire.Response


def sliced(body: bytes) -> Sliced:
    """The call. Raises Refused for a body that is none, with the place."""
    try:
        call = _BODY.decode(body)
        jointly = _JOINTLY.decode(call.configuration) if _CONFIGURATION.decode(call.configuration).joint else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(Situation.BAD_REQUEST, f"not a call for forecasts: {error}") from None
    if not 1 <= len(call.requests) <= MAX_ITEMS:
        message = f"a call has 1 to {MAX_ITEMS} requests, not {len(call.requests)}"
        raise Refused(Situation.BAD_REQUEST, message, field="requests")
    joint, asked = None, bytes(call.configuration)
    if jointly is not None:
        fields = _FIELDS.decode(call.configuration)
        joint = _joint(jointly, fields)
        kinds = [kind for kind in jointly.output_types if kind not in ("samples", "marginal")]
        kept = {name: value for name, value in fields.items() if name not in _JOINT}
        asked = msgspec.json.encode({**kept, "output_types": [*kinds, "marginal"]})
    tail = b'],"configuration":' + asked + b"}"
    return Sliced([_item(raw, tail) for raw in call.requests], joint)


def _joint(asked: _Jointly, fields: Mapping[str, msgspec.Raw]) -> Joint:
    if "samples" not in asked.output_types:
        message = "joint scenarios are samples: have `samples` among output_types, or leave output_types out"
        raise Refused(Situation.BAD_REQUEST, message, field="configuration.output_types")
    if asked.correlation is None:
        message = "name the archive that knows how the models move together, e.g. au/joint.mar"
        raise Refused(Situation.BAD_REQUEST, message, field="configuration.correlation")
    try:
        name = parse_model_name(asked.correlation)
    except InvalidModelName as error:
        raise Refused(Situation.BAD_NAME, str(error), field="configuration.correlation") from None
    return Joint(name, {field: fields[field] for field in _DRAWN if field in fields})


def _item(raw: msgspec.Raw, tail: bytes) -> Item | Refused:
    try:
        model = parse_model_name(_TARGET.decode(raw).target_model)
    except InvalidModelName as error:
        return Refused(Situation.BAD_NAME, str(error), field="target_model")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return Refused(Situation.BAD_REQUEST, f"the request names no model: {error}", field="target_model")
    return Item(model, b'{"instances":[' + bytes(raw) + tail)


def prediction(answer: bytes, *, marginal: bool = False) -> bytes:
    """The one prediction in a worker's answer, with a marginal where that is needed. Raises Refused without one."""
    try:
        (found,) = _ANSWER.decode(answer).predictions
        if marginal and "marginal" not in _FIELDS.decode(found):
            raise Refused(Situation.MODEL_FAILED, "the model answers no marginal, which joint scenarios are made of")
    except (msgspec.MsgspecError, ValueError):
        raise Refused(Situation.MODEL_FAILED, "the model answers tensors, not a forecast") from None
    return bytes(found)


def together(joint: Joint, items: Sequence[Item | Refused], found: Sequence[Prediction | Refused]) -> bytes:
    """The request to the correlation: every prediction's marginal by its model's name, in order."""
    forecasts = [
        {"name": item.model, "marginal": _FIELDS.decode(each.body)["marginal"]}
        for item, each in zip(items, found, strict=True)
        if isinstance(item, Item) and isinstance(each, Prediction)
    ]
    return msgspec.json.encode({"forecasts": forecasts, **joint.drawn})


def sampled(found: Sequence[Prediction | Refused], answer: bytes) -> list[Prediction | Refused]:
    """The predictions with their samples from the correlation's answer in the place of their marginals."""
    samples = iter(_SAMPLES.decode(answer).samples)
    return [each if isinstance(each, Refused) else _with(each, next(samples)) for each in found]


def _with(prediction: Prediction, samples: msgspec.Raw) -> Prediction:
    fields = _FIELDS.decode(prediction.body)
    del fields["marginal"]
    return Prediction(msgspec.json.encode({**fields, "samples": samples}), prediction.response)


def require_all(found: Sequence[Prediction | Refused]) -> None:
    """Raises the first item's refusal, with its place, as the whole call's."""
    for i, each in enumerate(found):
        if isinstance(each, Refused):
            raise Refused(each.situation, each.detail.message, i, each.detail.field)


def misplaced(found: Sequence[Prediction | Refused], refused: Refused) -> Refused:
    """What the correlation refused, its place being that among the forecasts it got, as a place among the requests."""
    detail = refused.detail
    if detail.instance is None:
        return refused
    asked = [i for i, each in enumerate(found) if isinstance(each, Prediction)]
    return Refused(refused.situation, detail.message, asked[detail.instance], detail.field)


def spliced(found: Sequence[Prediction | Refused]) -> bytes:
    """The whole answer."""
    parts = [_error(each) if isinstance(each, Refused) else each.body for each in found]
    failed = sum(isinstance(each, Refused) for each in found)
    return b'{"predictions":[' + b",".join(parts) + b'],"failed":%d}' % failed


def _error(refused: Refused) -> bytes:
    error: dict[str, object] = {"code": refused.situation.name.lower(), "message": refused.detail.message}
    if refused.detail.field is not None:
        error["field"] = refused.detail.field
    return msgspec.json.encode({"error": error})


def statuses(found: Iterable[Prediction | Refused]) -> list[int]:
    """For each item the status a call of its own would have had."""
    return [SAGEMAKER[each.situation].status if isinstance(each, Refused) else HTTP_OK for each in found]


def story(found: Iterable[Prediction | Refused]) -> list[tuple[bytes, bytes]]:
    """Headers: how many the cache had, and the longest times in milliseconds."""
    responses = [each.response for each in found if isinstance(each, Prediction)]
    cache = Counter(_CACHE[wire.CacheResult(each.cache)] for each in responses if each.cache)
    longest = {
        "queue": max((each.queue_us for each in responses), default=0),
        "load": max((each.load_us for each in responses), default=0),
        "inference": max((each.inference_us for each in responses), default=0),
    }
    times = ", ".join(f"{name};dur={us / 1e3:.3f}" for name, us in longest.items())
    counts = ", ".join(f"{name}={count}" for name, count in cache.items())
    return [(b"server-timing", times.encode()), (b"x-fleetcast-cache", counts.encode())]
