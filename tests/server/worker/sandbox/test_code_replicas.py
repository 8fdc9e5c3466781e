"""Replicas of code archives in a whole step loop, with real children: overlap, scaling, deaths and memory."""

from collections.abc import Iterator

import pytest

from model_store.names import ModelName
from server.ipc.operations import Batching
from server.worker import code_batches
from server.worker.sandbox.child_process import ChildProcess
from server.worker.sandbox.code_host import CodeHost
from server.worker.step_loop import StepLoop
from tests.patience import PATIENCE_S
from tests.server.worker.sandbox.code_archives import is_alive
from tests.server.worker.sandbox.conftest import run_host
from tests.server.worker.sandbox.test_code_batches import WAITER, CodeFront, CodeLoader, let_go, list_children, play
from tests.server.worker.test_step_loop import let_loop_run, list_resident

pytestmark = pytest.mark.slow

MODEL = ModelName("code/m")


@pytest.fixture(scope="module")
def host() -> Iterator[CodeHost]:
    """Children that may wait for as long as the test does."""
    yield from run_host(PATIENCE_S)


@pytest.fixture(autouse=True)
def measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children are charged what the test says."""
    monkeypatch.setattr(code_batches, "SAMPLE_S", 1e9)


async def scale(steps: StepLoop, front: CodeFront, count: int) -> list[ChildProcess]:
    """Load the model and give it so many processes, as far as they have room."""
    front.ask(1000, MODEL, "pid")
    await let_loop_run(lambda: 1000 in front.answers)
    steps.replicas.follow_counts({MODEL: count}, whole=False)
    assert await steps.replicas.wait_settled(MODEL) == len(list_children(steps, MODEL))
    return list_children(steps, MODEL)


def test_a_slow_request_does_not_block_the_next(host: CodeHost) -> None:
    """The second request is answered by another process while the first waits; then one is enough again."""

    async def scenario(steps: StepLoop, front: CodeFront) -> None:
        first, second = await scale(steps, front, 2)
        (row,) = steps.describe()
        assert [each["pid"] for each in row["processes"]] == [first.pid, second.pid]
        assert row["bytes"] == first.charge + second.charge
        front.ask(1, MODEL, "wait")
        front.ask(2, MODEL, "pid")
        await let_loop_run(lambda: 2 in front.answers)
        assert (int(front.answers[2]), 1 in front.answers) == (second.pid, False)
        steps.replicas.follow_counts({MODEL: 1}, whole=False)
        await steps.replicas.wait_settled(MODEL)
        assert (is_alive(first.pid), is_alive(second.pid)) == (True, False)
        (row,) = steps.describe()
        assert ("processes" in row, row["pid"], row["bytes"]) == (False, first.pid, first.charge)
        front.ask(3, MODEL, "pid")
        let_go(first)
        await let_loop_run(lambda: 3 in front.answers)
        assert [int(front.answers[ident]) for ident in (1, 3)] == [first.pid, first.pid]

    play(host, scenario, handler=WAITER, slabs=8)


def test_busy_processes_end_after_their_batch(host: CodeHost) -> None:
    """Both are busy when one is enough: both answer, and one is left. More than `most` are never started."""

    async def scenario(steps: StepLoop, front: CodeFront) -> None:
        children = await scale(steps, front, 64)
        assert len(children) == host.policy.replicas
        for ident in range(len(children) + 1):  # one more than there are processes waits for its turn
            front.ask(ident, MODEL, "wait")
        await let_loop_run(lambda: all(child.is_busy for child in children))
        steps.replicas.follow_counts({}, whole=True)
        assert list_children(steps, MODEL) == children
        for child in children:
            let_go(child)
        await let_loop_run(lambda: len(front.answers) == len(children) + 2)
        assert front.refusals == {}
        assert {int(front.answers[ident]) for ident in range(len(children))} == {child.pid for child in children}
        assert len(list_children(steps, MODEL)) == 1

    play(host, scenario, handler=WAITER, slabs=20)


def test_a_death_costs_one_batch_and_the_next_request_starts_another(host: CodeHost) -> None:
    """The other process goes on with what it does."""

    async def scenario(steps: StepLoop, front: CodeFront) -> None:
        first, second = await scale(steps, front, 2)
        front.ask(1, MODEL, "wait")
        front.ask(2, MODEL, "die")
        await let_loop_run(lambda: 2 in front.refusals)
        assert "Worker died" in front.refusals[2].detail.message
        assert list_children(steps, MODEL) == [first]
        let_go(first)
        front.ask(3, MODEL, "pid")
        await let_loop_run(lambda: {1, 3} <= front.answers.keys())
        assert await steps.replicas.wait_settled(MODEL) == 2
        assert front.refusals.keys() == {2}
        assert second.pid not in {child.pid for child in list_children(steps, MODEL)}

    play(host, scenario, handler=WAITER, slabs=8)


def test_replicas_take_the_place_of_idle_models_alone(host: CodeHost) -> None:
    """Two processes fit: another model that is idle goes for the second, and no third is started."""

    async def scenario(steps: StepLoop, front: CodeFront) -> None:
        front.ask(1, "code/idle", "pid")
        await let_loop_run(lambda: 1 in front.answers)
        children = await scale(steps, front, 3)
        assert (len(children), list_resident(steps)) == (2, {MODEL})
        front.ask(2, MODEL, "pid")
        await let_loop_run(lambda: 2 in front.answers)
        assert len(list_children(steps, MODEL)) == 2, "it is not tried again at once"

    play(host, scenario, handler=WAITER, slabs=7)


def test_grown_replicas_go_before_their_model(host: CodeHost) -> None:
    """Measured larger than the budget, an archive loses a replica; the first process stays, and answers."""

    async def scenario(steps: StepLoop, front: CodeFront) -> None:
        first, second = await scale(steps, front, 2)
        second.charge *= 2
        (slot,) = steps._residents.children
        steps._residents.recharge(slot, first.charge + second.charge)
        assert list_children(steps, MODEL) == [first]
        front.ask(1, MODEL, "pid")
        await let_loop_run(lambda: 1 in front.answers)
        assert int(front.answers[1]) == first.pid

    play(host, scenario, handler=WAITER, slabs=7)


def test_an_unload_waits_for_what_is_being_started(host: CodeHost) -> None:
    """Nothing is left when it returns; the next load has as many processes as were asked for."""

    async def scenario(steps: StepLoop, front: CodeFront) -> None:
        front.ask(1, MODEL, "pid")
        await let_loop_run(lambda: 1 in front.answers)
        steps.replicas.follow_counts({MODEL: 2}, whole=False)
        assert await steps.unload(MODEL)
        assert host._folder is not None
        assert list(host._folder.glob("tmp*")) == []
        front.ask(2, MODEL, "pid")
        await let_loop_run(lambda: 2 in front.answers)
        assert await steps.replicas.wait_settled(MODEL) == 2

    play(host, scenario, handler=WAITER, slabs=8)


def test_a_start_that_fails_leaves_fewer(host: CodeHost) -> None:
    """The archive that is there now is another version: none of its processes answers for this one."""
    loader = CodeLoader(host, WAITER)

    async def scenario(steps: StepLoop, front: CodeFront) -> None:
        front.ask(1, MODEL, "pid")
        await let_loop_run(lambda: 1 in front.answers)
        loader.versions[MODEL] = 2
        (first,) = await scale(steps, front, 2)
        front.ask(2, MODEL, "pid")
        await let_loop_run(lambda: 2 in front.answers)
        assert int(front.answers[2]) == first.pid

    play(host, scenario, slabs=8, loader=loader)


def test_batches_are_collected_while_another_runs(host: CodeHost) -> None:
    """One process waits; two requests become one batch of the other, and none is lost where both are busy."""
    host.follow_batching({MODEL: Batching(2, 0.02)}, whole=True)

    async def scenario(steps: StepLoop, front: CodeFront) -> None:
        children = await scale(steps, front, 2)
        front.ask(1, MODEL, "wait")
        await let_loop_run(lambda: any(child.is_busy for child in children))
        (busy,), (idle,) = [[child for child in children if child.is_busy is wanted] for wanted in (True, False)]
        for ident in (2, 3, 4):
            front.ask(ident, MODEL, "pid")
        await let_loop_run(lambda: {2, 3, 4} <= front.answers.keys())
        assert {int(front.answers[ident]) for ident in (2, 3, 4)} == {idle.pid}
        for ident in (5, 6, 7):
            front.ask(ident, MODEL, "wait")
        let_go(busy)
        let_go(idle)
        await let_loop_run(lambda: len(front.answers) == 8)

    try:
        play(host, scenario, handler=WAITER, slabs=8)
    finally:
        host.follow_batching({}, whole=True)
