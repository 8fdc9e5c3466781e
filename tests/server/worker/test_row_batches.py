"""Calls for many models in a worker's batches: blocks, items by themselves and other requests beside them."""

import asyncio
import dataclasses
import json
import math
from array import array
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from handlers.base import Float32
from handlers.codecs.codec import FamilyCodec
from handlers.kinds import RowModel
from model_store.archives.manifest import ForecastSpec, InputChannel, Scaler
from model_store.cache.cache import Cache
from model_store.names import ModelName
from server.errors import Situation
from server.ipc.frames import Request
from server.ipc.packed import NumbersBlock, TableRow
from server.ipc.pulse import Pulse
from server.ipc.together import AskedTogether, read_answered, write_asked
from server.metrics import WorkerMetrics
from server.worker.adaptive_bands import AdaptiveBands
from server.worker.engine.cpu import Engine
from server.worker.engine.memory_pool import Pool
from server.worker.host_cache import HostCache
from server.worker.long_jobs import LongJobs
from server.worker.model_loader import LoadedModel
from server.worker.scheduler import Scheduler
from server.worker.step_loop import StepLoop
from server.worker.together_calls import TogetherCall
from tests.server.worker.test_step_loop import FAMILIES, FAR, SLAB, FakeLoader, Front, let_loop_run

FORECAST = ForecastSpec(
    frequency="1h", context_length=9, prediction_length=2, quantile_levels=(0.1, 0.5, 0.9), tail="clamp",
    inputs=(InputChannel(source="target"), InputChannel(source="target", lag=3)),
    scaler=Scaler(kind="asinh", center=50.0, scale=20.0),
)  # fmt: skip
STEPS = 12
MODELS = [f"a/{i}" for i in range(6)]
TINY_S = 1e-12  #: of a slice, which then has room for one row


class ForecastLoader(FakeLoader):
    """Builds models that forecast."""

    def build(self, model: ModelName, *, revalidate: bool = False) -> LoadedModel:
        """A model whose family is `a` or `b`."""
        loaded, family = super().build(model, revalidate=revalidate), FAMILIES[model[0]]
        return dataclasses.replace(loaded, body=RowModel(family, FamilyCodec(family, FORECAST)))


class World:
    """A step loop whose models forecast; `slice_s`: how long a batch takes at most."""

    def __init__(self, slice_s: float = math.inf) -> None:
        loop, budget = asyncio.get_running_loop(), 8 * SLAB
        self.cache, self.scheduler, self.bands = Cache(budget, SLAB), Scheduler(2000, 5000), AdaptiveBands()
        self.metrics = WorkerMetrics(0, "cpu")
        self.steps = StepLoop(
            self.cache, self.scheduler, Engine(Pool(budget, torch.device("cpu")), 512), ForecastLoader(), self.metrics,
            shelf=HostCache(torch.empty(0), 60), long=LongJobs(loop, Pulse(), slice_s=slice_s, long_s=math.inf),
            batch=64, loader_threads=2, patience_s=5, bands=self.bands,
        )  # fmt: skip
        self.ended: list[tuple[Situation, bytes]] = []

    def submit(
        self, models: Sequence[str], rows: Sequence[Any], *, numbers: bool = True, most_bytes: int = 10**6
    ) -> None:
        """Submit a call for these models, as a front connection does."""
        sizes = [] if isinstance(rows[0], TableRow) else [len(row) for row in rows]
        head = AskedTogether(list(models), sizes, b"{}", most_bytes, numbers=numbers)
        body = write_asked(head, rows)
        request = Request(7, FAR, "", "together", "together", len(body), body, client="desk")
        call = TogetherCall(request, lambda *told: self._end(call, *told))
        call.submit(self.steps)

    def _end(self, call: TogetherCall, situation: Situation, body: bytes) -> None:
        call.cancel(self.steps)
        self.ended.append((situation, body))

    async def settle(self, calls: int) -> None:
        """Until so many calls have ended. Then nothing may be left of them."""
        await let_loop_run(lambda: len(self.ended) == calls and len(self.scheduler) == 0)
        await let_loop_run(lambda: all(slot.leases == 0 for slot in self.cache))

    def count_batches(self) -> float:
        """How many forwards have run."""
        name, labels = "fleetcast_inference_batch_rows_count", {"worker": "0", "device": "cpu"}
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def run(scenario: Callable[[World], Coroutine[Any, Any, Any]], slice_s: float = math.inf) -> Any:
    """Play a scenario in a world with resident models."""

    async def play() -> Any:
        world = World(slice_s)
        try:
            await asyncio.gather(*(world.steps.load(ModelName(model)) for model in MODELS))
            return await scenario(world)
        finally:
            world.steps.close()

    return asyncio.run(play())


