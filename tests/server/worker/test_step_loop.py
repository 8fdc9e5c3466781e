"""The step loop with a real cache, scheduler and engine; only the loader is a fake that builds when it is told to."""

import asyncio
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import orjson
import pytest
import torch

from handlers.base import Family
from handlers.codecs.codec import FamilyCodec
from handlers.forecasters import build_family, random_tensors
from handlers.kinds import RowModel
from model_store.archives.manifest import GoldenSample
from model_store.cache.cache import Cache
from model_store.errors import ArchiveInvalid, LoadError, ModelNotFound
from model_store.names import ModelName
from server.contract import QUEUE
from server.errors import Refused, Situation
from server.ipc.frames import CacheResult, Request
from server.metrics import WorkerMetrics
from server.worker.engine.cpu import Engine
from server.worker.engine.memory_pool import Pool
from server.worker.host_cache import HostCache
from server.worker.model_loader import LoadedModel, LoadSteps
from server.worker.scheduler import Job, Scheduler
from server.worker.step_loop import BURST_LOADS, StepLoop
from tests.patience import PATIENCE_S
from tests.server.worker.loads import make_load
from tests.server.worker.long_jobs import make_unsliced_jobs

SLAB = 64 * 1024
FAMILIES: dict[str, Family] = {
    "a": build_family(
        "tcn", {"features": 2, "context_length": 9, "prediction_length": 2, "quantiles": 3, "channels": 16}
    ),
    "b": build_family(
        "tcn", {"features": 2, "context_length": 9, "prediction_length": 2, "quantiles": 3, "channels": 8}
    ),
}
FAR = 10**18
VARIANTS = 3
SEEDING = threading.Lock()  # torch has one seed for all threads


class FakeLoader:
    """Builds `FAMILY/NAME` with weights that its version alone decides; `gate` and `broken` hold and fail them."""

    def __init__(self) -> None:
        self.versions: dict[str, int] = {}
        self.broken: dict[str, LoadError] = {}
        self.golden: dict[str, GoldenSample] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.builds: list[str] = []

    def build(self, model: ModelName, *, revalidate: bool = False) -> LoadedModel:
        """A model, or the failure that was ordered."""
        del revalidate
        self.builds.append(model)
        assert self.gate.wait(PATIENCE_S), "the test forgot to open the gate"
        if model in self.broken:
            raise self.broken[model]
        family, version = FAMILIES[model[0]], self.versions.get(model, 1)
        with SEEDING:
            row = family.row(random_tensors(family, seed_of(model, version)))
        body = RowModel(family, FamilyCodec(family))
        return LoadedModel(model, f"v{version}", "store", 0.0, body, row, self.golden.get(model))

    def load(self, model: ModelName, *, revalidate: bool = False, stale: bool = False) -> LoadSteps:
        """One step, in the disk lane."""
        del stale
        return make_load(lambda: self.build(model, revalidate=revalidate))

    def forget(self, model: ModelName) -> None:
        """Nothing is cached below."""


def seed_of(model: str, version: int) -> int:
    """The weights of a version."""
    return sum(map(ord, model)) * 1000 + version


@cache
def make_reference(model: str, version: str) -> torch.nn.Module:
    """The plain network with that version's weights."""
    with SEEDING:
        network = FAMILIES[model[0]].reference()
        tensors = random_tensors(FAMILIES[model[0]], seed_of(model, int(version[1:])))
    network.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    return network


@cache
def compute_expected(model: str, version: str, variant: int) -> np.ndarray[Any, Any]:
    """What the reference of that version answers."""
    with torch.inference_mode():
        answer: np.ndarray[Any, Any] = make_reference(model, version)(torch.tensor([draw_inputs(variant)]))[0].numpy()
    return answer


def draw_inputs(variant: int) -> list[list[float]]:
    """One of the few request bodies."""
    return [[float(variant + t) / 9 for t in range(9)] for _ in range(2)]


