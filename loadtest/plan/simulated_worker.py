"""One worker in simulated time, with the server's own cache. Pure: arrays and a seed in, arrays out.

One interpreter runs steps and, between two steps, the part of one load that needs the interpreter; loader threads do
the rest of the loads at the same time. A step takes half of the jobs of one family that are ready (see
server/worker/scheduler.py).
"""

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf, nan
from typing import NamedTuple

import numpy as np

from loadtest.driver.profiles import Float64
from loadtest.driver.trace import UInt8
from loadtest.plan.costs import Costs, Sample, draw_seconds
from model_store.cache.cache import Cache, FailedLoad, Placed
from model_store.cache.slots import Slot
from model_store.cache.victim_selection import Evict, Moves, Refuse, Wait
from model_store.errors import NoRoom
from model_store.names import ModelName
from server.contract import (
    ACCESS_LOG_OUTCOMES,
    LOADER_THREADS,
    MAX_BATCH_ROWS,
    QUEUE_PER_WORKER,
    REQUEST_TIMEOUT_S,
    REVALIDATE_S,
    UNHALVED_JOBS,
)

HIT, MISS, COALESCED, REFUSED = map(ACCESS_LOG_OUTCOMES.index, ("hit", "miss", "coalesced", "refused"))
_STEP, _FETCHED, _BUILT = range(3)
DRAWS = 4_096
#: The share of a load's time, without its GET, that needs the interpreter. To read, check and build a model from disk
#: takes 0.4 ms of work in a loop (loader alone, 70 KB), but a load takes 1.1 ms: the rest is the waking of threads.
HELD = 0.4


class SimulatedModel(NamedTuple):
    """A model as the cache sees it."""

    name: ModelName
    charge: int
    family: str


@dataclass(frozen=True, slots=True, eq=False)
class WorkerRun:
    """The results of requests [n]: seconds in the worker, and HIT, MISS, COALESCED or REFUSED.

    `busy_s` is the time that it computed; `loading_s` the busy time of all its loader threads together.
    """

    wait: Float64
    outcome: UInt8
    loads: int
    busy_s: float
    loading_s: float


@dataclass(slots=True)
class SimulatedWorker:
    """The state of a worker. Times are seconds since the start of the load; negative ones are while caches fill."""

    cache: Cache
    costs: Costs
    rng: np.random.Generator
    loader_threads: int = LOADER_THREADS
    fetched: dict[ModelName, float] = field(default_factory=dict)  #: when the store was last asked for it

    def __repr__(self) -> str:
        return f"<SimulatedWorker {self.cache!r}>"

    def fill(self, models: Iterable[SimulatedModel], now: float = 0.0) -> int:
        """Run requests one after the other, each completely and in no time. Returns the number of hits."""
        hits = 0
        for model in models:
            slot = self.cache.lease(model.name, now)
            if slot is not None:
                hits += 1
                self.cache.release(slot)
            elif not isinstance(self.cache.want(model.name, now), FailedLoad):
                self.fetched[model.name] = now
                placement = self.place(model, now)
                if isinstance(placement, Placed):
                    self.cache.ready(placement.slot, now)
                else:
                    self.fail(model, now)
        return hits

    def place(self, model: SimulatedModel, now: float) -> Placed | Wait | Refuse:
        """Place a built model; evict and move others as the cache decides."""
        while True:
            placement = self.cache.place(model.name, "", model.charge, now, model.family)
            if isinstance(placement, Evict):
                for victim in placement.victims:
                    self.cache.retired(victim)
            elif isinstance(placement, Moves):
                for slot, offset in placement.moves:
                    self.cache.moved(slot, offset)
            else:
                return placement

    def fail(self, model: SimulatedModel, now: float) -> None:
        """End the load of a model that is larger than the worker's share of the cache."""
        self.cache.failed(model.name, NoRoom(f"{model.name}: more than there is"), now)

    def run(self, at: Float64, asked: Sequence[SimulatedModel]) -> WorkerRun:
        """Run requests at the times `at` [n], each for one model."""
        return _WorkerLoad(self, at, asked).run()


