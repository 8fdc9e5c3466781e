"""Rows that a next worker takes back, and those that it must not: by two workers' memory in one process."""

import os
import signal
from collections.abc import Iterator
from itertools import count

import numpy as np
import pytest
import torch

from handlers.base import Float32
from handlers.forecasters import build_family, random_tensors
from handlers.kinds import ArchiveParts, RowModel, build_model, pack_model, run_row_on_cpu
from handlers.kinds.models import Target
from model_store.archives.archive import open_archive
from model_store.archives.manifest import Kind
from model_store.cache.cache import Cache, Placed
from model_store.cache.slots import Slot
from model_store.names import ModelName
from server.host import WorkerPlan
from server.ipc.row_memory import create_row_memory
from server.worker.engine.memory_pool import Pool
from server.worker.survivors import surviving_rows
from server.worker.survivors.surviving_rows import SurvivingRows, describe_row

SLAB = 1 << 16
PLAN = WorkerPlan(0, "cpu", (0,), 1, 16 * SLAB)
CONFIG = {"features": 2, "context_length": 12, "prediction_length": 4, "quantiles": 3}
TARGET = Target()
MOST = 3  #: residents of a worker that goes on for ever


@pytest.fixture
def descriptor() -> Iterator[int]:
    """Memory that the supervisor holds."""
    made = create_row_memory(0, PLAN.budget_bytes)
    assert made is not None
    yield made
    os.close(made)


