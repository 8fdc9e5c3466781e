"""The items of a call for many models: decoded together, and answered each as if it had come alone. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from handlers.base import Float32
from handlers.codecs.codec import JSON, DecodedCall, Encoded
from handlers.codecs.deepar import DeepAr, Encode
from handlers.codecs.deepar_schema import Configuration, Instance
from handlers.codecs.forecast_groups import (
    AskedForecast,
    ForecastNumbers,
    GroupEncode,
    decode_together,
    encode_together,
)
from handlers.codecs.forecast_texts import write_predictions
from handlers.codecs.tensors import check_finite
from handlers.errors import RequestError, RunFailed

Encoder = Callable[[Float32], Encoded]


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How predictions that are encoded together are written: their media type, and what packs one; None: as JSON."""

    media: str
    pack: Callable[[Sequence[str], ForecastNumbers], bytes] | None = None


@dataclass(frozen=True, slots=True)
class ItemEncode:
    """The encoder of one item, which `encode_items` runs with others."""

    encode: GroupEncode
    form: AnswerForm

    def __call__(self, outputs: Float32) -> Encoded:
        """Encode alone. Raises RunFailed."""
        (ready,) = encode_items([self], [outputs])
        return ready(outputs)


@dataclass(frozen=True, slots=True)
class _Ready:
    """The answer of an item that has been encoded, or why there is none."""

    found: Encoded | RunFailed

    def __call__(self, outputs: Float32) -> Encoded:
        """Return the answer. Raises RunFailed."""
        del outputs
        if isinstance(self.found, RunFailed):
            raise self.found
        return self.found


def decode_items(
    codecs: Sequence[DeepAr], instances: Sequence[Instance[Any]], configuration: Configuration, form: AnswerForm
) -> list[DecodedCall | RequestError]:
    """Decode instances that have been read. One that is encoded alone is answered as JSON, whatever the form."""
    asked = [AskedForecast(codec, each) for codec, each in zip(codecs, instances, strict=True)]
    return [
        each if isinstance(each, RequestError) else _make_call(each.rows, each.encode, form)
        for each in decode_together(asked, configuration)
    ]


def encode_items(encoders: Sequence[Encoder], outputs: Sequence[Float32]) -> list[Encoder]:
    """Encode together what can be, and give for each item an encoder: those have their answers already."""
    found = list(encoders)
    groups: dict[int, list[int]] = {}
    for i, each in enumerate(encoders):
        if isinstance(each, ItemEncode):
            groups.setdefault(id(each.encode.group), []).append(i)
    for places in groups.values():
        items = [each for each in (encoders[i] for i in places) if isinstance(each, ItemEncode)]
        numbers = encode_together([each.encode for each in items], [outputs[i] for i in places])
        both = list(zip(items, numbers, strict=True))
        good = [(item.encode, each) for item, each in both if not isinstance(each, RunFailed)]
        texts = iter(_write_all(good, items[0].form))
        for i, (item, number) in zip(places, both, strict=True):
            found[i] = _Ready(number if isinstance(number, RunFailed) else (next(texts), item.form.media))
    return found


def _write_all(good: Sequence[tuple[GroupEncode, ForecastNumbers]], form: AnswerForm) -> list[bytes]:
    """Write the predictions of one group."""
    if not good:
        return []
    if form.pack is not None:
        return [form.pack(encoder.group.names, numbers) for encoder, numbers in good]
    return write_predictions([encoder for encoder, _ in good], [numbers for _, numbers in good])


def _make_call(rows: Float32, encode: GroupEncode | Encode, form: AnswerForm) -> DecodedCall:
    if isinstance(encode, GroupEncode):
        return DecodedCall(rows, ItemEncode(encode, form), encode.group.numbers, encode.answered)
    alone = encode
    write: Encoder = lambda outputs: (alone(check_finite("predictions", outputs)), JSON)  # noqa: E731
    return DecodedCall(rows, write, alone.numbers, alone.answered, alone.marks)
