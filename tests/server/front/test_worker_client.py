"""The link to a worker that does not read: what waits is counted, takes turns and can be taken back."""

import asyncio
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import closing
from typing import Any

import pytest
import uvloop

from server.errors import Refused, Situation
from server.front.worker_client import WorkerCall, WorkerLink
from server.ipc.frames import CHUNK, Cancel, Data, Frame, FrameReader, Request

Run = Callable[[Coroutine[Any, Any, None]], None]
LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
BODY = b"x" * 4000
HOT = 5000  #: requests, 20 MB: far more than a socket's buffers hold
FAR = 1e9


class Stopped:
    """A worker that reads only when the test says so."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._reader = sock, FrameReader()

    async def read(self, enough: Callable[[list[Frame]], bool]) -> list[Frame]:
        """The frames that come until there are enough."""
        frames: list[Frame] = []
        while not enough(frames):
            data = await asyncio.get_running_loop().sock_recv(self._sock, CHUNK)
            assert data, "the link has ended"
            frames += self._reader.feed(data)
        return frames


async def connect() -> tuple[WorkerLink, Stopped, socket.socket]:
    """A link and its worker."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    link = WorkerLink(0, lambda _: None)
    await asyncio.get_running_loop().connect_accepted_socket(lambda: link, ours)
    return link, Stopped(theirs), theirs


def send_hot(link: WorkerLink, count: int = HOT, deadline: float = FAR) -> list[WorkerCall]:
    """Requests for one model."""
    return [link.call("hot", "", "", deadline, BODY) for _ in range(count)]


def end(link: WorkerLink) -> None:
    """Close the link; nobody waits for its calls."""
    for call in link._calls.values():
        call.reply.cancel()
    link.close()


def models_of(frames: list[Frame]) -> list[str]:
    """Of the requests."""
    return [frame.model for frame in frames if isinstance(frame, Request)]


@LOOPS
def test_another_model_passes_the_backlog_of_a_hot_one(run: Run) -> None:
    """5,000 requests of a hot model wait when one of another comes: it leaves next, and the hot ones in their order."""

    async def scenario() -> None:
        link, worker, sock = await connect()
        with closing(sock):
            send_hot(link)
            await asyncio.sleep(0)
            assert len(link._unsent) > HOT - 500, "the buffers hold a few hundred kB"
            link.call("other", "", "", FAR, BODY)
            frames = await worker.read(lambda frames: len(frames) == HOT + 1)
            asked = models_of(frames)
            assert asked.index("other") < 500
            assert [frame.id for frame in frames if isinstance(frame, Request) and frame.model == "hot"] == sorted(
                frame.id for frame in frames if frame.id != HOT + 1
            )
            assert not link._unsent
            end(link)

    run(scenario())


@LOOPS
def test_what_waits_can_be_taken_back_and_expires(run: Run) -> None:
    """A request that is cancelled before it was sent leaves no trace; one that expires is refused and not sent."""

    async def scenario() -> None:
        link, worker, sock = await connect()
        with closing(sock):
            send_hot(link, 1000)
            await asyncio.sleep(0)
            gone = link.call("gone", "", "", FAR, BODY)
            late = link.call("late", "", "", time.monotonic() + 100, BODY)
            soon = link.call("soon", "", "", time.monotonic(), BODY)
            link.cancel(gone)
            link.sweep(time.monotonic() + 100)
            last = link.call("last", "", "", FAR, BODY)
            frames = await worker.read(lambda frames: len(models_of(frames)) == 1001)
            assert {*models_of(frames)} == {"hot", "last"}
            assert not any(isinstance(frame, Cancel) for frame in frames)
            for call in (late, soon):
                refused = call.reply.exception()
                assert isinstance(refused, Refused)
                assert refused.situation is Situation.DEADLINE
                assert "was not read by the worker before the deadline" in str(refused)
            assert not last.reply.done()
            end(link)

    run(scenario())


@LOOPS
def test_what_expires_while_it_waits_is_not_sent(run: Run) -> None:
    """Without any sweep: the deadline is looked at when the worker reads again."""

    async def scenario() -> None:
        link, worker, sock = await connect()
        with closing(sock):
            send_hot(link, 1000)
            await asyncio.sleep(0)
            soon = link.call("soon", "", "", time.monotonic(), BODY)
            link.call("last", "", "", FAR, BODY)
            frames = await worker.read(lambda frames: len(models_of(frames)) == 1001)
            assert "soon" not in models_of(frames)
            assert isinstance(soon.reply.exception(), Refused)
            end(link)

    run(scenario())


@LOOPS
def test_a_large_body_and_a_backlog_do_not_starve_each_other(run: Run) -> None:
    """The parts of a large body that have credit leave among the requests that wait."""

    async def scenario() -> None:
        link, worker, sock = await connect()
        with closing(sock):
            send_hot(link, 100)
            link.call("large", "", "", FAR, bytes(3 * CHUNK))
            send_hot(link, 2000)
            await asyncio.sleep(0)

            def have_all(frames: list[Frame]) -> bool:
                return len(models_of(frames)) == 2101 and sum(isinstance(frame, Data) for frame in frames) == 2

            frames = await worker.read(have_all)
            last_part = max(at for at, frame in enumerate(frames) if isinstance(frame, Data))
            assert last_part < 1500
            end(link)

    run(scenario())


def test_the_end_of_the_link_ends_what_waits() -> None:
    """Requests that were not sent fail as those that were."""

    async def scenario() -> None:
        link, _, sock = await connect()
        calls = send_hot(link, 1000)
        await asyncio.sleep(0)
        assert link._unsent
        sock.close()
        done, _ = await asyncio.wait([call.reply for call in calls])
        assert all("died" in str(future.exception()) for future in done)
        assert not link._unsent

    uvloop.run(scenario())
