"""Simulates a fleet on machines of any number: every request in simulated time, through the server's own cache.

Workers share nothing, so where there are many workers or many requests, a sample of them is simulated completely: the
one with the most requests, which represents only itself, and others chosen by the hash that places the models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from loadtest.driver.profiles import Float64, Int64, Schedule
from loadtest.driver.trace import UInt8
from loadtest.plan.costs import Costs, draw_seconds
from loadtest.plan.demand import Demand
from loadtest.plan.placement import Placement
from loadtest.plan.simulated_worker import COALESCED, HIT, MISS, REFUSED, SimulatedModel, SimulatedWorker
from model_store.cache.cache import Cache
from model_store.cache.eviction import make_policy
from server.contract import EVICTION_POLICY, LOADER_THREADS, SLAB_BYTES

LEVELS = (50, 90, 99, 99.9)
MOST_REQUESTS = 300_000  #: requests that are simulated at least; if there are more, workers are sampled


def make_cache(budget_bytes: int, slab_bytes: int, policy: str) -> Cache:
    """Make the server's cache with a policy by name. Raises ValueError for an unknown policy."""
    return Cache(budget_bytes, slab_bytes, policy=make_policy(policy))


def list_models(demand: Demand, asked: Int64) -> list[SimulatedModel]:
    """Return the models [n] as the cache sees them, one object for each."""
    names, charge = demand.names, demand.charge
    known = {i: SimulatedModel(names[i], int(charge[i]), f"{charge[i]} bytes") for i in np.unique(asked).tolist()}
    return [known[i] for i in asked.tolist()]


@dataclass(frozen=True, slots=True)
class Loss:
    """A node of the first region that is lost at this second; -1: all nodes of that region."""

    node: int
    at_s: float

    @property
    def is_of_region(self) -> bool:
        """Whether the whole first region is lost, whose clients then ask the others in turn."""
        return self.node < 0


@dataclass(frozen=True, slots=True)
class Machines:
    """`nodes` of `workers` workers each and `cache_bytes` for their caches together; each model on `replicas` nodes.

    Each of `regions` has so many nodes, serves every model to its own clients, and no request leaves it.
    """

    cache_bytes: int
    workers: int = 1
    nodes: int = 1
    replicas: int = 1
    loss: Loss | None = None
    policy: str = EVICTION_POLICY
    slab_bytes: int = SLAB_BYTES
    loader_threads: int = LOADER_THREADS
    regions: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= self.nodes:
            raise ValueError(f"{self.replicas} replicas of each model need as many nodes, not {self.nodes}")
        if self.loss is None:
            return
        if self.regions == 1 if self.loss.is_of_region else not self.loss.node < self.nodes > 1:
            raise ValueError("a node or a region can be lost only where others stay")

    def cache(self) -> Cache:
        """Make an empty cache of one worker. Raises ValueError if it is smaller than a slab."""
        each = self.cache_bytes // self.workers
        if each < self.slab_bytes:
            raise ValueError(f"{self.cache_bytes} bytes for {self.workers} workers are less than a slab each")
        return make_cache(each, self.slab_bytes, self.policy)


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """The results of machines: latencies in ms by percentile (`p50`, ...), and shares of all requests.

    `busy` is the share of time that the busiest simulated worker computes; `loading` is the share of time that the
    loader threads are busy in the worker that loads most. `error` is the standard error of the hit ratio, 0 if every
    worker was simulated. `after` has the results after a loss.
    """

    machines: Machines
    requests: int
    hit_ratio: float
    cold: float
    refused: float
    ms: dict[str, float]
    loads_per_s: float
    busy: float
    loading: float
    simulated: int
    error: float
    after: "SimulationResult | None" = None


def simulate(
    placement: Placement,
    machines: Machines,
    costs: Costs,
    seed: int = 0,
    *,
    most: int = MOST_REQUESTS,
    look: Callable[[float], None] | None = None,
) -> SimulationResult:
    """Simulate every request of all or some workers; `look` gets the share done. Raises ValueError as `cache`."""
    placed = _PlacedDemand(placement, machines)
    chosen = placed.chosen(most)
    parts = []
    for i, (worker, weight) in enumerate(chosen):
        parts.append(placed.run(worker, weight, costs, seed))
        if look is not None:
            look((i + 1) / len(chosen))
    found = _combine_workers(machines, parts, placed.requests())
    if machines.loss is None:
        return found
    later = [part.since(machines.loss.at_s) for part in parts]
    return replace(found, after=_combine_workers(machines, later, placed.requests(machines.loss.at_s)))


