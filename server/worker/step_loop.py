"""The worker's step loop: schedule a batch, execute it, answer its requests.

Everything runs on the worker's event loop thread (the step thread) in short calls: `submit` when a request arrives,
`step` when there is work. A request that arrives during a step runs in a later batch. `server.worker.model_loads` loads
models, `server.worker.resident_models` holds the loaded ones.

INVARIANT: loads and residents change only on this thread, so no row changes while a batch runs.
"""

import asyncio
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import msgspec
import structlog
import torch

from handlers.codecs.codec import Encoded
from handlers.errors import Overran, RequestError, RunFailed
from handlers.kinds import RowModel, SingleModel
from model_store.cache.cache import Cache, FailedLoad, Load
from model_store.cache.slots import Slot
from model_store.errors import LoadError
from model_store.names import ModelName
from server.access_log import LOST, REFUSED, ArrivalBuffer
from server.errors import Refused, Situation, situation_of
from server.ipc.frames import CacheResult, Request, Tier
from server.metrics import WorkerMetrics
from server.worker.engine.accelerator import DeviceEngine
from server.worker.engine.cpu import Engine
from server.worker.host_cache import HostCache
from server.worker.long_jobs import LONG_S, DeadlinePassed, LongJobs, Outcome, Pace, answer_alone, answer_rows
from server.worker.model_loader import LoadedModel, ModelBuilder
from server.worker.model_loads import ModelLoads
from server.worker.prefetch.prefetcher import Prefetcher
from server.worker.quarantine import Quarantine
from server.worker.resident_models import ResidentModels
from server.worker.scheduler import Job, QueueFull, Scheduler

SWEEP_S = 0.05
_TIERS = {"host": Tier.HOST, "disk": Tier.DISK, "store": Tier.STORE}

log = structlog.get_logger()


class Origin(Protocol):
    """The front connection that a job's response is sent to."""

    def answer(self, job: Job, content_type: str, body: bytes, *, queue_s: float, inference_s: float) -> None:
        """Send the job's answer. `queue_s` and `inference_s`: seconds in the queue and in the forward."""

    def refuse(self, job: Job, refused: Refused) -> None:
        """Send the reason why there is no answer."""


