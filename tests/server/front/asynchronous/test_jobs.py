"""Asynchronous invocations over a plane whose worker answers as a test says, and a bucket in memory."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from model_store.names import ModelName
from server.errors import Refused, Situation
from server.front.asynchronous import jobs
from server.front.asynchronous.bucket import Bucket
from server.front.asynchronous.calls import AsyncCall
from server.front.asynchronous.jobs import AsyncJobs
from server.front.asynchronous.journal import JobRecord, Journal
from server.front.dataplane import DataPlane
from server.front.inference_plane import InferencePlane
from server.metrics import FrontMetrics
from server.settings import Settings
from tests.patience import PATIENCE_S, wait_until
from tests.server.front.answering import Worker, attach

MODEL = ModelName("au/NSW1.mar")
OVERLOADED = Situation.OVERLOADED, b'{"message":"full"}'
SETTINGS = Settings.model_validate({"store": "models"})


class MemoryBucket:
    """Objects by key; what is written is there at once. The first `refusals` writes are refused by the store."""

    def __init__(self, **objects: bytes) -> None:
        self.objects = dict(objects)
        self.reads = self.refusals = 0
        self.writes = list[tuple[str, bytes]]()

    async def read(self, key: ModelName) -> bytes:
        """A bucket's."""
        self.reads += 1
        return self.objects[key]

    async def write(self, key: ModelName, data: bytes) -> None:
        """A bucket's."""
        if self.refusals:
            self.refusals -= 1
            raise Refused(Situation.STORE_FAILED, "async_output: out")
        self.objects[key] = bytes(data)
        self.writes.append((key, bytes(data)))


class House:
    """Jobs of one front over one worker; made within a running loop. `folder` is the server's, of all fronts."""

    def __init__(self, folder: Path, answer: Callable[[Any], Any], most: int = 100, per_client: int = 100) -> None:
        self.plane, self.bucket, self.worker = DataPlane(2**24), MemoryBucket(), Worker(answer)
        attach(self.plane, self.worker)
        self.journal, self.metrics = Journal(folder, most, per_client), FrontMetrics()
        bucket = cast("Bucket", self.bucket)
        self.jobs = AsyncJobs(SETTINGS, bucket, self.journal, self.metrics.async_jobs, explain)
        self.looking: asyncio.Task[None] | None = None

    async def accept(
        self, name: str = "a", body: bytes = b"{}", *, source: str | None = None, ttl_s: float = 60.0, client: str = ""
    ) -> None:
        """Start a job that answers into `name`, or says in `name-failed` why not."""
        at = None if source is None else ModelName(source)
        call = AsyncCall(name, "application/json", "", at, ModelName(name), ModelName(f"{name}-failed"), ttl_s, None)
        record = JobRecord(call, MODEL, body, time.monotonic(), b"id", client, "desk" if client else "")
        await self.jobs.accept(record, self.plane)

    def look(self, find_plane: Callable[[str], InferencePlane] | None = None) -> None:
        """Take over what dead fronts leave."""
        found = self.jobs.take_over(self.plane.background, find_plane or (lambda _: self.plane))
        self.looking = asyncio.ensure_future(found)

    async def finish(self) -> None:
        """Until all jobs have ended by themselves: nothing of them is held or kept."""
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait(self.plane.background._jobs)
        assert self.plane.held.size == 0, "what a job held is given back"
        assert list(self.journal._list_all()) == []

    async def wait_for(self, key: str) -> bytes:
        """What is written at this key, once it is."""
        await asyncio.to_thread(wait_until, lambda: key in self.bucket.objects, f"{key} is written")
        return self.bucket.objects[key]

    async def stop(self) -> None:
        """As a front that is told to stop, without time for its jobs."""
        self.plane.background.stop(0.0)
        await self.plane.background.wait_ended()
        if self.looking is not None:
            await self.looking

    def die(self) -> None:
        """As a front that is killed: its jobs stop where they are, and its lock is free."""
        for task in self.plane.background._jobs:
            cast("Any", task.get_coro()).close()  # it never goes on
            task.cancel()
        self.journal.close()

    def count(self, result: str) -> float:
        """The counter of this result."""
        wanted = f'fleetcast_async_invocations_total{{result="{result}"}} '
        lines = self.metrics.text().splitlines()
        return next(float(line.removeprefix(wanted)) for line in lines if line.startswith(wanted))


