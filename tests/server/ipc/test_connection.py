"""The connection that front and worker share: order, credit and end, over a real socket and on both event loops."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from server.errors import Situation
from server.ipc.bodies import WINDOW
from server.ipc.connection import FrameConnection
from server.ipc.frames import (
    CHUNK,
    CacheResult,
    Cancel,
    Credit,
    Data,
    Held,
    Partial,
    Request,
    Response,
    Stages,
    Tier,
    WireError,
)

Run = Callable[[Coroutine[Any, Any, None]], None]
LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
END = Cancel(999)


class End(FrameConnection):
    """One end, which keeps the frames that arrive; request 13 breaks the wire."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: asyncio.Queue[Request | Data | Response | Cancel | Held | Partial | Stages] = asyncio.Queue()
        self.ended = asyncio.Event()

    def handle_frame(self, frame: Request | Data | Response | Cancel | Held | Partial | Stages) -> None:
        """Keep the frame."""
        if frame.id == 13:
            raise WireError("thirteen")
        self.frames.put_nowait(frame)

    def handle_end(self) -> None:
        """Note the end. A second one would be a mistake."""
        assert not self.ended.is_set()
        self.ended.set()


async def connect() -> tuple[End, End]:
    """Both ends of a connection."""
    loop = asyncio.get_running_loop()
    one, other = socket.socketpair()
    _, left = await loop.connect_accepted_socket(End, one)
    _, right = await loop.connect_accepted_socket(End, other)
    return left, right


async def close(left: End, right: End) -> None:
    """End the connection from one end; both learn it."""
    left.close()
    await left.ended.wait()
    await right.ended.wait()


async def read_parts(end: End, until: int) -> list[Data | Response]:
    """Parts of bodies, until they have so many bytes."""
    parts: list[Data | Response] = []
    while sum(len(part.body) for part in parts) < until:
        frame = await end.frames.get()
        assert isinstance(frame, Data | Response)
        parts.append(frame)
    return parts


def make_response(ident: int, body: bytes) -> Response:
    """A good answer."""
    return Response(ident, Situation.OK, CacheResult.HIT, Tier.NONE, "v", "t", 1, 2, 3, len(body), body)


@LOOPS
def test_small_frames_arrive_in_order(run: Run) -> None:
    """Requests, answers and cancellations of one loop pass arrive as they were sent."""

    async def scenario() -> None:
        left, right = await connect()
        request, response = Request(1, 2, "m", "a", "b", 3, b"abc"), make_response(2, b"x" * CHUNK)
        sent: list[Request | Response | Cancel] = [request, Cancel(1), response, Cancel(3)]
        for frame in sent:
            left.send(frame)
        assert [await right.frames.get() for _ in sent] == sent
        await close(left, right)

    run(scenario())


@LOOPS
def test_a_large_body_waits_for_credit(run: Run) -> None:
    """A window leaves, in chunks; a frame behind it does not wait; the rest follows credit, byte for byte."""
    body = bytes(range(256)) * (3 * WINDOW // 256)

    async def scenario() -> None:
        left, right = await connect()
        left.send(make_response(1, body))
        first = await read_parts(right, WINDOW)
        left.send(END)
        assert await right.frames.get() == END
        assert sum(len(part.body) for part in first) == WINDOW
        assert max(len(part.body) for part in first) == CHUNK
        right.send(Credit(1, 2 * WINDOW))
        rest = await read_parts(right, 2 * WINDOW)
        assert b"".join(part.body for part in (*first, *rest)) == body
        await close(left, right)

    run(scenario())


@LOOPS
def test_large_bodies_pass_each_other(run: Run) -> None:
    """Two windows that each end sends at once, more than a socket holds, arrive whole at the other."""
    bodies = {1: b"1" * WINDOW, 2: b"2" * WINDOW}

    async def scenario() -> None:
        left, right = await connect()
        for end in (left, right):
            for ident, body in bodies.items():
                end.send(make_response(ident, body))
        for end in (left, right):
            parts = await read_parts(end, 2 * WINDOW)
            for ident, body in bodies.items():
                assert b"".join(part.body for part in parts if part.id == ident) == body
        await close(left, right)

    run(scenario())


@LOOPS
def test_a_dropped_body_sends_no_more(run: Run) -> None:
    """Credit that comes after the drop changes nothing."""

    async def scenario() -> None:
        left, right = await connect()
        left.send(make_response(1, bytes(3 * WINDOW)))
        await read_parts(right, WINDOW)
        left.drop_body(1)
        right.send(Credit(1, WINDOW))
        right.send(END)
        assert await left.frames.get() == END
        left.send(END)
        assert await right.frames.get() == END
        await close(left, right)

    run(scenario())


@LOOPS
def test_a_broken_wire_ends_the_connection(run: Run) -> None:
    """A WireError of the subclass: frames before it count, frames behind it do not, both ends learn the end."""

    async def scenario() -> None:
        left, right = await connect()
        for ident in (12, 13, 14):
            left.send(Cancel(ident))
        await right.ended.wait()
        await left.ended.wait()
        assert (right.frames.qsize(), right.frames.get_nowait()) == (1, Cancel(12))

    run(scenario())


@LOOPS
def test_nothing_is_sent_after_the_end(run: Run) -> None:
    """Frames and bodies sent after the end raise nothing, into the loop either, and none of them is kept."""
    troubles: list[dict[str, Any]] = []

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: troubles.append(context))
        left, right = await connect()
        await close(left, right)
        for end in (left, right):
            for ident in range(10):
                end.send(make_response(ident, bytes(2 * CHUNK)))
            end.close()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not left._pending
        assert not right._pending

    run(scenario())
    assert troubles == []