class _WorkerLoad:
    """The run of one load of requests, which are numbers."""

    def __init__(self, worker: SimulatedWorker, at: Float64, asked: Sequence[SimulatedModel]) -> None:
        n = len(at)
        self.worker, self.cache, self.costs = worker, worker.cache, worker.costs
        self.at, self.asked = at.tolist(), asked
        self.done, self.outcome = [nan] * n, bytearray(n)
        self.slots: dict[int, Slot] = {}  # of requests that are ready
        self.ready: OrderedDict[str, deque[int]] = OrderedDict()  # family -> requests
        self.waiting: dict[ModelName, list[int]] = {}
        self.queued: deque[int] = deque()  # loads, by their first request: they wait for a thread,
        self.to_build: deque[int] = deque()  # for the interpreter,
        self.built: deque[int] = deque()  # and for room
        self.events: list[tuple[float, int, Sequence[int]]] = []
        self.threads, self.inside, self.loads = worker.loader_threads, 0, 0
        self.busy_s = self.loading_s = 0.0
        self.busy = self.stepped = False
        self.get, self.build = _Draws(worker.costs.get, worker.rng), _Draws(worker.costs.build, worker.rng)
        self.held: dict[int, float] = {}  # of loads, seconds of the interpreter

    def __repr__(self) -> str:
        return f"<_WorkerLoad {self.inside} inside, {len(self.waiting)} models awaited>"

    def run(self) -> WorkerRun:
        """Run until all requests have their results."""
        at, n, i = self.at, len(self.at), 0
        while i < n or self.events:
            if i < n and (not self.events or at[i] <= self.events[0][0]):
                now, i = at[i], i + 1
                self._arrive(i - 1, now)
            else:
                now, kind, requests = heapq.heappop(self.events)
                self._happen(kind, requests, now)
            if not self.busy:
                self._turn(now)
        wait = np.fmin(np.asarray(self.done) - at, REQUEST_TIMEOUT_S)
        outcome = np.where(wait < REQUEST_TIMEOUT_S, np.frombuffer(self.outcome, np.uint8), np.uint8(REFUSED))
        return WorkerRun(wait, outcome, self.loads, self.busy_s, self.loading_s)

    def _arrive(self, i: int, now: float) -> None:
        model = self.asked[i]
        self.inside += 1
        if self.inside > QUEUE_PER_WORKER:
            self._end(i, now, REFUSED)
            return
        slot = self.cache.lease(model.name, now)
        if slot is not None:
            self._queue(i, slot, HIT)
            return
        wanted = self.cache.want(model.name, now)
        if isinstance(wanted, FailedLoad):
            self._end(i, now, REFUSED)
            return
        self.waiting.setdefault(model.name, []).append(i)
        self.outcome[i] = COALESCED if wanted is None else MISS
        if wanted is not None:
            self.queued.append(i)
            self._fetch(now)

    def _queue(self, i: int, slot: Slot, outcome: int) -> None:
        """Queue a request for the next step of its family."""
        self.outcome[i], self.slots[i] = outcome, slot
        self.ready.setdefault(self.asked[i].family, deque()).append(i)

    def _end(self, i: int, now: float, outcome: int) -> None:
        self.inside -= 1
        self.done[i], self.outcome[i] = now, outcome

    def _happen(self, kind: int, requests: Sequence[int], now: float) -> None:
        if kind == _FETCHED:
            self.to_build.extend(requests)
            return
        self.busy = False
        if kind == _BUILT:
            self.built.extend(requests)
            self.threads += 1
            self.loading_s += now
            self._fetch(now)
            return
        for i in requests:
            self.cache.release(self.slots.pop(i))
            self._end(i, now, self.outcome[i])

    # --- loads ------------------------------------------------------------------------------------------------------

    def _fetch(self, now: float) -> None:
        """Give the next loads to free loader threads; the store is asked unless it was asked a short while ago."""
        while self.threads and self.queued:
            self.threads -= 1
            self.loading_s -= now
            i = self.queued.popleft()
            model, fetched = self.asked[i].name, self.worker.fetched
            ready, build = now, next(self.build)
            if now - fetched.get(model, -inf) >= REVALIDATE_S:
                ready = fetched[model] = now + next(self.get)
            self.held[i] = HELD * build
            heapq.heappush(self.events, (ready + build - self.held[i], _FETCHED, (i,)))

    def _place(self, now: float) -> None:
        """Place built models in order until one must wait for room; requests for a placed model become ready."""
        while self.built:
            model = self.asked[self.built[0]]
            placement = self.worker.place(model, now)
            if isinstance(placement, Wait):
                return
            self.built.popleft()
            self.loads += 1
            waited = self.waiting.pop(model.name)
            if isinstance(placement, Refuse):
                self.worker.fail(model, now)
                for i in waited:
                    self._end(i, now, REFUSED)
                continue
            self.cache.ready(placement.slot, now)
            for i in waited:
                slot = self.cache.lease(model.name, now)
                assert slot is not None, "it has just become ready"
                self._queue(i, slot, self.outcome[i])

    # --- the interpreter --------------------------------------------------------------------------------------------

    def _turn(self, now: float) -> None:
        """Run a step or a build; they take turns if both have work."""
        if self.built:
            self._place(now)
        if self.to_build and (self.stepped or not self.ready):
            self.stepped = False
            i = self.to_build.popleft()
            self._compute(now, self.held.pop(i), _BUILT, (i,))
        elif self.ready:
            self.stepped = True
            family, queue = self.ready.popitem(last=False)
            count = min(len(queue), max(UNHALVED_JOBS, (len(queue) + 1) // 2), MAX_BATCH_ROWS)
            batch = [queue.popleft() for _ in range(count)]
            if queue:
                self.ready[family] = queue
            rows = sum(now - self.at[i] < REQUEST_TIMEOUT_S for i in batch)  # the others have passed their deadline
            self._compute(now, self.costs.step_s + self.costs.row_s * rows, _STEP, batch)

    def _compute(self, now: float, seconds: float, kind: int, requests: Sequence[int]) -> None:
        self.busy = True
        self.busy_s += seconds
        heapq.heappush(self.events, (now + seconds, kind, requests))


class _Draws:
    """Draws from a distribution, made some thousand at a time."""

    def __init__(self, seen: Sample, rng: np.random.Generator) -> None:
        self._seen, self._rng = seen, rng
        self._left: list[float] = []

    def __repr__(self) -> str:
        return f"<_Draws up to {self._seen[-1]:g} s>"

    def __next__(self) -> float:
        if not self._left:
            self._left = draw_seconds(self._seen, DRAWS, self._rng).tolist()
        return self._left.pop()
