"""Which worker gets a request. Pure: numbers in, a worker out; the clock is an argument.

Rendezvous hashing gives every model a home, so that fronts agree without talking and a dead worker moves only its own
models. The load of a home is bounded: above its fair share a request spills to a replica; a new replica is made, on the
next worker in the model's own order, only where waiting at the home takes longer than loading the model elsewhere.
Replicas are listed and expire. Requests for a model that is still loading are not load: they wait for bytes, not for
compute.
"""

from dataclasses import dataclass, field

from server.contract import home_weight

REPLICA_S = 60.0
FAIR_SHARE = 1.25
FREE_QUEUE = 16
MAX_ORDERS = 100_000


@dataclass(slots=True, eq=False)
class Lane:
    """What this front knows of one worker: requests running there, its pace (s), the models seen to be there."""

    worker: int
    running: int = 0
    wait_s: float = 0.0
    load_s: float = 0.05
    warm: set[str] = field(default_factory=set)

    def __repr__(self) -> str:
        """For example `<Lane 2: 5 running, 40 warm, 0.4 ms a request, 20 ms a load>`."""
        pace = f"{self.wait_s * 1e3:.1f} ms a request, {self.load_s * 1e3:.0f} ms a load"
        return f"<Lane {self.worker}: {self.running} running, {len(self.warm)} warm, {pace}>"


class Router:
    """The lanes to the workers that are up, and the replicas this front has made."""

    def __init__(self) -> None:
        self.lanes: dict[int, Lane] = {}
        self._orders: dict[str, list[int]] = {}
        self._replicas: dict[str, dict[int, float]] = {}  # model -> worker -> until when
        self._expiry = 0.0

    def __repr__(self) -> str:
        """For example `<Router 3 workers, 12 running, 1 replicated models>`."""
        running = sum(lane.running for lane in self.lanes.values())
        return f"<Router {len(self.lanes)} workers, {running} running, {len(self._replicas)} replicated models>"

    def up(self, worker: int) -> None:
        """The worker takes requests; it starts cold."""
        self.lanes[worker] = Lane(worker)
        self._orders.clear()

    def down(self, worker: int) -> None:
        """The worker takes no more requests."""
        self.lanes.pop(worker, None)
        self._orders.clear()
        for replicas in self._replicas.values():
            replicas.pop(worker, None)

    def route(self, model: str, now: float, avoid: int | None = None) -> Lane | None:
        """The lane for a request, None when no worker is up. `avoid`: the worker that just died with this request."""
        if len(self.lanes) == 1 and avoid is None:
            return next(iter(self.lanes.values()))
        order = [worker for worker in self.order(model) if worker != avoid]
        if not order:
            return None
        home = self.lanes[order[0]]
        bound = FREE_QUEUE + FAIR_SHARE * sum(lane.running for lane in self.lanes.values()) / len(self.lanes)
        if home.running <= bound or model not in home.warm:
            return home
        return self._spill(model, home, order[1:], now) or home

    def order(self, model: str) -> list[int]:
        """All workers that are up, the model's home first (highest random weight, Thaler and Ravishankar 1996)."""
        order = self._orders.get(model)
        if order is None:
            if len(self._orders) >= MAX_ORDERS:
                self._orders.clear()
            order = self._orders[model] = sorted(
                self.lanes, key=lambda worker: home_weight(model, worker), reverse=True
            )
        return order

    def started(self, lane: Lane, model: str) -> bool:
        """A request goes out. True when it counts as load, to be given back to `ended`."""
        counts = model in lane.warm
        lane.running += counts
        return counts

    def ended(
        self, lane: Lane, model: str, counted: bool, *, held: bool, wait_s: float = 0.0, load_s: float = 0.0
    ) -> None:
        """Its answer is here. `held`: the worker has the model now. Times teach the pace."""
        lane.running -= counted
        if held:
            lane.warm.add(model)
            lane.wait_s += (wait_s - lane.wait_s) / 16
        else:
            lane.warm.discard(model)
        if load_s:
            lane.load_s += (load_s - lane.load_s) / 8

    def replicas(self, model: str) -> list[int]:
        """The workers beside its home that this front sends the model's overflow to."""
        return list(self._replicas.get(model, ()))

    def _spill(self, model: str, home: Lane, others: list[int], now: float) -> Lane | None:
        """A replica with less to do than the home; a new one where queueing costs more than loading.

        While a new replica loads, it stays the next in the model's order, and the same rule sends requests there.
        """
        self._expire(now)
        listed = self._replicas.get(model, {})
        mine = [self.lanes[worker] for worker in others if worker in listed and model in self.lanes[worker].warm]
        lane = min(mine, key=lambda lane: lane.running, default=None)
        if lane is None or lane.running >= home.running:
            fresh = next((self.lanes[worker] for worker in others if self.lanes[worker] not in mine), None)
            if fresh is None or fresh.running >= home.running or home.wait_s <= home.load_s:
                return None
            lane = fresh
        self._replicas.setdefault(model, {})[lane.worker] = now + REPLICA_S
        return lane

    def _expire(self, now: float) -> None:
        """Forget the replicas whose time is over: a walk over all models, so once a second is enough."""
        if now < self._expiry:
            return
        self._expiry = now + 1
        for model, replicas in list(self._replicas.items()):
            alive = {worker: until for worker, until in replicas.items() if until > now}
            if alive:
                self._replicas[model] = alive
            else:
                del self._replicas[model]
