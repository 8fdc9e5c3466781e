"""Asynchronous invocations from their acceptance to the answer, or the failure, in the bucket. Runs in a front.

A job is kept in the server's journal: one whose front is killed goes on with another front, or with the next one. Jobs
wait for one of a few turns; where a worker is overloaded, its job gives the turn up and tries again.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from model_store.names import ModelName
from server.errors import Refused, Situation
from server.front.asynchronous.bucket import Bucket
from server.front.asynchronous.calls import AsyncCall
from server.front.asynchronous.journal import Entry, JobRecord, Journal, Outcome
from server.front.background import BackgroundJobs
from server.front.inference import InferRequest
from server.front.inference_plane import InferencePlane
from server.metrics import AsyncSeries
from server.settings import Settings

log = structlog.get_logger()

TURNS = 8  #: jobs of one front that run at a time
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0  #: before a job asks an overloaded worker or bucket again; it doubles
LOOK_S = 0.5  #: between two looks for fronts that have died
MOST_FRONTS = 5  #: that one job may have: those before have died with it
LAST_WRITE_S = 60.0  #: in which the bucket must take what has become of a job whose time is over
_PASSING = (Situation.OVERLOADED, Situation.NOT_READY)
_STOPPED = "the server has stopped; ask again"

ExplainFailure = Callable[[Refused, bytes], bytes]  #: of a refusal and the request's id
FindPlane = Callable[[str], InferencePlane]  #: by a token's name; raises Refused where it is no token any more


@dataclass(slots=True)
class Job:
    """One job that this front has. Its body is in the journal until its turn comes."""

    entry: Entry
    call: AsyncCall
    model: ModelName
    plane: InferencePlane
    accepted: float
    request_id: bytes = b""
    client: str = ""
    is_written: bool = False  #: whether the bucket has taken what has become of it

    @property
    def expires(self) -> float:
        """When it has waited too long, on the monotonic clock (s)."""
        return self.accepted + self.call.ttl_s

    async def ask(self, body: bytes, deadline: float) -> bytes:
        """The model's answer. Nobody waits for it who could leave. Raises Refused."""
        response = await self.plane.infer(
            InferRequest(
                self.model,
                body,
                self.call.content_type,
                self.call.accept,
                deadline,
                request_id=self.request_id,
                client=self.client,
            )
        )
        return await response.read()


