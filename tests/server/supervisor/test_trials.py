"""Trials of suspects: one at a time, ended by an answer, a death, a front's end or time."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from server.ipc.pulse import RunningModel
from server.supervisor import trials as module
from server.supervisor.quarantine import ServerQuarantine
from server.supervisor.trials import Trials
from tests.patience import PATIENCE_S

FRONT, OTHER = "front-0.1", "front-1.1"


def play(scenario: Callable[[Trials, ServerQuarantine, list[int]], Coroutine[Any, Any, None]]) -> None:
    """Run a scenario with three workers, of which as many are ready as the list's element says."""

    async def run() -> None:
        quarantine, ready = ServerQuarantine(), [3]
        async with asyncio.timeout(PATIENCE_S):
            await scenario(Trials(quarantine, lambda: set(range(ready[0])), 3), quarantine, ready)

    asyncio.run(run())


async def is_waiting(task: "asyncio.Task[str]") -> bool:
    """Whether it has not ended after some passes of the loop."""
    for _ in range(10):
        await asyncio.sleep(0)
    return not task.done()


def test_one_runs_at_a_time() -> None:
    """The second front's suspect waits for the end of the first's; another's end is no end of it."""

    async def scenario(trials: Trials, _: ServerQuarantine, __: list[int]) -> None:
        assert await trials.begin(FRONT, "a.mar", 9.0) == ""
        second = asyncio.create_task(trials.begin(OTHER, "b.mar", 9.0))
        trials.end(OTHER, "b.mar", -1)
        assert await is_waiting(second)
        trials.end(FRONT, "a.mar", -1)
        assert (await second, trials.model) == ("", "b.mar")
        third = asyncio.create_task(trials.begin(FRONT, "c.mar", 9.0))
        trials.note_front_end(OTHER)
        assert await third == ""

    play(scenario)


def test_a_death_is_the_verdict() -> None:
    """A front knows of the death before the supervisor does: who waits is answered after the quarantine knows it."""

    async def scenario(trials: Trials, quarantine: ServerQuarantine, _: list[int]) -> None:
        assert not quarantine.note_death([RunningModel("a.mar", "batch")])
        await trials.begin(FRONT, "a.mar", 9.0)
        again = asyncio.create_task(trials.begin(FRONT, "a.mar", 9.0))
        trials.end(FRONT, "a.mar", 1)
        assert await is_waiting(again)
        trials.note_worker(0)
        assert await is_waiting(again)
        assert quarantine.note_death([RunningModel("a.mar", "batch")], tried=trials.model)
        trials.note_worker(1)
        assert "quarantined" in await again
        assert trials.model == ""
        assert "quarantined" in await trials.begin(FRONT, "a.mar", 9.0)

    play(scenario)


def test_the_last_worker_is_not_risked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one worker of three ready a trial waits for a second, but not for ever; with none it waits on."""
    monkeypatch.setattr(module, "SPARE_S", 9.0)

    async def scenario(trials: Trials, _: ServerQuarantine, ready: list[int]) -> None:
        ready[0] = 1
        task = asyncio.create_task(trials.begin(FRONT, "a.mar", 99.0))
        assert await is_waiting(task)
        ready[0] = 2
        trials.note_worker(0)
        assert await task == ""
        trials.end(FRONT, "a.mar", -1)
        monkeypatch.setattr(module, "SPARE_S", 0.0)
        ready[0] = 0
        task = asyncio.create_task(trials.begin(FRONT, "a.mar", 99.0))
        assert await is_waiting(task)
        ready[0] = 1
        trials.note_worker(0)
        assert await task == ""

    play(scenario)


def test_a_front_s_news_of_a_death_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker that a front has lost does not count as the second one, though the supervisor has not heard of its
    end; it counts again once there is news of it, and where none comes the front was wrong.
    """
    monkeypatch.setattr(module, "NEWS_S", 99.0)

    async def scenario(trials: Trials, _: ServerQuarantine, ready: list[int]) -> None:
        ready[0] = 2
        task = asyncio.create_task(trials.begin(FRONT, "a.mar", 99.0, 1))
        assert await is_waiting(task), "worker 0 is the last one"
        trials.note_worker(1)
        assert await task == "", "both are ready: it is up again"
        trials.end(FRONT, "a.mar", -1)
        monkeypatch.setattr(module, "NEWS_S", 0.01)
        assert await trials.begin(FRONT, "a.mar", 99.0, 1) == ""

    play(scenario)


def test_what_a_worker_died_of_waits_longer_for_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that a worker died of by itself does not get the last worker soon; one that was there when a worker was
    killed gets it within its deadline, though that be shorter than the wait.
    """
    monkeypatch.setattr(module, "SPARE_S", 99.0)

    async def scenario(trials: Trials, quarantine: ServerQuarantine, ready: list[int]) -> None:
        ready[0] = 1
        quarantine.note_death([RunningModel("bad.mar", "batch")])
        quarantine.note_death([RunningModel("good.mar", "batch")], from_outside=True)
        assert await trials.begin(FRONT, "good.mar", 0.2) == ""
        trials.end(FRONT, "good.mar", -1)
        with pytest.raises(TimeoutError):
            await trials.begin(FRONT, "bad.mar", 0.2)
        task = asyncio.create_task(trials.begin(FRONT, "bad.mar", 99.0))
        assert await is_waiting(task)
        ready[0] = 2
        trials.note_worker(1)
        assert await task == ""

    play(scenario)


def test_time_ends_waits_and_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose deadline passes waits no more; a front that never tells the end holds nobody up for ever."""
    monkeypatch.setattr(module, "EXPIRY_S", 0.0)

    async def scenario(trials: Trials, _: ServerQuarantine, __: list[int]) -> None:
        await trials.begin(FRONT, "a.mar", 0.2)
        with pytest.raises(TimeoutError):
            await trials.begin(FRONT, "b.mar", 0.01)
        assert await trials.begin(FRONT, "b.mar", 9.0) == ""

    play(scenario)
