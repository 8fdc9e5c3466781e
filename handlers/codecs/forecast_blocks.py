"""Sorts the forecasts of a call into blocks, which are decoded as arrays, and those that are decoded alone. No torch.

A block is what has one recipe, one start and one length, see `handlers.codecs.forecast_groups`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from handlers.base import Float32
from handlers.codecs.deepar import DeepAr, Encode
from handlers.codecs.deepar_schema import Configuration, Instance
from handlers.codecs.forecast_groups import DecodedGroup, ForecastColumns, ForecastGroup, Places
from handlers.codecs.tensors import Place
from handlers.errors import RequestError

REGULAR = {"mean", "quantiles"}  #: output types that are computed together
LEAST = 2  #: forecasts that are worth it


class AskedForecast(NamedTuple):
    """One forecast of a call: the contract of its model's archive, and what is asked. A target may be an array."""

    codec: DeepAr
    instance: Instance[Any]


class ForecastBlock(NamedTuple):
    """Forecasts of a call that were decoded as arrays: `rows` [n, channels, steps] of those at `places` of the call.

    `at`: their places in the group.
    """

    group: ForecastGroup
    at: Places
    places: Sequence[int]
    rows: Float32


class DecodedForecast(NamedTuple):
    """A forecast that was decoded by itself: its rows [1, channels, context], and its encoder."""

    rows: Float32
    encode: Encode


class DecodedForecasts(NamedTuple):
    """What became of a call's forecasts: those that were decoded as arrays, and the others by their places."""

    blocks: list[ForecastBlock]
    alone: dict[int, DecodedForecast | RequestError]


def decode_together(
    asked: Sequence[AskedForecast], configuration: Configuration, place: Place | None = None
) -> DecodedForecasts:
    """Decode the forecasts of a call. Those of one recipe, start and length are decoded as arrays.

    `place`: gives memory for the rows of a block, whose last axis may be shorter than the archive's context.
    """
    blocks = list[ForecastBlock]()
    for places in _group_regular(asked, configuration):
        group = ForecastGroup([asked[i].codec for i in places], configuration)
        _add_block(blocks, group, places, group.decode([asked[i].instance for i in places], place))
    return _decode_others(blocks, len(asked), lambda i: asked[i], configuration)


def decode_columns(
    codecs: Sequence[DeepAr], columns: ForecastColumns, configuration: Configuration, place: Place | None = None
) -> DecodedForecasts:
    """Decode forecasts that came as columns. Those of one recipe and start are decoded as arrays. See above."""
    blocks = list[ForecastBlock]()
    for places in _group_columns(codecs, columns.starts) if _is_regular(configuration) else ():
        group = ForecastGroup([codecs[i] for i in places], configuration)
        _add_block(blocks, group, places, group.decode_columns(columns, places, place))
    return _decode_others(
        blocks, len(codecs), lambda i: AskedForecast(codecs[i], columns.read_instance(i)), configuration
    )


def _group_columns(codecs: Sequence[DeepAr], starts: Sequence[str]) -> Iterable[Sequence[int]]:
    """The places of forecasts that can be decoded as arrays, by recipe and start."""
    recipes = [codec.recipe for codec in codecs]
    if recipes[0] is not None and recipes.count(recipes[0]) == len(recipes) and starts.count(starts[0]) == len(starts):
        return [range(len(codecs))]  # as mostly
    groups: dict[object, list[int]] = {}
    for i, (recipe, start) in enumerate(zip(recipes, starts, strict=True)):
        if recipe is not None:
            groups.setdefault((id(recipe), start), []).append(i)
    return groups.values()


def _add_block(
    blocks: list[ForecastBlock], group: ForecastGroup, places: Sequence[int], decoded: DecodedGroup | None
) -> None:
    """Add what is regular of a group."""
    if decoded is None or not decoded.regular.any():
        return
    if decoded.regular.all():
        blocks.append(ForecastBlock(group, group.everyone, places, decoded.rows))
    else:
        at = np.flatnonzero(decoded.regular)
        blocks.append(ForecastBlock(group, at, [places[i] for i in at.tolist()], decoded.rows[at]))


def _decode_others(
    blocks: list[ForecastBlock], count: int, read: Callable[[int], AskedForecast], configuration: Configuration
) -> DecodedForecasts:
    """Decode one by one what is in no block."""
    alone: dict[int, DecodedForecast | RequestError] = {}
    if sum(len(block.places) for block in blocks) < count:
        known = {i for block in blocks for i in block.places}
        alone = {i: _decode_alone(read(i), configuration) for i in range(count) if i not in known}
    return DecodedForecasts(blocks, alone)


def _group_regular(asked: Sequence[AskedForecast], configuration: Configuration) -> Iterator[list[int]]:
    """The places of forecasts that can be decoded as arrays, by recipe, start and length of their histories."""
    if not _is_regular(configuration):
        return
    groups: dict[object, list[int]] = {}
    for i, (codec, instance) in enumerate(asked):
        if codec.recipe is not None:
            groups.setdefault((id(codec.recipe), instance.start, len(instance.target)), []).append(i)
    yield from (places for places in groups.values() if len(places) >= LEAST)


def _is_regular(configuration: Configuration) -> bool:
    names = configuration.quantiles or ()
    kinds = configuration.output_types
    is_plain = bool(kinds) and REGULAR.issuperset(kinds) and not configuration.joint
    return is_plain and len(set(names)) == len(names)


def _decode_alone(one: AskedForecast, configuration: Configuration) -> DecodedForecast | RequestError:
    try:
        return DecodedForecast(*one.codec.decode_instances([one.instance], configuration))
    except RequestError as error:
        return error
