"""Prefetches in the step loop with a real cache: their benefit, and that they never harm other models."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from model_store.cache.cache import Cache
from model_store.cache.eviction import make_policy
from model_store.errors import ArchiveInvalid
from model_store.names import ModelName
from server.ipc.frames import CacheResult
from server.metrics import WorkerMetrics
from server.worker.engine.cpu import Engine
from server.worker.engine.memory_pool import Pool
from server.worker.host_cache import HostCache
from server.worker.prefetch.prefetcher import Prefetcher
from server.worker.scheduler import Scheduler
from server.worker.step_loop import StepLoop
from tests.server.worker.long_jobs import make_unsliced_jobs
from tests.server.worker.test_step_loop import SLAB, FakeLoader, Front, let_loop_run, list_resident, rows_per_slab

PERIOD_S = 300.0
LEARNT = 5  #: the first tick that is foreseen
ROOM = rows_per_slab("a")


@dataclass
class TickedWorker:
    """A worker under a clock of ours: ticks for a fleet, and other traffic between them."""

    steps: StepLoop
    loader: FakeLoader
    front: Front
    metrics: WorkerMetrics
    cache: Cache
    now: list[float]
    builds: list[int] = field(default_factory=list)

    async def ask(self, models: Iterable[str]) -> list[CacheResult]:
        """One request for each, all at once; what the cache did."""
        ids = [self.front.send(model) for model in models]
        await self.front.settled()
        return [self.front.jobs[ident].cache for ident in ids]

    async def learn(self, fleet: Iterable[str], noise: Iterable[str] = ()) -> None:
        """Ticks, and noise after each, until the next one is foreseen."""
        for k in range(1, LEARNT):
            self.now[0] = PERIOD_S * k
            await self.ask(fleet)
            self.now[0] += 100
            await self.ask(f"{model}-{k}" for model in noise)

    async def learn_and_evict(self, fleet: Iterable[str], noise: Iterable[str] | None = None) -> None:
        """The fleet's ticks, then noise that fills the cache after the last of them."""
        await self.learn(fleet)
        await self.ask(name_models("n", ROOM) if noise is None else noise)

    async def before(self, tick: int) -> None:
        """It is shortly before a tick, and the loop has seen that."""
        self.now[0] = PERIOD_S * tick - 20
        await asyncio.sleep(0.15)

    def counted(self, result: str) -> int:
        """Loads ahead of time with this result."""
        found = self.metrics.registry.get_sample_value(
            "fleetcast_prefetch_total", {"worker": "0", "device": "cpu", "result": result}
        )
        return int(found or 0)


Scenario = Callable[[TickedWorker], Coroutine[Any, Any, None]]


def play(scenario: Scenario, *, slabs: int = 1, ahead: bool = True, policy: str = "lru", host: int = 0) -> None:
    """Run a scenario on a worker whose cache has so many slabs; no lease, load or taken host row may be left over."""

    async def run() -> None:
        now = [0.0]
        loader, metrics = FakeLoader(), WorkerMetrics(0, "cpu")
        cache = Cache(slabs * SLAB, SLAB, policy=make_policy(policy))
        shelf = HostCache(torch.empty(host), 1e9, clock=lambda: 0.0)
        steps = StepLoop(
            cache,
            Scheduler(2000, 5000),
            Engine(Pool(slabs * SLAB, torch.device("cpu")), 512),
            loader,
            metrics,
            shelf=shelf,
            long=make_unsliced_jobs(),
            batch=64,
            loader_threads=4,
            patience_s=5,
            foresight=Prefetcher(cache, metrics, 2) if ahead else None,
            now=lambda: now[0],
        )
        front = Front(steps)
        try:
            await scenario(TickedWorker(steps, loader, front, metrics, cache, now))
            await front.settled()
            assert all(slot.leases == 0 for slot in cache)
            await let_loop_run(lambda: not list(cache.loads))
            assert not any(kept.held for kept in shelf._kept.values())
        finally:
            loader.gate.set()
            steps.close()

    asyncio.run(run())


def name_models(prefix: str, count: int) -> list[str]:
    """Names of family a, for example a/x0."""
    return [f"a/{prefix}{i}" for i in range(count)]