@dataclass(frozen=True, slots=True, eq=False)
class _WorkerResult:
    """A simulated worker's requests [n], and the number of workers that it represents.

    `loads`, `busy`, and `loading` of a loader thread are per second.
    """

    at: Float64
    seconds: Float64
    outcome: UInt8
    loads: float
    busy: float
    loading: float
    weight: float

    def since(self, at_s: float) -> "_WorkerResult":
        """Return the requests from a second on."""
        late = self.at >= at_s
        return replace(self, at=self.at[late], seconds=self.seconds[late], outcome=self.outcome[late])

    def count(self, *outcomes: int) -> int:
        """Count its requests with this outcome."""
        return int(np.isin(self.outcome, outcomes).sum())


class _PlacedDemand:
    """The worker of each request. A worker is a number: its node times the workers per node, plus its index there.

    Nodes are numbered through the regions. Clients of a region ask for each model as often as those of the others.
    """

    def __init__(self, placement: Placement, machines: Machines) -> None:
        demand = self.demand = placement.demand
        self.machines = machines
        models, loss = len(demand.names), machines.loss
        self.lost_workers: Int64 = _list_lost(machines)
        self.homes = placement.homes(machines.workers)
        self.nodes = placement.nodes(machines.nodes, machines.replicas + 1)  # the replicas, and the next node
        self.lost: Int64 = np.full(models, machines.nodes, np.int64)  # [models] the rank of the lost node
        if loss is not None and not loss.is_of_region:
            found = self.nodes == loss.node
            self.lost = np.where(found.any(axis=1), found.argmax(axis=1), machines.nodes)
        self.worker = self._workers(demand.schedule, loss)
        self.warm = None if demand.warm is None else self._workers(demand.warm, None)

    def __repr__(self) -> str:
        return f"<_PlacedDemand {self.demand!r} on {self.machines!r}>"

    def chosen(self, most: int) -> list[tuple[int, float]]:
        """The workers to simulate, and how many workers each represents; never one whose node is lost."""
        load = np.bincount(self.worker, minlength=_count_all_workers(self.machines))
        alive = sorted(set(range(len(load))) - set(self.lost_workers.tolist()), key=lambda worker: -load[worker])
        room = max(3, round(most / max(1.0, float(load[alive].mean()))))
        others = alive[1:]
        picked = others[:: max(1, -(-len(others) // (room - 1)))]
        return [(alive[0], 1.0), *((worker, len(others) / len(picked)) for worker in picked)]

    def requests(self, since_s: float = 0.0) -> int:
        """Return the number of requests for all workers from which `chosen` samples."""
        stays = ~np.isin(self.worker, self.lost_workers)
        return int((stays & (self.demand.schedule.at >= since_s)).sum())

    def run(self, worker: int, weight: float, costs: Costs, seed: int) -> _WorkerResult:
        """Simulate the requests of a worker, after those that fill its cache."""
        rng = np.random.default_rng([seed, worker])
        simulated = SimulatedWorker(self.machines.cache(), costs, rng, self.machines.loader_threads)
        warm, schedule, seconds = self.demand.warm, self.demand.schedule, self.demand.schedule.seconds
        if warm is not None:
            simulated.fill(list_models(self.demand, warm.model[self.warm == worker]))
        mine = self.worker == worker
        at = schedule.at[mine]
        ran = simulated.run(at, list_models(self.demand, schedule.model[mine]))
        took = ran.wait + draw_seconds(costs.overhead, len(at), rng)
        loads, busy, loading = (each / seconds for each in (ran.loads, ran.busy_s, ran.loading_s))
        return _WorkerResult(at, took, ran.outcome, loads, busy, loading, weight)

    def _workers(self, schedule: Schedule, loss: Loss | None) -> Int64:
        """Return the worker of each request [n]: a model's replicas take turns; the next node replaces a lost one."""
        machines, count = self.machines, np.arange(len(schedule.at))
        region = _assign_regions(len(schedule.at), machines.regions)
        line = count % machines.replicas
        if loss is not None:
            after = (schedule.at >= loss.at_s) & (region == 0)
            if loss.is_of_region:
                region = np.where(after, 1 + count % (machines.regions - 1), region)
            else:
                turn = count % min(machines.replicas, machines.nodes - 1)
                line = np.where(after, turn + (self.lost[schedule.model] <= turn), line)
        node = region * machines.nodes + self.nodes[schedule.model, line]
        return node * machines.workers + self.homes[schedule.model]


def _count_all_workers(machines: Machines) -> int:
    return machines.regions * machines.nodes * machines.workers


def _list_lost(machines: Machines) -> Int64:
    """Return the workers that a loss takes."""
    loss, each = machines.loss, machines.workers
    if loss is None:
        return np.arange(0)
    if loss.is_of_region:
        return np.arange(machines.nodes * each)
    return np.arange(loss.node * each, (loss.node + 1) * each)


def _assign_regions(requests: int, regions: int) -> Int64:
    """Return the region [requests] whose client makes each request; drawn, so that no model has a region of its own."""
    if regions == 1:
        return np.zeros(requests, np.int64)
    return np.random.default_rng([regions, requests]).integers(0, regions, requests)


def _combine_workers(machines: Machines, parts: Sequence[_WorkerResult], requests: int) -> SimulationResult:
    """Estimate the results of all workers, which have `requests` requests, from the simulated ones.

    Misses and refusals are scaled by the workers that each simulated one represents, because workers with as many
    models have about as many of them. Hits are the rest of the requests, since a worker with a popular model differs
    from others only in its hits.
    """
    total = max(1, requests)
    cold, refused = (
        min(1.0, sum(part.weight * part.count(*these) for part in parts) / total)
        for these in ((MISS, COALESCED), (REFUSED,))
    )
    hits = max(0.0, 1.0 - cold - refused)
    return SimulationResult(
        machines,
        requests=requests,
        hit_ratio=hits,
        cold=cold,
        refused=refused,
        ms=_compute_percentiles(parts, hits * total),
        loads_per_s=sum(part.loads * part.weight for part in parts),
        busy=max(part.busy for part in parts),
        loading=min(1.0, max(part.loading for part in parts) / machines.loader_threads),
        simulated=len(parts),
        error=_estimate_error(parts) / total,
    )


def _compute_percentiles(parts: Sequence[_WorkerResult], hits: float) -> dict[str, float]:
    """Compute percentiles over all requests: a worker's requests are weighted by the workers that it represents, and
    its hits so that the weights sum to all hits.
    """
    seconds = np.concatenate([part.seconds for part in parts])
    if not len(seconds):
        return {f"p{level:g}": 0.0 for level in LEVELS}
    spoken_for = max(0.0, hits - parts[0].count(HIT)) / max(1, sum(part.count(HIT) for part in parts[1:]))
    each = [1.0] + [spoken_for] * (len(parts) - 1)
    weights = np.concatenate(
        [np.where(part.outcome == HIT, hit, part.weight) for part, hit in zip(parts, each, strict=True)]
    )
    order = np.argsort(seconds)
    reached = np.cumsum(weights[order]) / weights.sum()
    at = np.searchsorted(reached, np.array(LEVELS) / 100 - 1e-12).clip(0, len(seconds) - 1)
    return {f"p{level:g}": float(seconds[order[i]]) * 1e3 for level, i in zip(LEVELS, at.tolist(), strict=True)}


def _estimate_error(parts: Sequence[_WorkerResult]) -> float:
    """Estimate the standard error of the misses, from the differences among the sampled workers."""
    missed = [part.count(MISS, COALESCED, REFUSED) for part in parts[1:]]
    if not missed or parts[1].weight == 1 or len(missed) == 1:
        return 0.0
    weight = parts[1].weight
    return float(np.std(missed, ddof=1) * weight * np.sqrt((1 - 1 / weight) * len(missed)))
