"""Asynchronous invocations over a plane whose worker answers as a test says, and a bucket in memory."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from model_store.names import ModelName
from server.errors import Refused, Situation
from server.front import background
from server.front.asynchronous import jobs
from server.front.asynchronous.bucket import Bucket
from server.front.asynchronous.calls import AsyncCall
from server.front.asynchronous.jobs import AsyncJobs, Job
from server.front.dataplane import DataPlane
from server.settings import Settings
from tests.patience import PATIENCE_S
from tests.server.front.answering import Worker, attach

MODEL = ModelName("au/NSW1.mar")
OVERLOADED = Situation.OVERLOADED, b'{"message":"full"}'


class MemoryBucket:
    """Objects by key; what is written is there at once."""

    def __init__(self, **objects: bytes) -> None:
        self.objects = dict(objects)
        self.reads, self.written = 0, asyncio.Event()

    async def read(self, key: ModelName) -> bytes:
        """A bucket's."""
        self.reads += 1
        return self.objects[key]

    async def write(self, key: ModelName, data: bytes) -> None:
        """A bucket's."""
        self.objects[key] = bytes(data)
        self.written.set()


class House:
    """Jobs over one worker; made within a running loop."""

    def __init__(self, answer: Callable[[Any], Any], **objects: bytes) -> None:
        self.plane, self.bucket, self.worker = DataPlane(2**24), MemoryBucket(**objects), Worker(answer)
        attach(self.plane, self.worker)
        self.jobs = AsyncJobs(Settings.model_validate({"store": "models"}), cast("Bucket", self.bucket))

    def accept(self, name: str = "a", body: bytes = b"{}", *, source: str | None = None, ttl_s: float = 60.0) -> None:
        """Start a job that answers into `name`, or says in `name-failed` why not."""
        at = None if source is None else ModelName(source)
        call = AsyncCall(name, "application/json", "", at, ModelName(name), ModelName(f"{name}-failed"), ttl_s, None)
        job = Job(call, MODEL, body, self.plane, time.monotonic())
        self.jobs.accept(job, lambda why: f"{why.situation.name}: {why.detail.message}".encode())

    async def finish(self) -> None:
        """Until all jobs have ended by themselves."""
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait(self.plane.background._jobs)
        assert self.plane.held.size == 0, "what a job held is given back"


def test_an_overloaded_worker_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice full, then an answer: the input is read each time, so that it is not held in between."""
    monkeypatch.setattr(jobs, "FIRST_PAUSE_S", 0.001)

    async def scenario() -> None:
        answers = iter([OVERLOADED, OVERLOADED, b"forecast"])
        house = House(lambda _: next(answers), source=b"input")
        house.accept(body=b"", source="source")
        await house.finish()
        assert house.bucket.objects["a"] == b"forecast"
        assert (house.bucket.reads, house.worker.asked[-1].body) == (3, b"input")

    asyncio.run(scenario())


def test_time_to_live_counts_in_the_queue_and_between_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job whose time has passed before its turn fails, and so does one whose worker stays overloaded."""
    monkeypatch.setattr(jobs, "TURNS", 1)

    async def scenario() -> None:
        house = House(lambda asked: OVERLOADED if asked.body == b"full" else ...)
        house.accept("full", b"full", ttl_s=0.0)
        await house.finish()
        assert house.bucket.objects.keys() == {"full-failed"}
        house.bucket.written.clear()
        house.accept("holds the turn")
        await asyncio.sleep(0)
        house.accept("late", ttl_s=0.01)
        async with asyncio.timeout(PATIENCE_S):
            await house.bucket.written.wait()
        assert house.bucket.objects["late-failed"].startswith(b"DEADLINE")
        assert b"RequestTTLSeconds" in house.bucket.objects["late-failed"]
        house.plane.background.stop(0.0)
        await house.plane.background.wait_ended()

    asyncio.run(scenario())


def test_jobs_are_bounded_in_number_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first job beyond a bound is refused; nothing of it stays."""
    monkeypatch.setattr(background, "MOST_JOBS", 3)
    monkeypatch.setattr(jobs, "MOST_HELD_BYTES", 100)

    async def scenario() -> None:
        house = House(lambda _: ...)
        house.accept("a", bytes(60))
        with pytest.raises(Refused, match="bytes of asynchronous requests") as heavy:
            house.accept("b", bytes(41))
        assert heavy.value.situation is Situation.OVERLOADED
        house.accept("c", bytes(20))
        house.accept("d", bytes(20))
        assert house.plane.held.size == 100
        with pytest.raises(Refused, match="3 asynchronous requests"):
            house.accept("e", b"")
        house.plane.background.stop(0.0)
        await house.plane.background.wait_ended()
        assert {name: said[:9] for name, said in house.bucket.objects.items()} == {
            f"{name}-failed": b"NOT_READY" for name in "acd"
        }
        assert house.plane.held.size == 0
        with pytest.raises(Refused, match="is stopping"):
            house.accept("f")

    asyncio.run(scenario())