@dataclass
class Front:
    """Whom jobs are answered to: keeps every answer and refusal, checks answers against the reference.

    What is wrong is told by `settled`: the step loop takes what is raised inside of a step for the model's fault.
    """

    steps: StepLoop
    jobs: list[Job] = field(default_factory=list)
    answers: dict[int, tuple[str, str]] = field(default_factory=dict)  # id -> model, version
    refusals: dict[int, Refused] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    queued: dict[int, float] = field(default_factory=dict)  # id -> seconds, of what is answered
    wrong: list[AssertionError] = field(default_factory=list)

    def answer_part(self, job: Job, content_type: str, body: bytes, head: bytes) -> bool:
        """No model here answers in parts."""
        raise AssertionError((job, content_type, body, head))

    def answer(
        self, job: Job, content_type: str, body: bytes, *, queue_s: float, inference_s: float, head: bytes = b""
    ) -> None:
        """An answer is right, and the first for its job."""
        with self._noting():
            assert content_type == "application/json"
            assert queue_s >= 0 <= inference_s
            assert job.slot is not None
            self._first(job)
            self.queued[job.request.id] = queue_s
            self.answers[job.request.id] = (job.model, job.slot.version)
            found = orjson.loads(body)["predictions"]
            right = compute_expected(job.model, job.slot.version, job.request.id % VARIANTS)
            np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)

    def refuse(self, job: Job, refused: Refused) -> None:
        """A refusal is the first word for its job too."""
        with self._noting():
            self._first(job)
            self.refusals[job.request.id] = refused

    def send(self, model: str, *, deadline_ns: int = FAR, body: bytes | None = None, arrived_ns: int = 0) -> int:
        """Submit a request; its id."""
        ident = len(self.jobs)
        body = body if body is not None else orjson.dumps({"x": draw_inputs(ident % VARIANTS)})
        request = Request(ident, deadline_ns, model, "", "", 0, body, arrived_ns)
        self.jobs.append(self.steps.submit(request, self))
        return ident

    async def settled(self) -> None:
        """Until every job has its answer or refusal. Raises AssertionError if one was wrong."""
        await let_loop_run(lambda: bool(self.wrong) or len(self.answers) + len(self.refusals) == len(self.jobs))
        for error in self.wrong:
            raise error

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except AssertionError as error:
            self.wrong.append(error)

    def _first(self, job: Job) -> None:
        assert job.request.id not in self.answers
        assert job.request.id not in self.refusals
        self.order.append(job.request.id)


Scenario = Callable[[StepLoop, FakeLoader, Front], Coroutine[Any, Any, None]]


def play(scenario: Scenario, *, slabs: int = 4, per_model: int = 2000) -> None:
    """Run a scenario against a step loop with a cache of so many slabs; afterwards nothing may be left over."""

    async def run() -> None:
        budget = slabs * SLAB
        loader, cache, scheduler = FakeLoader(), Cache(budget, SLAB, moves_per_call=2), Scheduler(per_model, 5000)
        engine = Engine(Pool(budget, torch.device("cpu")), 512)
        engine.pool.floats.fill_(float("nan"))
        steps = StepLoop(
            cache,
            scheduler,
            engine,
            loader,
            WorkerMetrics(0, "cpu"),
            shelf=HostCache(torch.empty(0), 60),
            long=make_unsliced_jobs(),
            batch=64,
            loader_threads=4,
            patience_s=5,
        )
        front = Front(steps)
        try:
            await scenario(steps, loader, front)
            await front.settled()
            assert len(scheduler) == 0
            assert all(slot.leases == 0 for slot in cache)
        finally:
            steps.close()

    asyncio.run(run())


async def let_loop_run(condition: Callable[[], bool]) -> None:
    """Let the loop run until something is true."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 -- the step loop has no events to wait for, by design
            await asyncio.sleep(0.001)


def rows_per_slab(family: str) -> int:
    """How many models of a family a slab holds."""
    return SLAB // (FAMILIES[family].row_floats * 4)


def list_resident(steps: StepLoop) -> set[str]:
    """The models that are ready."""
    return {row["model"] for row in steps.describe() if row["state"] == "ready"}


def test_a_thousand_first_calls_are_one_load() -> None:
    """Single flight: one miss builds, 999 coalesce, all are answered from the one model."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        del steps
        loader.gate.clear()
        for _ in range(1000):
            front.send("a/1")
        loader.gate.set()
        await front.settled()
        assert loader.builds == ["a/1"]
        caches = [job.cache for job in front.jobs]
        assert caches.count(CacheResult.MISS) == 1
        assert caches.count(CacheResult.COALESCED) == 999

    play(scenario)


