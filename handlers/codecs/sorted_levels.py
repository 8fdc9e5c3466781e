"""Sorts the quantile levels of many forecasts at once, to the bits that a sort of each alone gives. No torch."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from handlers.codecs.features import Float64

MOST_LEVELS = 8  #: of which comparisons of whole columns take less time than a sort of each few numbers


class SortedLevels(NamedTuple):
    """The columns of sorted prices, one for each level, and whether any price is zero."""

    columns: Sequence[Float64]
    has_zeros: bool


def sort_levels(prices: Float64) -> SortedLevels:
    """Sort finite prices [..., levels] along the last axis, in place.

    Few levels are compared column by column, which gives the same numbers. Zeros of both signs are equal and yet two
    numbers: where there is any zero, it is left to the sort which of them comes first.
    """
    levels, has_zeros = prices.shape[-1], not prices.all()
    if levels > MOST_LEVELS or has_zeros:
        prices.sort(axis=-1)
        return SortedLevels([prices[..., i] for i in range(levels)], has_zeros)
    columns = [prices[..., i].copy() for i in range(levels)]  # a single price would be a view
    spare = np.empty_like(columns[0])
    for low, high in _list_comparisons(levels):
        np.minimum(columns[low], columns[high], out=spare)
        np.maximum(columns[low], columns[high], out=columns[high])
        columns[low], spare = spare, columns[low]
    for i, column in enumerate(columns):
        prices[..., i] = column
    return SortedLevels(columns, has_zeros)


@lru_cache(maxsize=MOST_LEVELS)
def _list_comparisons(count: int) -> tuple[tuple[int, int], ...]:
    return tuple(_merge_exchange(count))


def _merge_exchange(count: int) -> Iterator[tuple[int, int]]:
    """Batcher's merge exchange (Knuth, The Art of Computer Programming, volume 3, 5.2.2, algorithm M)."""
    top = 1 << (count - 1).bit_length() >> 1
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            yield from ((i, i + d) for i in range(count - d) if i & p == r)
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
