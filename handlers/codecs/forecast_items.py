"""The items of a call for many models: decoded together, and answered each as if it had come alone. No torch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec import Struct

from handlers.base import Float32
from handlers.codecs.codec import JSON, DecodedCall, Encoded
from handlers.codecs.deepar import DeepAr, Encode
from handlers.codecs.deepar_schema import Configuration, Instance
from handlers.codecs.forecast_groups import (
    AskedForecast,
    DecodedForecast,
    ForecastColumns,
    GroupEncode,
    GroupNumbers,
    decode_columns,
    decode_together,
    encode_group,
)
from handlers.codecs.forecast_texts import write_predictions
from handlers.codecs.tensors import check_finite
from handlers.errors import RequestError, RunFailed

Encoder = Callable[[Float32], Encoded]


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How predictions that are encoded together are written: their media type, and what packs those of a group.

    `pack`: the group's levels and numbers -> an answer for each. None: they are written as JSON.
    """

    media: str
    pack: Callable[[Sequence[str], GroupNumbers], Sequence[Any]] | None = None


class ItemEncode(Struct, eq=False, gc=False):
    """The encoder of one item, which `encode_groups` runs with others."""

    encode: GroupEncode
    form: AnswerForm

    def __call__(self, outputs: Float32) -> Encoded:
        """Encode alone. Raises RunFailed."""
        ((_, (answer,), _),) = encode_groups([self], [outputs])
        if isinstance(answer, RunFailed):
            raise answer
        return answer, self.form.media


def decode_items(
    codecs: Sequence[DeepAr], instances: Sequence[Instance[Any]], configuration: Configuration, form: AnswerForm
) -> list[DecodedCall | RequestError]:
    """Decode instances that have been read. One that is encoded alone is answered as JSON, whatever the form."""
    asked = [AskedForecast(codec, each) for codec, each in zip(codecs, instances, strict=True)]
    return [_make_call(each, form) for each in decode_together(asked, configuration)]


def decode_rows(
    codecs: Sequence[DeepAr], columns: ForecastColumns, configuration: Configuration, form: AnswerForm
) -> list[DecodedCall | RequestError]:
    """Decode forecasts that came as columns. See `decode_items`."""
    return [_make_call(each, form) for each in decode_columns(codecs, columns, configuration)]


def encode_groups(
    encoders: Sequence[Encoder], outputs: Sequence[Float32]
) -> Iterator[tuple[list[int], Sequence[Any | RunFailed], str]]:
    """The places of encoders that run together, their answers and these' type, for each group; others are left out."""
    groups: dict[int, tuple[list[int], list[GroupEncode], AnswerForm]] = {}
    for i, each in enumerate(encoders):
        if isinstance(each, ItemEncode):
            encode = each.encode
            found = groups.get(id(encode.group))
            if found is None:
                found = groups[id(encode.group)] = ([], [], each.form)
            found[0].append(i)
            found[1].append(encode)
    for places, items, form in groups.values():
        yield places, _encode_group(items, form, np.concatenate([outputs[i] for i in places])), form.media


def _encode_group(encoders: Sequence[GroupEncode], form: AnswerForm, outputs: Float32) -> Sequence[Any | RunFailed]:
    numbers = encode_group(encoders, outputs)
    if form.pack is not None:
        answers: list[Any | RunFailed] = list(form.pack(encoders[0].group.names, numbers))
    else:
        answers = [*write_predictions(encoders, numbers)]
    for place, failed in numbers.failures.items():
        answers[place] = failed
    return answers


def _make_call(each: DecodedForecast | RequestError, form: AnswerForm) -> DecodedCall | RequestError:
    if isinstance(each, RequestError):
        return each
    rows, encode = each.rows, each.encode
    if isinstance(encode, GroupEncode):
        return DecodedCall(rows, ItemEncode(encode, form), encode.group.numbers, encode.answered)
    alone: Encode = encode
    write: Encoder = lambda outputs: (alone(check_finite("predictions", outputs)), JSON)  # noqa: E731
    return DecodedCall(rows, write, alone.numbers, alone.answered, alone.marks)
