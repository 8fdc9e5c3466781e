"""Which forecasts the supervisor has of workers that answer late, or end meanwhile."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

from server.ipc.control import ChannelClosed, ControlChannel
from server.ipc.operations import KeptLevels, TakeForecasts
from server.supervisor.actuals.rollout import ActualsRollout
from server.supervisor.children import Child
from server.supervisor.workers import Workers


class Channel:
    """To a worker that has so many forecasts dropped each time; before it answers, it does what a test says."""

    def __init__(self, name: str) -> None:
        self.name, self.asked = name, list[list[str]]()
        self.before: Callable[[], object] = lambda: None

    async def ask(self, operation: TakeForecasts, timeout_s: float) -> KeptLevels:
        """As a control channel."""
        del timeout_s
        self.asked.append(operation.receipts)
        self.before()
        return KeptLevels([], 1, f"{self.name}{len(self.asked)}")


def make_failing(error: BaseException) -> Callable[[], object]:
    """What raises this."""

    def raise_error() -> None:
        raise error

    return raise_error


def test_a_receipt_is_sent_of_what_has_arrived() -> None:
    """Until the worker's next answer has: one that came too late, or not at all, is handed over again."""
    children, channels = [Child("worker", index) for index in range(2)], [Channel("a"), Channel("b")]
    for child, channel in zip(children, channels, strict=True):
        child.channel = cast("ControlChannel", channel)
        child.ready.set()
    rollout = ActualsRollout(Workers(children, 1.0))

    def take() -> list[str]:
        return [taken.receipt for taken in asyncio.run(rollout.take_forecasts())]

    assert (take(), channels[0].asked[-1]) == (["a1", "b1"], [])
    channels[0].before = make_failing(TimeoutError())
    assert (take(), channels[0].asked[-1]) == (["b2"], ["a1", "b1"])
    channels[0].before = make_failing(ChannelClosed())
    assert (take(), channels[1].asked[-1]) == (["b3"], ["a1", "b2"])
    channels[0].before = children[1].ready.clear
    assert take() == ["a4"], "the other one has ended before it was asked"
    channels[0].before = lambda: None
    assert (take(), channels[0].asked[-1]) == (["a5"], ["a4", "b3"])
    children[0].channel = cast("Any", None)
    assert take() == [], "no answer of all is whole"