def test_nothing_is_learnt_in_a_burst_of_loads() -> None:
    """Forwards that measure would take their time from loads and from hits beside them; after the burst they go on."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        under_way = list[int]()

        def learn() -> bool:
            under_way.append(len(steps._loads))
            return False

        steps._engine.learn = learn  # type: ignore[method-assign]
        loader.gate.clear()
        for i in range(BURST_LOADS):
            front.send(f"a/{i}")
        await let_loop_run(lambda: len(steps._loads) == BURST_LOADS)
        steps._learn()
        loader.gate.set()
        await front.settled()
        steps._learn()
        assert under_way[-1] == 0
        assert max(under_way) < BURST_LOADS

    play(scenario)


@pytest.mark.slow
def test_one_batch_serves_many_models() -> None:
    """Requests for different models of a family that arrived together run in one forward, half of them at a time."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        del loader
        await asyncio.gather(*(steps.load(ModelName(f"a/{i}")) for i in range(8)))
        for i in range(8):
            front.send(f"a/{i}")
        await front.settled()
        assert "fleetcast_inference_batch_models_sum{" in steps.render_metrics()
        assert 'fleetcast_inference_batch_models_sum{device="cpu",worker="0"} 8.0' in steps.render_metrics()
        assert 'fleetcast_inference_batch_models_count{device="cpu",worker="0"} 2.0' in steps.render_metrics()

    play(scenario)


def test_the_wait_of_each_request_of_a_batch_is_counted() -> None:
    """Requests that came at two times run in one batch: the queue's histogram has each with the time that it waited."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        loader.gate.set()
        await steps.load(ModelName("a/0"))
        now = time.monotonic()
        for seconds in (5, 5, 9, 5):
            front.send("a/0", arrived_ns=int((now - seconds) * 1e9))
        await front.settled()
        waited_most = time.monotonic() - now
        lines = [line for line in steps.render_metrics().splitlines() if line.startswith(QUEUE.series)]
        found = {line.partition("{")[0].rpartition("_")[2]: float(line.split()[-1]) for line in lines}
        assert found["count"] == 4
        assert 24 <= found["sum"] <= 24 + 4 * waited_most

    play(scenario)


def test_evicts_in_lru_order_and_only_for_a_built_model() -> None:
    """A full cache gives up its least recently used model, and not before the newcomer is built."""
    full = 2 * rows_per_slab("a")

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        for i in range(full):
            await steps.load(ModelName(f"a/{i}"))
        front.send("a/0")
        await front.settled()
        loader.gate.clear()
        front.send("a/new")
        await asyncio.sleep(0.05)
        assert list_resident(steps) == {f"a/{i}" for i in range(full)}
        loader.gate.set()
        await front.settled()
        assert list_resident(steps) == {f"a/{i}" for i in range(full) if i != 1} | {"a/new"}

    play(scenario, slabs=2)


@pytest.mark.parametrize(
    ("error", "situation"),
    [
        (ArchiveInvalid("a/bad: broken on purpose"), Situation.ARCHIVE_FAILED),
        (ModelNotFound("a/bad is not there"), Situation.NOT_FOUND),
        (RuntimeError("a bug of ours"), Situation.ARCHIVE_FAILED),
    ],
)
def test_a_failed_load_costs_nobody_their_place(error: Exception, situation: Situation) -> None:
    """Every waiter learns the cause, the next call is refused from memory without a load, and nobody is evicted."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        for i in range(rows_per_slab("a")):
            await steps.load(ModelName(f"a/{i}"))
        before = list_resident(steps)
        loader.broken["a/bad"] = error  # type: ignore[assignment]
        loader.gate.clear()
        for _ in range(3):
            front.send("a/bad")
        loader.gate.set()
        await front.settled()
        front.send("a/bad")
        assert [refused.situation for refused in front.refusals.values()] == [situation] * 4
        said = str(error) if isinstance(error, LoadError) else "the server's log says why"
        assert all(said in str(refused) for refused in front.refusals.values())
        assert front.jobs[-1].cache is CacheResult.NONE
        assert loader.builds.count("a/bad") == 1
        assert list_resident(steps) == before

    play(scenario, slabs=1)


