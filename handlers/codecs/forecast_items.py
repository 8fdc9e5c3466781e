"""The items of a call for many models: decoded together, and answered each as if it had come alone. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from handlers.base import Float32
from handlers.codecs.codec import JSON, DecodedCall, Encoded
from handlers.codecs.deepar import DeepAr, Encode
from handlers.codecs.deepar_schema import Configuration
from handlers.codecs.forecast_groups import (
    AskedForecast,
    ForecastNumbers,
    GroupEncode,
    decode_together,
    encode_together,
)
from handlers.codecs.forecast_texts import read_instance, write_predictions
from handlers.codecs.tensors import check_finite
from handlers.errors import RequestError, RunFailed

Encoder = Callable[[Float32], Encoded]


@dataclass(frozen=True, slots=True)
class ItemEncode:
    """The encoder of one item, which `encode_items` runs with others. `media`: the type of its answer."""

    encode: GroupEncode
    media: str

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
    codecs: Sequence[DeepAr], texts: Sequence[bytes | memoryview], configuration: Configuration, media: str
) -> list[DecodedCall | None]:
    """Decode instances in JSON; None for an item that has to be decoded alone, which also says what is wrong with it.

    `media`: the type of a prediction that is encoded with others; those that are not are answered as JSON.
    """
    found: list[DecodedCall | None] = [None] * len(codecs)
    asked, places = list[AskedForecast](), list[int]()
    for i, (codec, text) in enumerate(zip(codecs, texts, strict=True)):
        instance = read_instance(text)
        if instance is not None:
            asked.append(AskedForecast(codec, instance))
            places.append(i)
    for i, each in zip(places, decode_together(asked, configuration), strict=True):
        if not isinstance(each, RequestError):
            found[i] = _make_call(each.rows, each.encode, media)
    return found


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
        texts = iter(_write_all([(item.encode, each) for item, each in both if not isinstance(each, RunFailed)]))
        for i, (item, number) in zip(places, both, strict=True):
            found[i] = _Ready(number if isinstance(number, RunFailed) else (next(texts), item.media))
    return found


def _write_all(good: Sequence[tuple[GroupEncode, ForecastNumbers]]) -> list[bytes]:
    return write_predictions([encoder for encoder, _ in good], [numbers for _, numbers in good]) if good else []


def _make_call(rows: Float32, encode: GroupEncode | Encode, media: str) -> DecodedCall:
    if isinstance(encode, GroupEncode):
        numbers = encode.group.numbers
        return DecodedCall(rows, ItemEncode(encode, media), numbers, encode.answered)
    alone = encode
    write: Encoder = lambda outputs: (alone(check_finite("predictions", outputs)), JSON)  # noqa: E731
    return DecodedCall(rows, write, alone.numbers, alone.answered, alone.marks)
