"""Chooses the models that a worker loads before they are requested. The worker's step thread owns it.

`server.worker.prefetch.rhythms` predicts when a model is due. A prefetch must not cost a request anything: it begins
only while no request waits for a load, a few run at a time, and each takes memory that is free or held by a model that
is worth less. A resident model that is due counts as requested, so that other traffic does not evict it before its
tick. A request for a model that is being prefetched joins that load, as it joins any other.

INVARIANT: a prefetch never evicts a model that is leased, pinned, or expected as soon.
"""

from collections import deque
from enum import StrEnum

from model_store.cache.cache import Cache, Load
from model_store.names import ModelName
from server.metrics import WorkerMetrics
from server.worker.prefetch.rhythms import Expected, Rhythms


class PrefetchOutcome(StrEnum):
    """The outcome of a prefetch, as the metrics count it."""

    USED = "used"  #: requested while it was resident
    LATE = "late"  #: requested while it was being loaded
    WASTED = "wasted"  #: evicted without a request
    REFUSED = "refused"  #: no memory was free or held by a model that is worth less
    FAILED = "failed"


class Prefetcher:
    """The prefetches of one worker, at most `most` at once."""

    def __init__(self, cache: Cache, metrics: WorkerMetrics, most: int) -> None:
        self.rhythms = Rhythms()
        self._cache, self._metrics, self._most = cache, metrics, most
        self._next: deque[Expected] = deque()
        self.loading: set[ModelName] = set()
        self.brought: set[ModelName] = set()  # resident, and not requested yet

    def __repr__(self) -> str:
        """For example `<Prefetcher <Rhythms ...>, 12 to bring, 2 loading, 40 brought>`."""
        counts = f"{len(self._next)} to bring, {len(self.loading)} loading, {len(self.brought)} brought"
        return f"<Prefetcher {self.rhythms!r}, {counts}>"

    def note_use(self, model: ModelName) -> None:
        """Count a request for a model of `loading` or `brought`. To be called before the cache is asked for a lease."""
        if model in self.brought:
            self.brought.discard(model)
            self._count(PrefetchOutcome.USED)
        elif model in self.loading:
            self.loading.discard(model)
            self._count(PrefetchOutcome.LATE)

    def advance_time(self, now: float) -> None:
        """Queue the models that have come near their tick; those that are resident are kept."""
        for expected in self.rhythms.collect_due(now):
            if not self._cache.expect(expected.model, now):
                self._next.append(expected)

    def next_load(self, now: float) -> ModelName | None:
        """A model to load now, for which the cache has a `Load`; None if there is none, or requests wait for loads."""
        while self._next and self._next[0].due < now:
            self._next.popleft()  # outside of the next loop, so that the queue is bounded while requests wait for loads
        while self._next and len(self.loading) < self._most and not self._cache.is_awaited:
            model, due = self._next.popleft()
            if due < now or model not in self.rhythms or model in self._cache:
                continue
            if isinstance(self._cache.want(model, now, speculative=True), Load):
                self.loading.add(model)
                return model
        return None

    def note_loaded(self, model: ModelName) -> None:
        """Record that a load has ended with the model resident, whether it was a prefetch or not."""
        if model in self.loading:
            self.loading.discard(model)
            self.brought.add(model)

    def note_ended(self, model: ModelName, result: PrefetchOutcome) -> None:
        """Record that a load has ended without the model."""
        if model in self.loading:
            self.loading.discard(model)
            self._count(result)

    def note_evicted(self, model: ModelName) -> None:
        """Record that the model was evicted or unloaded; it is queued again if it is still due."""
        if model in self.brought:
            self.brought.discard(model)
            self._count(PrefetchOutcome.WASTED)
        due = self.rhythms.near_tick(model)
        if due is not None:
            self._next.append(Expected(model, due))

    def _count(self, result: PrefetchOutcome) -> None:
        self._metrics.labelled(self._metrics.prefetch, result=result).inc()
