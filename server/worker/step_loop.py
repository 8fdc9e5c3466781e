"""The worker's step loop: schedule a batch, execute it, answer its requests.

Everything runs on the worker's event loop thread (the step thread) in short calls: `submit` when a request arrives,
`step` when there is work. A request that arrives during a step runs in a later batch. `server.worker.model_loads` loads
models, `server.worker.resident_models` holds the loaded ones.

INVARIANT: loads and residents change only on this thread, so no row changes while a batch runs.
"""

import asyncio
import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec
import structlog
import torch

from handlers.errors import Overran
from model_store.cache.cache import Cache, FailedLoad, Load
from model_store.cache.slots import Slot
from model_store.errors import LoadError, StoreUnavailable
from model_store.names import ModelName
from model_store.stores.load_part import LoadPart
from model_store.stores.store_health import StoreHealth
from server.access_log import ArrivalBuffer
from server.errors import Refused, Situation, situation_of
from server.ipc.frames import CacheResult, Request, Tier, TracedRequest
from server.metrics import WorkerMetrics
from server.worker.adaptive_bands import AdaptiveBands
from server.worker.code_batches import CodeBatches
from server.worker.code_replicas import CodeReplicas
from server.worker.engine.accelerator import DeviceEngine
from server.worker.engine.cpu import Engine
from server.worker.engine.device_errors import ending_if_lost
from server.worker.host_cache import HostCache
from server.worker.long_jobs import LongJobs
from server.worker.model_loader import LoadedModel, ModelBuilder
from server.worker.model_loads import ModelLoads
from server.worker.prefetch.prefetcher import Prefetcher
from server.worker.quarantine import Quarantine
from server.worker.replies import Origin, Replies, get_slot
from server.worker.resident_items import ResidentItems
from server.worker.resident_models import ResidentModels
from server.worker.row_batches import RowBatches
from server.worker.sandbox.code_host import CodeHost
from server.worker.scheduler import Job, QueueFull, Scheduler
from server.worker.single_batches import SingleBatches
from server.worker.stage_times import StageTimes
from server.worker.store_probe import StoreProbe
from server.worker.survivors.surviving_rows import SurvivingRows
from server.worker.together_batches import build_bodies

SWEEP_S = 0.05
LEARN_SHARE = 0.1  #: of the step thread's time at most, for what a device's engine does in idle time
BURST_LOADS = 16  #: while so many are under way nothing is learnt: they and the hits beside them need the processor
PROVE_S = 0.005  #: of a sweep, for rows that an earlier worker has left
BEAT_S = 0.2  #: between two beats of the step loop's pulse
_TIERS = {"host": Tier.HOST, "disk": Tier.DISK, "store": Tier.STORE}

log = structlog.get_logger()


