"""The memory of forwards is counted and bounded, whatever families and configurations archives bring."""

import threading
from collections.abc import Sequence
from math import prod

import numpy as np
import pytest
import torch

from handlers.base import Family
from handlers.forecasters import ARCHITECTURES, build_family, random_tensors
from server.worker.engine.accelerator import MAX_KEPT_BYTES, DeviceEngine, DevicePool
from server.worker.engine.graph_choice import EAGER_RUNS
from server.worker.engine.staging import LANE_BYTES, LANES, STAGING_BYTES, WORK_BYTES, count_capacity
from server.worker.engine.work_memory import measure_work
from tests.server.fake_device import FakeDevice
from tests.server.worker.engine.learning import learn_all
from tests.server.worker.engine.test_cpu import answer_plainly

MIB = 2**20


def test_many_large_families_share_one_staging() -> None:
    """Twelve families in turn, each of as much staging as a forward may have: nothing is thrown away, all are replayed,
    and neither kind of memory grows with the number of families.
    """
    families = [build_family("mlp", {"hidden": 128 - i, "features": 4, "context_length": 64}) for i in range(12)]
    size = max(family.row_floats for family in families) * 4
    device = FakeDevice()
    engine = DeviceEngine(DevicePool(size, device), 64)
    engine.pool.write(0, np.zeros(size // 4, np.float32))
    used = []
    for _ in range(EAGER_RUNS + 3):
        for family in families:
            engine.run(family, [0], [np.zeros((1, *family.input_shape), np.float32)])
        learn_all(engine)
        used.append(device.ledger.used_bytes - size)
    one = 64 * (size + 4 * 256)
    assert max(used) < 3 * one  # powers of two, and scratch
    assert device.page_locked.used_bytes < 4 * LANES * 64 * 4 * (256 + 120)
    assert (device.captures, device.replays) == (12, 3 * 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("gru", {"features": 100, "context_length": 10_000, "hidden": 8}),
        ("tcn", {"features": 1024, "context_length": 100_000, "channels": 1, "kernel": 16}),
        ("deepar", {"paths": 1000, "prediction_length": 4, "context_length": 24}),
    ],
)
def test_what_an_archive_may_ask_for_is_bounded(architecture: str, config: dict[str, int]) -> None:
    """Inputs, answers, scratch and temporaries count beside rows: of all that only one row may have more."""
    family = build_family(architecture, config)
    work = measure_work(family, bf16=False)
    rows, given = count_capacity(family, work, 512), prod(family.read_shape) * 4
    for size, limit in (
        (family.row_floats * 4 + given, STAGING_BYTES),
        (given + prod(family.output_shape) * 4, LANE_BYTES),
        (work.bound + work.peak, WORK_BYTES),
    ):
        assert rows * size <= limit or rows == 1
    assert rows < 512


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_the_measured_memory_is_what_a_forward_takes(architecture: str) -> None:
    """On a device of so much memory a batch runs, with an eighth of it it does not; graphs are counted on top.

    (The simulated device uses no memory of a graph twice, so that its graphs have all they want.)
    """
    family = build_family(architecture, {"context_length": 30, "prediction_length": 4})
    work, rows = measure_work(family, bf16=False), 16
    x = np.random.default_rng(0).standard_normal((rows, *family.input_shape), np.float32)
    device = FakeDevice()
    engine = DeviceEngine(DevicePool(family.row_floats * 4, device), rows)
    engine.pool.write(0, family.row(random_tensors(family, 0)))
    staging = engine._stage(family)
    used, needed = device.ledger.used_bytes, rows * (work.bound + work.peak)
    device.total_bytes = used + needed // 8
    with pytest.raises(torch.OutOfMemoryError):
        engine.run(family, [0], [x])
    for i in range(EAGER_RUNS + 2):
        device.total_bytes = used + needed * 11 // 10 + 4096 if i < EAGER_RUNS else 2**30
        if i == EAGER_RUNS:
            learn_all(engine)
        answer = engine.run(family, [0], [x])[0]
    np.testing.assert_allclose(answer, answer_plainly(family, 0, x), rtol=1e-3, atol=1e-4)
    assert device.replays == 2
    kept = staging.count_kept_bytes(engine.graphs.captured(family.key))
    assert kept == staging.count_graph_bytes(rows) == rows * (work.bound + work.peak) < MAX_KEPT_BYTES


def test_a_larger_family_makes_staging_grow_and_smaller_ones_answer_on() -> None:
    """The graphs of before are dropped with the memory they read, and made again; answers stay right."""
    small = build_family("mlp", {"features": 1, "context_length": 8, "prediction_length": 2, "hidden": 4})
    large = build_family("mlp", {"features": 2, "context_length": 90, "prediction_length": 2, "hidden": 64})
    device = FakeDevice()
    engine = DeviceEngine(DevicePool((small.row_floats + large.row_floats) * 4, device), 8)
    offsets = {small.key: 0, large.key: small.row_floats * 4}
    for family in (small, large):
        engine.pool.write(offsets[family.key], family.row(random_tensors(family, 1)))
    for family in (small, large, small):
        x = np.random.default_rng(0).standard_normal((3, *family.input_shape), np.float32)
        for turn in range(EAGER_RUNS + 2):
            if turn == EAGER_RUNS:
                learn_all(engine)
            answer = engine.run(family, [offsets[family.key]], [x])[0]
            np.testing.assert_allclose(answer, answer_plainly(family, 1, x), rtol=1e-4, atol=1e-5)
    assert device.captures == 3


def test_page_locked_memory_that_is_short_is_out_of_memory() -> None:
    """It is an error that passes, as that of the device's memory: after `trim` the step runs."""
    family = build_family("mlp", {"features": 2, "context_length": 90, "prediction_length": 2, "hidden": 64})
    device = FakeDevice(page_locked_bytes=10_000)
    engine = DeviceEngine(DevicePool(family.row_floats * 4, device), 16)
    engine.pool.write(0, family.row(random_tensors(family, 0)))
    x = np.ones((2, *family.input_shape), np.float32)
    with pytest.raises(torch.OutOfMemoryError):
        engine.run(family, [0], [x])
    engine.trim()
    device.page_locked_bytes = MIB
    np.testing.assert_allclose(engine.run(family, [0], [x])[0], answer_plainly(family, 0, x), rtol=1e-4, atol=1e-5)


def test_what_families_keep_is_bounded_and_graphs_are_kept_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of families that have not run for long the scratch is freed, but not that of graphs, which replay on."""
    families = [build_family("gru", {"features": 2, "context_length": 24, "hidden": 8 + i}) for i in range(4)]
    scratch = max(measure_work(family, bf16=False).bound for family in families)
    graph = sum(measure_work(families[0], bf16=False))
    monkeypatch.setattr("server.worker.engine.accelerator.MAX_KEPT_BYTES", graph + 5 * scratch)
    device = FakeDevice()
    engine = DeviceEngine(DevicePool(max(family.row_floats for family in families) * 4, device), 4)
    engine.pool.write(0, np.zeros(engine.pool.floats.numel(), np.float32))
    first = families[0].key
    for _ in range(EAGER_RUNS):
        engine.run(families[0], [0], [np.zeros((1, *families[0].input_shape), np.float32)])
    learn_all(engine)
    for rows in (2, 4):  # of more buckets than one, which are not captured
        for family in families:
            engine.run(family, [0], [np.zeros((rows, *family.input_shape), np.float32)])
    assert list(engine._staging) == [first, families[-1].key]
    assert engine.graphs.captured(first) == {1}
    assert engine._staging[first].bindings == 1
    engine.run(families[0], [0], [np.zeros((1, *families[0].input_shape), np.float32)])
    assert (device.captures, device.replays) == (1, 1)


def test_the_number_of_families_with_staging_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those without graphs the least recently used goes; so do families that were loaded and never asked for."""
    monkeypatch.setattr("server.worker.engine.accelerator.MOST_FAMILIES", 3)
    families = [build_family("mlp", {"features": 1, "context_length": 3 + i, "hidden": 4}) for i in range(6)]
    device = FakeDevice()
    engine = DeviceEngine(DevicePool(max(family.row_floats for family in families) * 4, device), 4)
    engine.pool.write(0, np.zeros(engine.pool.floats.numel(), np.float32))
    for _ in range(EAGER_RUNS):
        engine.run(families[0], [0], [np.zeros((1, *families[0].input_shape), np.float32)])
    learn_all(engine)
    for family in families[1:]:
        engine.run(family, [0], [np.zeros((1, *family.input_shape), np.float32)])
    assert list(engine._staging) == [families[i].key for i in (0, 4, 5)]
    for family in families:
        engine.expect(family)
    assert len(engine._expected) == 3


def test_a_familys_memory_is_measured_once() -> None:
    """On whatever thread comes first; at another precision it is other memory."""
    family = build_family("mlp", {"features": 1, "context_length": 5, "hidden": 77})
    ran = list[int]()

    class Counted:
        """It notes its forwards."""

        key = f"counted-{family.key}"

        def __getattr__(self, name: str) -> object:
            return getattr(family, name)

        def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            """The family's."""
            ran.append(len(x))
            return family.forward(weights, x)

    counted: Family = Counted()  # type: ignore[assignment]
    engine = DeviceEngine(DevicePool(family.row_floats * 4, FakeDevice()), 4)
    engine.pool.write(0, np.zeros(family.row_floats, np.float32))
    thread = threading.Thread(target=lambda: engine.measure(counted))
    thread.start()
    thread.join()
    assert ran == [1]
    engine._stage(counted)
    assert ran == [1]
    assert measure_work(counted, bf16=True) != measure_work(counted, bf16=False)


def test_a_golden_sample_of_many_rows_takes_no_more_than_a_forward() -> None:
    """Its rows are an archive's to choose. Run at once they would want eight times what a forward here has."""
    family = build_family("gru", {"features": 4, "context_length": 32, "hidden": 32})
    row, device = family.row(random_tensors(family, 0)), FakeDevice()
    engine = DeviceEngine(DevicePool(row.nbytes, device), 8)
    x = np.random.default_rng(0).standard_normal((64, *family.input_shape), np.float32)
    device.total_bytes = device.ledger.used_bytes + 2 * 8 * sum(measure_work(family, bf16=False))
    np.testing.assert_allclose(engine.probe(family, row, x), answer_plainly(family, 0, x), rtol=1e-4, atol=1e-5)
