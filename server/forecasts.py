"""Many models in one call (`POST /v1/forecasts`, CONTRACTS 5): its body sliced, the answers spliced. Pure.

Neither re-encodes a number: an item's bytes become the one instance of a request to its model, and the prediction in
that model's answer is put into the common answer as it is.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from model_store.names import InvalidModelName, ModelName, parse_model_name
from server import wire
from server.errors import SAGEMAKER, Refused, Situation

MAX_ITEMS = 10_000
HTTP_OK = 200
_CACHE = {wire.CacheResult.HIT: "hit", wire.CacheResult.MISS: "miss", wire.CacheResult.COALESCED: "coalesced"}


class _Body(msgspec.Struct):
    requests: list[msgspec.Raw]
    configuration: msgspec.Raw = msgspec.Raw(b"{}")


class _Target(msgspec.Struct):
    target_model: str


class _Configuration(msgspec.Struct):
    joint: bool = False


class _Answer(msgspec.Struct):
    predictions: list[msgspec.Raw]


_BODY, _TARGET = msgspec.json.Decoder(_Body), msgspec.json.Decoder(_Target)
_CONFIGURATION, _ANSWER = msgspec.json.Decoder(_Configuration), msgspec.json.Decoder(_Answer)


@dataclass(frozen=True, slots=True)
class Item:
    """One forecast of the call: whom to ask, and the whole request."""

    model: ModelName
    body: bytes


@dataclass(frozen=True, slots=True)
class Prediction:
    """What came of an item: the prediction's JSON, and what the worker says of it."""

    body: bytes
    response: wire.Response


def sliced(body: bytes) -> list[Item | Refused]:
    """The call's items in order; one that names no model is refused alone.

    Raises Refused for a body that is no such call at all, with the place.
    """
    try:
        call = _BODY.decode(body)
        configuration = _CONFIGURATION.decode(call.configuration)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(Situation.BAD_REQUEST, f"not a call for forecasts: {error}") from None
    if not 1 <= len(call.requests) <= MAX_ITEMS:
        message = f"a call has 1 to {MAX_ITEMS} requests, not {len(call.requests)}"
        raise Refused(Situation.BAD_REQUEST, message, field="requests")
    if configuration.joint:
        message = "joint scenarios are not served yet; ask without `joint`"
        raise Refused(Situation.BAD_REQUEST, message, field="configuration.joint")
    tail = b'],"configuration":' + bytes(call.configuration) + b"}"
    return [_item(raw, tail) for raw in call.requests]


def _item(raw: msgspec.Raw, tail: bytes) -> Item | Refused:
    try:
        model = parse_model_name(_TARGET.decode(raw).target_model)
    except InvalidModelName as error:
        return Refused(Situation.BAD_NAME, str(error), field="target_model")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return Refused(Situation.BAD_REQUEST, f"the request names no model: {error}", field="target_model")
    return Item(model, b'{"instances":[' + bytes(raw) + tail)


def prediction(answer: bytes) -> bytes:
    """The one prediction in a worker's answer. Raises Refused for an answer that is none."""
    try:
        (found,) = _ANSWER.decode(answer).predictions
    except (msgspec.MsgspecError, ValueError):
        raise Refused(Situation.MODEL_FAILED, "the model answers tensors, not a forecast") from None
    return bytes(found)


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
