"""The step loop: schedule -> execute -> update. What a worker does for requests.

Everything here runs on the worker's event loop thread, in short calls: `submit` when a request has arrived, `step` when
there is something to do. What arrives while a step runs is for the next batches. `server.worker.model_loads` brings
models, `server.worker.resident_models` has those that are here; both live on this thread, so that nothing is changed
while a batch runs.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import structlog
import torch

from handlers.errors import RequestError, RunFailed
from model_store.cache.cache import Cache, Failure
from model_store.cache.slots import Slot
from model_store.errors import LoadError
from model_store.names import ModelName
from server.access_log import LOST, REFUSED, Arrivals
from server.errors import Refused, Situation, situation_of
from server.ipc.frames import CacheResult, Request, Tier
from server.metrics import WorkerMetrics
from server.worker.engine.accelerator import DeviceEngine
from server.worker.engine.cpu import Engine
from server.worker.host_cache import Shelf
from server.worker.model_loader import Builder, Built, RowModel, SingleModel
from server.worker.model_loads import Loads
from server.worker.prefetch.prefetcher import Foresight
from server.worker.resident_models import Residents
from server.worker.scheduler import Job, QueueFull, Scheduler

SWEEP_S = 0.05
_TIERS = {"host": Tier.HOST, "disk": Tier.DISK, "store": Tier.STORE}

log = structlog.get_logger()


class Origin(Protocol):
    """Whom a job came from: a front's connection."""

    def answer(self, job: Job, content_type: str, body: bytes, *, queue_s: float, inference_s: float) -> None:
        """The job's answer."""

    def refuse(self, job: Job, refused: Refused) -> None:
        """Why there is none."""