@pytest.mark.slow
def test_a_failed_load_keeps_nothing_of_its_archive() -> None:
    """The failure is remembered and told to clients and operators; the frames it was raised in, and their bytes, go."""

    class Bytes:
        """An archive's, which can be watched."""

    watched: list[weakref.ref[Bytes]] = []

    def fail_with(archive: Bytes, why: str) -> None:
        watched.append(weakref.ref(archive))
        try:
            raise ValueError("not an archive")  # noqa: TRY301 -- a chain, as a reader of archives makes it
        except ValueError as error:
            raise ArchiveInvalid(why) from error

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        build = loader.build

        def fail_forward(model: ModelName, *, revalidate: bool = False) -> LoadedModel:
            if model.startswith("a/bad"):
                fail_with(Bytes(), f"{model}: broken {'x' * 10_000}")
            return build(model, revalidate=revalidate)

        loader.build = fail_forward  # type: ignore[method-assign]
        for i in range(3):
            front.send(f"a/bad{i}")
        with pytest.raises(ArchiveInvalid, match=r"a/bad9: broken x+ .shortened"):
            await steps.load(ModelName("a/bad9"))
        await front.settled()
        assert len(watched) == 4

        def are_gone() -> bool:
            gc.collect()
            return not any(archive() for archive in watched)

        await let_loop_run(are_gone)  # a loader thread has its last error in hand until it has ended its turn
        assert max(len(str(refused)) for refused in front.refusals.values()) < 3000

    play(scenario)


def test_a_wrong_golden_sample_costs_nobody_their_place() -> None:
    """The sample runs in scratch memory first: its archive is refused, the resident ones stay."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        for i in range(rows_per_slab("a")):
            await steps.load(ModelName(f"a/{i}"))
        before = list_resident(steps)
        x = draw_inputs(0)
        loader.golden["a/bad"] = GoldenSample(request={"x": x}, response={"predictions": [[9.0] * 3] * 2})
        loader.golden["a/good"] = GoldenSample(
            request={"x": x}, response={"predictions": compute_expected("a/good", "v1", 0).tolist()}
        )
        ident = front.send("a/bad")
        await front.settled()
        assert "golden" in str(front.refusals[ident])
        assert list_resident(steps) == before
        front.send("a/good")
        await front.settled()
        assert "a/good" in list_resident(steps)

    play(scenario, slabs=1)


def test_a_copy_that_fails_frees_the_room_and_the_waiters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device refuses a row: whoever waited is told, the room is free again, the next load gets it."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        del loader
        with monkeypatch.context() as broken:
            broken.setattr(Pool, "write", lambda *_: 1 / 0)
            lost = front.send("a/1")
            await front.settled()
        assert "the server's log says why" in str(front.refusals[lost])
        for i in range(2, 2 + rows_per_slab("a")):
            await steps.load(ModelName(f"a/{i}"))
        assert len(list_resident(steps)) == rows_per_slab("a")

    play(scenario, slabs=1)


@pytest.mark.slow
def test_pages_of_models() -> None:
    """By prefix, after a name, so many names: the same rows as cutting them out of the whole; evicted ones are gone."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        names = [f"{zone}/{i}" for zone in "ab" for i in range(12)]
        for name in names:
            front.send(name)
        await front.settled()
        loader.gate.clear()
        front.send("a/10x")
        await steps.unload(ModelName("a/3"))
        whole = steps.describe()
        known = [row["model"] for row in whole]
        assert known == sorted(known)
        assert "a/3" not in known
        assert {row["model"] for row in whole if row["state"] == "loading"} == {"a/10x"}
        for prefix in ("", "a/", "a/1", "b/11", "c"):
            for after in ("", "a/10", "a/99", "b/11", "z"):
                for limit in (1, 2, 5, 100):
                    wanted = [name for name in known if name.startswith(prefix) and name > after][:limit]
                    assert [row["model"] for row in steps.describe(prefix, after, limit)] == wanted
        loader.gate.set()

    play(scenario)


