"""The step loop over an accelerator's pool, with a shelf for evicted models, and a device that runs out of memory."""

import asyncio
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from handlers.base import Float32
from handlers.codecs.codec import SingleCodec
from handlers.kinds import SingleModel
from model_store.archives.manifest import GoldenSample
from model_store.cache.cache import Cache
from model_store.errors import ModelNotFound, NoRoom, StoreUnavailable
from model_store.names import ModelName
from server.errors import Situation, situation_of
from server.ipc.frames import Tier
from server.ipc.pulse import Pulse
from server.metrics import WorkerMetrics
from server.worker.engine.accelerator import DeviceEngine, DevicePool
from server.worker.engine.cpu import Engine
from server.worker.engine.device_errors import EXIT_CODE
from server.worker.engine.graph_choice import EAGER_RUNS
from server.worker.engine.memory_pool import Pool
from server.worker.host_cache import HostCache
from server.worker.long_jobs import LongJobs
from server.worker.model_loader import LoadedModel
from server.worker.scheduler import Scheduler
from server.worker.step_loop import SWEEP_S, StepLoop
from tests.patience import PATIENCE_S
from tests.server.fake_device import FakeDevice
from tests.server.worker.long_jobs import make_unsliced_jobs
from tests.server.worker.test_step_loop import (
    FAMILIES,
    SLAB,
    FakeLoader,
    Front,
    compute_expected,
    draw_inputs,
    let_loop_run,
    list_resident,
    rows_per_slab,
)

NOW = 10_000.0


class Store(FakeLoader):
    """A store that was asked now, of rows and, under the name `single...`, of sessions."""

    now = NOW

    def build(self, model: ModelName, *, revalidate: bool = False) -> LoadedModel:
        """As of now."""
        if model.startswith("single"):
            self.builds.append(model)
            return LoadedModel(model, "v1", "store", 0.0, Echo().model(), None, None, self.now)
        return replace(super().build(model, revalidate=revalidate), validated_at=self.now)


class Echo:
    """A session that needs no model."""

    inputs: Mapping[str, tuple[int, ...]] = {"x": (1,)}
    outputs: Mapping[str, tuple[int, ...]] = {"y": (1,)}
    charge_bytes = SLAB

    def model(self) -> SingleModel:
        """As a load gives it."""
        return SingleModel(self, SingleCodec(self.inputs, self.outputs))

    def run(self, feeds: Mapping[str, Float32]) -> Mapping[str, Float32]:
        """The input."""
        return {"y": feeds["x"]}

    def run_all(self, requests: Sequence[Mapping[str, Float32]]) -> Sequence[Mapping[str, Float32]]:
        """The inputs."""
        return [self.run(feeds) for feeds in requests]


@dataclass
class House:
    """What a scenario plays with."""

    steps: StepLoop
    store: Store
    front: Front
    device: FakeDevice
    cache: Cache
    engine: Engine | DeviceEngine
    shelf: HostCache

    async def ask(self, model: str) -> int:
        """Send a request and wait for all there are; its id."""
        ident = self.front.send(model)
        await self.front.settled()
        return ident

    def tiers(self) -> list[str]:
        """Where each request's model came from."""
        return [job.tier.name.lower() for job in self.front.jobs]

    def series(self, name: str) -> float:
        """A number of the exposition."""
        text = self.steps.render_metrics()
        return next(
            float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"fleetcast_{name}")
        )


Scenario = Callable[[House], Coroutine[Any, Any, None]]


