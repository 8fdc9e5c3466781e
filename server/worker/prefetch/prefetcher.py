"""What a worker loads before it is asked for. Owned by its step thread; when a model is due
`server.worker.prefetch.rhythms` knows.

Foresight costs idle bandwidth only: it begins a load while nobody waits for one, some at a time, and each takes room
that is free or of a model that is worth less, never of a leased, pinned or likewise expected one. What is here already
is marked as if it had been asked, so that the traffic before the tick does not push it out. A request that comes while
its model is on the way joins that load, as it would any other.
"""

from collections import deque
from enum import StrEnum

from model_store.cache.cache import Cache, Load
from model_store.names import ModelName
from server.metrics import WorkerMetrics
from server.worker.prefetch.rhythms import Expected, Rhythms


class Result(StrEnum):
    """What came of a load ahead of time, as counted."""

    USED = "used"  #: asked for while it was here
    LATE = "late"  #: asked for while it was on its way
    WASTED = "wasted"  #: left again, not asked for
    REFUSED = "refused"  #: no room that was worth less
    FAILED = "failed"


class Foresight:
    """The loads ahead of time of one worker: `most` at once."""

    def __init__(self, cache: Cache, metrics: WorkerMetrics, most: int) -> None:
        self.rhythms = Rhythms()
        self._cache, self._metrics, self._most = cache, metrics, most
        self._next: deque[Expected] = deque()
        self._loading: set[ModelName] = set()
        self._brought: set[ModelName] = set()  # and not asked for yet

    def __repr__(self) -> str:
        """For example `<Foresight <Rhythms ...>, 12 to bring, 2 loading, 40 brought>`."""
        counts = f"{len(self._next)} to bring, {len(self._loading)} loading, {len(self._brought)} brought"
        return f"<Foresight {self.rhythms!r}, {counts}>"

    def asked(self, model: ModelName, now: float) -> None:
        """A request for the model, before the cache is asked."""
        self.rhythms.note(model, now)
        if model in self._brought:
            self._brought.discard(model)
            self._count(Result.USED)
        elif model in self._loading:
            self._loading.discard(model)
            self._count(Result.LATE)

    def look(self, now: float) -> None:
        """Time has passed."""
        for expected in self.rhythms.due(now):
            if not self._cache.expect(expected.model, now):
                self._next.append(expected)

    def next(self, now: float) -> ModelName | None:
        """A model to load now, wanted in the cache; None when there is none or the moment is not right."""
        while self._next and self._next[0].due < now:
            self._next.popleft()  # also while others wait for loads all the time
        while self._next and len(self._loading) < self._most and not self._cache.is_awaited:
            model, due = self._next.popleft()
            if due < now or model not in self.rhythms or model in self._cache:
                continue
            if isinstance(self._cache.want(model, now, speculative=True), Load):
                self._loading.add(model)
                return model
        return None

    def loaded(self, model: ModelName) -> None:
        """The model is here, whoever wanted it."""
        if model in self._loading:
            self._loading.discard(model)
            self._brought.add(model)

    def ended(self, model: ModelName, result: Result) -> None:
        """The model's load is over without it."""
        if model in self._loading:
            self._loading.discard(model)
            self._count(result)

    def left(self, model: ModelName) -> None:
        """The model was evicted or unloaded; if that was too early, it is brought again."""
        if model in self._brought:
            self._brought.discard(model)
            self._count(Result.WASTED)
        due = self.rhythms.near(model)
        if due is not None:
            self._next.append(Expected(model, due))

    def _count(self, result: Result) -> None:
        self._metrics.labelled(self._metrics.prefetch, result=result).inc()
