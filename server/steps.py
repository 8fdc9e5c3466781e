"""The step loop: schedule -> execute -> update. The one owner of a worker's scheduler, cache and engine.

Everything here runs on the worker's event loop thread, in short calls: `submit` when a request has arrived, `step` when
there is something to do. What arrives while a step runs is the next batch. Only loads happen elsewhere, on loader
threads, and come back as one call on this thread.
"""

import asyncio
import sys
import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import structlog
import torch

from handlers.errors import RequestError, RunFailed
from model_store.errors import LoadError, NoRoom, StoreUnavailable
from model_store.names import ModelName
from model_store.policy import Cache, Evict, Failure, Moves, Placed, Refuse, Wait
from model_store.slots import Slot
from server.accelerator import STAGING_BYTES, DeviceEngine
from server.arrivals import LOST, REFUSED, Arrivals
from server.engine import Engine
from server.errors import Refused, Situation, situation_of
from server.foresight import Foresight, Result
from server.loader import Builder, Built, RowModel, SingleModel, prove, timed_build
from server.metrics import WorkerMetrics
from server.scheduler import Job, QueueFull, Scheduler
from server.shelf import Shelf
from server.wire import CacheResult, Request, Tier

SWEEP_S = 0.05
_TIERS = {"host": Tier.HOST, "disk": Tier.DISK, "store": Tier.STORE}
_Result = TypeVar("_Result")

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
        self._cache, self._scheduler, self._engine = cache, scheduler, engine
        self._loader, self._metrics, self._batch = loader, metrics, batch
        self._shelf, self._foresight, self._arrivals = shelf, foresight, arrivals
        self._patience_s, self._now = patience_s, now
        self._threads = ThreadPoolExecutor(loader_threads, thread_name_prefix="loader")
        self._loop = asyncio.get_running_loop()
        self._models: dict[Slot, RowModel | SingleModel] = {}
        self._validated: dict[Slot, float] = {}  # `Built.validated_at` of each
        self._sorted: list[Slot] = []  # the same slots by name, so that a page of them costs a page
        self._started: dict[ModelName, float] = {}
        self._built: deque[tuple[Built, float]] = deque()  # verified, waiting for room, and since when
        self._watchers: dict[ModelName, list[asyncio.Future[str]]] = {}  # operators who wait for a load
        self._leaving: dict[Slot, list[asyncio.Future[bool]]] = {}  # operators who wait for an unload
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
            self._scheduler.ready(self._group(slot), job)
            self._wake()
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
            self._load(job.model, now)

    # --- a step -----------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._loop.call_soon(self.step)

    def step(self) -> None:
        """Give built models their place, then run one batch. Whatever is left asks for the next step."""
        self._woken = False
        placed = self._place_built()
        if self._scheduler.has_work:
            group, jobs = self._scheduler.next_batch(self._batch)
            self._execute(group, jobs)
        if self._scheduler.has_work or (placed and self._built):
            self._wake()

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
            if isinstance(self._models[_slot(live[0])], RowModel):
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
            model = self._models[_slot(job)]
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
        family = self._models[_slot(running[0])]
        assert isinstance(family, RowModel)
        started = time.perf_counter()
        offsets = [_slot(job).offset for job in running]
        answers = self._with_memory(lambda: self._engine.run(family.family, offsets, parts))
        ended = time.perf_counter()
        self._metrics.batch_rows.observe(sum(map(len, parts)))
        self._metrics.batch_models.observe(len({job.model for job in running}))
        for job, call, answer in zip(running, calls, answers, strict=True):
            self._encode(job, call.encode, answer, now, ended - started)
        self._spent(began, started, ended)

    def _run_single(self, jobs: Sequence[Job], now: float) -> None:
        """The requests of one model that is not a row, in one run where the model allows it."""
        model = self._models[_slot(jobs[0])]
        assert isinstance(model, SingleModel), "a group holds one single"
        began = time.perf_counter()
        asked = [(job, call) for job in jobs if (call := self._decode(job, model.codec.decode)) is not None]
        if not asked:
            return
        started = time.perf_counter()
        answers = self._with_memory(lambda: model.single.run_all([call.feeds for _, call in asked]))
        ended = time.perf_counter()
        self._metrics.batch_rows.observe(sum(call.n for _, call in asked))
        self._metrics.batch_models.observe(1)
        for (job, call), outputs in zip(asked, answers, strict=True):
            if isinstance(outputs, RunFailed):
                self._refuse(job, Refused(Situation.MODEL_FAILED, str(outputs)))
            else:
                self._encode(job, call.encode, outputs, now, ended - started)
        self._spent(began, started, ended)

    def _with_memory(self, work: Callable[[], _Result]) -> _Result:
        """`work`, and once more if the device was out of memory: without idle singles, staging and graphs.

        Rows need none that they do not have: their pool was taken at the start.
        """
        try:
            return work()
        except torch.OutOfMemoryError as error:
            log.warning("out_of_memory_once", error=str(error))
            for victim in self._cache.relieve(STAGING_BYTES):
                self._evict(victim, self._now(), "memory")
            self._engine.trim()
            return work()

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
        if slot is not None and self._cache.release(slot):
            self._retire(slot)

    # --- loads ------------------------------------------------------------------------------------------------------

    def load(self, model: ModelName, *, revalidate: bool = False) -> asyncio.Future[str]:
        """An operator's load: the version that serves in the end, or LoadError. `revalidate` asks the store anyway."""
        future: asyncio.Future[str] = self._loop.create_future()
        slot = self._cache.get(model)
        if slot is not None and not revalidate:
            future.set_result(slot.version)
            return future
        self._watchers.setdefault(model, []).append(future)
        if self._cache.want(model, self._now(), reload=True) is not None:
            self._load(model, self._now(), revalidate=revalidate)
        return future

    def _load(self, model: ModelName, now: float, *, revalidate: bool = False) -> None:
        self._started[model] = now
        kept = None if revalidate else self._shelf.take(model)
        if kept is not None:
            self._built.append((kept, now))
            self._wake()
            return
        task = self._threads.submit(timed_build, self._loader, model, revalidate=revalidate)
        task.add_done_callback(lambda done: self._loop.call_soon_threadsafe(self._loaded, model, *done.result()))

    def _loaded(self, model: ModelName, built: Built | LoadError, seconds: float) -> None:
        """A loader thread is done."""
        if isinstance(built, StoreUnavailable) and (kept := self._shelf.take(model, stale=True)) is not None:
            log.warning("store_unavailable_serving_stale", model=model, version=kept.version, error=str(built))
            self._built.append((kept, self._now()))
            self._wake()
            return
        if isinstance(built, LoadError):
            self._load_failed(model, built)
            return
        self._metrics.downloading.observe(built.download_s)
        try:
            self._prove(built)
        except Exception as error:  # also what no golden sample should be able to cause costs this load alone
            if not isinstance(error, torch.OutOfMemoryError):
                self._loader.forget(model)
            self._load_failed(model, _as_load_error(model, error))
            return
        log.debug("built", model=model, version=built.version, tier=built.tier, seconds=round(seconds, 4))
        self._built.append((built, self._now()))
        self._wake()

    def _prove(self, built: Built) -> None:
        """The golden sample of a row runs here, in scratch memory, before anyone else loses a place for it."""
        body, row, golden = built.body, built.row, built.golden
        if golden is None or row is None or not isinstance(body, RowModel):
            return
        prove(
            built.model,
            golden,
            body.codec,
            lambda call: self._with_memory(lambda: self._engine.probe(body.family, row, call.rows)),
        )

    def _place_built(self) -> bool:
        """Place built models in order until one must wait. True when something changed."""
        changed = False
        while self._built:
            built, since = self._built[0]
            now = self._now()
            if self._unchanged(built):
                self._built.popleft()
                continue
            spare = () if self._foresight is None else self._foresight.rhythms
            placement = self._cache.place(built.model, built.version, built.charge, now, built.family, spare=spare)
            if isinstance(placement, Wait) and now - since < self._patience_s:
                return changed
            changed = True
            if isinstance(placement, Moves):
                for slot, offset in placement.moves:
                    self._engine.pool.move(slot.offset, offset, slot.charge)
                    self._cache.moved(slot, offset)
                return True  # a few a step: requests go on meanwhile
            if isinstance(placement, Evict):
                for victim in placement.victims:
                    self._evict(victim, now, "budget")
                continue
            self._built.popleft()
            if isinstance(placement, Placed):
                self._serve(placement.slot, built, now)
            elif self._cache.is_speculative(built.model):
                self._dismiss(built.model)
            else:
                why = (
                    placement.why if isinstance(placement, Refuse) else f"all room was in use for {self._patience_s} s"
                )
                self._load_failed(built.model, NoRoom(f"{built.model}: {why}"))
        return changed

    def _unchanged(self, built: Built) -> bool:
        """A reload that found the serving version again: nothing to place."""
        slot = self._cache.unchanged(built.model, built.version)
        if slot is None:
            return False
        self._validated[slot] = built.validated_at
        self._started.pop(built.model)
        self._tell_watchers(built.model, slot.version)
        return True

    def _serve(self, slot: Slot, built: Built, now: float) -> None:
        """Numbers in place, old version out, everyone who waited leased and queued."""
        try:
            row = built.row
            if row is not None:
                self._with_memory(lambda: self._engine.pool.write(slot.offset, row))
        except Exception as error:  # a device that fails to copy must not keep the room, nor the waiters
            self._cache.abandon(slot)
            self._load_failed(built.model, _as_load_error(built.model, error))
            return
        swap = slot.model in self._cache
        old = self._cache.ready(slot, now)
        self._models[slot], self._validated[slot] = built.body, built.validated_at
        self._shelf.drop(built.model)
        insort(self._sorted, slot, key=_name)
        if old is not None:
            self._retire(old)
        if swap:
            self._metrics.labelled(self._metrics.swaps, result="ok").inc()
        self._metrics.load_seconds(built.tier, now - self._started.pop(built.model))
        for job in self._scheduler.awaited(built.model):
            job.slot = self._cache.lease(built.model, now)
            job.load_s, job.tier = now - job.arrived, _TIERS[built.tier]
            self._metrics.loading_wait.observe(job.load_s)
            self._scheduler.ready(self._group(slot), job)
        self._tell_watchers(built.model, built.version)
        log.info("loaded", model=built.model, version=built.version, tier=built.tier)
        if self._foresight is not None:
            self._foresight.loaded(built.model)
            self._look_ahead()

    def _load_failed(self, model: ModelName, error: LoadError) -> None:
        """Everyone who waited gets the cause; nobody loses a place."""
        if self._foresight is not None:
            self._foresight.ended(model, Result.FAILED)
        self._cache.failed(model, error, self._now())
        self._shelf.drop(model)
        self._started.pop(model, None)
        self._metrics.labelled(self._metrics.failures, reason=error.reason).inc()
        if model in self._cache:
            self._metrics.labelled(self._metrics.swaps, result="failed").inc()
        log.warning("load_failed", model=model, reason=error.reason, error=str(error))
        for job in self._scheduler.awaited(model):
            self._refuse(job, Refused(situation_of(error), str(error)))
        for future in self._watchers.pop(model, []):
            if not future.done():
                future.set_exception(error)

    def _look_ahead(self) -> None:
        """Load what is about to be asked, as far as that disturbs nobody."""
        if self._foresight is None:
            return
        now = self._now()
        while (model := self._foresight.next(now)) is not None:
            self._load(model, now)

    def _dismiss(self, model: ModelName) -> None:
        """A load ahead of time found no room, and is held against nobody."""
        assert self._foresight is not None, "nobody else looks ahead"
        self._foresight.ended(model, Result.REFUSED)
        self._cache.dismiss(model)
        self._shelf.put_back(model)
        self._started.pop(model)

    def _tell_watchers(self, model: ModelName, version: str) -> None:
        for future in self._watchers.pop(model, []):
            if not future.done():
                future.set_result(version)

    # --- leaving ----------------------------------------------------------------------------------------------------

    async def unload(self, model: ModelName) -> bool:
        """Forget the model once nobody uses it; returns when its memory is free. False if it was not here."""
        if model in self._cache.loads:
            try:
                await self.load(model)  # joins the load: whoever waits for it is served first
            except LoadError:
                return False
        self._shelf.drop(model)
        slot = self._cache.unload(model)
        if slot is None:
            return False
        if slot.leases == 0:
            self._retire(slot)
            return True
        future: asyncio.Future[bool] = self._loop.create_future()
        self._leaving.setdefault(slot, []).append(future)
        return await future

    def pin(self, model: ModelName) -> None:
        """Never evict the model, now or once it is loaded."""
        self._cache.pin(model)

    def unpin(self, model: ModelName) -> None:
        """The model may be evicted again."""
        self._cache.unpin(model)

    def _evict(self, slot: Slot, now: float, reason: str) -> None:
        self._metrics.labelled(self._metrics.evictions, tier="device", reason=reason).inc()
        self._metrics.age.observe(now - slot.loaded_at)
        log.debug("evicted", model=slot.model, version=slot.version)
        self._shelve(slot)
        self._retire(slot)

    def _shelve(self, slot: Slot) -> None:
        """Keep an evicted row in host memory, where there is some for it."""
        body, before = self._models[slot], self._shelf.overwritten
        if not isinstance(body, RowModel):
            return
        numbers = self._shelf.keep(slot, body, self._validated[slot])
        self._metrics.labelled(self._metrics.evictions, tier="host", reason="budget").inc(
            self._shelf.overwritten - before
        )
        if numbers is None:
            return
        try:
            self._engine.pool.keep(slot.offset, numbers)
        except Exception as error:  # then it is just evicted
            log.warning("not_kept", model=slot.model, error=repr(error))
            self._shelf.drop(slot.model)

    def _retire(self, slot: Slot) -> None:
        """The slot's room is free: on this thread no step can be reading it."""
        started = time.perf_counter()
        if not self._cache.retired(slot):
            return
        del self._models[slot], self._validated[slot]
        del self._sorted[self._sorted.index(slot, bisect_left(self._sorted, slot.model, key=_name))]
        if slot.model not in self._cache:
            self._metrics.model_gone(slot.model)
            if self._foresight is not None:
                self._foresight.left(slot.model)
        self._metrics.unloading.observe(time.perf_counter() - started)
        for future in self._leaving.pop(slot, []):
            if not future.done():
                future.set_result(True)

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
            if self._built:
                self._wake()
            if self._foresight is not None:
                self._foresight.look(self._now())
                self._look_ahead()

    async def drain(self) -> None:
        """Returns when no job is left."""
        while len(self._scheduler):  # noqa: ASYNC110 -- asked once in a life, and the step loop stays free of events
            await asyncio.sleep(SWEEP_S)

    def close(self) -> None:
        """No more loads."""
        self._sweeper.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def exposition(self) -> str:
        """The metrics, gauges up to date."""
        self._metrics.loaded.set(len(self._cache))
        if self._foresight is not None:
            self._metrics.rhythms.set(len(self._foresight.rhythms))
        self._metrics.bytes.set(self._cache.used_bytes)
        self._metrics.capacity.set(self._cache.budget_bytes)
        self._metrics.host_bytes.set(self._shelf.used_bytes)
        self._metrics.host_capacity.set(self._shelf.capacity_bytes)
        return self._metrics.text()

    def describe(self, prefix: str = "", after: str = "", limit: int = sys.maxsize) -> list[dict[str, Any]]:
        """Rows of the first `limit` models that this worker knows, by name: resident, loading, or failed.

        Only names with this prefix and after that name; what a page costs does not grow with what is resident.
        """
        now, found = self._now(), dict[ModelName, list[dict[str, Any]]]()
        for at in range(bisect_left(self._sorted, max(prefix, after), key=_name), len(self._sorted)):
            slot = self._sorted[at]
            if not slot.model.startswith(prefix) or (len(found) >= limit and slot.model not in found):
                break
            if slot.model > after:
                found.setdefault(slot.model, []).append(self._row(slot, now))
        rest = [{"model": model, "state": "loading"} for model in self._cache.loads]
        rest += [
            {"model": model, "state": "failed", "error": str(failure.error), "reason": failure.error.reason}
            for model, failure in self._cache.failures()
        ]
        for row in rest:
            model = ModelName(row["model"])
            if model > after and model.startswith(prefix) and not self._is_here(model):
                found[model] = [row]
        return [row for model in sorted(found)[:limit] for row in found[model]]

    def _is_here(self, model: ModelName) -> bool:
        at = bisect_left(self._sorted, model, key=_name)
        return at < len(self._sorted) and self._sorted[at].model == model

    def _row(self, slot: Slot, now: float) -> dict[str, Any]:
        body = self._models[slot]
        alone = {"one_by_one": body.one_by_one} if isinstance(body, RowModel) and body.one_by_one else {}
        return {
            "model": slot.model,
            "version": slot.version,
            "state": str(slot.state),
            "family": slot.family,
            "bytes": slot.charge,
            **alone,
            "leases": slot.leases,
            "pinned": slot.model in self._cache.pins,
            "loaded_s_ago": round(now - slot.loaded_at, 3),
            "used_s_ago": round(now - slot.used_at, 3),
        }

    def _group(self, slot: Slot) -> str:
        return slot.family or f"single {slot.model}@{slot.version}"


def _name(slot: Slot) -> ModelName:
    return slot.model


def _slot(job: Job) -> Slot:
    assert job.slot is not None, "a job in a batch holds a lease"
    return job.slot


def _as_load_error(model: ModelName, error: Exception) -> LoadError:
    if isinstance(error, torch.OutOfMemoryError):
        return NoRoom(f"{model}: the device is out of memory: {error}")
    return error if isinstance(error, LoadError) else LoadError(f"{model}: loading failed unexpectedly: {error!r}")
