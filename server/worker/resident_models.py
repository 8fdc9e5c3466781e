"""The models that a worker has loaded. Carries out the cache's decisions on memory pool, host cache and model objects.

INVARIANT: only the step thread uses this, so no step reads a row while it is moved, overwritten or freed.
"""

import asyncio
import sys
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import structlog
import torch

from handlers.kinds import RowModel, SingleModel
from model_store.cache.cache import Cache
from model_store.cache.departed_models import DepartedModels
from model_store.cache.slots import Slot, Usage
from model_store.names import ModelName
from server.metrics import WorkerMetrics
from server.worker.adaptive_bands import AdaptiveBands
from server.worker.engine.accelerator import DeviceEngine
from server.worker.engine.cpu import Engine
from server.worker.engine.device_errors import end_if_lost, ending_if_lost
from server.worker.engine.staging import STAGING_BYTES
from server.worker.host_cache import HostCache
from server.worker.model_loader import LoadedModel
from server.worker.prefetch.prefetcher import Prefetcher
from server.worker.sandbox.child_process import ChildProcess
from server.worker.sandbox.replicas import Replicas
from server.worker.survivors.row_ledger import RowReady
from server.worker.survivors.surviving_rows import SurvivingRows

NO_ROOM_S = 30.0  #: after a replica has had to go for want of memory, until another may be started

_Result = TypeVar("_Result")

log = structlog.get_logger()