def play(
    scenario: Scenario,
    *,
    on_device: bool = True,
    slabs: int = 1,
    shelf_rows: int = 8,
    seed: int = 0,
    long: Callable[[], LongJobs] = make_unsliced_jobs,
) -> None:
    """Run a scenario over an engine whose free memory is NaN; afterwards nothing may be left over."""

    async def run() -> None:
        budget, device = slabs * SLAB, FakeDevice(seed)
        pool = DevicePool(budget, device) if on_device else Pool(budget, torch.device("cpu"))
        pool.floats.fill_(float("nan"))
        engine = DeviceEngine(pool, 16) if isinstance(pool, DevicePool) else Engine(pool, 16)
        store, cache = Store(), Cache(budget, SLAB, moves_per_call=2)
        row_floats = SLAB // 4 // rows_per_slab("a")
        shelf = HostCache(device.host(shelf_rows * row_floats), 60, clock=lambda: store.now)
        steps = StepLoop(
            cache,
            Scheduler(2000, 5000),
            engine,
            store,
            WorkerMetrics(0, "cpu"),
            shelf=shelf,
            long=long(),
            batch=64,
            loader_threads=4,
            patience_s=5,
        )
        house = House(steps, store, Front(steps), device, cache, engine, shelf)
        try:
            await scenario(house)
            await house.front.settled()
            assert all(slot.leases == 0 for slot in cache)
        finally:
            steps.close()

    asyncio.run(run())


def name_models(count: int) -> list[str]:
    """Models of one family."""
    return [f"a/m{i}" for i in range(count)]


@pytest.mark.parametrize("on_device", [True, False])
def test_an_evicted_model_returns_without_the_loader(on_device: bool) -> None:
    """On a device and on the CPU: a model that had to go is back from the shelf, right, counted as tier `host`, and
    leaves the shelf; the loader, and with it disk and store, hears nothing of it.
    """

    async def scenario(house: House) -> None:
        models = name_models(rows_per_slab("a") + 1)
        for model in models:
            await house.ask(model)
        assert (ModelName(models[0]) in house.shelf, models[0] in list_resident(house.steps)) == (True, False)
        assert house.series('model_cache_bytes{device="cpu",tier="host"') > 0
        built = list(house.store.builds)
        await house.ask(models[0])
        assert house.store.builds == built
        assert house.front.jobs[-1].tier is Tier.HOST
        assert house.front.answers[len(models)] == (models[0], "v1")
        assert ModelName(models[0]) not in house.shelf
        assert ModelName(models[1]) in house.shelf
        assert house.series('model_loading_seconds_count{device="cpu",tier="host"') == 1

    play(scenario, on_device=on_device)


def test_a_due_copy_asks_the_store() -> None:
    """`revalidate_s` after its validation a copy is not served: the loader finds the new version, and that answers."""

    async def scenario(house: House) -> None:
        models = name_models(rows_per_slab("a") + 1)
        for model in models:
            await house.ask(model)
        house.store.now += 61
        house.store.versions[models[0]] = 2
        ident = await house.ask(models[0])
        assert house.front.answers[ident] == (models[0], "v2")
        assert house.tiers()[-1] == "store"

    play(scenario)


def test_a_due_copy_serves_while_the_store_is_out_of_reach() -> None:
    """As the disk tier does; a model that the store has no more is forgotten instead."""

    async def scenario(house: House) -> None:
        models = name_models(rows_per_slab("a") + 2)
        for model in models:
            await house.ask(model)
        house.store.now += 61
        house.store.broken = {models[0]: StoreUnavailable("no route"), models[1]: ModelNotFound(f"{models[1]} is gone")}
        assert house.front.answers[await house.ask(models[0])] == (models[0], "v1")
        assert house.front.refusals[await house.ask(models[1])].situation is Situation.NOT_FOUND
        assert ModelName(models[1]) not in house.shelf

    play(scenario)


def test_reload_and_unload_leave_no_copy_behind() -> None:
    """An operator's reload asks the store though a fresh copy is here; an unload forgets the copy too."""

    async def scenario(house: House) -> None:
        models = name_models(rows_per_slab("a") + 1)
        for model in models:
            await house.ask(model)
        house.store.versions[models[0]] = 2
        assert await house.steps.load(ModelName(models[0]), revalidate=True) == "v2"
        assert ModelName(models[1]) in house.shelf
        assert await house.steps.unload(ModelName(models[1])) is False
        assert ModelName(models[1]) not in house.shelf

    play(scenario)