@pytest.mark.slow
def test_what_other_traffic_evicted_is_back_before_the_tick() -> None:
    """Noise fills the cache between two ticks; at the next one every call is a hit, and every load was of use."""
    fleet, noise = name_models("t", ROOM), name_models("n", ROOM)

    async def scenario(market: TickedWorker) -> None:
        await market.learn(fleet)
        for tick in range(LEARNT, LEARNT + 3):
            market.now[0] = PERIOD_S * (tick - 1) + 100
            await market.ask(noise)
            assert not list_resident(market.steps) & set(fleet)
            await market.before(tick)
            await let_loop_run(lambda: list_resident(market.steps) == set(fleet))
            market.now[0] = PERIOD_S * tick
            assert set(await market.ask(fleet)) == {CacheResult.HIT}
        assert market.counted("used") == 3 * len(fleet)
        assert market.counted("wasted") == market.counted("late") == market.counted("refused") == 0

    play(scenario)


@pytest.mark.slow
def test_without_foresight_the_same_tick_is_cold() -> None:
    """What the test above is measured against: the same traffic, every call a miss."""
    fleet, noise = name_models("t", ROOM), name_models("n", ROOM)

    async def scenario(market: TickedWorker) -> None:
        await market.learn_and_evict(fleet, noise)
        await market.before(LEARNT)
        assert set(await market.ask(fleet)) == {CacheResult.MISS}

    play(scenario, ahead=False)


@pytest.mark.slow
def test_rows_of_the_host_tier_come_back_without_a_load() -> None:
    """A model that was evicted to host memory is brought from there."""
    fleet, noise = name_models("t", ROOM), name_models("n", ROOM)

    async def scenario(market: TickedWorker) -> None:
        await market.learn_and_evict(fleet, noise)
        builds = len(market.loader.builds)
        await market.before(LEARNT)
        await let_loop_run(lambda: list_resident(market.steps) == set(fleet))
        assert len(market.loader.builds) == builds

    play(scenario, host=2 * SLAB)


