"""Paces: operations are counted right, floors are computed, and the marked way is the one that is taken."""

import numpy as np
import pytest
import torch

from handlers.forecasters import build_family, random_tensors
from server.worker.engine.execution_plan import CELLS, CostTable, Path
from server.worker.engine.speed import CoreRates, FamilySpeed, count_flops, measure_core, measure_family, one_thread

pytestmark = pytest.mark.slow

TCN = {"features": 3, "context_length": 9, "prediction_length": 4, "quantiles": 3, "channels": 8, "layers": 2}
RATES = CoreRates(flops=1e9, bytes=1e8)


def test_products_are_counted_whether_in_place_or_not() -> None:
    """By hand: a product of [n, k] and [k, m] is 2 n k m, a residual's in place like any other."""
    small = build_family("tcn", TCN)
    # two layers of 3 and 1 positions: three taps and the residual each, and the head
    by_hand = 2 * (3 * (9 + 3) * 8 + 1 * (24 + 8) * 8 + 8 * 12)
    assert count_flops(small, np.zeros(small.row_floats, np.float32)) == by_hand
    recurrent = build_family(
        "gru", {"features": 2, "context_length": 5, "hidden": 4, "prediction_length": 2, "quantiles": 1}
    )
    at_least = 2 * 5 * 3 * 4 * (2 + 4)  # every step: three gates of input and state
    found = count_flops(recurrent, np.zeros(recurrent.row_floats, np.float32))
    assert at_least <= found <= 2 * at_least


def test_floors_and_the_ways_taken() -> None:
    """A row that is shared by a batch is read once; the cheapest measured way is taken, for each kind of batch its own.

    What was not measured has no time.
    """
    cost = {Path.GATHER: 4e-6, Path.IN_PLACE: 9e-6, Path.REPEAT: 1e-6}
    known = {(path, size): cost[path] * size for path, size in CELLS if size < 64}
    found = FamilySpeed("f", row_bytes=640, rows=100, flops=1000, rates=RATES, table=CostTable(known))
    assert found.floor_us(8, 8) == pytest.approx(1.0 + 6.4)
    assert found.floor_us(8, 1) == pytest.approx(1.0 + 0.8)
    assert (found.chosen_path(8, 8), found.chosen_path(8, 1)) == (Path.GATHER, Path.REPEAT)
    assert found.answer_us(Path.GATHER, 8) == pytest.approx(4.0)
    assert found.answer_us(Path.GATHER, 64) is None


def test_a_family_is_measured_on_more_rows_than_a_cache_holds() -> None:
    """Every cell has a time, at least the arithmetic's, and the rows together are what `paths` calls cold."""
    family = build_family("lear", {})
    found = measure_family(family, family.row(random_tensors(family, 0)), measure_core())
    assert found.rows * found.row_bytes > 64 * 2**20
    times = [found.answer_us(path, size) for path, size in CELLS]
    assert not [us for us in times if us is None or us <= 0.1], times


def test_one_thread_is_for_a_while() -> None:
    """Whatever fails meanwhile, the process has its threads again."""
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError), one_thread():
            _ = 1 / (torch.get_num_threads() - 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