def test_a_reload_swaps_between_two_steps() -> None:
    """Requests queued on the old version get the old answer, later ones the new; the old row becomes free."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        await steps.load(ModelName("a/1"))
        loader.versions["a/1"] = 2
        swap = steps.load(ModelName("a/1"), revalidate=True)
        early = front.send("a/1")
        assert await swap == "v2"
        late = front.send("a/1")
        await front.settled()
        assert front.answers[early] == ("a/1", "v1")
        assert front.answers[late] == ("a/1", "v2")
        assert [row["version"] for row in steps.describe()] == ["v2"]

    play(scenario)


@pytest.mark.slow
def test_a_reload_of_the_same_version_changes_nothing() -> None:
    """The store had nothing new: the slot stays, and the operator learns the version."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        del front
        await steps.load(ModelName("a/1"))
        assert await steps.load(ModelName("a/1"), revalidate=True) == "v1"
        assert loader.builds == ["a/1", "a/1"]
        assert 'model_swaps_total{device="cpu",result="ok",worker="0"} 0.0\n' in steps.render_metrics()

    play(scenario)


def test_a_bad_reload_leaves_the_old_version_serving() -> None:
    """The new archive fails: the operator learns why, clients go on with the old one."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        await steps.load(ModelName("a/1"))
        loader.broken["a/1"] = ArchiveInvalid("a/1: bad new version")
        with pytest.raises(ArchiveInvalid, match="bad new version"):
            await steps.load(ModelName("a/1"), revalidate=True)
        ident = front.send("a/1")
        await front.settled()
        assert front.answers[ident] == ("a/1", "v1")
        assert 'model_swaps_total{device="cpu",result="failed",worker="0"} 1.0' in steps.render_metrics()

    play(scenario)


def test_unload_waits_for_queued_requests() -> None:
    """Requests that were there first are answered; then the operator's reply comes, and the model is gone."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        del loader
        await steps.load(ModelName("a/1"))
        idents = [front.send("a/1") for _ in range(200)]
        assert await steps.unload(ModelName("a/1"))
        assert set(front.answers) == set(idents)
        assert list_resident(steps) == set()
        assert not await steps.unload(ModelName("a/1"))

    play(scenario)


def test_unload_of_a_loading_model_lets_its_waiters_run_first() -> None:
    """An unload during a load joins it: whoever waits is served, then the model goes."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        loader.gate.clear()
        ident = front.send("a/1")
        unload = asyncio.create_task(steps.unload(ModelName("a/1")))
        await asyncio.sleep(0)
        loader.gate.set()
        assert await unload
        assert ident in front.answers
        assert list_resident(steps) == set()

    play(scenario)


def test_a_load_waits_while_all_room_is_leased() -> None:
    """Every row has a queue: the newcomer gets a place when the first queue is done, and nobody is refused."""
    full = rows_per_slab("a")

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        del loader
        for i in range(full):
            await steps.load(ModelName(f"a/{i}"))
        for i in range(full):
            for _ in range(40):
                front.send(f"a/{i}")
        newcomer = front.send("a/new")
        await front.settled()
        assert newcomer in front.answers
        assert not front.refusals

    play(scenario, slabs=1)


def test_pins_that_fill_the_budget_refuse_at_once() -> None:
    """No patience helps against pins: the newcomer is refused with the reason, the pinned stay."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        del loader
        for i in range(rows_per_slab("a")):
            await steps.load(ModelName(f"a/{i}"))
            steps.pin(ModelName(f"a/{i}"))
        before = list_resident(steps)
        ident = front.send("a/new")
        await front.settled()
        assert front.refusals[ident].situation is Situation.NO_ROOM
        assert "pinned" in str(front.refusals[ident])
        assert list_resident(steps) == before

    play(scenario, slabs=1)


