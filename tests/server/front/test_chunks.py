"""Replies that are sent while they are made: over a socket, with clients that leave, stand still or come too late."""

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from server.errors import Refused, Situation
from server.front.app import App
from server.front.chunks import PIECE_BYTES, Chunks, Ending
from server.front.exchange import DialectOperation, HttpReply, HttpRequest, Limit
from server.front.inference_plane import InferencePlane
from server.http_listener import Listener, make_listener
from server.metrics import FrontMetrics
from server.routes.record import Protocol
from server.settings import Settings
from tests.patience import PATIENCE_S, wait_until

SETTINGS = Settings.model_validate({"store": "models"})
LIMIT = Limit(1000, "max_body_bytes")


class Streamer:
    """A protocol whose every answer is made by `parts`, of the test's own; `words` are what it says of a failure."""

    name = "streamer"
    routes = Protocol("streamer", "Streamer", "tests", (), (500,), "any_object")
    paths = "/stream"

    def __init__(self, parts: Callable[[], AsyncGenerator[bytes]], words: bytes | None = b"BROKEN") -> None:
        self._parts, self._words = parts, words

    def match(self, method: str, path: str, query: bytes = b"") -> DialectOperation | None:
        """Anything."""
        del method, path, query
        return DialectOperation("stream", LIMIT)

    async def answer(self, operation: DialectOperation, request: HttpRequest, plane: InferencePlane) -> HttpReply:
        """The test's parts."""
        del operation, plane
        chunks = await Chunks.open(self._parts(), self._end, request.deadline, request.client_gone)
        return HttpReply(200, "text/stream", b"", chunks=chunks)

    def _end(self, why: Refused) -> Ending:
        return Ending(500 + why.situation, None if self._words is None else self._words + why.detail.message.encode())

    def refused(self, why: Refused, request: HttpRequest) -> HttpReply:
        """The situation's number."""
        del request
        return HttpReply(500 + why.situation, "text/plain", why.detail.message.encode())


class House:
    """A running listener over a `Streamer`."""

    def __init__(self, app: App, server: Listener, port: int) -> None:
        self.app, self.server = app, server
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=PATIENCE_S)
        self.port = port

    def count(self, status: int) -> float:
        """How many answers were counted with this status."""
        wanted = f'fleetcast_inference_requests_total{{code="{status}",protocol="streamer"}} '
        lines = [line for line in self.app._metrics.text().splitlines() if line.startswith(wanted)]
        return float(lines[0].removeprefix(wanted)) if lines else 0.0

    async def wait_counted(self, status: int) -> None:
        """Until an answer was counted with this status; nothing is held then."""
        await asyncio.to_thread(wait_until, lambda: self.count(status), f"an answer is counted as {status}")
        assert self.app.plane.held.size == 0


@asynccontextmanager
async def run_house(
    parts: Callable[[], AsyncGenerator[bytes]], words: bytes | None = b"BROKEN", grace_s: float = 5.0
) -> AsyncIterator[House]:
    """A house whose answers are made by `parts`; it has ended in the end."""
    app = App(SETTINGS, FrontMetrics(), (lambda _: Streamer(parts, words),))
    server, sock = make_listener(app, grace_s, PATIENCE_S, 5), socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    house = House(app, server, sock.getsockname()[1])
    try:
        yield house
    finally:
        await house.client.aclose()
        server.stop()
        await serving


