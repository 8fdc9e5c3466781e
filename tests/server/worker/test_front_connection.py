"""A worker's connection to a front: requests become jobs, answers go back, and a front may die at any moment."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Any, cast

import uvloop

from model_store.names import ModelName
from server.cli.setting_flags import settings_from
from server.errors import Refused, Situation
from server.ipc.frames import (
    CHUNK,
    CacheResult,
    Cancel,
    Credit,
    Data,
    Frame,
    FrameReader,
    Request,
    Response,
    Tier,
    append_frame,
)
from server.worker.front_connection import FrontConnection
from server.worker.main import largest_body
from server.worker.replies import Origin
from server.worker.scheduler import Job
from server.worker.step_loop import StepLoop

LIMIT = 10 * CHUNK
UNSENT = 20 * CHUNK


class EchoSteps:
    """In the place of the step loop: answers each job with its request's body, in the second step after it came."""

    def __init__(self) -> None:
        self.cancelled: list[int] = []
        self.answered = 0
        self.done = asyncio.Event()

    def submit(self, request: Request, origin: Origin) -> Job:
        """As StepLoop.submit; a request for `full` is refused at once, one for `never` is not answered."""
        job = Job(request, ModelName(request.model), origin, 0.0, 0.0)
        if request.model == "full":
            job.done = True
            origin.refuse(job, Refused(Situation.OVERLOADED, "the queue is full"))
        elif request.model != "never":
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self._answer, job)
        return job

    def cancel(self, job: Job) -> None:
        """As StepLoop.cancel."""
        self.cancelled.append(job.request.id)
        job.done = True
        self.done.set()

    def _answer(self, job: Job) -> None:
        if not job.done:
            self.answered += 1
            self.done.set()
            job.origin.answer(job, "text/plain", job.request.body, queue_s=0.001, inference_s=0.002)


class FrontSocket:
    """The front's end of a socket, by hand: it writes and reads frames and gives no credit by itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._frames = FrameReader()

    def write(self, *frames: Frame) -> None:
        """Send frames."""
        buffer = bytearray()
        for frame in frames:
            append_frame(buffer, frame)
        self._writer.write(buffer)

    async def read(self) -> list[Frame]:
        """The frames that the next bytes complete; empty at the end."""
        return list(self._frames.feed(await self._reader.read(2**20)))

    async def read_until(self, count: int) -> list[Frame]:
        """At least so many frames."""
        frames: list[Frame] = []
        while len(frames) < count:
            frames += await self.read()
        return frames


async def connect(steps: EchoSteps) -> tuple[FrontConnection, socket.socket]:
    """A worker's connection over a socket pair, and the front's socket."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    loop = asyncio.get_running_loop()
    fake = cast("StepLoop", steps)
    _, connection = await loop.connect_accepted_socket(lambda: FrontConnection(fake, LIMIT, UNSENT), ours)
    return connection, theirs


@asynccontextmanager
async def connect_front(steps: EchoSteps) -> AsyncIterator[FrontSocket]:
    """A front that is connected to a worker with these steps."""
    _, sock = await connect(steps)
    reader, writer = await asyncio.open_connection(sock=sock)
    with closing(writer):
        yield FrontSocket(reader, writer)


def make_request(ident: int, body: bytes, model: str = "m", body_bytes: int | None = None) -> Request:
    """A request with all of its body, or its first part."""
    return Request(ident, 0, model, "a/b", "", len(body) if body_bytes is None else body_bytes, body)


def test_a_front_that_dies_between_an_answer_and_its_flush_leaves_no_trace() -> None:
    """The front ends while its job waits for the next step. That step answers, then the connection is lost, then the
    answer is to be written: nothing is raised into the loop, and no frame stays behind.
    """
    troubles: list[dict[str, Any]] = []

    async def scenario() -> FrontConnection:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: troubles.append(context))
        steps = EchoSteps()
        connection, front = await connect(steps)
        buffer = bytearray()
        append_frame(buffer, make_request(1, b"body"))
        front.send(buffer)
        front.close()
        await steps.done.wait()
        assert (steps.answered, steps.cancelled) == (1, []), "the step came before the connection was lost"
        for _ in range(5):
            await asyncio.sleep(0)
        return connection

    connection = uvloop.run(scenario())
    assert troubles == []
    assert not connection._pending
    assert repr(connection) == "<FrontConnection 0 jobs, 0 bodies in, <Outbox 0 bodies, 0 bytes>>"