class AsyncJobs:
    """The asynchronous invocations of one front. `explain` gives the failure object of a refusal."""

    def __init__(
        self, settings: Settings, bucket: Bucket, journal: Journal, series: AsyncSeries, explain: ExplainFailure
    ) -> None:
        self._bucket, self._journal, self._series, self._explain = bucket, journal, series, explain
        self._turns = asyncio.Semaphore(TURNS)
        self._input_bytes, self._longest_s = int(settings.max_body_bytes), settings.request_timeout_s
        self._under_way = 0

    def __repr__(self) -> str:
        """For example `<AsyncJobs 12 under way for <Bucket s3://bucket/async>>`."""
        return f"<AsyncJobs {self._under_way} under way for {self._bucket!r}>"

    async def accept(self, record: JobRecord, plane: InferencePlane) -> None:
        """Keep the job and start it. Raises Refused where there is no room; nothing was read from the bucket then."""
        plane.background.check()
        job = self._make_job(await asyncio.to_thread(self._journal.write, record), record, plane)
        self._series.accepted.inc()
        plane.background.start(self._run(job))

    async def take_over(self, background: BackgroundJobs, find_plane: FindPlane) -> None:
        """Go on with the jobs of fronts that die, for as long as this one takes new ones. Raises nothing."""
        while not background.is_stopping:
            try:
                for entry in await asyncio.to_thread(self._journal.adopt):
                    background.start(self._run_adopted(entry, find_plane))
            except OSError as error:
                log.warning("async_jobs_not_looked_for", error=str(error))
            await asyncio.sleep(LOOK_S)

    @staticmethod
    def _make_job(entry: Entry, record: JobRecord, plane: InferencePlane) -> Job:
        return Job(entry, record.call, record.model, plane, record.accepted, record.request_id, record.client)

    async def _run_adopted(self, entry: Entry, find_plane: FindPlane) -> None:
        """Go on with a job of another front."""
        try:
            record = await asyncio.to_thread(self._journal.read, entry)
        except Refused as why:
            log.error("async_job_lost", job=entry.id, error=why.detail.message)  # noqa: TRY400 -- the disk's fault
            await asyncio.to_thread(self._journal.remove, entry)
            return
        log.info("async_job_taken_over", request_id=record.call.id, model=record.model, fronts=entry.tries)
        plane, refused = find_plane(""), None
        try:
            plane = find_plane(record.token)
        except Refused as gone:
            refused = gone
        if entry.tries > MOST_FRONTS:
            message = f"{MOST_FRONTS} processes of the server died while they had this request"
            refused = Refused(Situation.INTERNAL, message)
        await self._run(self._make_job(entry, record, plane), refused)

    async def _run(self, job: Job, refused: Refused | None = None) -> None:
        """Answer into the bucket, or say there why not; one that is `refused` already is not asked. Raises nothing."""
        self._count(1)
        try:
            if refused is None:
                await self._work(job)
            else:
                await self._fail(job, refused)
        except asyncio.CancelledError:
            await self._fail(job, Refused(Situation.NOT_READY, _STOPPED), until=0.0)
        except Exception:
            log.exception("async_job_failed", request_id=job.call.id)
            await self._fail(job, Refused(Situation.INTERNAL, "the server failed; its log says why"))
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self._under_way += change
        self._series.under_way.set(self._under_way)

    async def _work(self, job: Job) -> None:
        """Try until there is an answer, a refusal for good, or no time left; and write what has become of the job."""
        pause = FIRST_PAUSE_S
        while True:
            if not await self._take_turn(job):
                message = f"the request waited for its turn for {job.call.ttl_s:g} s (RequestTTLSeconds)"
                await self._fail(job, Refused(Situation.DEADLINE, message))
                return
            try:
                outcome = await self._try(job)
                await self._deliver(job, outcome, max(job.expires, time.monotonic() + LAST_WRITE_S))
            except Refused as why:
                if why.situation not in _PASSING or time.monotonic() + pause > job.expires:
                    await self._fail(job, why)
                    return
            else:
                return
            finally:
                self._turns.release()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _take_turn(self, job: Job) -> bool:
        """Whether the job has got its turn before it had waited too long."""
        try:
            async with asyncio.timeout_at(job.expires - time.monotonic() + asyncio.get_running_loop().time()):
                await self._turns.acquire()
        except TimeoutError:
            return False
        return True

    async def _try(self, job: Job) -> Outcome:
        """One try, from the input to the answer, which is kept. Raises Refused."""
        found = await asyncio.to_thread(self._journal.find_outcome, job.entry)
        if found is not None:
            return found
        held = job.plane.held
        with held.hold(self._input_bytes):
            if job.call.source is None:
                body = (await asyncio.to_thread(self._journal.read, job.entry)).body
            else:
                body = await self._bucket.read(job.call.source)
        deadline = time.monotonic() + min(job.call.timeout_s or self._longest_s, self._longest_s)
        with held.hold(len(body)):
            answer = bytes(await job.ask(body, deadline))
        return await asyncio.to_thread(self._journal.decide, job.entry, Outcome(answered=True, data=answer))

    async def _fail(self, job: Job, why: Refused, until: float | None = None) -> None:
        """Write the failure object, or the answer if the job has come to one before; nothing if one is written."""
        if job.is_written:
            return
        log.info("async_invocation_failed", request_id=job.call.id, model=job.model, error=why.detail.message)
        failure = Outcome(answered=False, data=self._explain(why, job.request_id))
        outcome = await asyncio.to_thread(self._journal.decide, job.entry, failure)
        await self._deliver(job, outcome, time.monotonic() + LAST_WRITE_S if until is None else until)

    async def _deliver(self, job: Job, outcome: Outcome, until: float) -> None:
        """Write what has become of the job, and forget it. A bucket that is out is asked again until then."""
        key, pause = job.call.output if outcome.answered else job.call.failure, FIRST_PAUSE_S
        held, size = job.plane.held, len(outcome.data)
        held.size += size
        try:
            while (why := await self._write(key, outcome.data)) is not None:
                if why.situation is not Situation.STORE_FAILED or time.monotonic() + pause > until:
                    log.error("async_outcome_not_written", request_id=job.call.id, key=key, error=why.detail.message)
                    break
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
        finally:
            held.size -= size
        job.is_written = True
        counter = self._series.done if outcome.answered and why is None else self._series.failed
        counter.inc()
        await asyncio.to_thread(self._journal.remove, job.entry)

    async def _write(self, key: ModelName, data: bytes) -> Refused | None:
        """Write an object; returns why it was not written."""
        try:
            await self._bucket.write(key, data)
        except Refused as why:
            return Refused(why.situation, why.detail.message)
        return None