def run_scenario(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine."""

    async def run() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await scenario()

    asyncio.run(run())


def test_parts_arrive_one_by_one() -> None:
    """The next is made only when the client has the one before, which the client itself says here."""

    async def scenario() -> None:
        taken = asyncio.Semaphore(0)

        async def make_parts() -> AsyncGenerator[bytes]:
            yield b"0\n"
            for i in range(1, 4):
                await taken.acquire()
                yield b"%d\n" % i

        async with run_house(make_parts) as house, house.client.stream("POST", "/stream") as answer:
            assert "content-length" not in answer.headers
            assert answer.headers["content-type"] == "text/stream"
            assert answer.headers["x-request-id"]
            lines = []
            async for line in answer.aiter_lines():
                lines.append(line)
                taken.release()
            assert lines == ["0", "1", "2", "3"]
            await house.wait_counted(200)

    run_scenario(scenario)


@pytest.mark.slow
def test_what_fails_before_the_first_part_is_a_plain_refusal() -> None:
    """It has its own status and a length; the bug of a generator is the server's failure."""

    async def scenario() -> None:
        for error, status in (
            (Refused(Situation.NOT_FOUND, "no such model"), Situation.NOT_FOUND),
            (KeyError("bug"), Situation.INTERNAL),
        ):

            async def fail(error: Exception | None = error) -> AsyncGenerator[bytes]:
                if error is not None:
                    raise error
                yield b"never"

            async with run_house(fail) as house:
                answer = await house.client.post("/stream")
                assert answer.status_code == 500 + status
                assert int(answer.headers["content-length"]) == len(answer.content)

    run_scenario(scenario)


@pytest.mark.slow
@pytest.mark.parametrize("has_words", [True, False])
def test_a_failure_after_the_first_part_is_said_or_the_body_is_cut(has_words: bool) -> None:
    """A protocol's own words end the body; a protocol without any leaves a body that no client takes for whole."""

    async def scenario() -> None:
        async def fail() -> AsyncGenerator[bytes]:
            yield b"half"
            raise Refused(Situation.MODEL_FAILED, ": the model has failed")

        async with run_house(fail, b" BROKEN" if has_words else None) as house:
            if has_words:
                assert (await house.client.post("/stream")).content == b"half BROKEN: the model has failed"
            else:
                with pytest.raises(httpx.RemoteProtocolError):
                    await house.client.post("/stream")
            await house.wait_counted(500 + Situation.MODEL_FAILED)

    run_scenario(scenario)


@pytest.mark.slow
def test_a_part_that_is_late_does_not_come() -> None:
    """The deadline is the client's own; the generator is closed in the middle of its wait."""

    async def scenario() -> None:
        closed = asyncio.Event()

        async def hang() -> AsyncGenerator[bytes]:
            try:
                yield b"in time "
                await asyncio.get_running_loop().create_future()
            finally:
                closed.set()

        async with run_house(hang) as house:
            answer = await house.client.post("/stream", headers={"X-Request-Timeout-Ms": "3000"})
            assert answer.content == b"in time BROKENthe deadline passed before the answer was complete"
            await closed.wait()
            await house.wait_counted(500 + Situation.DEADLINE)

    run_scenario(scenario)


@pytest.mark.slow
def test_a_client_that_leaves_ends_the_work() -> None:
    """Before the first part, and between two: what the generator has under way is given up."""

    async def scenario() -> None:
        for before in (b"", b"one"):
            begun, closed = asyncio.Event(), asyncio.Event()

            async def hang(before: bytes = before, begun: Any = begun, closed: Any = closed) -> AsyncGenerator[bytes]:
                try:
                    if before:
                        yield before
                    begun.set()
                    await asyncio.get_running_loop().create_future()
                    yield b"never"
                finally:
                    closed.set()

            async with run_house(hang) as house:
                asking = asyncio.create_task(house.client.post("/stream"))
                await begun.wait()
                asking.cancel()
                await closed.wait()
                await house.wait_counted(499)

    run_scenario(scenario)


@pytest.mark.slow
def test_a_client_that_does_not_read_stops_the_making() -> None:
    """What is made ahead of it is what the kernel's buffers and one part hold, not the whole answer."""

    async def scenario() -> None:
        made = 0

        async def flood() -> AsyncGenerator[bytes]:
            nonlocal made
            for _ in range(1000):
                made += 1
                yield bytes(PIECE_BYTES)

        async with run_house(flood) as house:
            reader, writer = await asyncio.open_connection("127.0.0.1", house.port, limit=1024)
            writer.write(b"POST /stream HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
            before = -1
            while before != made or not made:  # until nothing is made any more
                before = made
                await asyncio.sleep(0.3)
            assert made < 500
            assert 0 < house.app.plane.held.size <= 2 * PIECE_BYTES
            while await reader.read(2**20):
                if made == 1000:
                    break
            writer.close()

    run_scenario(scenario)


def test_a_stream_that_the_drain_ends_says_so() -> None:
    """When the drain's time is over the last words are the server's stop."""

    async def scenario() -> None:
        async def hang() -> AsyncGenerator[bytes]:
            yield b"one"
            await asyncio.get_running_loop().create_future()

        async with run_house(hang, grace_s=0.2) as house, house.client.stream("POST", "/stream") as answer:
            parts = answer.aiter_raw()
            assert await anext(parts) == b"one"
            house.server.stop()
            assert await anext(parts) == b"BROKENthe server is stopping; ask again"

    run_scenario(scenario)


def test_a_client_of_http_1_0_gets_the_body_without_chunks() -> None:
    """Its body ends with the connection."""

    async def scenario() -> None:
        async def make_parts() -> AsyncGenerator[bytes]:
            yield b"one "
            yield b"two"

        async with run_house(make_parts) as house:
            reader, writer = await asyncio.open_connection("127.0.0.1", house.port)
            writer.write(b"POST /stream HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            writer.close()
            assert body == b"one two"
            assert b"chunked" not in head.lower()

    run_scenario(scenario)
