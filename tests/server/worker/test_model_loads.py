"""Due copies, by a whole step loop: served while the store is slow or out, and renewed when it is back."""

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from model_store.cache.cache import Cache
from model_store.errors import ModelNotFound, StoreUnavailable
from model_store.names import ModelName
from model_store.stores.store_health import StoreHealth
from server.errors import Situation
from server.metrics import WorkerMetrics
from server.worker import model_loads
from server.worker.engine.cpu import Engine
from server.worker.engine.memory_pool import Pool
from server.worker.host_cache import HostCache
from server.worker.load_lanes import SLOW_PLACES, SLOW_S, SUSPECTED_S
from server.worker.scheduler import Scheduler
from server.worker.step_loop import StepLoop
from tests.server.worker.long_jobs import make_unsliced_jobs
from tests.server.worker.test_load_lanes import HeldStore, name_models
from tests.server.worker.test_step_loop import SLAB, Front, let_loop_run, list_resident

THREADS = 2
DUE = ModelName("a/due")


@dataclass
class Worker:
    """A step loop and what is around it. `clock`: the monotonic time, moved by the test."""

    steps: StepLoop
    store: HeldStore
    front: Front
    health: StoreHealth
    clock: list[float]

    def version(self, ident: int) -> str:
        """Which version answered a request."""
        return self.front.answers[ident][1]

    def serving(self, model: str) -> str:
        """The version that serves, or nothing."""
        rows = [row for row in self.steps.describe() if row["model"] == model and row["state"] == "ready"]
        return str(rows[0]["version"]) if rows else ""

    def series(self, name: str) -> float:
        """The sum of a metric's samples."""
        found = [line for line in self.steps.render_metrics().splitlines() if line.startswith(f"fleetcast_{name}")]
        return sum(float(line.rpartition(" ")[2]) for line in found)


Scenario = Callable[[Worker], Coroutine[Any, Any, None]]


def play(scenario: Scenario) -> None:
    """Run a scenario; in the end every request has its answer, and no lease is left."""

    async def run() -> None:
        store, clock = HeldStore(), [1_000.0]
        health, cache = StoreHealth(lambda: clock[0]), Cache(4 * SLAB, SLAB)
        steps = StepLoop(
            cache,
            Scheduler(2000, 5000),
            Engine(Pool(4 * SLAB, torch.device("cpu")), 512),
            store,
            WorkerMetrics(0, "cpu"),
            shelf=HostCache(torch.empty(0), 60),
            long=make_unsliced_jobs(),
            batch=64,
            loader_threads=THREADS,
            patience_s=5,
            health=health,
            now=lambda: clock[0],
        )
        front = Front(steps)
        try:
            await scenario(Worker(steps, store, front, health, clock))
            await front.settled()
            assert all(slot.leases == 0 for slot in cache)
        finally:
            steps.close()
            store.answer_all()

    asyncio.run(run())


@pytest.mark.slow
def test_a_slow_store_delays_a_due_copy_by_no_more_than_a_moment() -> None:
    """The request is answered while the store still hangs; what it gives at last is swapped in, without a request."""

    async def scenario(worker: Worker) -> None:
        store, front = worker.store, worker.front
        store.due.add(DUE)
        early = front.send(DUE)
        await let_loop_run(lambda: store.asked == [DUE])
        assert not front.answers
        worker.clock[0] += SLOW_S
        await front.settled()
        assert worker.version(early) == "v1"
        store.versions[DUE] = 2
        store.answer(DUE)
        await let_loop_run(lambda: worker.serving(DUE) == "v2")
        late = front.send(DUE)
        await front.settled()
        assert worker.version(late) == "v2"
        assert store.asked == [DUE]

    play(scenario)


@pytest.mark.slow
def test_while_the_store_is_out_due_copies_are_served_without_asking() -> None:
    """No load waits for it; when it is back, each is asked for once, and what is new is swapped in."""

    async def scenario(worker: Worker) -> None:
        store, front = worker.store, worker.front
        models = name_models("due", 6)
        store.due.update(models)
        worker.health.note_failure(worker.clock[0])
        for model in models:
            front.send(model)
        await front.settled()
        assert set(front.answers) == set(range(6))
        assert store.asked == []
        store.versions["a/due3"] = 2
        for model in models:
            store.answer(model)
        worker.health.note_answer()
        await let_loop_run(lambda: worker.serving("a/due3") == "v2")
        await let_loop_run(lambda: sorted(store.asked) == models and not list(worker.steps._cache.loads))
        assert list_resident(worker.steps) == set(models)
        assert not worker.steps._loads._due

    play(scenario)


def test_models_to_renew_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """More are checked when they are next loaded."""
    monkeypatch.setattr(model_loads, "MAX_DUE", 2)

    async def scenario(worker: Worker) -> None:
        models = name_models("due", 6)
        worker.store.due.update(models)
        worker.health.note_failure(worker.clock[0])
        for model in models:
            worker.front.send(model)
        await worker.front.settled()
        assert len(worker.steps._loads._due) == 2

    play(scenario)


def test_a_copy_whose_key_is_gone_serves_on_as_after_a_reload() -> None:
    """The store is back and says that there is no such key: what is resident stays."""

    async def scenario(worker: Worker) -> None:
        store, front = worker.store, worker.front
        store.due.add(DUE)
        worker.health.note_failure(worker.clock[0])
        front.send(DUE)
        await front.settled()
        store.due.clear()
        store.answer(DUE, ModelNotFound(f"{DUE} is not there"))
        worker.health.note_answer()
        await let_loop_run(lambda: worker.series("model_load_failures_total") == 1)
        again = front.send(DUE)
        await front.settled()
        assert worker.version(again) == "v1"

    play(scenario)