def explain(why: Refused, request_id: bytes) -> bytes:
    """A failure object."""
    return b"%b: %b: %b" % (why.situation.name.encode(), why.detail.message.encode(), request_id)


def run_scenario(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run a test's coroutine."""

    async def run() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await scenario()

    asyncio.run(run())


def test_an_overloaded_worker_is_asked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Twice full, then an answer: the input is read each time, so that it is not held in between."""
    monkeypatch.setattr(jobs, "FIRST_PAUSE_S", 0.001)

    async def scenario() -> None:
        answers = iter([OVERLOADED, OVERLOADED, b"forecast"])
        house = House(tmp_path, lambda _: next(answers))
        house.bucket.objects["source"] = b"input"
        await house.accept(body=b"", source="source")
        await house.finish()
        assert house.bucket.objects["a"] == b"forecast"
        assert (house.bucket.reads, house.worker.asked[-1].body) == (3, b"input")
        assert [house.count(result) for result in ("accepted", "done", "failed")] == [1, 1, 0]

    run_scenario(scenario)


def test_time_to_live_counts_in_the_queue_and_between_tries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A job whose time has passed before its turn fails, and so does one whose worker stays overloaded."""
    monkeypatch.setattr(jobs, "TURNS", 1)

    async def scenario() -> None:
        house = House(tmp_path, lambda asked: OVERLOADED if asked.body == b"full" else ...)
        await house.accept("full", b"full", ttl_s=0.0)
        await house.finish()
        assert house.bucket.objects.keys() == {"full-failed"}
        await house.accept("holds the turn")
        await asyncio.to_thread(wait_until, lambda: house.worker.waiting, "the first has the turn")
        await house.accept("late", ttl_s=0.01)
        late = await house.wait_for("late-failed")
        assert late.startswith(b"DEADLINE")
        assert b"RequestTTLSeconds" in late
        await house.stop()
        assert house.count("failed") == 3

    run_scenario(scenario)


def test_jobs_are_bounded_in_number(tmp_path: Path) -> None:
    """In the server and for each known client, over all fronts; a refusal names the limit and the setting."""

    async def scenario() -> None:
        house, other = House(tmp_path, lambda _: ..., 4, 2), House(tmp_path, lambda _: ..., 4, 2)
        await house.accept("a", client="desk")
        await other.accept("b", client="desk")
        with pytest.raises(Refused, match=r"desk has 2 .*async_jobs_per_client") as many:
            await house.accept("c", client="desk", source="unread")
        assert many.value.situation is Situation.OVERLOADED
        await house.accept("d", client="lab")
        await other.accept("e")
        with pytest.raises(Refused, match=r"^4 asynchronous requests .*\(async_jobs\)"):
            await house.accept("f")
        assert house.bucket.reads == 0
        await house.stop()
        await other.stop()
        said = {name: said[:9] for each in (house, other) for name, said in each.bucket.objects.items()}
        assert said == {f"{name}-failed": b"NOT_READY" for name in "abde"}
        with pytest.raises(Refused, match="is stopping"):
            await house.accept("f")

    run_scenario(scenario)


def test_one_output_has_one_writer(tmp_path: Path) -> None:
    """A second job for the same key is refused while the first is under way, on any front, and taken afterwards."""

    async def scenario() -> None:
        house, other = House(tmp_path, lambda _: ...), House(tmp_path, lambda _: b"forecast")
        await house.accept("a")
        with pytest.raises(Refused, match="the same place") as twice:
            await other.accept("a")
        assert twice.value.situation is Situation.BAD_REQUEST
        await house.stop()
        await other.accept("a")
        await other.finish()
        assert other.bucket.objects == {"a": b"forecast"}

    run_scenario(scenario)


@pytest.mark.slow
def test_the_jobs_of_a_dead_front_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With another that lives, and only when the first is dead; with the plane of the token that asked."""
    monkeypatch.setattr(jobs, "LOOK_S", 0.01)

    async def scenario() -> None:
        first, second = House(tmp_path, lambda _: ...), House(tmp_path, lambda asked: asked.body)
        asked = list[str]()

        def find_plane(token: str) -> InferencePlane:
            asked.append(token)
            return second.plane

        second.look(find_plane)
        for i in range(20):
            await first.accept(f"job{i}", b"body%d" % i, client="desk")
        await asyncio.sleep(0.1)
        assert second.bucket.objects == {}, "who lives keeps its jobs"
        first.die()
        for i in range(20):
            assert await second.wait_for(f"job{i}") == b"body%d" % i
        assert set(asked) == {"", "desk"}
        await second.stop()
        assert len(second.bucket.writes) == 20

    run_scenario(scenario)
    assert not [*tmp_path.glob("front-*/*.job"), *(tmp_path / "outcomes").iterdir()]


def test_an_answer_that_was_made_before_the_front_died_is_the_one_that_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The front that takes the job over asks no model again, which might answer something else by now."""
    monkeypatch.setattr(jobs, "LOOK_S", 0.01)

    async def scenario() -> None:
        first = House(tmp_path, lambda _: b"first answer")
        first.bucket.refusals = 1000  # it dies while its bucket is out
        await first.accept("a")
        await asyncio.to_thread(wait_until, lambda: first.bucket.refusals < 1000, "the answer is made")
        first.die()
        second = House(tmp_path, lambda _: b"second answer")
        second.look()
        assert await second.wait_for("a") == b"first answer"
        assert second.worker.asked == []
        await second.stop()
        assert second.bucket.writes == [("a", b"first answer")]

    run_scenario(scenario)


def test_a_job_whose_fronts_die_one_after_the_other_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It may be the reason; and one whose token is gone fails too."""
    monkeypatch.setattr(jobs, "LOOK_S", 0.01)

    async def scenario() -> None:
        house = House(tmp_path, lambda _: ...)
        await house.accept("a")
        for _ in range(jobs.MOST_FRONTS):
            house.die()
            house = House(tmp_path, lambda _: ...)
            if house.journal.adopt()[0].tries > jobs.MOST_FRONTS:
                break
        house.die()
        last = House(tmp_path, lambda _: b"never")

        def find_plane(token: str) -> InferencePlane:
            if token:
                raise Refused(Situation.FORBIDDEN, f"no token {token}")
            return last.plane

        last.look(find_plane)
        assert (await last.wait_for("a-failed")).startswith(b"INTERNAL: 5 processes")
        other = House(tmp_path, lambda _: ...)
        await other.accept("b", client="desk")
        other.die()
        assert (await last.wait_for("b-failed")).startswith(b"FORBIDDEN: no token desk: id")
        await last.stop()

    run_scenario(scenario)


def test_a_bucket_that_is_out_is_written_to_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The model is asked once; a bucket that stays out until the end leaves the job failed and forgotten."""
    monkeypatch.setattr(jobs, "FIRST_PAUSE_S", 0.001)

    async def scenario() -> None:
        house = House(tmp_path, lambda _: b"forecast")
        house.bucket.refusals = 3
        await house.accept("a")
        await house.finish()
        assert house.bucket.objects == {"a": b"forecast"}
        assert len(house.worker.asked) == 1
        monkeypatch.setattr(jobs, "LAST_WRITE_S", 0.0)
        house.bucket.refusals = 1000
        await house.accept("b", ttl_s=0.001)
        await house.finish()
        assert house.bucket.objects == {"a": b"forecast"}
        assert (house.count("done"), house.count("failed")) == (1, 1)

    run_scenario(scenario)
