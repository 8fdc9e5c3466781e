"""The accelerator on a real CUDA device: the tests of `test_accelerator.py`, which uses a fake device, and times."""

import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from handlers.base import Family, Float32
from handlers.codecs.codec import FamilyCodec
from handlers.forecasters import build_family, random_tensors
from handlers.kinds import RowModel
from model_store.cache.slots import Slot, State
from model_store.names import ModelName
from server.worker.engine.accelerator import DeviceEngine, DevicePool
from server.worker.engine.device import CudaDevice, Precision
from server.worker.engine.device_budget import cache_share
from server.worker.engine.graph_choice import EAGER_RUNS
from server.worker.host_cache import HostCache
from tests.server.worker.engine.learning import learn_all
from tests.server.worker.engine.test_cpu import CONFIGS, answer_plainly

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and a torch built for it"),
]

WHERE = torch.device("cuda:0")
TICK = 1000
SHAPE = {"features": 8, "context_length": 168, "prediction_length": 24, "quantiles": 5}


def make_engine(family: Family, models: int, precision: Precision = "float32", max_rows: int = 512) -> DeviceEngine:
    """An engine whose pool is poisoned but for the first five models."""
    size = family.row_floats * 4
    pool = DevicePool(models * size, CudaDevice(WHERE, precision))
    pool.device.launch(lambda: pool.floats.fill_(float("nan"))).synchronize()
    for model in range(min(models, 5)):
        pool.write(model * size, family.row(random_tensors(family, model)))
    return DeviceEngine(pool, max_rows, bf16=precision == "bf16")


def draw_inputs(family: Family, rows: int, seed: int = 0) -> Float32:
    """Rows of input."""
    return np.random.default_rng(seed).standard_normal((rows, *family.input_shape), dtype=np.float32)


def median_ms(work: Callable[[], object], times: int = 30) -> float:
    """Of a call that returns when the device is done."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append((time.perf_counter() - started) * 1e3)
    return statistics.median(taken)


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_answers_are_the_cpus(architecture: str) -> None:
    """Every architecture, every bucket, eager and as graphs, models in any order: abs <= 1e-5 + 1e-4 |reference|."""
    family = build_family(architecture, CONFIGS[architecture])
    made = make_engine(family, 5, max_rows=64)
    rng = np.random.default_rng(0)
    for turn, rows in enumerate([1, 2, 3, 17, 64, 150] * (EAGER_RUNS + 2)):
        if turn == 6 * EAGER_RUNS:
            learn_all(made)
        models = rng.integers(0, 5, rows).tolist()
        parts = [draw_inputs(family, 1, rows + i) for i in range(rows)]
        found = made.run(family, [model * family.row_floats * 4 for model in models], parts)
        for answer, model, x in list(zip(found, models, parts, strict=True))[:: max(1, rows // 8)]:
            np.testing.assert_allclose(answer, answer_plainly(family, model, x), rtol=1e-4, atol=1e-5)
    assert made.graphs.captured(family.key) == {1, 2, 4, 32, 64}  # 150 rows are two of 64 and one of 32


def test_a_row_is_back_by_one_copy_from_the_shelf() -> None:
    """Evicted, its place taken by another model, brought back to a third place: the same answers, bit for bit."""
    family = build_family("tcn", CONFIGS["tcn"])
    made, size = make_engine(family, 8), family.row_floats * 4
    shelf = HostCache(made.pool.device.host(4 * family.row_floats), 60)
    x = draw_inputs(family, 3)
    before = made.run(family, [0], [x])[0]
    slot = Slot(ModelName("a"), "v1", family.key, size, 0, State.RETIRING, 0.0)
    numbers = shelf.keep(slot, RowModel(family, FamilyCodec(family)), time.time())
    assert numbers is not None
    made.pool.keep(0, numbers)
    made.pool.write(0, family.row(random_tensors(family, 4)))
    back = shelf.take(ModelName("a"))
    assert back is not None
    assert back.row is not None
    made.pool.write(7 * size, back.row)
    assert np.array_equal(made.run(family, [7 * size], [x])[0], before)
    np.testing.assert_allclose(made.run(family, [0], [x])[0], answer_plainly(family, 4, x), rtol=1e-4, atol=1e-5)


def test_rows_move_while_copies_fly() -> None:
    """Writes and moves told without waiting, a hundred times over; each step sees what was told before it."""
    family = build_family("mlp", {**SHAPE, "hidden": 256})
    made, size = make_engine(family, 8), family.row_floats * 4
    rows = [family.row(random_tensors(family, seed)) for seed in range(4)]
    x = draw_inputs(family, 1)
    right = [made.probe(family, row, x) for row in rows]
    for i in range(100):
        made.pool.write(0, rows[i % 4])
        made.pool.move(0, 5 * size, size)
        made.pool.write(0, rows[(i + 1) % 4])
        found = made.run(family, [5 * size, 0], [x, x])
        np.testing.assert_allclose(found, [right[i % 4], right[(i + 1) % 4]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 0.01), ("bf16", 0.05)])
def test_other_precisions_are_close(precision: Precision, tolerance: float) -> None:
    """Within a share of the largest answer. (Float32 is held to the CPU's numbers above.)"""
    family = build_family("tcn", SHAPE)
    made, x = make_engine(family, 5, precision), draw_inputs(family, 8)
    right = answer_plainly(family, 0, x)
    for turn in range(EAGER_RUNS + 2):
        if turn == EAGER_RUNS:
            learn_all(made)
        np.testing.assert_allclose(made.run(family, [0], [x])[0], right, atol=tolerance * np.abs(right).max())


def test_out_of_memory_is_an_error_that_passes() -> None:
    """More than there is raises torch.OutOfMemoryError; afterwards the engine answers as before."""
    family = build_family("tcn", CONFIGS["tcn"])
    made, x = make_engine(family, 5), draw_inputs(family, 1)
    before = made.run(family, [0], [x])[0]
    with pytest.raises(torch.OutOfMemoryError):
        DevicePool(made.pool.device.free_and_total()[1] * 2, made.pool.device)
    made.trim()
    np.testing.assert_allclose(made.run(family, [0], [x])[0], before, rtol=1e-5, atol=1e-6)


def test_the_budget_leaves_the_reserve() -> None:
    """What a worker would take leaves the reserve free on the device as it is."""
    free, total = CudaDevice(WHERE, "float32").free_and_total()
    assert 0 < free <= total
    assert cache_share((free, total), 2**30, 1) <= free - 2**30


def test_a_tick_of_a_thousand_models() -> None:
    """1,000 different models, decoded rows to host answers: right, and the time printed (goal: 1 ms)."""
    family = build_family("tcn", SHAPE)
    size = family.row_floats * 4
    made = make_engine(family, TICK, max_rows=TICK)
    rows = np.stack([family.row(random_tensors(family, model)) for model in range(TICK)])
    for model, row in enumerate(rows):
        made.pool.write(model * size, row)
    offsets = np.random.default_rng(0).permutation(TICK) * size
    parts = list(draw_inputs(family, TICK)[:, None])
    for turn in range(EAGER_RUNS + 2):
        if turn == EAGER_RUNS:
            learn_all(made)
        found = made.run(family, offsets.tolist(), parts)
    for at in (0, 499, 999):
        right = answer_plainly(family, int(offsets[at]) // size, parts[at])
        np.testing.assert_allclose(found[at], right, rtol=1e-4, atol=1e-5)
    taken = median_ms(lambda: made.run(family, offsets.tolist(), parts))
    print(f"tick of {TICK} models: {taken:.3f} ms on {torch.cuda.get_device_name(WHERE)}")  # noqa: T201 -- the point
