"""The life of a load: begin it, build the model, wait for memory, and tell the waiting requests and operators.

The step thread owns everything here. Only building runs on loader threads; its result returns as one call on the step
thread.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol

import structlog
import torch

from model_store.cache.cache import Placed, Placement
from model_store.cache.slots import Slot
from model_store.cache.victim_selection import Evict, Moves, Refuse, Wait
from model_store.errors import LoadError, NoRoom, StoreUnavailable
from model_store.names import ModelName
from server.ipc.pulse import Pulse
from server.metrics import WorkerMetrics
from server.worker.model_loader import LoadedModel, ModelBuilder, timed_build, unexpected
from server.worker.prefetch.prefetcher import Prefetcher, PrefetchOutcome
from server.worker.resident_models import ResidentModels

KEPT = 7 / 8  #: weight of the loads that were measured before
MAX_MESSAGE = 2000  #: characters of a failure that are kept
#: Loads that wait or run. A client may leave at once, so that the queue of requests does not bound them.
MAX_LOADS = 4096
#: Bytes of built models that wait for memory, beyond which no further model is built. One is always built.
MAX_BUILT_BYTES = 256 * 1024 * 1024

log = structlog.get_logger()


class LoadListener(Protocol):
    """What a load tells the step loop, which holds the requests that wait for the model."""

    def served(self, built: LoadedModel, now: float) -> None:
        """The model is resident."""

    def failed(self, model: ModelName, error: LoadError) -> None:
        """The load failed."""

    def wake(self) -> None:
        """A model is built: call `Loads.place_built` in the next step."""


class ModelLoads:
    """The loads of one worker. A built model waits for memory at most `patience_s`; `now` is the monotonic clock."""

    def __init__(
        self,
        residents: ResidentModels,
        waiting: LoadListener,
        loader: ModelBuilder,
        metrics: WorkerMetrics,
        foresight: Prefetcher | None,
        *,
        pulse: Pulse,
        threads: int,
        patience_s: float,
        now: Callable[[], float],
    ) -> None:
        self._residents, self._waiting, self._loader, self._metrics = residents, waiting, loader, metrics
        self._cache, self._shelf, self._foresight = residents.cache, residents.shelf, foresight
        self._pulse, self._patience_s, self._now = pulse, patience_s, now
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="loader")
        self._size = self._idle = threads  # loader threads, and those that build nothing
        self._busy_since = 0.0  # when one last took up or ended a build
        self._load_s = 0.0  # what a build takes on a loader thread
        self._due: dict[ModelName, float] = {}  # when models that are being built are expected to be
        self._queued: deque[tuple[ModelName, bool]] = deque()  # loads that wait for one, and whether to revalidate
        self._loop = asyncio.get_running_loop()
        self._started: dict[ModelName, float] = {}
        self.built: deque[tuple[LoadedModel, float]] = deque()  # verified models that wait for memory, and since when
        self._watchers: dict[ModelName, list[asyncio.Future[str]]] = {}  # loads by operators

    def __repr__(self) -> str:
        """For example `<ModelLoads 3 under way, 1 waiting for room>`."""
        return f"<ModelLoads {len(self._started)} under way, {len(self.built)} waiting for room>"

    def __len__(self) -> int:
        return len(self._started)

    def expected_s(self, model: ModelName, now: float) -> float:
        """In how many seconds a model that is being loaded is expected to be built; 0 while no load was measured."""
        return max(0.0, self._due.get(model, now) - now)

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
        kept = None if revalidate else self._shelf.take(model)
        if kept is not None:
            self._queue(kept, now)
            return
        self._due[model] = now + self._load_s * (1 + len(self._queued) / self._size)
        self._queued.append((model, revalidate))
        self._build_next()

    def _build_next(self) -> None:
        """Start builds on idle loader threads, unless the models that are built already hold enough memory."""
        held = sum(built.charge for built, _ in self.built)
        while self._queued and self._idle and held <= MAX_BUILT_BYTES:
            model, revalidate = self._queued.popleft()
            self._idle, self._busy_since = self._idle - 1, self._now()
            task = self._threads.submit(self._build, model, revalidate=revalidate)
            task.add_done_callback(partial(self._pass_on, model))

    def _build(self, model: ModelName, *, revalidate: bool) -> tuple[LoadedModel | LoadError, float]:
        """Runs on a loader thread. The load is noted: foreign bytes in native code may end this process."""
        with self._pulse.noting(model, "load"):
            return timed_build(self._loader, model, revalidate=revalidate)

    def stuck_s(self, now: float) -> float:
        """For how many seconds all loader threads have been busy with the same builds; 0 while one is idle."""
        return 0.0 if self._idle else now - self._busy_since

    def _pass_on(self, model: ModelName, done: "Future[tuple[LoadedModel | LoadError, float]]") -> None:
        """Runs on the loader thread, or on any that cancels."""
        if not done.cancelled():
            with contextlib.suppress(RuntimeError):  # the worker has ended meanwhile, and its loop with it
                self._loop.call_soon_threadsafe(self._end_load, model, *done.result())

    def look_ahead(self) -> None:
        """Start prefetches of models that are expected to be requested, as far as the prefetcher allows now."""
        if self._foresight is None:
            return
        now = self._now()
        while (model := self._foresight.next_load(now)) is not None:
            self.begin(model, now)

    def close(self) -> None:
        """Start no more loads."""
        self._queued.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # --- built ------------------------------------------------------------------------------------------------------

    def _end_load(self, model: ModelName, built: LoadedModel | LoadError, seconds: float) -> None:
        """Take the result of a loader thread."""
        self._idle, self._busy_since = self._idle + 1, self._now()
        self._due.pop(model, None)
        try:
            self._take(model, built, seconds)
        finally:
            self._build_next()

    def _take(self, model: ModelName, built: LoadedModel | LoadError, seconds: float) -> None:
        if isinstance(built, StoreUnavailable) and (kept := self._shelf.take(model, stale=True)) is not None:
            log.warning("store_unavailable_serving_stale", model=model, version=kept.version, error=str(built))
            self._queue(kept, self._now())
            return
        if isinstance(built, LoadError):
            self._fail(model, built)
            return
        self._load_s = seconds if not self._load_s else KEPT * self._load_s + (1 - KEPT) * seconds
        self._metrics.downloading.observe(built.download_s)
        try:
            with self._pulse.noting(model, "load"):
                self._prove(built)
        except Exception as error:  # whatever a golden sample causes fails this load only
            if not isinstance(error, torch.OutOfMemoryError):
                self._loader.forget(model)
            self._fail(model, _as_load_error(model, error))
            return
        log.debug("built", model=model, version=built.version, tier=built.tier, seconds=round(seconds, 4))
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
        """Place built models in order until one must wait. True if something changed."""
        changed = False
        while self.built:
            built, since = self.built[0]
            now = self._now()
            if self._keep_unchanged(built):
                self.built.popleft()
                self._build_next()
                continue
            spare = () if self._foresight is None else self._foresight.rhythms
            placement = self._cache.place(built.model, built.version, built.charge, now, built.family, spare=spare)
            if isinstance(placement, Wait) and now - since < self._patience_s:
                return changed
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
            self._build_next()
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
        self._started.pop(built.model)
        self._tell(built.model, slot.version)
        return True

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
        self._metrics.load_seconds(built.tier, now - self._started.pop(built.model))
        self._waiting.served(built, now)
        self._tell(built.model, built.version)
        log.info("loaded", model=built.model, version=built.version, tier=built.tier)
        if self._foresight is not None:
            self._foresight.note_loaded(built.model)
            self.look_ahead()

    def _fail(self, model: ModelName, error: LoadError) -> None:
        """End a failed load: tell all who wait for it the cause. No model is evicted."""
        if self._foresight is not None:
            self._foresight.note_ended(model, PrefetchOutcome.FAILED)
        error = _without_frames(error)
        self._cache.failed(model, error, self._now())
        self._shelf.drop(model)
        self._started.pop(model, None)
        self._metrics.labelled(self._metrics.failures, reason=error.reason).inc()
        if model in self._cache:
            self._metrics.labelled(self._metrics.swaps, result="failed").inc()
        log.warning("load_failed", model=model, reason=error.reason, error=str(error))
        self._waiting.failed(model, error)
        for future in self._watchers.pop(model, []):
            if not future.done():
                future.set_exception(error)

    def _dismiss(self, model: ModelName) -> None:
        """End a prefetch that got no memory; it does not count as a failure of the model."""
        assert self._foresight is not None, "only the prefetcher starts speculative loads"
        self._foresight.note_ended(model, PrefetchOutcome.REFUSED)
        self._cache.dismiss(model)
        self._shelf.put_back(model)
        self._started.pop(model)

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
    if isinstance(error, torch.OutOfMemoryError):
        return NoRoom(f"{model}: the device is out of memory: {error}")
    return error if isinstance(error, LoadError) else unexpected(model, error)
