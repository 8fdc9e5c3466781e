"""The life of a load: begin it, build the model, wait for memory, and tell the waiting requests and operators.

The step thread owns everything here. `server.worker.load_lanes` runs what takes time; its results return as calls on
the step thread. A copy that is due is served without the store's word where the store is out or slow; it is loaded
again as soon as the store answers, and what is new is swapped in.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Protocol

import structlog
import torch

from model_store.cache.cache import Placed, Placement
from model_store.cache.slots import Slot
from model_store.cache.victim_selection import Evict, Moves, Refuse, Wait
from model_store.errors import LoadError, NoRoom, StoreOut, StoreUnavailable
from model_store.names import ModelName
from model_store.stores.load_part import LoadPart
from model_store.stores.store_health import StoreHealth
from server.ipc.pulse import LoadSigns, Pulse
from server.metrics import WorkerMetrics
from server.worker.load_lanes import CODE_PLACES, LoadLanes
from server.worker.model_loader import LoadedModel, ModelBuilder, unexpected
from server.worker.prefetch.prefetcher import Prefetcher, PrefetchOutcome
from server.worker.resident_models import ResidentModels
from server.worker.store_probe import StoreProbe

MAX_MESSAGE = 2000  #: characters of a failure that are kept
#: Loads that wait or run. A client may leave at once, so that the queue of requests does not bound them.
MAX_LOADS = 4096
#: Bytes of built models that wait for memory, beyond which no further model is built. One is always built.
MAX_BUILT_BYTES = 256 * 1024 * 1024
#: Models that were served from due copies and are to be loaded again. More are checked when they are next loaded.
MAX_DUE = 100_000
#: Of these, how many are looked at in one sweep.
DUE_A_SWEEP = 64

log = structlog.get_logger()


class LoadListener(Protocol):
    """What a load tells the step loop, which holds the requests that wait for the model."""

    def served(self, built: LoadedModel, now: float, parts: Sequence[LoadPart]) -> None:
        """The model is resident. `parts`: how long those of its load took."""

    def failed(self, model: ModelName, error: LoadError, retry_s: float, parts: Sequence[LoadPart]) -> None:
        """The load failed, and is not tried again for `retry_s`."""

    def delayed(self, model: ModelName, load_s: float) -> None:
        """The store has to be asked for the model, which is expected in so many seconds."""

    def wake(self) -> None:
        """A model is built: call `Loads.place_built` in the next step."""


class ModelLoads:
    """The loads of one worker. A built model waits for memory at most `patience_s`; `now` is the monotonic clock.

    `health`: what is known of the store; `probe` asks it, None where nobody shall. `asks`: see LoadLanes.
    """

    def __init__(
        self,
        residents: ResidentModels,
        waiting: LoadListener,
        loader: ModelBuilder,
        metrics: WorkerMetrics,
        foresight: Prefetcher | None,
        *,
        pulse: Pulse,
        health: StoreHealth,
        probe: StoreProbe | None,
        threads: int,
        patience_s: float,
        now: Callable[[], float],
        asks: int = 0,
    ) -> None:
        self._residents, self._waiting, self._loader, self._metrics = residents, waiting, loader, metrics
        self._cache, self._shelf, self._foresight = residents.cache, residents.shelf, foresight
        self._pulse, self._patience_s, self._now = pulse, patience_s, now
        self._health, self._probe, self._threads = health, probe, threads
        self.lanes = LoadLanes(loader, self, pulse=pulse, threads=threads, now=now, asks=asks)
        self._loop = asyncio.get_running_loop()
        self._started: dict[ModelName, float] = {}
        self.built: deque[tuple[LoadedModel, float]] = deque()  # verified models that wait for memory, and since when
        self._due: dict[ModelName, None] = {}  # residents that were loaded from a copy that was due, the oldest first
        self._renewing: set[ModelName] = set()  # those of them that are being loaded again
        self._watchers: dict[ModelName, list[asyncio.Future[str]]] = {}  # loads by operators

    def __repr__(self) -> str:
        """For example `<ModelLoads 3 under way, 1 waiting for room>`."""
        return f"<ModelLoads {len(self._started)} under way, {len(self.built)} waiting for room>"

    def __len__(self) -> int:
        return len(self._started)

    @property
    def are_full(self) -> bool:
        """Whether no load may begin for a request now."""
        return len(self._started) >= MAX_LOADS

    def ask(self, model: ModelName, *, revalidate: bool) -> asyncio.Future[str]:
        """Load a model for an operator. Resolves with the version that serves, or LoadError.

        `revalidate` makes a store request even if the model is resident.
        """
        future: asyncio.Future[str] = self._loop.create_future()
        slot = self._cache.get(model)
        if slot is not None and not revalidate:
            future.set_result(slot.version)
            return future
        self._watchers.setdefault(model, []).append(future)
        if self._cache.want(model, self._now(), reload=True) is not None:
            self.begin(model, self._now(), revalidate=revalidate)
        return future

    def begin(self, model: ModelName, now: float, *, revalidate: bool = False) -> None:
        """Load a model for which `Cache.want` returned a `Load`."""
        self._started[model] = now
        use_copy = self._health.is_out or self.lanes.prefers_copy(model, now)
        kept = None if revalidate else self._take_kept(model, stale=use_copy)
        if kept is not None:
            self._queue(kept, now)
        else:
            self.lanes.start(model, revalidate=revalidate, stale=use_copy)

    def _take_kept(self, model: ModelName, *, stale: bool) -> LoadedModel | None:
        """The model from host memory. `stale`: also if it is due."""
        kept = self._shelf.take(model)
        if kept is None and stale and (kept := self._shelf.take(model, stale=True)) is not None:
            kept = replace(kept, stale=True)
        return kept

    def advance_time(self, now: float) -> None:
        """Do what depends on time: serve copies where the store is slow, probe the store, load due models again."""
        for model in list(self.lanes.late(now)):
            if model in self._cache:
                continue  # it is served
            kept = self._take_kept(model, stale=True)
            if kept is not None:
                self.lanes.leave(model)
                self._queue(kept, now)
            else:
                self.lanes.serve_copy(model)
        self.lanes.advance()
        if self._probe is not None:
            self._probe.advance_time(now, doubted=self.lanes.is_doubtful(now))
        if self._due and not self._health.is_out:
            self._renew(now)

    def _renew(self, now: float) -> None:
        """Load models again that came from due copies, a few at a time, so that requests find free threads."""
        for model in list(islice(self._due, DUE_A_SWEEP)):
            if len(self._renewing) >= max(1, self._threads // 2):
                return
            del self._due[model]
            if model not in self._cache:
                continue
            if self.lanes.prefers_copy(model, now) or self._cache.want(model, now, reload=True) is None:
                self._due[model] = None
            else:
                self._renewing.add(model)
                self.begin(model, now)

    def describe_signs(self, now: float) -> LoadSigns:
        """What the worker's pulse says of its loads and its store."""
        return LoadSigns(self.lanes.stuck_s(now), self._health.failing_s())

    def look_ahead(self) -> None:
        """Start prefetches of models that are expected to be requested, as far as the prefetcher allows now."""
        if self._foresight is None:
            return
        now = self._now()
        while (model := self._foresight.next_load(now)) is not None:
            self.begin(model, now)

    def update_gauges(self) -> None:
        """Update the gauges of loads."""
        lanes = self.lanes
        counts = (len(lanes.disk.running), lanes.waiting_to_build, len(lanes.store.running), lanes.waiting_to_ask)
        for gauge, count in zip((*self._metrics.disk_lane, *self._metrics.store_lane), counts, strict=True):
            gauge.set(count)
        self._metrics.failed.set(sum(1 for _ in self._cache.failures()))
        self._metrics.stale.set(sum(model in self._cache for model in self._due))
        self._metrics.store_failing.set(self._health.failing_s())

    def close(self) -> None:
        """Start no more loads."""
        self.lanes.close()
        if self._probe is not None:
            self._probe.close()

    # --- built ------------------------------------------------------------------------------------------------------

    def may_build(self) -> bool:
        """See LaneOwner."""
        return sum(built.charge for built, _ in self.built if not built.runs_code) <= MAX_BUILT_BYTES

    def may_start_code(self) -> bool:
        """See LaneOwner."""
        return sum(built.runs_code for built, _ in self.built) < CODE_PLACES

    def refuse_asking(self, model: ModelName) -> LoadError | None:
        """See LaneOwner: one more request would only wait for a store that answers none."""
        if self._health.is_out and self.lanes.store.is_full:
            text = f"the store has not answered for {self._health.failing_s():.0f} s"
            return StoreOut(f"{model}: {text}, and {len(self.lanes.store.running)} requests wait for it already")
        self._waiting.delayed(model, self.lanes.expected_s(model, self._now()))
        return None

    def end_load(self, model: ModelName, built: LoadedModel | LoadError) -> None:
        """See LaneOwner."""
        if isinstance(built, StoreUnavailable) and (kept := self._take_kept(model, stale=True)) is not None:
            self._queue(kept, self._now())
            return
        if isinstance(built, LoadError):
            if isinstance(built.__cause__, torch.OutOfMemoryError):
                self._residents.free_memory(str(built.__cause__))  # for its next load, after the back-off
            self._fail(model, built)
            return
        self._metrics.downloading.observe(built.download_s)
        try:
            with self._pulse.noting(model, "load"):
                self._prove(built)
        except Exception as error:  # whatever a golden sample causes fails this load only
            if not isinstance(error, torch.OutOfMemoryError):
                self._loader.forget(model)
            self._fail(model, _as_load_error(model, error))
            return
        log.debug("built", model=model, version=built.version, tier=built.tier)
        self._queue(built, self._now())

    def _queue(self, built: LoadedModel, now: float) -> None:
        self.built.append((built, now))
        self._waiting.wake()

    def _prove(self, built: LoadedModel) -> None:
        """Check the golden sample of a row, in scratch memory. INVARIANT: this precedes any eviction for the model."""
        residents = self._residents
        built.prove(lambda family, row, x: residents.with_memory(lambda: residents.engine.probe(family, row, x)))

    # --- placed -----------------------------------------------------------------------------------------------------

    def place_built(self) -> bool:
        """Place built models in order until one must wait. True if something changed.

        A code archive that must wait lets the others go first: it may wait for the code of another to answer.
        """
        set_aside = deque[tuple[LoadedModel, float]]()
        try:
            return self._place_in_order(set_aside)
        finally:
            self.built.extendleft(reversed(set_aside))

    def _place_in_order(self, set_aside: deque[tuple[LoadedModel, float]]) -> bool:
        changed = False
        while self.built:
            built, since = self.built[0]
            now = self._now()
            if self._keep_unchanged(built):
                self.built.popleft()
                self.lanes.advance()
                continue
            spare = () if self._foresight is None else self._foresight.rhythms
            placement = self._cache.place(built.model, built.version, built.charge, now, built.family, spare=spare)
            if isinstance(placement, Wait) and now - since < self._patience_s:
                if not built.runs_code:
                    return changed
                set_aside.append(self.built.popleft())
                continue
            changed = True
            if isinstance(placement, Moves):
                self._residents.move(placement.moves)
                return True  # a few moves a step, so that requests are not delayed
            if isinstance(placement, Evict):
                for victim in placement.victims:
                    self._residents.evict(victim, now, "budget")
                continue
            self.built.popleft()
            self._apply_placement(built, placement, now)
            self.lanes.advance()
        return changed

    def _apply_placement(self, built: LoadedModel, placement: Placement, now: float) -> None:
        """End the load by its placement: the model gets its slot, or the load is dismissed or fails."""
        if isinstance(placement, Placed):
            self._settle(placement.slot, built, now)
        elif self._cache.is_speculative(built.model):
            self._dismiss(built.model)
        else:
            why = placement.why if isinstance(placement, Refuse) else f"all room was in use for {self._patience_s} s"
            self._fail(built.model, NoRoom(f"{built.model}: {why}"))

    def _keep_unchanged(self, built: LoadedModel) -> bool:
        """End a reload that found the serving version again; False if it found another version."""
        slot = self._residents.revalidate_same(built)
        if slot is None:
            return False
        self._end(built.model)
        self.lanes.take_parts(built.model)
        self._note_due(built)
        self._tell(built.model, slot.version)
        return True

    def _note_due(self, built: LoadedModel) -> None:
        """Load the model again when the store answers, if it came from a copy that is due."""
        if not built.stale:
            self._due.pop(built.model, None)
        elif len(self._due) < MAX_DUE:
            self._due[built.model] = None

    def _end(self, model: ModelName) -> float:
        """The load has ended: when it began."""
        self._renewing.discard(model)
        return self._started.pop(model, 0.0)

    def _settle(self, slot: Slot, built: LoadedModel, now: float) -> None:
        """Copy the model into its slot, serve from it, and tell all who wait."""
        try:
            self._residents.write(slot, built)
        except Exception as error:  # a failed copy must free the slot and refuse the jobs that wait
            self._cache.abandon(slot)
            self._fail(built.model, _as_load_error(built.model, error))
            return
        if self._residents.settle(slot, built, now):
            self._metrics.labelled(self._metrics.swaps, result="ok").inc()
        slot.tier, slot.load_s = built.tier, now - self._end(built.model)
        self._metrics.load_seconds(slot.tier, slot.load_s)
        self._note_due(built)
        self._waiting.served(built, now, self.lanes.take_parts(built.model))
        self._tell(built.model, built.version)
        if built.stale:
            log.warning("serving_stale", model=built.model, version=built.version, store_out=self._health.is_out)
        log.debug("loaded", model=built.model, version=built.version, tier=built.tier)
        if self._foresight is not None:
            self._foresight.note_loaded(built.model)
            self.look_ahead()

    def _fail(self, model: ModelName, error: LoadError) -> None:
        """End a failed load: tell all who wait for it the cause. No model is evicted."""
        if self._foresight is not None:
            self._foresight.note_ended(model, PrefetchOutcome.FAILED)
        error = _without_frames(error)
        now = self._now()
        retry_s = self._cache.failed(model, error, now).until - now
        self._shelf.drop(model)
        self._end(model)
        self._metrics.labelled(self._metrics.failures, reason=error.reason).inc()
        if model in self._cache:
            self._metrics.labelled(self._metrics.swaps, result="failed").inc()
        log.warning("load_failed", model=model, reason=error.reason, error=str(error))
        self._waiting.failed(model, error, retry_s, self.lanes.take_parts(model))
        for future in self._watchers.pop(model, []):
            if not future.done():
                future.set_exception(error)

    def _dismiss(self, model: ModelName) -> None:
        """End a prefetch that got no memory; it does not count as a failure of the model."""
        assert self._foresight is not None, "only the prefetcher starts speculative loads"
        self._foresight.note_ended(model, PrefetchOutcome.REFUSED)
        self._cache.dismiss(model)
        self._shelf.put_back(model)
        self._end(model)
        self.lanes.take_parts(model)

    def _tell(self, model: ModelName, version: str) -> None:
        for future in self._watchers.pop(model, []):
            if not future.done():
                future.set_result(version)


def _without_frames(error: LoadError) -> LoadError:
    """The same error, bounded, without its traceback.

    A failure is remembered for as long as its back-off and longer. Its traceback would keep the frames of the load, and
    these the archive's bytes: a few broken archives of 10 MiB would fill the host's memory.
    """
    return type(error)(_shorten(str(error)), _shorten(error.public))


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} (shortened)"


def _as_load_error(model: ModelName, error: Exception) -> LoadError:
    return error if isinstance(error, LoadError) else unexpected(model, error)