def test_a_copy_that_fails_is_only_a_loss_of_the_copy() -> None:
    """The device cannot bring a row out: the model is evicted all the same, and is not on the shelf with garbage."""

    async def scenario(house: House) -> None:
        models = name_models(rows_per_slab("a") + 1)
        for model in models[:-1]:
            await house.ask(model)

        def keep(offset: int, target: torch.Tensor) -> None:
            raise RuntimeError("an illegal memory access was encountered")

        house.engine.pool.keep = keep  # type: ignore[method-assign]
        await house.ask(models[-1])
        assert len(house.shelf) == 0
        await house.ask(models[0])
        assert house.tiers()[-1] == "store"

    play(scenario)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_fleet_larger_than_its_device_answers_right_on_any_order_of_the_streams(seed: int) -> None:
    """Two families, three slabs, evictions, moves, returns and reloads in bursts: every answer is its version's."""

    async def scenario(house: House) -> None:
        chance = random.Random(seed)
        models = [f"{family}/m{i}" for family in "ab" for i in range(2 * rows_per_slab("a"))]
        for _ in range(40):
            for model in chance.choices(models, k=chance.randrange(1, 12)):
                house.front.send(model)
            if chance.random() < 0.2:
                model = chance.choice(models)
                house.store.versions[model] = house.store.versions.get(model, 1) + 1
                house.steps.load(ModelName(model), revalidate=True)
            if chance.random() < 0.5:
                await house.front.settled()
        await house.front.settled()
        for model in (
            *models,
            *reversed(models),
        ):  # on the way back some are on the shelf, whatever was overtaken before
            await house.ask(model)
        assert not house.front.refusals
        assert {"host", "store", "none"} <= set(house.tiers())

    play(scenario, slabs=3, seed=seed, shelf_rows=6)


def test_a_request_that_its_batch_has_no_room_for_keeps_its_numbers() -> None:
    """It is decoded, put back, and runs behind another family's batch, whose inputs lie where its own lay."""

    async def scenario(house: House) -> None:
        for model in ("a/m0", "a/m1", "b/m0", "b/m1"):
            await house.ask(model)
        for _ in range(3):  # other inputs each: they follow from the request's number
            for model in ("a/m0", "a/m1", "b/m0", "b/m1", "a/m0", "b/m0", "a/m1"):
                house.front.send(model)
            await house.front.settled()
        assert not house.front.refusals  # answers are compared as they come

    play(scenario, slabs=2, long=lambda: LongJobs(asyncio.get_running_loop(), Pulse(), slice_s=0.0, long_s=math.inf))


def test_a_step_out_of_memory_once_is_answered() -> None:
    """Idle sessions leave, staging is given back, the step runs again, and nobody notices but the metrics."""

    async def scenario(house: House) -> None:
        await house.steps.load(ModelName("single/x"))
        await house.ask("a/m0")
        house.device.short_of_memory = 1
        ident = await house.ask("a/m0")
        assert house.front.answers[ident] == ("a/m0", "v1")
        assert list_resident(house.steps) == {"a/m0"}
        assert house.device.trims == 1
        assert house.series('model_evictions_total{device="cpu",reason="memory",tier="device"') == 1

    play(scenario, slabs=3)


def test_a_step_out_of_memory_is_507_and_the_next_one_is_answered() -> None:
    """Twice is once too often: NO_ROOM (507) naming the device; the models stay, and later requests are served."""

    async def scenario(house: House) -> None:
        await house.ask("a/m0")
        house.device.short_of_memory = 10**9
        refused = house.front.refusals[await house.ask("a/m0")]
        assert refused.situation is Situation.NO_ROOM
        assert "the device is out of memory" in refused.detail.message
        house.device.short_of_memory = 0
        assert await house.ask("a/m0") in house.front.answers

    play(scenario)


