"""The items of a call for many models: decoded together, and answered each as if it had come alone. No torch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from msgspec import Struct

from handlers.base import Float32
from handlers.codecs.calibration import AnsweredLevels
from handlers.codecs.codec import JSON, DecodedCall, Encoded
from handlers.codecs.deepar import DeepAr
from handlers.codecs.deepar_schema import Configuration, Instance
from handlers.codecs.forecast_blocks import (
    AskedForecast,
    DecodedForecast,
    DecodedForecasts,
    ForecastBlock,
    decode_columns,
    decode_together,
)
from handlers.codecs.forecast_groups import ForecastColumns, ForecastGroup, GroupEncode, GroupNumbers, encode_group
from handlers.codecs.forecast_texts import write_predictions
from handlers.codecs.tensors import Place, check_finite
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
    """The encoder of one item that was taken out of its block, which `encode_groups` runs with others."""

    encode: GroupEncode
    form: AnswerForm

    def __call__(self, outputs: Float32) -> Encoded:
        """Encode alone. Raises RunFailed."""
        ((_, (answer,), _),) = encode_groups([self], [outputs])
        if isinstance(answer, RunFailed):
            raise answer
        return answer, self.form.media


class ItemBlock(Struct, eq=False, gc=False):
    """Items of a call that were decoded as arrays, and are run and encoded as such.

    `places`: of the items in their call. `rows`: [n, *shape], nobody else's.
    """

    block: ForecastBlock
    form: AnswerForm

    @property
    def rows(self) -> Float32:
        """The inputs of all."""
        return self.block.rows

    @property
    def places(self) -> Sequence[int]:
        """Which of the items that were decoded."""
        return self.block.places

    @property
    def numbers(self) -> int:
        """About the number of values in one answer."""
        return self.block.group.numbers

    @property
    def keeps_levels(self) -> bool:
        """Whether some of the archives keep the levels that they answer."""
        return self.block.group.keeps_levels

    def encode(self, outputs: Float32) -> Sequence[Any | RunFailed]:
        """An answer for each item's outputs [n, prediction, levels], or why there is none."""
        group, at = self.block.group, self.block.at
        return _write_group(group, at.tolist(), self.form, group.compute_answers(at, outputs))

    def take_levels(self, i: int) -> Sequence[AnsweredLevels]:
        """The levels that the item was answered with, where its archive keeps them; once."""
        group = self.block.group
        return tuple(group.take_levels(int(self.block.at[i]))) if group.keeps_levels else ()

    def split(self) -> list[DecodedCall]:
        """Each item by itself."""
        group, rows = self.block.group, self.block.rows
        return [
            _make_item_call(rows[i : i + 1], GroupEncode(group, at, [] if group.keeps_levels else ()), self.form)
            for i, at in enumerate(self.block.at.tolist())
        ]


class DecodedItems(NamedTuple):
    """What became of items: blocks, and the others by their places."""

    blocks: list[ItemBlock]
    alone: dict[int, DecodedCall | RequestError]


def decode_items(
    codecs: Sequence[DeepAr],
    instances: Sequence[Instance[Any]],
    configuration: Configuration,
    form: AnswerForm,
    place: Place | None = None,
) -> DecodedItems:
    """Decode instances that have been read. One that is encoded alone is answered as JSON, whatever the form.

    `place`: gives memory for the rows of a block.
    """
    asked = [AskedForecast(codec, each) for codec, each in zip(codecs, instances, strict=True)]
    return _make_items(decode_together(asked, configuration, place), form)


def decode_rows(
    codecs: Sequence[DeepAr],
    columns: ForecastColumns,
    configuration: Configuration,
    form: AnswerForm,
    place: Place | None = None,
) -> DecodedItems:
    """Decode forecasts that came as columns. See `decode_items`."""
    return _make_items(decode_columns(codecs, columns, configuration, place), form)


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
        numbers = encode_group(items, np.concatenate([outputs[i] for i in places]))
        yield places, _write_group(items[0].group, [each.at for each in items], form, numbers), form.media


def _write_group(
    group: ForecastGroup, places: Sequence[int], form: AnswerForm, numbers: GroupNumbers
) -> Sequence[Any | RunFailed]:
    """The answers of the forecasts at these places of a group."""
    answers: Sequence[Any | RunFailed]
    answers = write_predictions(group, places, numbers) if form.pack is None else form.pack(group.names, numbers)
    if not numbers.failures:
        return answers
    return [numbers.failures.get(i, answer) for i, answer in enumerate(answers)]


def _make_items(found: DecodedForecasts, form: AnswerForm) -> DecodedItems:
    alone = {i: each if isinstance(each, RequestError) else _make_call(each) for i, each in found.alone.items()}
    return DecodedItems([ItemBlock(each, form) for each in found.blocks], alone)


def _make_item_call(rows: Float32, encode: GroupEncode, form: AnswerForm) -> DecodedCall:
    return DecodedCall(rows, ItemEncode(encode, form), encode.group.numbers, encode.answered)


def _make_call(each: DecodedForecast) -> DecodedCall:
    alone = each.encode
    write: Encoder = lambda outputs: (alone(check_finite("predictions", outputs)), JSON)  # noqa: E731
    return DecodedCall(each.rows, write, alone.numbers, alone.answered, alone.marks)