def test_requests_are_answered_with_what_happened() -> None:
    """Small requests of one write: an answer with its times, and a refusal with its reason."""

    async def scenario() -> list[Frame]:
        async with connect_front(EchoSteps()) as front:
            front.write(make_request(1, b"one"), make_request(2, b"two", "full"))
            return await front.read_until(2)

    refused, answer = uvloop.run(scenario())
    assert isinstance(refused, Response)
    assert (refused.id, refused.situation) == (2, Situation.OVERLOADED)
    assert refused.body == b'{"message":"the queue is full"}'
    assert refused.queue_us > 0, "since its arrival at the front"
    assert isinstance(answer, Response)
    assert (answer.id, answer.situation, answer.body, answer.body_bytes) == (1, Situation.OK, b"one", 3)
    assert (answer.queue_us, answer.load_us, answer.inference_us) == (1000, 0, 2000)


def test_a_large_body_comes_and_leaves_under_credit() -> None:
    """Each part of the request is credited; of the answer a window leaves, and the rest as the front gives credit."""
    body = bytes(range(256)) * (6 * CHUNK // 256)

    async def scenario() -> tuple[list[Frame], list[Frame]]:
        async with connect_front(EchoSteps()) as front:
            parts = [body[at : at + CHUNK] for at in range(0, len(body), CHUNK)]
            front.write(make_request(7, parts[0], body_bytes=len(body)))
            front.write(*(Data(7, part) for part in parts[1:]), make_request(8, b"behind"))
            before = await front.read_until(5 + 4 + 1)
            front.write(Credit(7, CHUNK), Credit(7, 10 * CHUNK))
            return before, await front.read_until(2)

    before, after = uvloop.run(scenario())
    assert before[:5] == [Credit(7, CHUNK)] * 5
    assert sorted(frame.id for frame in before[5:]) == [7, 7, 7, 7, 8], "a window of it, and the answer behind it"
    answer = next(frame for frame in before if isinstance(frame, Response) and frame.id == 7)
    parts = [frame.body for frame in (*before, *after) if isinstance(frame, Data)]
    assert answer.body + b"".join(parts) == body


def test_a_request_above_the_limit_ends_the_connection() -> None:
    """An announced body that no front may send ends the connection before a byte of it is kept; so end its jobs."""

    async def scenario() -> tuple[list[Frame], EchoSteps]:
        steps = EchoSteps()
        async with connect_front(steps) as front:
            front.write(make_request(1, b"", "never"), make_request(2, b"", body_bytes=LIMIT + 1))
            front.write(make_request(3, b"three"))
            return await front.read(), steps

    frames, steps = uvloop.run(scenario())
    assert frames == []
    assert steps.cancelled == [1]


def test_a_cancelled_request_is_not_answered() -> None:
    """Cancelled while its body arrives, or while it waits for its step: the answer is that of another request alone."""

    async def scenario() -> tuple[list[Frame], EchoSteps]:
        steps = EchoSteps()
        async with connect_front(steps) as front:
            front.write(make_request(1, b"", body_bytes=5), Cancel(1), Data(1, b"12345"))
            front.write(make_request(2, b"two"), Cancel(2), make_request(3, b"three"))
            return await front.read(), steps

    frames, steps = uvloop.run(scenario())
    assert [frame.id for frame in frames] == [3]
    assert steps.cancelled == [2]


def test_a_front_sends_no_responses() -> None:
    """A frame of the wrong direction ends the connection."""

    async def scenario() -> list[Frame]:
        async with connect_front(EchoSteps()) as front:
            response = Response(1, Situation.OK, CacheResult.HIT, Tier.NONE, "", "", 0, 0, 0, 0, b"")
            front.write(response, make_request(2, b"two"))
            return await front.read()

    assert uvloop.run(scenario()) == []


def test_the_largest_body_is_that_of_a_call_for_many_models() -> None:
    """A front may ask a correlation's archive with the answers of all items: more than `max_body_bytes`."""
    settings = settings_from({"store": "s", "max_body_bytes": "1MiB", "max_forecasts_bytes": "8MiB"})
    assert largest_body(settings) > 16 * 1024 * 1024
    settings = settings_from({"store": "s", "max_body_bytes": "100MiB", "max_forecasts_bytes": "1MiB"})
    assert largest_body(settings) > 100 * 1024 * 1024