class Worker:
    """One worker's memory and cache, without its loop."""

    def __init__(self, descriptor: int, distrusted: tuple[str, ...] = (), *, trusts: bool = True) -> None:
        self.survivors = SurvivingRows(descriptor, PLAN, SLAB, TARGET)
        self.pool = Pool(PLAN.budget_bytes, torch.device("cpu"), self.survivors.pool)
        self.cache = Cache(PLAN.budget_bytes, SLAB)
        self.adopted = self.survivors.adopt(self.cache, 0.0, distrusted, trusts=trusts)

    @property
    def models(self) -> set[str]:
        """The residents."""
        return {slot.model for slot in self.cache}

    def load(self, name: str, seed: int, *, dies_half_way: bool = False) -> tuple[Slot, Float32]:
        """Load a model as the step thread does. `dies_half_way`: in the middle of its row's copy."""
        family = build_family("tcn", CONFIG)
        parts = ArchiveParts(tensors=random_tensors(family, seed), architecture="tcn", config=CONFIG)
        archive = open_archive(pack_model(Kind.FORECASTER, parts, model_name="m"), name)
        built = build_model(archive, TARGET)
        assert isinstance(built.body, RowModel)
        assert built.row is not None
        record = describe_row(archive, built.body, built.row)
        assert record is not None
        model = ModelName(name)
        self.cache.want(model, 0.0)
        placed = self.cache.place(model, f"v{seed}", built.row.nbytes, 0.0, built.body.family.key)
        assert isinstance(placed, Placed)
        if dies_half_way:
            self.pool.write(placed.slot.offset, built.row[: built.row.size // 2])
            return placed.slot, built.row
        self.pool.write(placed.slot.offset, built.row)
        self.survivors.note_written(placed.slot, record, 7.0)
        self.cache.ready(placed.slot, 0.0)
        return placed.slot, built.row


def answer(model: RowModel, row: Float32) -> Float32:
    """What the model answers to a certain input."""
    return run_row_on_cpu(model.family, row, np.ones((1, *model.family.input_shape), np.float32))


def test_a_next_worker_has_the_residents_and_their_answers(descriptor: int) -> None:
    """Slots at once, with version and place; the model when it is proven, with the same answer bit for bit."""
    first = Worker(descriptor)
    rows = dict(first.load(f"{seed}.mar", seed) for seed in range(5))
    assert first.adopted == []
    second = Worker(descriptor)
    assert second.models == {f"{seed}.mar" for seed in range(5)}
    assert {validated for _, validated in second.adopted} == {7.0}
    assert second.cache.used_bytes == first.cache.used_bytes
    for slot, row in rows.items():
        again = second.cache.get(slot.model)
        assert again is not None
        assert (again.version, again.offset, again.family) == (slot.version, slot.offset, slot.family)
        model = second.survivors.prove(again)
        assert model is not None
        assert np.array_equal(answer(model, second.pool.read(again.offset, again.charge)), answer(model, row))
    assert not second.survivors.unproven


def test_a_damaged_row_is_not_served(descriptor: int) -> None:
    """One byte that differs, and there is no model; the others are untouched."""
    first = Worker(descriptor)
    slot, _ = first.load("a.mar", 1)
    first.load("b.mar", 2)
    first.survivors.pool[slot.offset + 100] ^= 1
    second = Worker(descriptor)
    found = {str(each.model): second.survivors.prove(each) for each, _ in second.adopted}
    assert found["a.mar"] is None
    assert found["b.mar"] is not None


def test_a_half_written_row_is_not_adopted(descriptor: int) -> None:
    """A worker that dies in the copy of a row leaves the rows before it, and at that place none."""
    first = Worker(descriptor)
    first.load("a.mar", 1)
    first.load("b.mar", 2, dies_half_way=True)
    assert Worker(descriptor).models == {"a.mar"}


def test_a_place_that_was_used_again_has_its_last_model(descriptor: int) -> None:
    """An evicted model does not come back, whatever lies at its place now."""
    first = Worker(descriptor)
    slot, _ = first.load("a.mar", 1)
    first.cache.unload(slot.model)
    first.cache.retired(slot)
    first.survivors.note_gone(slot)
    assert Worker(descriptor).models == set()
    third = Worker(descriptor)
    assert third.load("b.mar", 2)[0].offset == slot.offset
    assert Worker(descriptor).models == {"b.mar"}


def test_suspects_and_memory_without_trust_are_not_adopted(descriptor: int) -> None:
    """A model that may have killed its worker is left out for good; after too many deaths all are."""
    first = Worker(descriptor)
    first.load("bad.mar", 1)
    first.load("good.mar", 2)
    assert Worker(descriptor, ("bad.mar",)).models == {"good.mar"}
    assert Worker(descriptor).models == {"good.mar"}
    assert Worker(descriptor, trusts=False).models == set()
    assert Worker(descriptor).models == set()


def test_rows_of_another_version_are_not_adopted(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version of the program lays rows out in its own way: it begins with empty memory."""
    Worker(descriptor).load("a.mar", 1)
    monkeypatch.setattr(surviving_rows, "__version__", "0.0.0")
    assert Worker(descriptor).models == set()


@pytest.mark.slow
def test_fifty_workers_take_no_more_memory_than_one(descriptor: int) -> None:
    """Each loads and leaves: the memory holds what its last worker has."""
    sizes = []
    for turn in range(50):
        worker = Worker(descriptor)
        for slot in list(worker.cache):
            worker.cache.unload(slot.model)
            worker.cache.retired(slot)
            worker.survivors.note_gone(slot)
        worker.load(f"{turn}.mar", turn)
        sizes.append(os.fstat(descriptor).st_blocks * 512)
    assert Worker(descriptor).models == {"49.mar"}
    assert sizes[-1] <= sizes[0] + (1 << 17)


def test_a_real_death_in_the_middle_of_loads_leaves_whole_rows(descriptor: int) -> None:
    """Killed by the kernel at any moment: what the next worker adopts is proven, row by row."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        load_for_ever(descriptor, writes)
    os.close(writes)
    for _ in range(10):
        assert os.read(reads, 1), "it loads"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reads)
    second = Worker(descriptor)
    assert len(second.adopted) >= MOST - 1
    assert all(second.survivors.prove(slot) is not None for slot, _ in second.adopted)


def load_for_ever(descriptor: int, told: int) -> None:
    """Load a model, evict another, and so on; tell of each load."""
    worker = Worker(descriptor)
    for turn in count():
        for old in list(worker.cache)[: len(worker.cache) - MOST + 1]:
            worker.cache.unload(old.model)
            worker.cache.retired(old)
            worker.survivors.note_gone(old)
        worker.load(f"{turn}.mar", turn)
        os.write(told, b".")
