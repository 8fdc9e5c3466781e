"""What a node gives to another's front: a client there that does not read holds a bounded amount here."""

import asyncio
import socket
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from server.errors import Detail, Situation
from server.front.inference import InferRequest, InferStats
from server.front.nodes.node_gate import SLOW_CLIENTS, NodeGate
from server.ipc.frames import Partial, Request, Response
from tests.patience import PATIENCE_S
from tests.server.ipc.test_connection import End

MOST = 400_000
PART = b"x" * 50_000


class EndlessAnswer:
    """An answer in parts that has no end, as an archive's code may make one."""

    is_streamed, head, content_type = True, None, "text/plain"
    stats = InferStats(None, 0, None, 0)

    def __init__(self) -> None:
        self.given, self.closed = 0, asyncio.Event()

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Parts without end, or until nobody wants them."""
        try:
            while True:
                self.given += len(PART)
                yield PART
                await asyncio.sleep(0)
        finally:
            self.closed.set()


class EndlessPlane:
    """A plane all of whose models answer so."""

    def __init__(self) -> None:
        self.answer = EndlessAnswer()

    async def infer(self, request: InferRequest) -> EndlessAnswer:
        """The one answer."""
        del request
        return self.answer


def test_a_client_that_does_not_read_ends_its_answer() -> None:
    """Parts that no credit came for are kept up to the bound; then the answer ends as overload, and its code stops."""

    async def scenario() -> None:
        plane: Any = EndlessPlane()
        loop = asyncio.get_running_loop()
        one, other = socket.socketpair()
        _, front = await loop.connect_accepted_socket(End, one)
        _, gate = await loop.connect_accepted_socket(lambda: NodeGate(plane, 1000, MOST), other)
        front.send(Request(1, 10**10, "m.mar", "", "", 0, b""))
        async with asyncio.timeout(PATIENCE_S):
            await plane.answer.closed.wait()
            assert plane.answer.given < 3 * MOST
            said: list[Any] = []
            while not isinstance(said[-1] if said else None, Response):
                said.append(await front.frames.get())
                if isinstance(said[-1], Partial):
                    gate.add_credit(1, len(said[-1].body))
        assert sum(len(each.body) for each in said[:-1]) == plane.answer.given - len(PART)
        assert said[-1].situation is Situation.OVERLOADED
        assert msgspec.json.decode(said[-1].body, type=Detail).message == SLOW_CLIENTS
        front.close()
        gate.close()

    asyncio.run(scenario())
