"""DeepAR JSON cut and joined without decoding a number: requests to models and their answers. Pure, and in slices.

An instance's bytes become the one instance of a request to its model, and the prediction in that model's answer is put
into the common answer as it is.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, Generic, TypeVar, cast

import msgspec

from server.errors import Refused, Situation
from server.front.json_cutter import NotJson, cut_fields, cut_items
from server.front.slices import AT_ONCE, ITEM, Slices, join_parts

MAX_ITEMS = 10_000  #: of one call

T = TypeVar("T")


class _Answer(msgspec.Struct, Generic[T]):
    predictions: list[T]


#: How the answer of a correlation archive begins that was asked for sizes: `handlers.codecs.joint`.
_SIZES: Final = re.compile(rb'\{"sizes":(\[[0-9, ]{1,200000}\]),"samples":\[')
_ANSWER = msgspec.json.Decoder(_Answer[msgspec.Raw])
_CUT_ANSWER = msgspec.json.Decoder(_Answer[dict[str, msgspec.Raw]])
_NO_FORECAST = (msgspec.MsgspecError, NotJson, KeyError, ValueError)
NO_FORECAST = "the model answers tensors, not a forecast"

Fields = Mapping[str, msgspec.Raw]  #: of a prediction


def build_request(instance: msgspec.Raw | bytes, configuration: bytes) -> bytes:
    """The body of a request for one instance."""
    return b"".join((b'{"instances":[', instance, b'],"configuration":', configuration, b"}"))


def extract_prediction(answer: bytes) -> Slices[bytes]:
    """The one prediction in a model's answer. Raises Refused without one."""
    view = memoryview((yield from _read_prediction(answer, _ANSWER, _leave_whole)))
    # The copy of a small one lets its answer go; a large one is not copied, and all that read it take any buffer.
    return bytes(view) if len(view) <= AT_ONCE else cast("bytes", view)


def cut_prediction(answer: bytes) -> Slices[Fields]:
    """The fields of the one prediction in a model's answer, with a marginal. Raises Refused without one."""
    found = yield from _read_prediction(answer, _CUT_ANSWER, cut_fields)
    if "marginal" not in found:
        raise Refused(Situation.MODEL_FAILED, "the model answers no marginal, which joint scenarios are made of")
    return found


def _read_prediction(
    answer: bytes, decoder: "msgspec.json.Decoder[_Answer[T]]", cut: Callable[[msgspec.Raw], Slices[T]]
) -> Slices[T]:
    """The one prediction in a model's answer: decoded from a small one, `cut` from a large one. Raises Refused."""
    try:
        if len(answer) <= AT_ONCE:
            yield len(answer)
            (found,) = decoder.decode(answer).predictions
        else:
            (whole,) = yield from cut_items((yield from cut_fields(answer))["predictions"], 1)
            found = yield from cut(whole)
    except _NO_FORECAST:
        raise Refused(Situation.MODEL_FAILED, NO_FORECAST) from None
    return found


def _leave_whole(prediction: msgspec.Raw) -> Slices[msgspec.Raw]:
    yield ITEM
    return prediction


def build_correlation_request(
    predictions: Iterable[tuple[str, Fields]], drawn: Mapping[str, msgspec.Raw]
) -> Slices[bytes]:
    """The request to a correlation archive: the predictions' marginals by model name, and how samples are drawn."""
    parts: list[bytes | memoryview] = [b'{"forecasts":[']
    for name, fields in predictions:
        comma, marginal = b"," if len(parts) > 1 else b"", memoryview(fields["marginal"])
        parts += (comma + b'{"name":' + msgspec.json.encode(name) + b',"marginal":', marginal, b"}")
    parts.append(b"]")
    parts += (part for name, value in drawn.items() for part in (b",", *_write_field(name, value)))
    return (yield from join_parts([*parts, b',"sizes":true}']))


def split_samples(answer: bytes) -> Slices[list[msgspec.Raw]]:
    """The samples of each forecast in a correlation archive's answer, cut at its sizes where it has them.

    Raises Refused for an answer that has none.
    """
    found = yield from _cut_at_sizes(memoryview(answer))
    if found is not None:
        return found
    try:
        return (yield from cut_items((yield from cut_fields(answer))["samples"], MAX_ITEMS))
    except (NotJson, KeyError) as error:
        why = "it has no `samples`" if isinstance(error, KeyError) else str(error)
        raise Refused(Situation.MODEL_FAILED, f"the correlation archive answers no samples: {why}") from None


def _cut_at_sizes(answer: memoryview) -> Slices[list[msgspec.Raw] | None]:
    """The samples as the sizes ahead of them say; None for an answer without any, or with no brackets at these places.

    Only our own codec answers so, and a wrong size could only misplace what this answer has.
    """
    head = _SIZES.match(answer)
    if head is None:
        return None
    found, at = list[msgspec.Raw](), head.end()
    for size in msgspec.json.decode(head[1], type=list[int]):
        until = at + size
        if bytes(answer[at - 1 : at + 1]) != (b",[" if found else b"[[") or bytes(answer[until - 1 : until]) != b"]":
            return None
        found.append(msgspec.Raw(answer[at:until]))
        at = until + 1
        yield ITEM
    return found if bytes(answer[at - 1 : at + 2]) == b"]}" else None


def replace_marginal(fields: Fields, samples: msgspec.Raw) -> list[bytes | memoryview]:
    """The parts of the prediction with its samples in the place of its marginal."""
    kept = [(name, value) for name, value in fields.items() if name != "marginal"]
    parts = [b"{", *(part for name, value in kept for part in (*_write_field(name, value), b","))]
    return [*parts, *_write_field("samples", samples), b"}"]


def _write_field(name: str, value: msgspec.Raw) -> Iterator[bytes | memoryview]:
    yield msgspec.json.encode(name) + b":"
    yield memoryview(value)