def test_a_cold_slab_is_reclaimed_for_another_family() -> None:
    """Family b takes a slab of a full family a: the coldest of a go, the hot ones move and still answer right."""
    full = 3 * rows_per_slab("a")

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        del loader
        for i in range(full):
            await steps.load(ModelName(f"a/{i}"))
        hot = [f"a/{i}" for i in range(0, full, 3)]
        for model in hot:
            front.send(model)
        await front.settled()
        front.send("b/1")
        await front.settled()
        assert {*hot, "b/1"} <= list_resident(steps)
        for model in hot:
            front.send(model)
        await front.settled()
        assert not front.refusals

    play(scenario, slabs=3)


def test_deadlines_while_loading_and_while_queued() -> None:
    """A passed deadline is told in time, also during a load; the load goes on for those who come later."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        loader.gate.clear()
        late = front.send("a/1", deadline_ns=1)
        patient = front.send("a/1")
        await let_loop_run(lambda: late in front.refusals)
        assert front.refusals[late].situation is Situation.DEADLINE
        loader.gate.set()
        await front.settled()
        assert patient in front.answers
        queued = front.send("a/1", deadline_ns=1)
        await front.settled()
        assert front.refusals[queued].situation is Situation.DEADLINE
        assert list_resident(steps) == {"a/1"}

    play(scenario)


def test_the_queue_counts_from_the_arrival_at_the_front() -> None:
    """A request that waited 3 s for the worker to read it has queued for 3 s, in its answer and in the histogram."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        del loader
        front.send("a/0")
        await front.settled()
        late = front.send("a/0", arrived_ns=time.monotonic_ns() - 3_000_000_000)
        ahead_of_time = front.send("a/0", arrived_ns=time.monotonic_ns() + 3_000_000_000)
        await front.settled()
        assert front.queued[late] >= 3.0
        assert front.queued[ahead_of_time] >= 0.0
        told = steps.render_metrics().splitlines()
        total = next(line for line in told if line.startswith("fleetcast_inference_queue_seconds_sum"))
        assert float(total.rpartition(" ")[2]) >= 3.0

    play(scenario)


def test_a_load_that_will_not_make_the_deadline_is_refused_at_once_and_goes_on() -> None:
    """Loads take minutes here: who has 10 s is told at once when to come back, and then the model is there."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        front.send("a/0")
        await front.settled()
        steps._loads.lanes.disk.seconds = 120.0
        loader.gate.clear()
        soon = front.send("a/1", deadline_ns=time.monotonic_ns() + 10_000_000_000)
        assert soon in front.refusals, "before the load has ended"
        joins = front.send("a/1", deadline_ns=time.monotonic_ns() + 10_000_000_000)
        patient = front.send("a/1")
        for ident in (soon, joins):
            refused = front.refusals[ident]
            assert refused.situation is Situation.OVERLOADED
            assert refused.detail.retry_ms is not None
            assert 119_000 < refused.detail.retry_ms <= 120_000
        loader.gate.set()
        await front.settled()
        assert patient in front.answers
        assert loader.builds == ["a/0", "a/1"]
        again = front.send("a/1", deadline_ns=time.monotonic_ns() + 60_000_000_000)
        await front.settled()
        assert again in front.answers
        assert not steps._loads.lanes._due
        assert 0 < steps._loads.lanes.disk.seconds < 120

    play(scenario)


def test_what_is_ready_after_its_deadline_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline passes while the forward runs: the client is told so."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        del loader
        front.send("a/0")
        await front.settled()
        run = steps._engine.run

        def run_slowly(*arguments: Any) -> Any:
            found = run(*arguments)
            monkeypatch.setattr(steps._replies, "_now", lambda: time.monotonic() + 100)
            return found

        monkeypatch.setattr(steps._engine, "run", run_slowly)
        late = front.send("a/0", deadline_ns=time.monotonic_ns() + 50_000_000_000)
        await front.settled()
        assert front.refusals[late].situation is Situation.DEADLINE

    play(scenario)


def test_a_bad_request_costs_its_batch_nothing() -> None:
    """One wrong body in a batch is refused with its place; the others of the batch are answered."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        del loader
        await steps.load(ModelName("a/1"))
        good = front.send("a/1")
        bad = front.send("a/1", body=b'{"x": [[1, 2], [3, "x"]]}')
        also_good = front.send("a/1")
        await front.settled()
        assert front.refusals[bad].situation is Situation.BAD_REQUEST
        assert front.refusals[bad].detail.field is not None
        assert {good, also_good} == set(front.answers)

    play(scenario)