class StepLoop:
    """Accepts, runs and answers the requests of one worker.

    `batch`: most jobs of one batch. `patience_s`: how long a built model waits for memory. `arrivals`: rows of the
    access log, None without one. `long`: runs long requests. `now`: the monotonic clock in seconds. `health`: what is
    known of the store; `probe` asks it, None where nobody shall. `note_served` is told of each model that was
    loaded. `code` runs code archives, None where none may run. `bands` adapts bands to observed prices, None where that
    is off. `store_requests`: most requests to the store at a time, where it is quick and archives are small.
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
        long: LongJobs,
        batch: int,
        loader_threads: int,
        patience_s: float,
        foresight: Prefetcher | None = None,
        arrivals: ArrivalBuffer | None = None,
        now: Callable[[], float] = time.monotonic,
        health: StoreHealth | None = None,
        probe: StoreProbe | None = None,
        note_served: Callable[[LoadedModel], None] = lambda _: None,
        code: CodeHost | None = None,
        bands: AdaptiveBands | None = None,
        store_requests: int = 0,
    ) -> None:
        self._residents = ResidentModels(cache, engine, shelf, metrics, foresight, now)
        self._residents.bands = bands
        self._loads = ModelLoads(
            self._residents, self, loader, metrics, foresight, pulse=long.pulse, health=health or StoreHealth(now),
            probe=probe, threads=loader_threads, patience_s=patience_s, now=now, asks=store_requests,
        )  # fmt: skip
        self._note_served = note_served
        self._cache, self._scheduler, self._engine = cache, scheduler, engine
        self.quarantine = Quarantine(lambda model, why: log.error("quarantined", model=model, why=why))
        self._leaving = set[asyncio.Task[bool]]()
        self._foresight, self._long = foresight, long
        self._replies = replies = Replies(scheduler, self._residents, metrics, arrivals, now)
        self._resident_items = ResidentItems(self._residents, scheduler, metrics, foresight, self.quarantine)
        self._rows = RowBatches(replies, self._residents, scheduler, engine, long)
        self._singles = SingleBatches(
            replies, self._residents, scheduler, long, quarantine=self._quarantine_overran, wake=self.wake
        )
        self.replicas = CodeReplicas(self._residents, loader, long.pulse, most=code.policy.replicas if code else 1)
        self._code = CodeBatches(
            replies,
            self._residents,
            scheduler,
            self.replicas,
            most_bytes=code.policy.memory_bytes if code else 0,
            most_disk_bytes=code.policy.disk_bytes if code else 0,
            quarantine=self.quarantine,
            wake=self.wake,
            now=now,
        )
        self.lent = self._code.lent
        if code is not None:
            self._residents.note_death = code.note_death
            self._residents.note_gone = self._code.measures.drop
            metrics.registry.register(self._code.measures)
        self._metrics, self._batch, self._now = metrics, batch, now
        self._loop = asyncio.get_running_loop()
        self._woken, self._beaten, self._beat_due = False, self._now(), False
        self._learn_after = self._now()
        self._sweeper = self._loop.create_task(self._sweep())

    def __repr__(self) -> str:
        """For example `<StepLoop <Cache ...>, <Scheduler ...>>`."""
        return f"<StepLoop {self._cache!r}, {self._scheduler!r}>"

    # --- requests ---------------------------------------------------------------------------------------------------

    def submit(self, request: Request, origin: Origin) -> Job:
        """Accept a request. INVARIANT: it is answered or refused through its origin exactly once, unless cancelled."""
        now, model = self._now(), ModelName(request.model)
        arrived = min(now, request.arrived_ns / 1e9) or now
        job = Job(request, model, origin, arrived, request.deadline_ns / 1e9, accepted=now)
        if type(request) is TracedRequest:
            job.times = StageTimes(request.trace_id)
        try:
            self._scheduler.admit(job)
        except QueueFull as full:
            self._replies.refuse_unadmitted(job, Refused(Situation.OVERLOADED, str(full)))
            return job
        if self._foresight is not None:
            self._foresight.rhythms.record_request(model, now)
            if model in self._foresight.brought or model in self._foresight.loading:
                self._foresight.note_use(model)
        if model in self.quarantine.reasons:
            quarantined = self.quarantine.error(model)
            self._replies.refuse(job, Refused(situation_of(quarantined), str(quarantined)))
            return job
        slot = self._cache.lease(model, now)
        if slot is not None and slot in self._residents.unproven and not self._residents.prove_leased(slot):
            slot = None
        if slot is not None:
            job.cache, job.slot = CacheResult.HIT, slot
            self._metrics.hits.inc()
            self._scheduler.add_ready(_get_group(slot, job), job)
            self.wake()
        else:
            self._await_model(job, now)
        return job

    def submit_resident(self, requests: Sequence[Request], origin: Origin) -> list[Job | None]:
        """Accept those items of a call whose models are resident at once; see `ResidentItems.submit`."""
        found = self._resident_items.submit(requests, origin, self._now())
        if self._scheduler.has_work:
            self.wake()
        return found

    def adopt(self, survivors: SurvivingRows, distrusted: Collection[str], *, trusts: bool) -> None:
        """Take the rows of an earlier worker for residents; see `ResidentModels.adopt`."""
        self._residents.adopt(survivors, distrusted, trusts=trusts)

    def cancel(self, job: Job) -> None:
        """Cancel a job whose client has left. It is skipped in its batch, where its lease ends."""
        self._replies.cancel(job)
        job.request = msgspec.structs.replace(job.request, body=b"")  # the job itself may be queued for long

    def _await_model(self, job: Job, now: float) -> None:
        wanted = self._cache.want(job.model, now)
        if isinstance(wanted, Load) and self._loads.are_full:
            self._cache.dismiss(job.model)
            self._replies.refuse(
                job, Refused(Situation.OVERLOADED, f"{len(self._loads)} models are being loaded already")
            )
            return
        if isinstance(wanted, FailedLoad):
            self._replies.refuse(job, _explain_failure(wanted.error, wanted.until - now))
            return
        job.cache = CacheResult.COALESCED if wanted is None else CacheResult.MISS
        (self._metrics.coalesced if wanted is None else self._metrics.misses).inc()
        if wanted is not None:
            self._residents.note_missed(job.model)
            self._loads.begin(job.model, now)
        self._await_load(job, self._loads.lanes.expected_s(job.model, now), now)

    def _await_load(self, job: Job, load_s: float, now: float) -> None:
        """Let the job wait for its model, unless that is expected too late."""
        if load_s and now + load_s > job.deadline:  # the load goes on, so that the advice to come back is true
            message = f"{job.model} is expected to be loaded in {load_s * 1e3:.0f} ms, after the deadline"
            retry_ms = max(1, round(load_s * 1e3))
            self._replies.refuse(job, Refused(Situation.OVERLOADED, message, retry_ms=retry_ms))
        else:
            self._scheduler.add_waiting(job)

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
        if self._loads.built and not placed:
            self.lent.make_room()
        self._code.end_collections(self._now())
        if self._scheduler.has_work:
            group, jobs = self._scheduler.next_batch(self._batch)
            self._execute(group, jobs)
        if self._scheduler.has_work or (placed and self._loads.built):
            self.wake()
        if self._beat_due:  # at the end: a step that fails each time beats no more
            self._beat_due, self._beaten = False, self._now()
            self._long.pulse.beat(self._loads.describe_signs(self._beaten))

    def _execute(self, group: str, jobs: Sequence[Job]) -> None:
        now = self._now()
        self._count([job for job in jobs if job.call is None and not job.done], now)
        live = list(self._replies.keep_live(jobs, now))
        if not live:
            return
        try:
            batches = self._choose_batches(get_slot(live[0]))
            if batches is not self._rows and not (live := build_bodies(live, self._replies)):
                return
            batches.run(group, live, now)
        except torch.OutOfMemoryError as error:
            log.error("out_of_memory", group=group, error=str(error))  # noqa: TRY400 -- a traceback would say nothing
            self._refuse_all(live, Refused(Situation.NO_ROOM, f"the device is out of memory: {error}"), now)
        except Overran as error:  # reported already
            self._refuse_all(live, Refused(Situation.MODEL_FAILED, str(error)), now)
        except Exception as error:  # an error of a forward fails these requests, not the worker
            log.exception("step_failed", group=group)
            self._refuse_all(live, Refused(Situation.MODEL_FAILED, f"the model failed: {error}"), now)

    def _refuse_all(self, live: Sequence[Job], refused: Refused, began: float) -> None:
        """Refuse the jobs of a batch that failed; those that have been answered stay so."""
        for job in live:
            if job.times is not None:
                job.times.note_batch(began, began, self._now())
            self._replies.refuse(job, refused)

    def _choose_batches(self, slot: Slot) -> RowBatches | SingleBatches | CodeBatches:
        if slot.family is not None:
            return self._rows
        return self._code if slot in self._residents.children else self._singles

    def _quarantine_overran(self, model: ModelName, overran: Overran) -> None:
        """Refuse the model from now on and free its memory."""
        self.quarantine.add(model, str(overran))
        leaving = self._loop.create_task(self.unload(model))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    def _count(self, jobs: Sequence[Job], now: float) -> None:
        """Count the jobs of a batch that begins; those of one call have waited equally long."""
        first, alike = jobs[0] if jobs else None, 0
        for job in jobs:
            if first is not None and (job.arrived != first.arrived or job.load_s != first.load_s):
                self._metrics.queue.observe(first.queued_s(now), alike)
                first, alike = job, 0
            alike += 1
        if first is not None:
            self._metrics.queue.observe(first.queued_s(now), alike)
        if self._metrics.per_model:
            for job in jobs:
                self._metrics.model_request(job.model)

    # --- loads ------------------------------------------------------------------------------------------------------

    def load(self, model: ModelName, *, revalidate: bool = False) -> asyncio.Future[str]:
        """Load a model for an operator. Resolves with the version that serves, or LoadError.

        `revalidate` makes a store request even if the model is resident.
        """
        if model in self.quarantine.reasons:
            future: asyncio.Future[str] = self._loop.create_future()
            future.set_exception(self.quarantine.error(model))
            return future
        found = self._loads.ask(model, revalidate=revalidate)
        self.lent.advance_time(self._now())  # none of a model that is loaded again is lent
        return found

    def served(self, built: LoadedModel, now: float, parts: Sequence[LoadPart]) -> None:
        """Lease and queue the jobs that waited for this model: it is resident now."""
        self._note_served(built)
        self.lent.advance_time(now)  # a front may have the version that was replaced
        if built.runs_code:
            self.replicas.follow(built.model)
        for job in self._scheduler.take_waiting(built.model):
            job.slot = self._cache.lease(built.model, now)
            job.load_s, job.tier = now - job.accepted, _TIERS[built.tier]
            self._metrics.loading_wait.observe(job.load_s)
            if job.times is not None:
                job.times.note_load(now, parts)
            self._scheduler.add_ready(_get_group(get_slot(job), job), job)

    def failed(self, model: ModelName, error: LoadError, retry_s: float, parts: Sequence[LoadPart]) -> None:
        """Refuse the jobs that waited for this model, with the cause of its failed load."""
        for job in self._scheduler.take_waiting(model):
            if job.times is not None:
                job.times.note_load(self._now(), parts, str(error))
            self._replies.refuse(job, _explain_failure(error, retry_s))

    def delayed(self, model: ModelName, load_s: float) -> None:
        """Refuse the jobs whose deadlines pass before the store is expected to have given this model."""
        now = self._now()
        for job in self._scheduler.take_waiting(model):
            self._await_load(job, load_s, now)

    async def unload(self, model: ModelName) -> bool:
        """Unload the model after its last lease; returns when its memory is free. False if it was not resident."""
        if model in self._cache.loads:
            try:
                await self.load(model)  # joins the running load, so that the jobs that wait for it are served first
            except LoadError:
                return False
        await self.lent.take_back(model)
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
        for memory, look after slow loads, start prefetches, and send a beat through the queue of steps. INVARIANT: only
        a loop whose sweeps and whose steps both turn beats.
        """
        while True:
            await asyncio.sleep(SWEEP_S)
            for job in self._scheduler.take_expired(self._now()):
                message = f"{job.model} was not ready before the deadline passed"
                self._replies.refuse(job, Refused(Situation.DEADLINE, message))
            self._long.tell_late(self._replies, self._now())
            self._code.advance_time(self._now())
            self._learn()
            self._residents.prove_idle(self._now() + PROVE_S)
            if self._loads.built:
                self.wake()
            self._loads.advance_time(self._now())
            if self._foresight is not None:
                self._foresight.advance_time(self._now())
                self._loads.look_ahead()
            if self._now() - self._beaten >= BEAT_S:
                self._beat_due = True
                self.wake()

    def _learn(self) -> None:
        """Let the engine learn a little. Nobody waits for it, so its errors fail no request and end no sweep.

        On a device that may take long: only while no request is ready, and seldom. If the device is lost, this process
        ends.
        """
        if len(self._loads) >= BURST_LOADS:
            return
        began, on_device = self._now(), isinstance(self._engine, DeviceEngine)
        if on_device and (began < self._learn_after or self._woken or self._scheduler.has_work):
            return
        try:
            with ending_if_lost():
                self._engine.learn()
        except Exception:  # whatever a device raises
            log.exception("idle_work_failed")
        ended = self._now()
        self._learn_after = ended + (ended - began) * (1 / LEARN_SHARE - 1)

    def close(self) -> None:
        """Stop the sweep and start no more loads."""
        self._sweeper.cancel()
        self._long.close()
        self._code.close()
        self.replicas.close()
        self._loads.close()

    def render_metrics(self) -> str:
        """The metrics in exposition format, with updated gauges."""
        self._residents.update_gauges()
        self._loads.update_gauges()
        for gauge, count in zip(self._metrics.waiting, self._scheduler.count_queued(), strict=True):
            gauge.set(count)
        if self._foresight is not None:
            self._metrics.rhythms.set(len(self._foresight.rhythms))
        return self._metrics.text()

    def list_versions(self, after: str, limit: int) -> dict[str, str]:
        """The versions that serve; see `ResidentModels.list_versions`."""
        return self._residents.list_versions(after, limit)

    def describe(
        self, prefix: str = "", after: str = "", limit: int = sys.maxsize, *, whole: bool = False
    ) -> list[dict[str, Any]]:
        """Describe models; see `ResidentModels.describe`."""
        return self._residents.describe(prefix, after, limit, whole=whole)


def _explain_failure(error: LoadError, retry_s: float) -> Refused:
    """The refusal of a request whose model's load failed. A store's failure passes, so it is worth to come back."""
    passes = isinstance(error, StoreUnavailable)
    return Refused(situation_of(error), error.public, retry_ms=max(1, round(retry_s * 1e3)) if passes else None)


def _get_group(slot: Slot, job: Job) -> str:
    """The key of jobs that can run in one batch: the slot's family, or the single model and its version.

    A suspect's request runs beside no other model's, so that a death says which it was.
    """
    return f"{slot.family} alone {slot.model}" if job.request.alone and slot.family is not None else slot.group
