"""The workers as the supervisor's parts see them, and what is remembered of them. No process is started."""

import asyncio

import pytest

from server.errors import Situation
from server.ipc.control import ControlError
from server.ipc.operations import ListModels, LoadModel
from server.supervisor.children import Child
from server.supervisor.pins import PinnedModels
from server.supervisor.workers import Workers


def make_workers(count: int, up: set[int]) -> Workers:
    """So many, of which these say that they are up, though none has a channel."""
    children = [Child("worker", index) for index in range(count)]
    for index in up:
        children[index].ready.set()
    return Workers(children, 1.0)


def test_a_models_home_does_not_wander() -> None:
    """It follows from the number of workers alone, so that a pin is where it was when a worker is back."""
    names = [f"m{i}" for i in range(50)]
    homes = [make_workers(3, set()).home(name).index for name in names]
    assert homes == [make_workers(3, {1}).home(name).index for name in names]
    assert set(homes) == {0, 1, 2}


def test_who_is_up_is_asked() -> None:
    """A worker that is not up is named by an operation for it alone, and left out of one for all."""
    workers = make_workers(3, set())
    assert (len(workers), workers.list_up(), workers.find_ready()) == (3, [], set())
    assert repr(workers) == "<Workers 0 of 3 up>"
    assert asyncio.run(workers.ask_all(ListModels("", "", 1))) == ([], [])
    with pytest.raises(ControlError, match="worker 1 is not up") as refused:
        asyncio.run(workers.ask(workers[1], LoadModel("a.mar")))
    assert refused.value.situation == Situation.NOT_READY
    assert make_workers(3, {0, 2}).find_ready() == {0, 2}


def test_pins_are_remembered() -> None:
    """What was pinned at the start and what came later, until it is let go."""
    pins = PinnedModels(["a.mar"])
    pins.add("b.mar")
    pins.add("b.mar")
    pins.discard("a.mar")
    pins.discard("never.mar")
    assert ("a.mar" in pins, "b.mar" in pins, list(pins), repr(pins)) == (False, True, ["b.mar"], "<PinnedModels 1>")