class ResidentModels:
    """The loaded models of one worker. `foresight` is told which models leave; `now` is the monotonic clock."""

    def __init__(
        self,
        cache: Cache,
        engine: Engine | DeviceEngine,
        shelf: HostCache,
        metrics: WorkerMetrics,
        foresight: Prefetcher | None,
        now: Callable[[], float],
    ) -> None:
        self.cache, self.engine, self.shelf = cache, engine, shelf
        self._metrics, self._foresight, self._now = metrics, foresight, now
        self.rows: dict[Slot, RowModel] = {}  #: the models that run a slot's requests
        self.singles: dict[Slot, SingleModel] = {}  #: as `rows`, those that run alone
        self.children: dict[Slot, Replicas] = {}  #: as `rows`, those whose code runs in processes of its own
        self.note_death: Callable[[ModelName], None] = _ignore  #: called when such a process has ended by itself
        self.note_gone: Callable[[ModelName], None] = _ignore  #: called when no slot has a model any more
        self.bands: AdaptiveBands | None = None  #: adapts bands to observed prices; None where that is off
        self.survivors: SurvivingRows | None = None  #: where rows outlive this worker; None where they do not
        self.unproven: dict[Slot, RowReady] = {}  #: `survivors.unproven`, or always empty
        self._validated: dict[Slot, float] = {}  # `LoadedModel.validated_at` of each
        self._sorted: list[Slot] = []  # the same slots by name: a page's cost does not grow with their number
        self._leaving: dict[Slot, list[asyncio.Future[bool]]] = {}  # unloads by operators
        self._departed = DepartedModels()

    def __repr__(self) -> str:
        """For example `<ResidentModels of <Cache ...>>`."""
        return f"<ResidentModels of {self.cache!r}>"

    # --- loading ----------------------------------------------------------------------------------------------------

    def write(self, slot: Slot, built: LoadedModel) -> None:
        """Copy the row's numbers to the slot's place. Raises whatever a failing copy raises."""
        row = built.row
        if row is not None:
            self.with_memory(lambda: self.engine.pool.write(slot.offset, row))
            if self.survivors is not None and built.record is not None:
                self.survivors.note_written(slot, built.record, built.validated_at)

    def settle(self, slot: Slot, built: LoadedModel, now: float) -> bool:
        """Serve from a written slot and retire the old version. True if there was one."""
        swapped = slot.model in self.cache
        old = self.cache.ready(slot, now)
        if isinstance(built.body, RowModel):
            self.rows[slot] = built.body
            if self.bands is not None:
                self.bands.equip(slot, built.body.codec)
            if isinstance(self.engine, DeviceEngine):
                self.engine.expect(built.body.family)
        elif isinstance(built.body, SingleModel):
            self.singles[slot] = built.body
        else:
            self.children[slot] = Replicas(built.body)
            self._watch(slot, built.body)
        self._validated[slot] = built.validated_at
        self.shelf.drop(built.model)
        insort(self._sorted, slot, key=_slot_name)
        if old is not None:
            self.retire(old)
        return swapped

    # --- rows of an earlier worker ----------------------------------------------------------------------------------

    def adopt(self, survivors: SurvivingRows, distrusted: Collection[str], *, trusts: bool) -> None:
        """Take the rows of an earlier worker for residents, and have rows outlive this one."""
        self.survivors, self.unproven = survivors, survivors.unproven
        adopted = dict(survivors.adopt(self.cache, self._now(), distrusted, trusts=trusts))
        self._validated |= adopted
        self._metrics.adopted.inc(len(adopted))
        self._sorted = sorted(self._validated, key=_slot_name)

    def prove_leased(self, slot: Slot) -> bool:
        """Prove an adopted row of which a request has just taken the first lease; False: there is no such model."""
        if self._prove(slot):
            return True
        self.cache.release(slot)
        self.retire(slot)
        return False

    def prove_idle(self, until: float) -> None:
        """Prove adopted rows that no request has wanted yet, until that time."""
        while self.unproven and self._now() < until:
            slot = next(iter(self.unproven))
            if not self._prove(slot):
                self.retire(slot)

    def _prove_named(self, prefix: str, after: str, limit: int) -> None:
        """Prove the adopted rows of a page of whole descriptions: these need the models."""
        page = (slot for slot in self.unproven if slot.model.startswith(prefix) and slot.model > after)
        for slot in sorted(page, key=_slot_name)[:limit]:
            if not self._prove(slot):
                self.retire(slot)

    def _prove(self, slot: Slot) -> bool:
        """Whether the row is sound: then it can run. Else its model is unloaded, and the caller retires it."""
        assert self.survivors is not None, "only survivors leave rows that are not proven"
        model = self.survivors.prove(slot)
        if model is None:
            self._metrics.damaged.inc()
            self.cache.unload(slot.model)
            return False
        self.rows[slot] = model
        if self.bands is not None:
            self.bands.equip(slot, model.codec)
        return True

    def revalidate_same(self, built: LoadedModel) -> Slot | None:
        """The slot that serves this version already, revalidated; None if another version serves."""
        slot = self.cache.unchanged(built.model, built.version)
        if slot is not None:
            self._validated[slot] = built.validated_at
        return slot

    def move(self, moves: Sequence[tuple[Slot, int]]) -> None:
        """Copy rows to other places of the pool."""
        with ending_if_lost():
            for slot, offset in moves:
                self.engine.pool.move(slot.offset, offset, slot.charge)
                if self.survivors is not None:
                    self.survivors.note_moved(slot.offset, offset)
                self.cache.moved(slot, offset)

    def with_memory(self, work: Callable[[], _Result]) -> _Result:
        """Do `work`; if the device is out of memory, free idle singles, staging and graphs and do it once more.

        Rows are not evicted: their pool was allocated at the start, and evicting them would free no memory. If the
        device is lost, this process ends.
        """
        try:
            return work()
        except torch.OutOfMemoryError as error:
            why = str(error)
        except Exception as error:
            end_if_lost(error)
            raise
        # INVARIANT: the error is gone here. The frames of its traceback hold the staging that is to be freed.
        with ending_if_lost():
            self.free_memory(why)
            return work()

    def free_memory(self, why: str) -> None:
        """Free idle singles, staging and graphs: the device was out of memory. If it is lost, this process ends."""
        log.warning("out_of_memory_once", error=why)
        with ending_if_lost():
            for victim in self.cache.relieve(STAGING_BYTES):
                self.evict(victim, self._now(), "memory")
            self.engine.trim()

    # --- evictions --------------------------------------------------------------------------------------------------

    def note_missed(self, model: ModelName) -> None:
        """A request waits for a load of this model: count by how much the cache was too small to still hold it."""
        shortfall = self._departed.find_shortfall(model)
        if shortfall is not None:
            self._metrics.shortfall.observe(shortfall)

    def evict(self, slot: Slot, now: float, reason: str) -> None:
        """Evict a model from the device, and keep its row in host memory if there is space."""
        self._metrics.labelled(self._metrics.evictions, tier="device", reason=reason).inc()
        self._metrics.age.observe(now - slot.loaded_at)
        self._departed.note_evicted(slot.model, slot.charge)
        log.info("evicted", model=slot.model, version=slot.version, why=reason, age_s=round(now - slot.loaded_at, 1))
        self._shelve(slot)
        self.retire(slot)

    def retire(self, slot: Slot) -> None:
        """Free the slot's memory; no-op while the slot has a lease."""
        started = time.perf_counter()
        if not self.cache.retired(slot):
            return
        if self.survivors is not None and slot.family is not None:
            self.survivors.note_gone(slot)
        self.rows.pop(slot, None)
        if self.bands is not None:
            self.bands.forget(slot)
        self.singles.pop(slot, None)
        if (replicas := self.children.pop(slot, None)) is not None:
            replicas.close()
        del self._validated[slot]
        del self._sorted[self._sorted.index(slot, bisect_left(self._sorted, slot.model, key=_slot_name))]
        if slot.model not in self.cache:
            self._metrics.model_gone(slot.model)
            self.note_gone(slot.model)
            if self._foresight is not None:
                self._foresight.note_evicted(slot.model)
        self._metrics.unloading.observe(time.perf_counter() - started)
        for future in self._leaving.pop(slot, []):
            if not future.done():
                future.set_result(True)

    async def unload(self, model: ModelName) -> bool:
        """Unload the model after its last lease; returns when its memory is free. False if it was not resident."""
        self.shelf.drop(model)
        slot = self.cache.unload(model)
        if slot is None:
            return False
        replicas = self.children.get(slot)
        if slot.leases == 0:
            self.retire(slot)
        else:
            future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
            self._leaving.setdefault(slot, []).append(future)
            await future
        if replicas is not None:
            await replicas.wait_gone()
        return True

    def add_replica(self, slot: Slot, child: ChildProcess) -> None:
        """One more process runs the slot's requests."""
        self.children[slot].children.append(child)
        self._watch(slot, child)
        self.cache.recharge(slot, self.children[slot].charge)

    def make_room(self, slot: Slot, need: int) -> bool:
        """Evict others until `need` bytes more fit into the budget. False, and none is evicted, if they would not."""
        victims = self.cache.make_room(need, slot)
        for victim in victims or ():
            self.evict(victim, self._now(), "memory")
        return victims is not None

    def recharge(self, slot: Slot, size: int) -> None:
        """Count what its processes were measured to take; evict others where that is more than the budget has.

        Where others free too little, replicas go first: an archive that no longer fits would be loaded again at once.
        """
        self.cache.recharge(slot, size)
        replicas = self.children[slot]
        while len(replicas.children) > 1 and not self.make_room(slot, 0) and replicas.end_idle():
            log.warning("replica_without_room", model=slot.model, replicas=len(replicas.children))
            replicas.not_before = self._now() + NO_ROOM_S
            self.cache.recharge(slot, replicas.charge)
        over = self.cache.used_bytes - self.cache.budget_bytes
        for victim in self.cache.relieve(over):
            self.evict(victim, self._now(), "memory")

    def _watch(self, slot: Slot, child: ChildProcess) -> None:
        child.attach(asyncio.get_running_loop(), partial(self._forget_ended, slot, child))

    def _forget_ended(self, slot: Slot, child: ChildProcess) -> None:
        """A process of a slot has ended by itself. After the last one the next request loads the model again."""
        self.note_death(slot.model)
        replicas = self.children.get(slot)
        if replicas is not None and replicas.drop(child):
            self.cache.recharge(slot, replicas.charge)
            return
        if self.cache.get(slot.model) is slot:
            self.cache.unload(slot.model)
        if slot.leases == 0:
            self.retire(slot)

    def _shelve(self, slot: Slot) -> None:
        """Keep an evicted row in host memory if there is space."""
        body, before = self.rows.get(slot), self.shelf.overwritten
        if body is None:
            return
        numbers = self.shelf.keep(slot, body, self._validated[slot])
        self._metrics.labelled(self._metrics.evictions, tier="host", reason="budget").inc(
            self.shelf.overwritten - before
        )
        if numbers is None:
            return
        try:
            self.engine.pool.keep(slot.offset, numbers)
        except Exception as error:  # the model is evicted without a copy
            end_if_lost(error)
            log.warning("not_kept", model=slot.model, error=repr(error))
            self.shelf.drop(slot.model)

    # --- contents ---------------------------------------------------------------------------------------------------

    def update_gauges(self) -> None:
        """Update the gauges of models and bytes held."""
        self._metrics.loaded.set(len(self.cache))
        self._metrics.bytes.set(self.cache.used_bytes)
        self._metrics.capacity.set(self.cache.budget_bytes)
        self._metrics.host_bytes.set(self.shelf.used_bytes)
        self._metrics.host_capacity.set(self.shelf.capacity_bytes)

    def describe(
        self, prefix: str = "", after: str = "", limit: int = sys.maxsize, *, whole: bool = False
    ) -> list[dict[str, Any]]:
        """Describe the first `limit` models by name: resident, loading or failed ones.

        Only names that start with `prefix` and follow `after`; `whole`: with all that a request must know. The cost of
        a page does not grow with the number of resident models.
        """
        now, found = self._now(), dict[ModelName, list[dict[str, Any]]]()
        if whole and self.unproven:
            self._prove_named(prefix, after, limit)
        for at in range(bisect_left(self._sorted, max(prefix, after), key=_slot_name), len(self._sorted)):
            slot = self._sorted[at]
            if not slot.model.startswith(prefix) or (len(found) >= limit and slot.model not in found):
                break
            if slot.model > after:
                found.setdefault(slot.model, []).append(self._row(slot, now, whole=whole))
        rest = [{"model": model, "state": "loading"} for model in self.cache.loads]
        rest += [
            {"model": model, "state": "failed", "error": failure.error.public, "reason": failure.error.reason}
            for model, failure in self.cache.failures()
        ]
        for row in rest:
            model = ModelName(row["model"])
            if model > after and model.startswith(prefix) and not self._is_here(model):
                found[model] = [row]
        return [row for model in sorted(found)[:limit] for row in found[model]]

    def list_versions(self, after: str, limit: int) -> dict[str, str]:
        """The versions that serve, by model: of the first `limit` models by name that follow `after`."""
        start = bisect_right(self._sorted, after, key=_slot_name)
        names = dict.fromkeys(slot.model for slot in self._sorted[start : start + 2 * limit])  # two may be one model's
        serving = ((name, self.cache.get(name)) for name in islice(names, limit))
        return {name: slot.version for name, slot in serving if slot is not None}

    def _is_here(self, model: ModelName) -> bool:
        at = bisect_left(self._sorted, model, key=_slot_name)
        return at < len(self._sorted) and self._sorted[at].model == model

    def _row(self, slot: Slot, now: float, *, whole: bool) -> dict[str, Any]:
        body, replicas = self.rows.get(slot), self.children.get(slot)
        alone = {"one_by_one": body.one_by_one} if body and body.one_by_one else {}
        return {
            "model": slot.model,
            "version": slot.version,
            "state": str(slot.state),
            "family": slot.family,
            "bytes": slot.charge,
            **alone,
            **(body.codec.describe(whole=whole) if body else {}),
            **(_describe_processes(replicas) if replicas else {}),
            "leases": slot.leases,
            "pinned": slot.model in self.cache.pins,
            "tier": slot.tier,
            "load_ms": round(slot.load_s * 1e3, 3),
            "loaded_s_ago": round(now - slot.loaded_at, 3),
            "used_s_ago": round(now - slot.used_at, 3),
            "usage": _describe_usage(slot.usage, now),
        }


def _describe_processes(replicas: Replicas) -> dict[str, Any]:
    """The pid of the first process; where there are several, all of them with their memory."""
    rows = [{"pid": child.pid, "bytes": child.charge} for child in replicas.children]
    return {"pid": replicas.children[0].pid, **({"processes": rows} if len(rows) > 1 else {})}


def _describe_usage(usage: Usage, now: float) -> dict[str, Any]:
    """What was counted since the model was loaded; times in whole microseconds."""
    return {
        "answers": usage.answers,
        "failures": usage.failures,
        "batches": usage.batches,
        "answered_us": round(usage.answered_s * 1e6),
        "failed_us": round(usage.failed_s * 1e6),
        "queued_us": round(usage.queued_s * 1e6),
        "ran_us": round(usage.ran_s * 1e6),
        "last_ms": round((time.time() - now + usage.last) * 1e3) if usage.answers else 0,
    }


def _ignore(_: ModelName) -> None:
    """Nobody wants to know."""


def _slot_name(slot: Slot) -> ModelName:
    return slot.model
