"""Which worker gets a request. Pure: numbers in, a worker out; the clock is an argument.

Rendezvous hashing gives every model a home, so that fronts agree without talking and a dead worker moves only its own
models. The load of a home is bounded: above its fair share a request spills to a replica; a new replica is made, on the
next worker in the model's own order, only where waiting at the home takes longer than loading the model elsewhere.
Replicas are listed and expire. Requests for a model that is still loading are not load: they wait for bytes, not for
compute.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from model_store.name_table import NameTable
from server.contract import MIB, home_weight

REPLICA_S = 60.0
FAIR_SHARE = 1.25
FREE_QUEUE = 16
#: Bytes of the models' orders, of the names each lane has seen warm, and of the replicated models: beyond, the oldest
#: are forgotten, which costs a calculation, or a request that counts as one for a model that is still loading.
MAX_ORDER_BYTES, MAX_WARM_BYTES, MAX_REPLICA_BYTES = 16 * MIB, 16 * MIB, 4 * MIB
WORKER_BYTES = 128  #: of one worker in an order or among replicas


@dataclass(slots=True, eq=False)
class WorkerLoad:
    """What this front knows of one worker: requests running there, its pace (s), the models seen to be there."""

    worker: int
    running: int = 0
    wait_s: float = 0.0
    load_s: float = 0.05
    warm: NameTable[None] = field(default_factory=lambda: NameTable(MAX_WARM_BYTES))

    def __repr__(self) -> str:
        """For example `<WorkerLoad 2: 5 running, 40 warm, 0.4 ms a request, 20 ms a load>`."""
        pace = f"{self.wait_s * 1e3:.1f} ms a request, {self.load_s * 1e3:.0f} ms a load"
        return f"<WorkerLoad {self.worker}: {self.running} running, {len(self.warm)} warm, {pace}>"


class Router:
    """The lanes to the workers that are up, and the replicas this front has made."""

    def __init__(self) -> None:
        self.lanes: dict[int, WorkerLoad] = {}
        self.silent: frozenset[int] = frozenset()  #: workers that get requests only when no other is up
        self._orders: NameTable[list[int]] = NameTable(MAX_ORDER_BYTES)
        #: model -> worker -> until when
        self._replicas: NameTable[dict[int, float]] = NameTable(MAX_REPLICA_BYTES, value_bytes=8 * WORKER_BYTES)
        self._expiry = 0.0

    def __repr__(self) -> str:
        """For example `<Router 3 workers, 12 running, 1 replicated models>`."""
        running = sum(lane.running for lane in self.lanes.values())
        return f"<Router {len(self.lanes)} workers, {running} running, {len(self._replicas)} replicated models>"

    def worker_up(self, worker: int) -> None:
        """The worker takes requests; it starts cold."""
        self.lanes[worker] = WorkerLoad(worker)
        self._forget_orders()

    def worker_down(self, worker: int) -> None:
        """The worker takes no more requests."""
        self.lanes.pop(worker, None)
        self._forget_orders()
        for replicas in self._replicas.values():
            replicas.pop(worker, None)

    def _forget_orders(self) -> None:
        self._orders = NameTable(MAX_ORDER_BYTES, value_bytes=WORKER_BYTES * len(self.lanes))

    def route(self, model: str, now: float, avoid: int | None = None) -> WorkerLoad | None:
        """The lane for a request, None when no worker is up. `avoid`: the worker that just died with this request."""
        if len(self.lanes) == 1 and avoid is None:
            return next(iter(self.lanes.values()))
        order = [worker for worker in self.order(model) if worker != avoid]
        if self.silent:
            order = [worker for worker in order if worker not in self.silent] or order
        if not order:
            return None
        home = self.lanes[order[0]]
        bound = FREE_QUEUE + FAIR_SHARE * sum(lane.running for lane in self.lanes.values()) / len(self.lanes)
        if home.running <= bound or not home.warm.has(model):
            return home
        return self._spill(model, home, order[1:], now) or home

    def route_all(self, models: Sequence[str]) -> dict[WorkerLoad, list[int]] | None:
        """The places of the models that each lane gets; None where one by one not all would get their homes.

        INVARIANT: it is what `route` says of each, where those before it have been started.
        """
        if len(self.lanes) <= 1 or self.silent:
            return {lane: [*range(len(models))] for lane in self.lanes.values()} if len(self.lanes) == 1 else None
        placed: dict[WorkerLoad, list[int]] = {lane: [] for lane in self.lanes.values()}
        running = {lane: lane.running for lane in placed}
        total, share = sum(running.values()), FAIR_SHARE / len(placed)
        for place, model in enumerate(models):
            home = self.lanes[self.order(model)[0]]
            if home.warm.has(model):
                if running[home] > FREE_QUEUE + share * total:
                    return None
                running[home] += 1
                total += 1
            placed[home].append(place)
        return {lane: places for lane, places in placed.items() if places}

    def order(self, model: str) -> list[int]:
        """All workers that are up, the model's home first (highest random weight, Thaler and Ravishankar 1996)."""
        order = self._orders.get(model)
        if order is None:
            order = sorted(self.lanes, key=lambda worker: home_weight(model, worker), reverse=True)
            self._orders.put(model, order)
        return order

    def count_start(self, lane: WorkerLoad, model: str) -> bool:
        """A request goes out. True when it counts as load, to be given back to `count_end`."""
        counts = lane.warm.has(model)
        lane.running += counts
        return counts

    def count_end(
        self, lane: WorkerLoad, model: str, counted: bool, *, held: bool, wait_s: float = 0.0, load_s: float = 0.0
    ) -> None:
        """Its answer is here. `held`: the worker has the model now. Times teach the pace."""
        lane.running -= counted
        if held:
            if not lane.warm.has(model):
                lane.warm.put(model, None)
            lane.wait_s += (wait_s - lane.wait_s) / 16
        else:
            lane.warm.pop(model)
        if load_s:
            lane.load_s += (load_s - lane.load_s) / 8

    def count_starts(self, lane: WorkerLoad, models: Sequence[str]) -> list[bool]:
        """As `count_start` for each of these."""
        counts = [*map(lane.warm.has, models)]
        lane.running += sum(counts)
        return counts

    def count_ends(
        self,
        lane: WorkerLoad,
        models: Sequence[str],
        counted: Sequence[bool],
        *,
        held: bool,
        wait_s: float = 0.0,
        load_s: float = 0.0,
    ) -> None:
        """As `count_end` for each of these, whose answers are alike."""
        if not held or load_s or not all(map(lane.warm.has, models)):
            for model, counts in zip(models, counted, strict=True):
                self.count_end(lane, model, counts, held=held, wait_s=wait_s, load_s=load_s)
            return
        lane.running -= sum(counted)
        lane.wait_s = wait_s + (lane.wait_s - wait_s) * (15 / 16) ** len(models)

    def replicas(self, model: str) -> list[int]:
        """The workers beside its home that this front sends the model's overflow to."""
        return list(self._replicas.get(model) or ())

    def _spill(self, model: str, home: WorkerLoad, others: list[int], now: float) -> WorkerLoad | None:
        """A replica with less to do than the home; a new one where queueing costs more than loading.

        While a new replica loads, it stays the next in the model's order, and the same rule sends requests there.
        """
        self._expire(now)
        listed = self._replicas.get(model) or {}
        mine = [self.lanes[worker] for worker in others if worker in listed and self.lanes[worker].warm.has(model)]
        lane = min(mine, key=lambda lane: lane.running, default=None)
        if lane is None or lane.running >= home.running:
            fresh = next((self.lanes[worker] for worker in others if self.lanes[worker] not in mine), None)
            if fresh is None or fresh.running >= home.running or home.wait_s <= home.load_s:
                return None
            lane = fresh
        self._replicas.put(model, {**listed, lane.worker: now + REPLICA_S})
        return lane

    def _expire(self, now: float) -> None:
        """Forget the replicas whose time is over: a walk over all models, so once a second is enough."""
        if now < self._expiry:
            return
        self._expiry = now + 1
        for model, replicas in list(self._replicas.items()):
            alive = {worker: until for worker, until in replicas.items() if until > now}
            if alive:
                self._replicas.put(model, alive)
            else:
                self._replicas.pop(model)