def test_the_staging_of_a_step_out_of_memory_is_gone_before_the_step_runs_again() -> None:
    """The frames of the error hold the family's staging; a second one beside it would never find room."""

    async def scenario(house: House) -> None:
        house.steps._learn_after = math.inf  # the request is to be the first to need staging
        await house.steps.load(ModelName("a/m0"))
        assert isinstance(house.engine, DeviceEngine)
        pool, used, trim = house.device.ledger.used_bytes, list[int](), house.engine.trim
        house.device.total_bytes = pool + 219_500  # its staging, without the scratch of a forward

        def trim_and_note() -> None:
            trim()
            used.append(house.device.ledger.used_bytes)

        house.engine.trim = trim_and_note  # type: ignore[method-assign]
        refused = house.front.refusals[await house.ask("a/m0")]
        assert "wanted" in refused.detail.message
        assert used == [pool]
        house.device.total_bytes = 2**30
        assert await house.ask("a/m0") in house.front.answers

    play(scenario)


def test_a_load_out_of_memory_once_and_always() -> None:
    """A row's copy fails once: the model serves. It always fails: its waiters get 507, and its room is free again."""

    async def scenario(house: House) -> None:
        house.device.short_of_memory = 1
        assert await house.steps.load(ModelName("a/m0")) == "v1"
        used = house.cache.used_bytes
        house.device.short_of_memory = 10**9
        with pytest.raises(NoRoom, match="a/m1: the device is out of memory") as failed:
            await house.steps.load(ModelName("a/m1"))
        assert situation_of(failed.value) is Situation.NO_ROOM
        assert house.cache.used_bytes == used
        assert list_resident(house.steps) == {"a/m0"}
        house.device.short_of_memory = 0
        assert await house.ask("a/m0") in house.front.answers

    play(scenario)


def test_a_golden_sample_out_of_memory_is_not_the_archives_fault() -> None:
    """The archive is not called bad, and not forgotten on disk, because the device had no memory to prove it."""

    async def scenario(house: House) -> None:
        forgotten: list[str] = []
        house.store.forget = forgotten.append  # type: ignore[method-assign, assignment]
        response = {"predictions": compute_expected("a/m0", "v1", 0).tolist()}
        house.store.golden["a/m0"] = GoldenSample(request={"x": draw_inputs(0)}, response=response)
        house.device.short_of_memory = 2
        with pytest.raises(NoRoom):
            await house.steps.load(ModelName("a/m0"))
        assert forgotten == []
        assert await house.steps.load(ModelName("a/m0")) == "v1"

    play(scenario)


def test_page_locked_memory_that_is_short_costs_one_request() -> None:
    """The host lets the device lock no more: NO_ROOM for the request that needed it; the worker stays and serves."""

    async def scenario(house: House) -> None:
        house.steps._learn_after = math.inf  # the request is to be the first to need staging
        await house.steps.load(ModelName("a/m0"))
        house.device.page_locked_bytes = house.device.page_locked.used_bytes
        refused = house.front.refusals[await house.ask("a/m0")]
        assert refused.situation is Situation.NO_ROOM
        house.device.page_locked_bytes = 2**30
        assert await house.ask("a/m0") in house.front.answers

    play(scenario)


def test_page_locked_memory_that_is_short_costs_one_load() -> None:
    """A golden sample's answers have no place: the load is refused, and the next one succeeds."""

    async def scenario(house: House) -> None:
        response = {"predictions": compute_expected("a/m0", "v1", 0).tolist()}
        house.store.golden["a/m0"] = GoldenSample(request={"x": draw_inputs(0)}, response=response)
        house.device.page_locked_bytes = house.device.page_locked.used_bytes
        with pytest.raises(NoRoom, match="out of memory"):
            await house.steps.load(ModelName("a/m0"))
        assert await house.ask("b/m0") not in house.front.answers
        house.device.page_locked_bytes = 2**30
        assert await house.steps.load(ModelName("a/m0")) == "v1"
        assert await house.ask("b/m0") in house.front.answers

    play(scenario, slabs=2)