def test_cancelled_jobs_are_not_run_and_leave_no_lease() -> None:
    """A client that left: its job is skipped, ready or waiting, and holds nothing."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        await steps.load(ModelName("a/1"))
        front.send("a/1")
        loader.gate.clear()
        front.send("a/2")
        for job in front.jobs:
            steps.cancel(job)
        loader.gate.set()
        await let_loop_run(lambda: "a/2" in list_resident(steps))
        await asyncio.sleep(0.01)
        assert not front.answers
        assert not front.refusals
        front.jobs.clear()

    play(scenario)


def test_a_full_queue_refuses_and_leaves_the_others_room() -> None:
    """The bound is per model: one noisy market is told to wait, another one is served."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        del loader
        await asyncio.gather(steps.load(ModelName("a/1")), steps.load(ModelName("a/2")))
        for _ in range(15):
            front.send("a/1")
        other = front.send("a/2")
        await front.settled()
        assert [refused.situation for refused in front.refusals.values()] == [Situation.OVERLOADED] * 5
        assert other in front.answers
        assert front.order.index(other) < len(front.order) - 1

    play(scenario, per_model=10)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.slow
def test_any_interleaving_answers_every_request_once_and_right(seed: int) -> None:
    """Requests, reloads of new versions, unloads, pins and failures in random order over two families that do not fit:
    every request gets exactly one word, every answer is right for the version it names.
    """
    rng = random.Random(seed)
    names = [f"{family}/{i}" for family in "ab" for i in range(40)]

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        tasks: list[asyncio.Future[Any]] = []
        for _ in range(1500):
            model = ModelName(rng.choice(names[:20] if rng.random() < 0.5 else names))
            act = rng.random()
            if act < 0.9:
                front.send(model)
            elif act < 0.93:
                loader.versions[model] = loader.versions.get(model, 1) + 1
                tasks.append(steps.load(model, revalidate=True))
            elif act < 0.96:
                tasks.append(asyncio.create_task(steps.unload(model)))
            elif act < 0.98:
                (steps.pin if rng.random() < 0.3 else steps.unpin)(model)
            else:
                loader.broken = {rng.choice(names): ArchiveInvalid("broken on purpose")}
            if rng.random() < 0.3:
                await asyncio.sleep(rng.choice([0, 0, 0.002]))
        for name in names:
            steps.unpin(ModelName(name))
        await asyncio.gather(*tasks, return_exceptions=True)
        await front.settled()
        assert len(front.answers) > 1000

    play(scenario, slabs=3)


@pytest.mark.slow
def test_paths_are_measured_while_it_serves() -> None:
    """The sweep times the paths of a family that has run, and requests are answered right before and after."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        del loader
        engine = steps._engine
        assert isinstance(engine, Engine)
        async with asyncio.timeout(PATIENCE_S):
            # One round of requests may be so slow on a busy machine that long forwards are left out until the next.
            while len(engine.cost_table(FAMILIES["a"]).seconds) < 6:
                for i in range(16):
                    front.send(f"a/{i}")
                await front.settled()
                await asyncio.sleep(0.05)
        for i in range(48):
            front.send(f"a/{i % 16}" if i < 32 else "a/3")
        await front.settled()
        assert not front.refusals

    play(scenario)


@pytest.mark.slow
def test_only_a_loop_whose_steps_turn_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats come without any request; while each step fails there are none, though the event loop turns."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        del loader, front
        pulse = steps._long.pulse
        await let_loop_run(lambda: pulse._beats >= 2)
        fails = 0

        def fail(_: object) -> bool:
            nonlocal fails
            fails += 1
            raise RuntimeError("a bug of ours")

        steps._loop.set_exception_handler(lambda *_: None)
        with monkeypatch.context() as patch:
            patch.setattr(type(steps._scheduler), "has_work", property(fail))
            before = pulse._beats
            await let_loop_run(lambda: fails >= 3)
            assert pulse._beats == before
        await let_loop_run(lambda: pulse._beats > before)

    play(scenario)
