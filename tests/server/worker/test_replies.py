"""Items of a call that were computed together are answered or refused once each, whatever ends their call meanwhile."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
import torch

from handlers.errors import RunFailed
from model_store.names import ModelName
from server.errors import Refused
from server.ipc.packed import BlockRows, NumbersBlock
from server.worker.engine.cpu import Engine
from server.worker.engine.memory_pool import Pool
from server.worker.host_cache import HostCache
from server.worker.replies import Replies
from server.worker.resident_models import ResidentModels
from server.worker.scheduler import Job
from tests.server.worker.test_resident_items import Call, World
from tests.server.worker.test_step_loop import SLAB


class EndingCall(Call):
    """A call that ends with its first refusal or answers, as one does whose answers are too large."""

    jobs: Sequence[Job] = ()

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self.answered: list[str] = []

    def refuse(self, job: Job, refused: Refused) -> None:
        """Keep the reason, and give up the others."""
        super().refuse(job, refused)
        self._end()

    def answer_items(
        self, jobs: Sequence[Job], content_type: str, bodies: Sequence[Any], began: float, inference_s: float
    ) -> None:
        """Keep whose answers came, and give up the others."""
        assert (content_type, began, inference_s, len(bodies)) == ("text", 1000.0, 0.001, len(jobs))
        self.answered += [job.model for job in jobs]
        self._end()

    def _end(self) -> None:
        for job in list(self.jobs):
            self._world.steps.cancel(job)


@pytest.mark.parametrize("failing", [(0,), (1,), (2,), (0, 1), (0, 1, 2), ()])
def test_a_call_that_ends_meanwhile_finishes_each_item_once(failing: tuple[int, ...]) -> None:
    """No job and no lease is left, and none ends twice: what is answered is finished before anything is refused."""

    async def answer(world: World) -> None:
        call = world.call = EndingCall(world)
        models = ["a/0", "a/1", "a/2"]
        call.jobs = jobs = world.submit(models, at_once=True)
        found = [RunFailed("its outputs are not finite") if i in failing else b"1" for i in range(len(jobs))]
        make_replies(world).answer_items(jobs, found, "text", 1000.0, 0.001)
        assert call.answered == [model for i, model in enumerate(models) if i not in failing]
        assert len(call.refused) == (1 if len(failing) == len(models) else 0), "the call had ended"
        assert len(world.scheduler) == 0
        assert [world.scheduler.count(ModelName(model)) for model in models] == [0, 0, 0]
        assert [slot.leases for slot in world.cache] == [0, 0, 0, 0]

    run_filled(answer)


@pytest.mark.parametrize("gone", [(), (1,), (0, 2), (0, 1, 2)])
def test_a_block_answers_those_that_still_wait(gone: tuple[int, ...]) -> None:
    """Of items that were computed as a block some may be given up meanwhile: their leases end without an answer."""

    async def answer(world: World) -> None:
        call = world.call = EndingCall(world)
        models = ["a/0", "a/1", "a/2"]
        jobs = world.submit(models, at_once=True)
        for i in gone:
            world.steps.cancel(jobs[i])
        found = BlockRows(NumbersBlock("s", 1, True, [], [bytes(12)]), 3)
        make_replies(world).answer_items(jobs, found, "text", 1000.0, 0.001)
        assert call.answered == [model for i, model in enumerate(models) if i not in gone]
        assert len(world.scheduler) == 0
        assert [slot.leases for slot in world.cache] == [0, 0, 0, 0]

    run_filled(answer)


def test_leases_of_jobs_that_are_given_up_end() -> None:
    """The others stay as they are."""

    async def drop(world: World) -> None:
        jobs = world.submit(["a/0", "a/1", "a/2"], at_once=True)
        world.steps.cancel(jobs[1])
        assert make_replies(world).drop_done(jobs) == [jobs[0], jobs[2]]
        assert {slot.model: slot.leases for slot in world.cache} == {"a/0": 1, "a/1": 0, "a/2": 1, "b/0": 0}

    run_filled(drop)


def test_items_that_were_answered_together_waited_as_long_as_each_did() -> None:
    """Between two hits one whose model was loaded: its wait is noted without the load, and theirs as they are."""

    async def answer(world: World) -> None:
        world.call = EndingCall(world)
        jobs = world.submit(["a/0", "a/1", "a/2"], at_once=True)
        jobs[1].load_s = 0.25
        slots = [job.slot for job in jobs]
        make_replies(world).answer_items(jobs, [b"1"] * 3, "text", 1000.0, 0.001)
        usages = [slot.usage for slot in slots if slot is not None]
        assert [(each.answers, each.queued_s, each.answered_s) for each in usages] == [
            (1, 0.5, 0.5),
            (1, 0.25, 0.5),
            (1, 0.5, 0.5),
        ]

    run_filled(answer)


def run_filled(scenario: Callable[[World], Awaitable[None]]) -> None:
    """Run a scenario in a worker whose models are resident."""

    async def run() -> None:
        world = World()
        try:
            await world.fill()
            await scenario(world)
        finally:
            world.close()

    asyncio.run(run())


def make_replies(world: World) -> Replies:
    """What answers the jobs of this worker."""
    engine = Engine(Pool(4 * SLAB, torch.device("cpu")), 512)
    residents = ResidentModels(world.cache, engine, HostCache(torch.empty(0), 60), world.metrics, None, lambda: 1000.0)
    return Replies(world.scheduler, residents, world.metrics, None, lambda: 1000.0)