def make_row(i: int, *, odd: float | None = None, name: str | None = None) -> TableRow:
    """A row of a table, of its own prices."""
    target = [50 + 9 * math.sin(i + t) for t in range(STEPS)]
    if odd is not None:
        target[0] = odd
    return TableRow("2026-01-01 00:00:00", name, "d", [], [array("d", target).tobytes()])


def read_numbers(body: bytes, count: int) -> list[Float32]:
    """The numbers of each item, mean and levels. Items of a block are its rows in their order."""
    found, rows = list[Float32](), dict[int, int]()
    for answer, block in read_answered(body, count):
        assert answer.situation is Situation.OK
        assert isinstance(block, NumbersBlock)
        row = rows[id(block)] = rows.get(id(block), -1) + 1
        columns = [np.frombuffer(each, np.float32).reshape(-1, block.steps) for each in block.columns]
        found.append(np.stack([column[row] for column in columns]))
    return found


@pytest.mark.parametrize("slice_s", [math.inf, TINY_S])
def test_a_table_is_answered_in_one_batch_or_in_slices(slice_s: float) -> None:
    """As a block where there is room for all, else row by row; the numbers are those that each gets alone."""
    rows = [make_row(i) for i in range(len(MODELS))]

    async def ask(world: World) -> tuple[list[Float32], float, int]:
        world.submit(MODELS, rows)
        await world.settle(1)
        kept = world.bands.take(())
        return read_numbers(world.ended[0][1], len(rows)), world.count_batches(), len(kept.forecasts)

    async def ask_each(world: World) -> list[Float32]:
        for i, (model, row) in enumerate(zip(MODELS, rows, strict=True)):
            world.submit([model], [row])
            await world.settle(i + 1)
        return [read_numbers(body, 1)[0] for _, body in world.ended]

    found, batches, kept = run(ask, slice_s)
    assert (batches, kept) == (1 if slice_s == math.inf else len(MODELS), len(MODELS))
    np.testing.assert_allclose(found, run(ask_each), rtol=1e-5)


@pytest.mark.parametrize("slice_s", [math.inf, TINY_S])
@pytest.mark.parametrize("is_table", [True, False])
def test_a_call_runs_beside_other_requests(slice_s: float, *, is_table: bool) -> None:
    """Tensors of the same family, before and behind it in the queue, and items that are decoded alone."""
    rows: list[Any] = [make_row(i, odd=math.nan if i == 2 else None, name=f"n{i}") for i in range(len(MODELS))]
    if not is_table:
        rows = [make_json(row) for row in rows]

    async def ask(world: World) -> list[Any]:
        front = Front(world.steps)
        front.send("a/0")
        world.submit(MODELS, rows, numbers=is_table)
        for model in MODELS:
            front.send(model)
        await front.settled()
        await world.settle(1)
        told = [each for _, each in read_answered(world.ended[0][1], len(rows))]
        if is_table:
            assert [isinstance(each, NumbersBlock) for each in told] == [i != 2 for i in range(len(rows))]
            return []
        found = [json.loads(bytes(each)) for each in told if not isinstance(each, NumbersBlock)]
        assert [each.get("item_id") or each["predictions"][0]["item_id"] for each in found] == [
            f"n{i}" for i in range(6)
        ]
        return found

    run(ask, slice_s)


def make_json(row: TableRow) -> bytes:
    """The instance of a row; a missing number is null."""
    target = [None if math.isnan(x) else x for x in memoryview(row.series[0]).cast("d")]
    return msgspec.json.encode({"start": row.start, "target": target, "item_id": row.item_id})


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_call_that_ends_while_it_is_decoded_leaves_nothing(*, is_whole: bool) -> None:
    """An item is refused, and what that says is too many bytes: all others are given up, and their leases end."""
    rows = [make_row(i, odd=math.inf if i == 3 else None) for i in range(len(MODELS))]

    async def ask(world: World) -> list[Situation]:
        world.submit(MODELS, rows, most_bytes=10)
        await world.settle(1)
        return [situation for situation, _ in world.ended]

    assert run(ask, math.inf if is_whole else TINY_S) == [Situation.TOO_LARGE]


@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 0, 0, 1]])
def test_a_model_may_be_asked_several_times(rows: list[int]) -> None:
    """Each item has its own answer, in its own place."""

    async def ask(world: World) -> None:
        world.submit([MODELS[0]] * len(rows), [make_row(i) for i in rows])
        await world.settle(1)
        found = read_numbers(world.ended[0][1], len(rows))
        for i, row in enumerate(rows):
            np.testing.assert_allclose(found[i], found[rows.index(row)], rtol=1e-5)
        assert len({each.tobytes() for each in found}) >= len(set(rows))

    run(ask)
