"""Items of resident models are accepted in one pass, and what the worker knows afterwards is as if each came alone."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from model_store.cache.cache import Cache
from model_store.names import ModelName
from server.errors import Refused
from server.ipc.frames import Request
from server.metrics import WorkerMetrics
from server.worker.engine.cpu import Engine
from server.worker.engine.memory_pool import Pool
from server.worker.host_cache import HostCache
from server.worker.prefetch.prefetcher import Prefetcher
from server.worker.scheduler import Job, Scheduler
from server.worker.step_loop import StepLoop
from tests.server.worker.long_jobs import make_unsliced_jobs
from tests.server.worker.test_step_loop import FAR, SLAB, FakeLoader

RESIDENT = [ModelName(name) for name in ("a/0", "a/1", "a/2", "b/0")]


class Call:
    """Keeps what is refused of a call; nothing is run, so that nothing is answered."""

    def __init__(self) -> None:
        self.refused: list[tuple[str, str]] = []

    def answer(
        self, job: Job, content_type: str, body: bytes, *, queue_s: float, inference_s: float, head: bytes = b""
    ) -> None:
        """Nothing is answered."""
        raise AssertionError((job, content_type, body, queue_s, inference_s, head))

    def answer_part(self, job: Job, content_type: str, body: bytes, head: bytes) -> bool:
        """Nor in parts."""
        raise AssertionError((job, content_type, body, head))

    def refuse(self, job: Job, refused: Refused) -> None:
        """Keep why there is no answer."""
        self.refused.append((job.model, str(refused)))


class World:
    """A step loop with four resident models, which no step interrupts."""

    def __init__(self, per_model: int = 2000, per_worker: int = 5000) -> None:
        self.cache, self.metrics = Cache(4 * SLAB, SLAB), WorkerMetrics(0, "cpu")
        self.scheduler = Scheduler(per_model, per_worker)
        self.foresight, self.call = Prefetcher(self.cache, self.metrics, 4), Call()
        self.loader = FakeLoader()
        self.steps = StepLoop(
            self.cache,
            self.scheduler,
            Engine(Pool(4 * SLAB, torch.device("cpu")), 512),
            self.loader,
            self.metrics,
            shelf=HostCache(torch.empty(0), 60),
            long=make_unsliced_jobs(),
            batch=64,
            loader_threads=1,
            patience_s=5,
            foresight=self.foresight,
            now=lambda: 1000.0,
        )

    def close(self) -> None:
        """End the loop before a step runs what is queued."""
        for job in self.scheduler.open_jobs():
            self.steps.cancel(job)
        self.loader.gate.set()
        self.steps.close()

    async def fill(self) -> None:
        """Load the models."""
        await asyncio.gather(*(self.steps.load(model) for model in RESIDENT))

    def submit(self, models: list[str], *, at_once: bool, alone: bool = False) -> list[Job]:
        """Accept a call's items, all resident ones at once or each by itself."""
        requests = [
            Request(i, FAR, model, "", "", 0, b"", int(999.5e9), alone, "desk") for i, model in enumerate(models)
        ]
        found = self.steps.submit_resident(requests, self.call) if at_once else [None] * len(requests)
        return [job or self.steps.submit(each, self.call) for job, each in zip(found, requests, strict=True)]

    def describe(self, jobs: list[Job]) -> dict[str, Any]:
        """All that the worker knows of these jobs and their models."""
        queued = sorted((job.model, job.cache) for job in self.scheduler.open_jobs())  # the odd ones come last
        return {
            "jobs": [(job.model, job.cache, job.done, job.arrived, job.deadline, job.accepted) for job in jobs],
            "leases": {slot.model: (slot.leases, slot.used_at, slot.state) for slot in self.cache},
            "slots": [None if job.slot is None else job.slot.model for job in jobs],
            "counts": ([self.scheduler.count(ModelName(job.model)) for job in jobs], len(self.scheduler)),
            "queued": (queued, self.scheduler.count_queued()),
            "refused": sorted(self.call.refused),
            "foresight": (repr(self.foresight), sorted(self.foresight.brought)),
            "loads": sorted(self.cache.loads),
            "metrics": sorted(line for line in self.steps.render_metrics().splitlines() if "requests" in line),
        }


def quarantine_model(world: World) -> None:
    """One of the resident models is refused, and the list of them has been replaced since the worker began."""
    world.steps.quarantine.replace({"a/1": "it killed a worker"})


def prefetch_model(world: World) -> None:
    """One of them was prefetched."""
    world.foresight.brought.add(ModelName("a/1"))


def pin_model(world: World) -> None:
    """One of them is pinned."""
    world.steps.pin(ModelName("a/1"))


def ask_model(world: World) -> None:
    """One of them has a request already."""
    world.submit(["a/1"], at_once=False)


PLAIN = ["a/0", "b/0", "a/1", "a/2"]


@pytest.mark.parametrize(
    ("models", "prepare", "bounds", "alone"),
    [
        (PLAIN, None, (), False),
        (["a/0", "c/missing", "a/1", "a/0"], None, (), False),
        (PLAIN, quarantine_model, (), False),
        (PLAIN, prefetch_model, (), False),
        (PLAIN, pin_model, (), False),
        (PLAIN, ask_model, (1,), False),
        (["a/0", "a/0", "a/0", "a/1"], None, (2,), False),
        (PLAIN, None, (5, 3), False),
        (PLAIN, None, (), True),
    ],
)
def test_the_worker_knows_the_same(
    models: list[str], prepare: Callable[[World], None] | None, bounds: tuple[int, ...], alone: bool
) -> None:
    """Whatever state a worker is in: jobs, leases, counts, refusals, rhythms, loads and metrics of both ways agree."""

    async def run(*, at_once: bool) -> dict[str, Any]:
        world = World(*bounds)
        try:
            await world.fill()
            world.loader.gate.clear()
            if prepare is not None:
                prepare(world)
            return world.describe(world.submit(models, at_once=at_once, alone=alone))
        finally:
            world.close()

    assert asyncio.run(run(at_once=True)) == asyncio.run(run(at_once=False))


def test_resident_items_are_queued_at_once() -> None:
    """Those of the four that nothing is odd about are jobs after the one pass; a missing model's item is left."""

    async def run() -> list[bool]:
        world = World()
        try:
            await world.fill()
            names = [*RESIDENT, ModelName("a/missing")]
            requests = [Request(i, FAR, name, "", "", 0, b"") for i, name in enumerate(names)]
            return [job is not None for job in world.steps.submit_resident(requests, world.call)]
        finally:
            world.close()

    assert asyncio.run(run()) == [True] * 4 + [False]