@pytest.mark.slow
def test_half_the_fleet_is_here_and_stays_while_the_rest_is_brought() -> None:
    """The oldest in an LRU are the fleet's own rows: noise goes instead of them, also for calls before the tick."""
    fleet, noise = name_models("t", ROOM), name_models("n", ROOM // 2)

    async def scenario(market: TickedWorker) -> None:
        await market.learn_and_evict(fleet, noise)
        builds = len(market.loader.builds)
        await market.before(LEARNT)
        await let_loop_run(lambda: list_resident(market.steps) == set(fleet))
        assert len(market.loader.builds) - builds == len(noise), "as many as were missing, none twice"

    play(scenario)


def test_a_fleet_that_does_not_fit_is_not_brought_in_circles() -> None:
    """Models of the same tick never make room for each other: each is built once at most, and the rest is refused."""
    fleet = name_models("t", 2 * ROOM)

    async def scenario(market: TickedWorker) -> None:
        await market.learn_and_evict(fleet)
        builds = len(market.loader.builds)
        await market.before(LEARNT)
        await let_loop_run(lambda: market.counted("refused") == ROOM)
        assert len(list_resident(market.steps) & set(fleet)) == ROOM
        assert len(market.loader.builds) - builds <= len(fleet)

    play(scenario)


@pytest.mark.slow
def test_other_traffic_before_the_tick_takes_its_own_room() -> None:
    """Between the loads ahead of time and the tick others miss, more than there is spare room for: they push out each
    other, the fleet stays, and its tick is warm.
    """
    fleet = name_models("t", ROOM - 2)

    async def scenario(market: TickedWorker) -> None:
        await market.learn(fleet, name_models("n", 3))
        await market.ask(name_models("o", ROOM))
        await market.before(LEARNT)
        await let_loop_run(lambda: set(fleet) <= list_resident(market.steps))
        for model in name_models("late", ROOM):
            assert await market.ask([model]) == [CacheResult.MISS]
        market.now[0] = PERIOD_S * LEARNT
        assert set(await market.ask(fleet)) == {CacheResult.HIT}
        assert market.counted("wasted") == 0

    play(scenario)


def test_a_request_is_served_where_all_that_is_here_is_about_to_be_asked() -> None:
    """No room is worth less than the fleet's: a request has it all the same, and who had to go is brought again."""
    fleet = name_models("t", ROOM)

    async def scenario(market: TickedWorker) -> None:
        await market.learn(fleet)
        await market.before(LEARNT)
        builds = len(market.loader.builds)
        assert await market.ask(["a/other"]) == [CacheResult.MISS]
        await let_loop_run(lambda: list_resident(market.steps) == set(fleet))
        assert len(market.loader.builds) - builds == 2

    play(scenario)


@pytest.mark.slow
def test_a_wrong_guess_costs_no_pinned_and_no_leased_row() -> None:
    """All rows are pinned but one, which a request holds: what was foreseen is refused, nobody has left."""
    fleet, pinned = name_models("t", 4), name_models("p", ROOM - 1)

    async def scenario(market: TickedWorker) -> None:
        await market.learn(fleet)
        await market.ask([*pinned, "a/held"])
        for model in pinned:
            market.steps.pin(ModelName(model))
        slot = market.cache.lease(ModelName("a/held"), market.now[0])
        assert slot is not None
        await market.before(LEARNT)
        await let_loop_run(lambda: market.counted("refused") == len(fleet))
        assert list_resident(market.steps) == {*pinned, "a/held"}
        market.cache.release(slot)
        assert set(await market.ask([*pinned, "a/held"])) == {CacheResult.HIT}

    play(scenario)


@pytest.mark.slow
def test_nothing_is_brought_while_somebody_waits_for_a_load() -> None:
    """A request's load comes first and alone; once it is over, foresight goes on."""
    fleet = name_models("t", 4)

    async def scenario(market: TickedWorker) -> None:
        await market.learn_and_evict(fleet)
        market.loader.gate.clear()
        market.front.send("a/urgent")
        builds = len(market.loader.builds)
        await market.before(LEARNT)
        assert [model for model in market.loader.builds[builds:] if model in fleet] == []
        market.loader.gate.set()
        await let_loop_run(lambda: set(fleet) <= list_resident(market.steps))

    play(scenario)


@pytest.mark.slow
def test_a_request_joins_the_load_that_is_on_its_way() -> None:
    """Asked for too early: coalesced with the load ahead of time, which is built once and counted as late."""

    async def scenario(market: TickedWorker) -> None:
        await market.learn_and_evict(["a/t"])
        market.loader.gate.clear()
        await market.before(LEARNT)
        builds = market.loader.builds.count("a/t")
        ident = market.front.send("a/t")
        market.loader.gate.set()
        await market.front.settled()
        assert market.front.jobs[ident].cache is CacheResult.COALESCED
        assert market.loader.builds.count("a/t") == builds
        assert market.counted("late") == 1

    play(scenario)


@pytest.mark.slow
def test_what_is_not_asked_for_after_all_is_counted_as_wasted() -> None:
    """The fleet's tick does not come: its rows are the first to go for others, and nobody else has lost one."""
    fleet = name_models("t", 4)

    async def scenario(market: TickedWorker) -> None:
        await market.learn_and_evict(fleet)
        await market.before(LEARNT)
        await let_loop_run(lambda: set(fleet) <= list_resident(market.steps))
        market.now[0] += 100
        await asyncio.sleep(0.15)
        await market.ask(name_models("o", ROOM))
        assert market.counted("wasted") == len(fleet)
        assert market.counted("used") == 0

    play(scenario)


@pytest.mark.slow
def test_a_load_ahead_of_time_that_fails_hurts_nobody() -> None:
    """A broken archive: counted, remembered like any failure, and the other models of the tick are brought."""
    fleet = name_models("t", 4)

    async def scenario(market: TickedWorker) -> None:
        await market.learn_and_evict(fleet)
        market.loader.broken["a/t0"] = ArchiveInvalid("a/t0: broken")
        await market.before(LEARNT)
        await let_loop_run(lambda: market.counted("failed") == 1 and set(fleet[1:]) <= list_resident(market.steps))

    play(scenario)


@pytest.mark.slow
def test_under_the_policy_that_knows_rhythms_itself() -> None:
    """`due` expects the fleet as well: foresight brings it back at the price of noise."""
    fleet, noise = name_models("t", ROOM // 2), name_models("n", 2 * ROOM)

    async def scenario(market: TickedWorker) -> None:
        await market.learn(fleet, noise)
        await market.before(LEARNT)
        await let_loop_run(lambda: set(fleet) <= list_resident(market.steps))

    play(scenario, policy="due")
