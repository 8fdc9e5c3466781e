"""Levels that are sorted column by column have the bits of numpy's sort, zeros of both signs too."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from handlers.codecs.features import Float64
from handlers.codecs.sorted_levels import MOST_LEVELS, sort_levels

PRICES = st.one_of(st.floats(-1e300, 1e300), st.sampled_from([0.0, -0.0, 1.0, -1.0, 5e-324]))


@example(np.array([[[-1.0, 1.0, 1.0, 0.5]]]))
@given(arrays.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 10)), elements=PRICES))
def test_any_prices_are_sorted_as_numpy_sorts_them(prices: Float64) -> None:
    """In place and as columns, bit by bit."""
    expected = prices.copy()
    expected.sort(axis=-1)
    found = sort_levels(prices)
    assert prices.tobytes() == expected.tobytes()
    assert [column.tobytes() for column in found.columns] == [
        np.ascontiguousarray(expected[..., i]).tobytes() for i in range(expected.shape[-1])
    ]
    assert found.has_zeros == bool((expected == 0).any())


@pytest.mark.parametrize("levels", range(1, MOST_LEVELS + 1))
def test_the_comparisons_sort_every_order(levels: int) -> None:
    """What sorts all sequences of two numbers sorts all sequences (the zero-one principle)."""
    prices = np.array(list(itertools.product([1.0, 2.0], repeat=levels)))
    expected = np.sort(prices, axis=-1)
    sort_levels(prices)
    assert np.array_equal(prices, expected)