class StepLoop:
    """See the module. `now` is the monotonic clock in seconds."""

    def __init__(
        self,
        cache: Cache,
        scheduler: Scheduler,
        engine: Engine | DeviceEngine,
        loader: Builder,
        metrics: WorkerMetrics,
        *,
        shelf: Shelf,
        batch: int,
        loader_threads: int,
        patience_s: float,
        foresight: Foresight | None = None,
        arrivals: Arrivals | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._residents = Residents(cache, engine, shelf, metrics, foresight, now)
        self._loads = Loads(
            self._residents, self, loader, metrics, foresight, threads=loader_threads, patience_s=patience_s, now=now
        )
        self._cache, self._scheduler, self._engine = cache, scheduler, engine
        self._foresight, self._arrivals = foresight, arrivals
        self._metrics, self._batch, self._now = metrics, batch, now
        self._loop = asyncio.get_running_loop()
        self._woken = False
        self._sweeper = self._loop.create_task(self._sweep())

    def __repr__(self) -> str:
        """For example `<StepLoop <Cache ...>, <Scheduler ...>>`."""
        return f"<StepLoop {self._cache!r}, {self._scheduler!r}>"

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request, origin: Origin) -> Job:
        """A request has arrived. It is answered through its origin, now or later, exactly once."""
        now = self._now()
        model = ModelName(request.model)
        job = Job(request, model, origin, now, request.deadline_ns / 1e9)
        try:
            self._scheduler.admit(job)
        except QueueFull as full:
            job.done = True
            self._record(job, REFUSED)
            origin.refuse(job, Refused(Situation.OVERLOADED, str(full)))
            return job
        if self._foresight is not None:
            self._foresight.asked(model, now)
        slot = self._cache.lease(model, now)
        if slot is not None:
            job.cache, job.slot = CacheResult.HIT, slot
            self._metrics.hits.inc()
            self._scheduler.ready(_group(slot), job)
            self.wake()
        else:
            self._await_model(job, now)
        return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for the answer: the job is skipped where it lies, its lease ends when its turn comes."""
        if self._scheduler.finish(job):
            self._record(job, LOST)

    def _await_model(self, job: Job, now: float) -> None:
        wanted = self._cache.want(job.model, now)
        if isinstance(wanted, Failure):
            self._refuse(job, Refused(situation_of(wanted.error), str(wanted.error)))
            return
        job.cache = CacheResult.COALESCED if wanted is None else CacheResult.MISS
        (self._metrics.coalesced if wanted is None else self._metrics.misses).inc()
        self._scheduler.wait(job)
        if wanted is not None:
            self._loads.begin(job.model, now)

    # --- a step -----------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """There is something to do: run a step as soon as what happens now is over."""
        if not self._woken:
            self._woken = True
            self._loop.call_soon(self.step)

    def step(self) -> None:
        """Give built models their place, then run one batch. Whatever is left asks for the next step."""
        self._woken = False
        placed = self._loads.place()
        if self._scheduler.has_work:
            group, jobs = self._scheduler.next_batch(self._batch)
            self._execute(group, jobs)
        if self._scheduler.has_work or (placed and self._loads.any_built):
            self.wake()

    def _execute(self, group: str, jobs: Sequence[Job]) -> None:
        now = self._now()
        live = []
        for job in jobs:
            if job.done:
                self._release(job)
            elif job.deadline <= now:
                self._refuse(job, Refused(Situation.DEADLINE, "the deadline passed while the request was queued"))
            else:
                live.append(job)
        if not live:
            return
        self._count(live, now)
        try:
            if isinstance(self._residents[_slot(live[0])], RowModel):
                self._run_rows(live, now)
            else:
                self._run_single(live, now)
        except torch.OutOfMemoryError as error:
            log.error("out_of_memory", group=group, error=str(error))  # noqa: TRY400 -- where it ran out says nothing
            for job in live:
                self._refuse(job, Refused(Situation.NO_ROOM, f"the device is out of memory: {error}"))
        except Exception as error:  # whatever a forward throws is these requests' trouble, not the worker's
            log.exception("step_failed", group=group)
            for job in live:
                self._refuse(job, Refused(Situation.MODEL_FAILED, f"the model failed: {error}"))

    def _run_rows(self, jobs: Sequence[Job], now: float) -> None:
        """One forward for the rows of many models."""
        running, calls, parts = [], [], []
        began = time.perf_counter()
        for job in jobs:
            model = self._residents[_slot(job)]
            assert isinstance(model, RowModel), "a group holds one family"
            call = self._decode(job, model.codec.decode)
            if call is None:
                continue
            if not len(call.rows):  # lines of which none can be answered
                self._encode(job, call.encode, call.rows, now, 0.0)
                continue
            running.append(job)
            calls.append(call)
            parts.append(call.rows)
        if not running:
            return
        family = self._residents[_slot(running[0])]
        assert isinstance(family, RowModel)
        started = time.perf_counter()
        offsets = [_slot(job).offset for job in running]
        answers = self._residents.with_memory(lambda: self._engine.run(family.family, offsets, parts))
        ended = time.perf_counter()
        self._metrics.batch_rows.observe(sum(map(len, parts)))
        self._metrics.batch_models.observe(len({job.model for job in running}))
        for job, call, answer in zip(running, calls, answers, strict=True):
            self._encode(job, call.encode, answer, now, ended - started)
        self._spent(began, started, ended)

    def _run_single(self, jobs: Sequence[Job], now: float) -> None:
        """The requests of one model that is not a row, in one run where the model allows it."""
        model = self._residents[_slot(jobs[0])]
        assert isinstance(model, SingleModel), "a group holds one single"
        began = time.perf_counter()
        asked = [(job, call) for job in jobs if (call := self._decode(job, model.codec.decode)) is not None]
        if not asked:
            return
        started = time.perf_counter()
        answers = self._residents.with_memory(lambda: model.single.run_all([call.feeds for _, call in asked]))
        ended = time.perf_counter()
        self._metrics.batch_rows.observe(sum(call.n for _, call in asked))
        self._metrics.batch_models.observe(1)
        for (job, call), outputs in zip(asked, answers, strict=True):
            if isinstance(outputs, RunFailed):
                self._refuse(job, Refused(Situation.MODEL_FAILED, str(outputs)))
            else:
                self._encode(job, call.encode, outputs, now, ended - started)
        self._spent(began, started, ended)

    def _spent(self, began: float, started: float, ended: float) -> None:
        """Count where a step's time went: before the forward it decoded, after it it encoded."""
        self._metrics.decode_s.inc(started - began)
        self._metrics.forward_s.inc(ended - started)
        self._metrics.encode_s.inc(time.perf_counter() - ended)

    def _decode(self, job: Job, decode: Callable[[bytes, str, str], Any]) -> Any:
        """The request as arrays, or None when it was refused."""
        try:
            return decode(job.request.body, job.request.content_type, job.request.accept)
        except RequestError as bad:
            self._refuse(job, Refused(Situation.BAD_REQUEST, bad.message, bad.instance, bad.field))
            return None

    def _encode(
        self, job: Job, encode: Callable[[Any], tuple[bytes, str]], answer: Any, now: float, step_s: float
    ) -> None:
        try:
            body, content_type = encode(answer)
        except RunFailed as failed:
            self._refuse(job, Refused(Situation.MODEL_FAILED, str(failed)))
            return
        if self._scheduler.finish(job):
            self._record(job, job.cache)
            queue_s = max(0.0, now - job.arrived - job.load_s)
            job.origin.answer(job, content_type, body, queue_s=queue_s, inference_s=step_s)
        self._release(job)

    def _count(self, jobs: Sequence[Job], now: float) -> None:
        for job in jobs:
            self._metrics.queue.observe(max(0.0, now - job.arrived - job.load_s))
            self._metrics.model_request(job.model)

    def _refuse(self, job: Job, refused: Refused) -> None:
        if self._scheduler.finish(job):
            self._record(job, REFUSED)
            job.origin.refuse(job, refused)
        self._release(job)

    def _record(self, job: Job, outcome: int) -> None:
        """For the access log."""
        if self._arrivals is not None:
            self._arrivals.note(job.model, job.arrived, 0 if job.slot is None else job.slot.charge, outcome)

    def _release(self, job: Job) -> None:
        slot, job.slot = job.slot, None
        if slot is not None:
            self._residents.release(slot)

    # --- loads ------------------------------------------------------------------------------------------------------

    def load(self, model: ModelName, *, revalidate: bool = False) -> asyncio.Future[str]:
        """An operator's load: the version that serves in the end, or LoadError. `revalidate` asks the store anyway."""
        return self._loads.ask(model, revalidate=revalidate)

    def served(self, built: Built, now: float) -> None:
        """A model is here: everyone who waited for it is leased and queued."""
        for job in self._scheduler.awaited(built.model):
            job.slot = self._cache.lease(built.model, now)
            job.load_s, job.tier = now - job.arrived, _TIERS[built.tier]
            self._metrics.loading_wait.observe(job.load_s)
            self._scheduler.ready(_group(_slot(job)), job)

    def failed(self, model: ModelName, error: LoadError) -> None:
        """It will not be here: everyone who waited for it gets the cause."""
        for job in self._scheduler.awaited(model):
            self._refuse(job, Refused(situation_of(error), str(error)))

    async def unload(self, model: ModelName) -> bool:
        """Forget the model once nobody uses it; returns when its memory is free. False if it was not here."""
        if model in self._cache.loads:
            try:
                await self.load(model)  # joins the load: whoever waits for it is served first
            except LoadError:
                return False
        return await self._residents.unload(model)

    def pin(self, model: ModelName) -> None:
        """Never evict the model, now or once it is loaded."""
        self._cache.pin(model)

    def unpin(self, model: ModelName) -> None:
        """The model may be evicted again."""
        self._cache.unpin(model)

    # --- time and state ---------------------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        """Deadlines of jobs that wait for a model, built models that wait for room, a path's time to measure, and what
        is about to be asked.
        """
        while True:
            await asyncio.sleep(SWEEP_S)
            for job in self._scheduler.expired(self._now()):
                message = f"{job.model} was not ready before the deadline passed"
                self._refuse(job, Refused(Situation.DEADLINE, message))
            self._engine.learn()
            if self._loads.any_built:
                self.wake()
            if self._foresight is not None:
                self._foresight.look(self._now())
                self._loads.look_ahead()

    def close(self) -> None:
        """No more loads."""
        self._sweeper.cancel()
        self._loads.close()

    def exposition(self) -> str:
        """The metrics, gauges up to date."""
        self._residents.gauges()
        if self._foresight is not None:
            self._metrics.rhythms.set(len(self._foresight.rhythms))
        return self._metrics.text()

    def describe(self, prefix: str = "", after: str = "", limit: int = sys.maxsize) -> list[dict[str, Any]]:
        """See Residents.describe."""
        return self._residents.describe(prefix, after, limit)


def _slot(job: Job) -> Slot:
    assert job.slot is not None, "a job in a batch holds a lease"
    return job.slot


def _group(slot: Slot) -> str:
    """What may run with it: its family, or it alone."""
    return slot.family or f"single {slot.model}@{slot.version}"
