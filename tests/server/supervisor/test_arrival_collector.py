"""Which rows of the access log the supervisor has of workers that answer late, or end meanwhile."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

from server.access_log import ArrivalBuffer, Arrivals
from server.ipc.control import ChannelClosed, ControlChannel
from server.ipc.operations import TakeAccessLog
from server.supervisor.arrival_collector import ArrivalCollector
from server.supervisor.children import Child
from server.supervisor.workers import Workers


class Channel:
    """To a worker that has one row more each time; after it has handed them over, it does what a test says."""

    def __init__(self, name: str) -> None:
        self._name, self._buffer, self._rows = name, ArrivalBuffer(lambda: 0.0, lambda: 0.0), 0
        self.after: Callable[[], object] = lambda: None

    async def ask(self, operation: TakeAccessLog, timeout_s: float) -> Arrivals:
        """As a control channel."""
        del timeout_s
        self._rows += 1
        self._buffer.note(f"{self._name}{self._rows}", 0.0, 0, 0)
        arrivals = self._buffer.hand_over(operation.receipts)
        self.after()
        return arrivals


def make_failing(error: BaseException) -> Callable[[], object]:
    """What raises this."""

    def raise_error() -> None:
        raise error

    return raise_error


def test_what_arrives_too_late_is_taken_the_next_time() -> None:
    """No row is lost or taken twice, and a worker that fails keeps no other's rows back."""
    children, channels = [Child("worker", index) for index in range(2)], [Channel("a"), Channel("b")]
    for child, channel in zip(children, channels, strict=True):
        child.channel = cast("ControlChannel", channel)
        child.ready.set()
    collector = ArrivalCollector(Workers(children, 1.0))

    def take() -> list[str]:
        taken = "".join(each.rows for each in asyncio.run(collector.take()))
        return [row.split(",")[1] for row in taken.splitlines()]

    assert take() == ["a1", "b1"]
    channels[0].after = make_failing(TimeoutError())
    assert take() == ["b2"]
    assert take() == ["b3"]
    channels[0].after = make_failing(ChannelClosed())
    assert take() == ["b4"]
    channels[0].after = lambda: None
    assert take() == ["a2", "a3", "a4", "a5", "b5"]
    channels[0].after = children[1].ready.clear
    assert take() == ["a6"], "the other one has ended before it was asked"
    children[1].ready.set()
    channels[0].after = lambda: None
    assert take() == ["a7", "b6"]
    children[0].channel = cast("Any", None)
    assert take() == ["b7"]