def test_a_store_that_goes_on_to_hang_is_not_asked_for_a_key_again_and_again() -> None:
    """The key times out, its copy serves, and it is left alone until it is no suspect any more."""

    async def scenario(worker: Worker) -> None:
        store, front = worker.store, worker.front
        store.due.add(DUE)
        front.send(DUE)
        await let_loop_run(lambda: store.asked == [DUE])
        worker.clock[0] += SLOW_S
        await front.settled()
        store.answer(DUE, StoreUnavailable("timed out"))
        await let_loop_run(lambda: DUE in worker.steps._loads._due and not worker.steps._loads.lanes.store.running)
        await worker.steps.unload(DUE)
        front.send(DUE)
        await front.settled()
        assert len(front.answers) == 2
        assert store.asked == [DUE]

    play(scenario)


def test_without_a_copy_a_load_fails_at_once_where_many_hang_already() -> None:
    """The store is out and every place is taken: one more request is refused with the cause, and not asked for."""

    async def scenario(worker: Worker) -> None:
        store, front = worker.store, worker.front
        places = THREADS * (1 + SLOW_PLACES)
        for model in name_models("hung", places):
            front.send(model)
        for asked in range(THREADS, places + 1, THREADS):
            await let_loop_run(lambda asked=asked: len(store.asked) == asked)  # type: ignore[misc]
            worker.clock[0] += SLOW_S
        worker.health.note_failure(worker.clock[0] - 7)
        cold = front.send("a/cold")
        await let_loop_run(lambda: cold in front.refusals)
        assert front.refusals[cold].situation is Situation.STORE_FAILED
        assert "not answered for 7 s" in str(front.refusals[cold])
        assert front.refusals[cold].detail.retry_ms == 1_000
        worker.clock[0] += 0.25
        again = front.send("a/cold")
        assert front.refusals[again].detail.retry_ms == 750
        assert len(store.asked) == places
        store.answer_all()

    play(scenario)


def test_requests_learn_that_their_model_comes_from_a_slow_store() -> None:
    """Downloads take half a minute: who has 10 s is told as soon as it is known that the model has to be fetched."""

    async def scenario(worker: Worker) -> None:
        store, front = worker.store, worker.front
        worker.steps._loads.lanes.store.seconds = 30.0
        deadline = int((worker.clock[0] + 10) * 1e9)
        hasty, patient = front.send("a/cold", deadline_ns=deadline), front.send("a/cold")
        await let_loop_run(lambda: hasty in front.refusals)
        assert front.refusals[hasty].situation is Situation.OVERLOADED
        assert front.refusals[hasty].detail.retry_ms == 30_000
        store.answer("a/cold")
        await front.settled()
        assert patient in front.answers

    play(scenario)


def act_at_random(worker: Worker, rng: random.Random, model: ModelName) -> asyncio.Future[Any] | None:
    """One thing that a client, an operator, the store or the clock does."""
    store, steps = worker.store, worker.steps
    acts: dict[str, tuple[int, Callable[[], Any]]] = {
        "request": (50, lambda: worker.front.send(model)),
        "unload": (10, lambda: asyncio.ensure_future(steps.unload(model))),
        "reload": (5, lambda: steps.load(model, revalidate=True)),
        "answer": (10, lambda: store.answer_some(rng, None)),
        "time out": (5, lambda: store.answer_some(rng, StoreUnavailable("timed out"))),
        "let time pass": (10, lambda: worker.clock.__setitem__(0, worker.clock[0] + rng.choice([0.1, SLOW_S]))),
        "let a copy become due": (5, lambda: store.fresh.discard(model)),
        "outage": (2, lambda: worker.health.note_failure(worker.clock[0])),
        "end of the outage": (3, worker.health.note_answer),
    }
    (name,) = rng.choices(list(acts), [weight for weight, _ in acts.values()])
    found = acts[name][1]()
    return found if isinstance(found, asyncio.Future) else None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_store_does_every_request_has_one_answer(seed: int) -> None:
    """Requests, unloads, reloads, time, answers, time-outs and outages in random order: each request is answered or
    refused once, and when the store is well again nothing is left that waits, and all copies are renewed.
    """
    rng = random.Random(seed)
    names = [ModelName(f"a/{i}") for i in range(24)]

    async def scenario(worker: Worker) -> None:
        store, steps, loads = worker.store, worker.steps, worker.steps._loads
        store.due.update(names[:16])
        tasks = []
        for _ in range(600):
            tasks.append(act_at_random(worker, rng, rng.choice(names)))
            await asyncio.sleep(rng.choice([0, 0, 0.002]))
        store.is_well = True
        store.answer_all(None)
        worker.health.note_answer()
        worker.clock[0] += SUSPECTED_S
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)
        lanes = loads.lanes
        await let_loop_run(
            lambda: not (loads._due or list(steps._cache.loads) or lanes.store.running or lanes.disk.running)
        )
        assert (lanes.waiting_to_ask, lanes.waiting_to_build, len(loads)) == (0, 0, 0)
        assert [*lanes._runs, *lanes._left, *lanes._due, *loads._renewing] == []
        assert lanes._fetched == 0

    play(scenario)