def test_idle_work_that_fails_costs_nothing() -> None:
    """The sweep goes on, and with it the beats that say that this worker is alive."""

    async def scenario(house: House) -> None:
        tried: list[None] = []

        def learn() -> bool:
            tried.append(None)
            raise torch.OutOfMemoryError("out of memory")

        house.engine.learn = learn  # type: ignore[method-assign]
        await let_loop_run(lambda: len(tried) > 1)
        assert await house.ask("a/m0") in house.front.answers

    play(scenario)


#: A worker whose device is lost in idle work, and one whose device is lost while its memory is freed.
LOST_IN = {
    "idle work": "    house.engine.learn = house.device.require_context\n    await asyncio.sleep(60)\n",
    "freeing": "    house.steps._residents.free_memory('a batch was out of memory')\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("where", LOST_IN)
def test_a_device_that_is_lost_outside_of_a_request_ends_the_worker(where: str) -> None:
    """Nobody waits for this work, so no request would ever say that the worker is of no use any more."""
    script = (
        "import asyncio\n"
        "from tests.server.worker.test_step_loop_memory import play\n"
        "async def scenario(house):\n"
        "    house.device.break_context()\n"
        f"{LOST_IN[where]}"
        "play(scenario)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )
    assert ended.returncode == EXIT_CODE, ended.stderr
    assert "device_lost" in ended.stdout + ended.stderr


def test_forwards_are_captured_while_nothing_is_ready() -> None:
    """Requests run eagerly, as many as there are, and no capture comes under or between them while others are ready.
    Once they are answered the forward is captured, and then replayed.
    """

    async def scenario(house: House) -> None:
        await house.ask("a/m0")
        graph, step, steps_under_way, busy = house.device.graph, house.steps.step, list[int](), list[bool]()

        def note_step() -> None:
            steps_under_way.append(1)
            step()
            steps_under_way.pop()

        def note_capture(work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
            busy.append(bool(steps_under_way) or house.steps._scheduler.has_work)
            return graph(work)

        house.steps.step = note_step  # type: ignore[method-assign]
        house.device.graph = note_capture  # type: ignore[method-assign]
        until_s = time.monotonic() + 4 * SWEEP_S
        while time.monotonic() < until_s or len(house.front.jobs) <= 2 * EAGER_RUNS:  # several sweeps find work
            house.front.send("a/m0")
            house.steps._learn()
            await asyncio.sleep(0)
        await let_loop_run(lambda: bool(busy))
        assert busy == [False]
        replays = house.device.replays
        await house.ask("a/m0")
        assert house.device.replays == replays + 1

    play(scenario)


def test_learning_takes_a_tenth_of_the_time_at_most() -> None:
    """However long a piece takes on a device, and nothing while requests are ready; the CPU's pieces are short."""

    async def scenario(house: House) -> None:
        clock, began = [0.0], list[float]()

        def learn() -> bool:
            began.append(clock[0])
            clock[0] += 2.0
            return True

        house.engine.learn = learn  # type: ignore[method-assign]
        house.steps._now, house.steps._learn_after = lambda: clock[0], 0.0
        for _ in range(41):
            house.steps._learn()
            clock[0] += 1.0
        house.steps._now, house.steps._learn_after = time.monotonic, 0.0
        assert began == ([0.0, 20.0, 40.0] if isinstance(house.engine, DeviceEngine) else [3.0 * i for i in range(41)])
        await house.steps.load(ModelName("a/m0"))
        house.steps._learn_after = 0.0
        began.clear()
        house.front.send("a/m0")
        house.steps._learn()
        assert len(began) == isinstance(house.engine, Engine)
        await house.front.settled()

    for on_device in (True, False):
        play(scenario, on_device=on_device)


def test_a_loaded_family_is_warmed_before_its_first_request() -> None:
    """In idle time: the request that comes then finds its staging."""

    async def scenario(house: House) -> None:
        await house.steps.load(ModelName("a/m0"))
        assert isinstance(house.engine, DeviceEngine)
        engine = house.engine
        await let_loop_run(lambda: FAMILIES["a"].key in engine._staging)
        assert engine.open_batch(FAMILIES["a"]).is_staged
        assert await house.ask("a/m0") in house.front.answers

    play(scenario)
