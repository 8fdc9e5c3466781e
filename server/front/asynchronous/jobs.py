"""Asynchronous invocations from their acceptance to the answer, or the failure, in the bucket. Runs in a front.

A job lives in the memory of its front: what is accepted is answered or failed also when the server stops, but not when
it is killed. Jobs wait for one of a few turns; where a worker is overloaded, its job gives the turn up and tries again.
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
from server.front.dataplane import InferencePlane, InferRequest
from server.settings import Settings

log = structlog.get_logger()

TURNS = 8  #: jobs of one front that run at a time
MOST_HELD_BYTES = 32 * 1024 * 1024  #: of inputs that came as bodies and wait in one front
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0  #: before a job asks an overloaded worker again; it doubles
_PASSING = (Situation.OVERLOADED, Situation.NOT_READY)

ExplainFailure = Callable[[Refused], bytes]


@dataclass(frozen=True, slots=True)
class Job:
    """One accepted invocation, without its connection. `client`: see InferRequest; `accepted`: a monotonic time (s)."""

    call: AsyncCall
    model: ModelName
    body: bytes
    plane: InferencePlane
    accepted: float
    request_id: bytes = b""
    client: str = ""

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
    """The asynchronous invocations of one front."""

    def __init__(self, settings: Settings, bucket: Bucket) -> None:
        self._bucket, self._turns = bucket, asyncio.Semaphore(TURNS)
        self._input_bytes, self._longest_s = int(settings.max_body_bytes), settings.request_timeout_s
        self._held_bytes = 0

    def __repr__(self) -> str:
        """For example `<AsyncJobs 12000 bytes wait for <Bucket s3://bucket/async>>`."""
        return f"<AsyncJobs {self._held_bytes} bytes wait for {self._bucket!r}>"

    def accept(self, job: "Job", explain: ExplainFailure) -> None:
        """Start the job. `explain` gives the failure object of a refusal. Raises Refused where there is no room."""
        job.plane.background.check()
        if self._held_bytes + len(job.body) > MOST_HELD_BYTES:
            message = f"this front holds {MOST_HELD_BYTES} bytes of asynchronous requests already; try again"
            raise Refused(Situation.OVERLOADED, message)
        self._held_bytes += len(job.body)
        job.plane.held.size += len(job.body)
        job.plane.background.start(self._run(job, explain))

    async def _run(self, job: "Job", explain: ExplainFailure) -> None:
        """Answer into the bucket, or say there why not. Raises nothing."""
        try:
            await self._answer(job)
        except Refused as why:
            await self._fail(job, why, explain)
        except asyncio.CancelledError:
            await self._fail(job, Refused(Situation.NOT_READY, "the server has stopped; ask again"), explain)
        except Exception:
            log.exception("async_job_failed", request_id=job.call.id)
            await self._fail(job, Refused(Situation.INTERNAL, "the server failed; its log says why"), explain)
        finally:
            self._held_bytes -= len(job.body)
            job.plane.held.size -= len(job.body)

    async def _fail(self, job: "Job", why: Refused, explain: ExplainFailure) -> None:
        """Write the failure object, once. A bucket that does not take it leaves a line in the log."""
        log.info("async_invocation_failed", request_id=job.call.id, model=job.model, error=why.detail.message)
        try:
            await self._bucket.write(job.call.failure, explain(why))
        except (Refused, asyncio.CancelledError) as error:
            log.error("async_failure_not_written", request_id=job.call.id, key=job.call.failure, error=str(error))  # noqa: TRY400 -- the bucket's fault

    async def _answer(self, job: "Job") -> None:
        """Try until there is an answer, a refusal for good, or no time left. Raises Refused."""
        pause, expires = FIRST_PAUSE_S, job.accepted + job.call.ttl_s
        while True:
            try:
                async with asyncio.timeout_at(expires - time.monotonic() + asyncio.get_running_loop().time()):
                    await self._turns.acquire()
            except TimeoutError:
                message = f"the request waited for its turn for {job.call.ttl_s:g} s (RequestTTLSeconds)"
                raise Refused(Situation.DEADLINE, message) from None
            try:
                return await self._try(job)
            except Refused as why:
                if why.situation not in _PASSING or time.monotonic() + pause > expires:
                    raise
            finally:
                self._turns.release()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _try(self, job: "Job") -> None:
        """One try, from the input to the answer in the bucket. Raises Refused."""
        held, body = job.plane.held, job.body
        if job.call.source is not None:
            with held.hold(self._input_bytes):
                body = await self._bucket.read(job.call.source)
        deadline = time.monotonic() + min(job.call.timeout_s or self._longest_s, self._longest_s)
        with held.hold(len(body)):
            answer = await job.ask(body, deadline)
        held.size += len(answer)
        try:
            await self._bucket.write(job.call.output, answer)
        finally:
            held.size -= len(answer)