class StepLoop:
    """Accepts, runs and answers the requests of one worker.

    `batch`: most jobs of one batch. `patience_s`: how long a built model waits for memory. `arrivals`: rows of the
    access log, None without one. `long`: runs long requests, None to run all on the step thread. `now`: the monotonic
    clock in seconds.
    """

    def __init__(
        self,
        cache: Cache,
        scheduler: Scheduler,
        engine: Engine | DeviceEngine,
        loader: ModelBuilder,
        metrics: WorkerMetrics,
        *,
        shelf: HostCache,
        batch: int,
        loader_threads: int,
        patience_s: float,
        foresight: Prefetcher | None = None,
        arrivals: ArrivalBuffer | None = None,
        long: LongJobs | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._residents = ResidentModels(cache, engine, shelf, metrics, foresight, now)
        self._loads = ModelLoads(
            self._residents, self, loader, metrics, foresight, threads=loader_threads, patience_s=patience_s, now=now
        )
        self._cache, self._scheduler, self._engine = cache, scheduler, engine
        self.quarantine = Quarantine(lambda model, why: log.error("quarantined", model=model, why=why))
        self._leaving = set[asyncio.Task[bool]]()
        self._foresight, self._arrivals, self._long = foresight, arrivals, long
        self._metrics, self._batch, self._now = metrics, batch, now
        self._loop = asyncio.get_running_loop()
        self._woken = False
        self._sweeper = self._loop.create_task(self._sweep())

    def __repr__(self) -> str:
        """For example `<StepLoop <Cache ...>, <Scheduler ...>>`."""
        return f"<StepLoop {self._cache!r}, {self._scheduler!r}>"

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request, origin: Origin) -> Job:
        """Accept a request. INVARIANT: it is answered or refused through its origin exactly once, unless cancelled."""
        now, model = self._now(), ModelName(request.model)
        job = Job(request, model, origin, now, request.deadline_ns / 1e9)
        try:
            self._scheduler.admit(job)
        except QueueFull as full:
            job.done = True
            self._record(job, REFUSED)
            origin.refuse(job, Refused(Situation.OVERLOADED, str(full)))
            return job
        if self._foresight is not None:
            self._foresight.rhythms.record_request(model, now)
            if model in self._foresight.brought or model in self._foresight.loading:
                self._foresight.note_use(model)
        if model in self.quarantine.reasons:
            quarantined = self.quarantine.error(model)
            self._refuse(job, Refused(situation_of(quarantined), str(quarantined)))
            return job
        slot = self._cache.lease(model, now)
        if slot is not None:
            job.cache, job.slot = CacheResult.HIT, slot
            self._metrics.hits.inc()
            self._scheduler.add_ready(_get_group(slot), job)
            self.wake()
        else:
            self._await_model(job, now)
        return job

    def cancel(self, job: Job) -> None:
        """Cancel a job whose client has left. It is skipped in its batch, where its lease ends."""
        if self._scheduler.finish(job):
            self._record(job, LOST)
        job.request = msgspec.structs.replace(job.request, body=b"")  # the job itself may be queued for long

    def _await_model(self, job: Job, now: float) -> None:
        wanted = self._cache.want(job.model, now)
        if isinstance(wanted, Load) and self._loads.are_full:
            self._cache.dismiss(job.model)
            self._refuse(job, Refused(Situation.OVERLOADED, f"{len(self._loads)} models are being loaded already"))
            return
        if isinstance(wanted, FailedLoad):
            self._refuse(job, Refused(situation_of(wanted.error), wanted.error.public))
            return
        job.cache = CacheResult.COALESCED if wanted is None else CacheResult.MISS
        (self._metrics.coalesced if wanted is None else self._metrics.misses).inc()
        self._scheduler.add_waiting(job)
        if wanted is not None:
            self._loads.begin(job.model, now)

    # --- a step -----------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Schedule a step on the event loop; no-op if one is scheduled."""
        if not self._woken:
            self._woken = True
            self._loop.call_soon(self.step)

    def step(self) -> None:
        """Place built models, then run one batch. Schedules another step if work is left."""
        self._woken = False
        placed = bool(self._loads.built) and self._loads.place_built()
        if self._scheduler.has_work:
            group, jobs = self._scheduler.next_batch(self._batch)
            self._execute(group, jobs)
        if self._scheduler.has_work or (placed and self._loads.built):
            self.wake()

    def _execute(self, group: str, jobs: Sequence[Job]) -> None:
        now = self._now()
        live = list(self._live(jobs, now))
        if not live:
            return
        self._count([job for job in live if job.call is None], now)
        try:
            if isinstance(self._residents[_get_slot(live[0])], RowModel):
                self._run_rows(group, live, now)
            else:
                self._run_single(group, live, now)
        except torch.OutOfMemoryError as error:
            log.error("out_of_memory", group=group, error=str(error))  # noqa: TRY400 -- a traceback would say nothing
            for job in live:
                self._refuse(job, Refused(Situation.NO_ROOM, f"the device is out of memory: {error}"))
        except Overran as error:  # reported already
            for job in live:
                self._refuse(job, Refused(Situation.MODEL_FAILED, str(error)))
        except Exception as error:  # an error of a forward fails these requests, not the worker
            log.exception("step_failed", group=group)
            for job in live:
                self._refuse(job, Refused(Situation.MODEL_FAILED, f"the model failed: {error}"))

    def _live(self, jobs: Sequence[Job], now: float) -> Iterator[Job]:
        """The jobs that are to be run; the leases of the others end."""
        for job in jobs:
            if job.done:
                self._release(job)
            elif job.deadline <= now:
                self._refuse(job, Refused(Situation.DEADLINE, "the deadline passed while the request was queued"))
            else:
                yield job

    def _run_rows(self, group: str, jobs: list[Job], now: float) -> None:
        """One forward for the rows of many models, of as many as a slice has time for."""
        running, calls, parts = list[Job](), list[Any](), list[Any]()
        began = time.perf_counter()
        first = self._residents[_get_slot(jobs[0])]
        assert isinstance(first, RowModel), "a group holds one family"
        pace = self._long.pace(first) if self._long is not None and self._long.rows else None
        room: float = math.inf if pace is None else pace.slice_rows
        for at, job in enumerate(jobs):
            model = self._residents[_get_slot(job)]
            assert isinstance(model, RowModel), "a group holds one family"
            if pace is not None and self._runs_apart(job, model, None, pace, now):
                continue
            call = job.call or self._decode(job, model.codec.decode)
            if call is None or (pace is not None and self._runs_apart(job, model, call, pace, now)):
                continue
            if running and len(call.rows) > room:
                job.call = call
                self._scheduler.put_back(group, jobs[at:])
                break
            room -= len(call.rows)
            if not len(call.rows):  # JSON Lines of which none is valid
                self._encode(job, call.encode, call.rows, now, 0.0)
                continue
            running.append(job)
            calls.append(call)
            parts.append(call.rows)
        if not running:
            return
        jobs[:] = running  # the others do not fail with these
        started = time.perf_counter()
        offsets = [_get_slot(job).offset for job in running]
        answers = self._residents.with_memory(lambda: self._engine.run(first.family, offsets, parts))
        ended = time.perf_counter()
        self._metrics.batch_rows.observe(sum(map(len, parts)))
        self._metrics.batch_models.observe(len({job.model for job in running}))
        if pace is not None:
            pace.ran(sum(map(len, parts)), ended - started)
        for job, call, answer in zip(running, calls, answers, strict=True):
            self._encode(job, call.encode, answer, now, ended - started)
        self._count_step_time(began, started, ended)

    def _run_single(self, group: str, jobs: Sequence[Job], now: float) -> None:
        """Run the requests of one single model, together if the model allows it."""
        model = self._residents[_get_slot(jobs[0])]
        assert isinstance(model, SingleModel), "a group holds one single"
        long = self._long
        if long is not None and any(long.is_long_to_decode(job, model) for job in jobs):
            self._run_single_apart(long, group, model, [(job, None) for job in jobs], now)
            return
        began = time.perf_counter()
        asked = [(job, call) for job in jobs if (call := self._decode(job, model.codec.decode)) is not None]
        if not asked:
            return
        calls = [call for _, call in asked]
        if long is not None and long.is_long_alone(model, calls):
            self._run_single_apart(long, group, model, asked, now)
            return
        started = time.perf_counter()
        name = asked[0][0].model
        try:
            with nullcontext() if long is None else long.noted.noting(name):
                answers = self._residents.with_memory(lambda: model.single.run_all([call.feeds for call in calls]))
        except Overran as overran:
            self._overran(name, overran)
            raise
        ended = time.perf_counter()
        if long is not None:
            long.ran_alone(model, calls, ended - started)
        self._metrics.batch_rows.observe(sum(call.n for _, call in asked))
        self._metrics.batch_models.observe(1)
        for (job, call), outputs in zip(asked, answers, strict=True):
            if isinstance(outputs, RunFailed):
                self._refuse(job, Refused(Situation.MODEL_FAILED, str(outputs)))
            else:
                self._encode(job, call.encode, outputs, now, ended - started)
        self._count_step_time(began, started, ended)

    # --- long requests, on other threads ----------------------------------------------------------------------------

    def _runs_apart(self, job: Job, model: RowModel, call: Any, pace: Pace, now: float) -> bool:
        """Whether this request is long, and is run apart from now on; `call` is None before it is decoded."""
        assert self._long is not None, "without threads nothing is long"
        if call is None:
            if job.call is not None or not self._long.is_long_to_decode(job, model):
                return False
        elif pace.seconds(len(call.rows)) + call.seconds <= LONG_S:
            return False
        row = self._engine.pool.read(_get_slot(job).offset, model.family.row_floats * 4)  # the slot may move
        started = time.perf_counter()
        self._long.start(
            [job],
            answer_rows(job, model, row, call, pace),
            lambda outcome: self._end_apart(job, outcome, now, time.perf_counter() - started),
        )
        return True

    def _run_single_apart(
        self, long: LongJobs, group: str, model: SingleModel, asked: Sequence[tuple[Job, Any]], now: float
    ) -> None:
        jobs, calls = [job for job, _ in asked], [call for _, call in asked]
        started = time.perf_counter()

        def note(calls: Sequence[Any], seconds: float) -> None:
            self._loop.call_soon_threadsafe(long.ran_alone, model, calls, seconds)

        def done(outcomes: list[Outcome] | Exception) -> None:
            took = time.perf_counter() - started
            self._scheduler.unpark(group)
            if isinstance(outcomes, Overran):
                self._overran(jobs[0].model, outcomes)
            for i, job in enumerate(jobs):
                self._end_apart(job, outcomes if isinstance(outcomes, Exception) else outcomes[i], now, took)
            if self._scheduler.has_work:
                self.wake()

        self._scheduler.park(group)  # a model that runs alone runs one batch at a time
        long.start(jobs, answer_alone(jobs, model, calls, note), done)

    def _end_apart(self, job: Job, outcome: Outcome, now: float, took: float) -> None:
        """Answer or refuse a request that ran apart, and end its lease."""
        if not isinstance(outcome, Exception):
            self._answer(job, outcome, now, took)
        elif isinstance(outcome, RequestError):
            self._refuse(job, Refused(Situation.BAD_REQUEST, outcome.message, outcome.instance, outcome.field))
        elif isinstance(outcome, DeadlinePassed):
            self._refuse(job, Refused(Situation.DEADLINE, "the deadline passed while the request ran"))
        else:
            if not isinstance(outcome, RunFailed):
                log.error("long_job_failed", model=job.model, error=repr(outcome))
            self._refuse(job, Refused(Situation.MODEL_FAILED, f"the model failed: {outcome}"))

    def _overran(self, model: ModelName, overran: Overran) -> None:
        """Refuse the model from now on and free its memory."""
        self.quarantine.add(model, str(overran))
        leaving = self._loop.create_task(self.unload(model))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    def _count_step_time(self, began: float, started: float, ended: float) -> None:
        """Count a step's seconds of decoding (before `started`), forward (until `ended`) and encoding (until now)."""
        self._metrics.decode_s.inc(started - began)
        self._metrics.forward_s.inc(ended - started)
        self._metrics.encode_s.inc(time.perf_counter() - ended)

    def _decode(self, job: Job, decode: Callable[[bytes, str, str], Any]) -> Any:
        """The request as arrays; None if it was refused."""
        try:
            return decode(job.request.body, job.request.content_type, job.request.accept)
        except RequestError as bad:
            self._refuse(job, Refused(Situation.BAD_REQUEST, bad.message, bad.instance, bad.field))
            return None

    def _encode(self, job: Job, encode: Callable[[Any], Encoded], answer: Any, now: float, step_s: float) -> None:
        try:
            encoded = encode(answer)
        except RunFailed as failed:
            self._refuse(job, Refused(Situation.MODEL_FAILED, str(failed)))
            return
        self._answer(job, encoded, now, step_s)

    def _answer(self, job: Job, encoded: Encoded, now: float, step_s: float) -> None:
        body, content_type = encoded
        if self._scheduler.finish(job):
            self._record(job, job.cache)
            queue_s = max(0.0, now - job.arrived - job.load_s)
            job.origin.answer(job, content_type, body, queue_s=queue_s, inference_s=step_s)
        self._release(job)

    def _count(self, jobs: Sequence[Job], now: float) -> None:
        for job in jobs:
            self._metrics.queue.observe(max(0.0, now - job.arrived - job.load_s))
            if self._metrics.per_model:
                self._metrics.model_request(job.model)

    def _refuse(self, job: Job, refused: Refused) -> None:
        self._tell_refused(job, refused)
        self._release(job)

    def _tell_refused(self, job: Job, refused: Refused) -> None:
        """Refuse a job whose model is still in use: its lease ends later."""
        if self._scheduler.finish(job):
            self._record(job, REFUSED)
            job.origin.refuse(job, refused)

    def _record(self, job: Job, outcome: int) -> None:
        """Add a row to the access log."""
        if self._arrivals is not None:
            self._arrivals.note(job.model, job.arrived, 0 if job.slot is None else job.slot.charge, outcome)

    def _release(self, job: Job) -> None:
        slot, job.slot = job.slot, None
        if slot is not None:
            self._residents.release(slot)

    # --- loads ------------------------------------------------------------------------------------------------------

    def load(self, model: ModelName, *, revalidate: bool = False) -> asyncio.Future[str]:
        """Load a model for an operator. Resolves with the version that serves, or LoadError.

        `revalidate` makes a store request even if the model is resident.
        """
        if model in self.quarantine.reasons:
            future: asyncio.Future[str] = self._loop.create_future()
            future.set_exception(self.quarantine.error(model))
            return future
        return self._loads.ask(model, revalidate=revalidate)

    def served(self, built: LoadedModel, now: float) -> None:
        """Lease and queue the jobs that waited for this model: it is resident now."""
        for job in self._scheduler.take_waiting(built.model):
            job.slot = self._cache.lease(built.model, now)
            job.load_s, job.tier = now - job.arrived, _TIERS[built.tier]
            self._metrics.loading_wait.observe(job.load_s)
            self._scheduler.add_ready(_get_group(_get_slot(job)), job)

    def failed(self, model: ModelName, error: LoadError) -> None:
        """Refuse the jobs that waited for this model, with the cause of its failed load."""
        for job in self._scheduler.take_waiting(model):
            self._refuse(job, Refused(situation_of(error), error.public))

    async def unload(self, model: ModelName) -> bool:
        """Unload the model after its last lease; returns when its memory is free. False if it was not resident."""
        if model in self._cache.loads:
            try:
                await self.load(model)  # joins the running load, so that the jobs that wait for it are served first
            except LoadError:
                return False
        return await self._residents.unload(model)

    def pin(self, model: ModelName) -> None:
        """Never evict the model, from now on or once it is loaded."""
        self._cache.pin(model)

    def unpin(self, model: ModelName) -> None:
        """Allow the model to be evicted again."""
        self._cache.unpin(model)

    # --- time and state ---------------------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        """Do what depends on time, every SWEEP_S.

        That is: refuse waiting jobs whose deadline has passed, measure execution paths, retry built models that wait
        for memory, and start prefetches.
        """
        while True:
            await asyncio.sleep(SWEEP_S)
            for job in self._scheduler.take_expired(self._now()):
                message = f"{job.model} was not ready before the deadline passed"
                self._refuse(job, Refused(Situation.DEADLINE, message))
            for job in [] if self._long is None else [job for job in self._long.running if job.deadline <= self._now()]:
                self._tell_refused(job, Refused(Situation.DEADLINE, "the deadline passed while the request ran"))
            self._engine.learn()
            if self._loads.built:
                self.wake()
            if self._foresight is not None:
                self._foresight.advance_time(self._now())
                self._loads.look_ahead()

    def close(self) -> None:
        """Stop the sweep and start no more loads."""
        self._sweeper.cancel()
        if self._long is not None:
            self._long.close()
        self._loads.close()

    def render_metrics(self) -> str:
        """The metrics in exposition format, with updated gauges."""
        self._residents.update_gauges()
        if self._foresight is not None:
            self._metrics.rhythms.set(len(self._foresight.rhythms))
        return self._metrics.text()

    def describe(self, prefix: str = "", after: str = "", limit: int = sys.maxsize) -> list[dict[str, Any]]:
        """Describe models; see `ResidentModels.describe`."""
        return self._residents.describe(prefix, after, limit)


def _get_slot(job: Job) -> Slot:
    assert job.slot is not None, "a job in a batch holds a lease"
    return job.slot


def _get_group(slot: Slot) -> str:
    """The key of jobs that can run in one batch: the slot's family, or the single model and its version."""
    return slot.family or f"single {slot.model}@{slot.version}"
