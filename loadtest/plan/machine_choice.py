"""Finds by simulation how many machines of each kind reach the targets, and what they cost in a month."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, inf

import numpy as np

from loadtest.plan.costs import Costs
from loadtest.plan.demand import Demand
from loadtest.plan.placement import Placement
from loadtest.plan.prices import Machine, PriceTable, count_nodes
from loadtest.plan.simulate import Machines, SimulationResult, simulate
from loadtest.report.charts import format_number
from server.contract import REQUEST_TIMEOUT_S

MOST_NODES = 64
DEARER = 4  #: as a multiple of the cheapest: more expensive machines are not simulated
MOST_BUSY = 0.7  #: largest mean share of time that workers compute; the search starts with it
MOST_REQUESTS = 60_000  #: number of requests simulated for each candidate


@dataclass(frozen=True, slots=True)
class Promise:
    """The targets to reach; None means no limit. `refused` is a share of requests, `availability` a share of time."""

    p99_ms: float | None = None
    hit_ratio: float | None = None
    refused: float = 0.001
    availability: float = 0.999

    def missed(self, found: SimulationResult) -> str:
        """Return the targets that are missed, in words; empty if all are reached."""
        if found.refused > self.refused:
            return f"refuses {found.refused:.2%}"
        if self.p99_ms is not None and found.ms["p99"] > self.p99_ms:
            return f"p99 {format_number(found.ms['p99'])} ms"
        if self.hit_ratio is not None and found.hit_ratio < self.hit_ratio:
            return f"hits {found.hit_ratio:.3f}"
        return ""


@dataclass(frozen=True, slots=True)
class Offer:
    """A kind of machine: `needed` of them reach the targets (`found`), `nodes` keep enough up; or `why` it cannot.

    Both are of one region; `monthly` is for all regions.
    """

    machine: Machine
    needed: int = 0
    nodes: int = 0
    monthly: float = inf
    found: SimulationResult | None = None
    why: str = ""


def find_offers(
    placement: Placement,
    costs: Costs,
    prices: PriceTable,
    promise: Promise,
    base: Machines,
    *,
    seed: int = 0,
    look: Callable[[], None] = lambda: None,
) -> list[Offer]:
    """Make an offer of every kind of machine, cheapest first; kinds that cannot reach the targets come last.

    `base` gives policy, slabs and loader threads. Each model is on one of the machines. `look` is called once a kind.
    """
    found: list[Offer] = []
    base = replace(base, replicas=1, loss=None)
    for machine in sorted(prices.machine, key=lambda each: each.price_per_hour / each.workers):
        cheapest = min((offer.needed * offer.machine.price_per_hour for offer in found if offer.found), default=inf)
        most = int(min(MOST_NODES, DEARER * cheapest / machine.price_per_hour))
        found.append(_find_offer(machine, placement, costs, prices, promise, base, seed, most))
        look()
    return sorted(found, key=lambda offer: (offer.monthly, offer.machine.price_per_hour))


def _find_offer(
    machine: Machine,
    placement: Placement,
    costs: Costs,
    prices: PriceTable,
    promise: Promise,
    base: Machines,
    seed: int,
    most: int,
) -> Offer:
    demand, there = placement.demand, costs.faster(machine.speed)
    if machine.device != costs.device:
        return Offer(machine, why=f"the costs were measured on {costs.device}, this one has {machine.device}")
    if machine.cache_bytes // machine.workers < max(base.slab_bytes, int(demand.charge.max())):
        return Offer(machine, why="its memory has no room for a model in each worker")
    least = max(1, ceil(_count_workers(demand, there, base.loader_threads) / base.regions / machine.workers))
    if least > most:
        return Offer(machine, why=f"takes {least} of them; more than {most} are not looked at")
    tried: dict[int, SimulationResult] = {}

    def kept(nodes: int) -> bool:
        machines = replace(base, cache_bytes=machine.cache_bytes, workers=machine.workers, nodes=nodes)
        tried[nodes] = simulate(placement, machines, there, seed, most=MOST_REQUESTS)
        return not promise.missed(tried[nodes])

    needed = _find_fewest(kept, least, most)
    if needed is None:
        last = max(tried)
        return Offer(machine, why=f"{last} of them: {promise.missed(tried[last])}")
    nodes = count_nodes(needed, prices.availability, promise.availability)
    return Offer(machine, needed, nodes, prices.monthly(machine, nodes * base.regions), tried[needed])


def _count_workers(demand: Demand, costs: Costs, loader_threads: int) -> float:
    """Compute a lower bound of workers: for the computation, and for the loads of models never requested before."""
    compute = demand.rate * costs.row_s / MOST_BUSY
    new = np.count_nonzero(demand.asked())
    if demand.warm is not None:
        new -= len(np.unique(demand.warm.model))
    fetch = new * float(np.mean(costs.get)) / (demand.schedule.seconds + REQUEST_TIMEOUT_S) / loader_threads
    return max(compute, fetch)


def _find_fewest(kept: Callable[[int], bool], least: int, most: int) -> int | None:
    """Find the fewest sufficient nodes from `least` to `most`, by doubling and then by bisection."""
    low, high = least - 1, least
    while not kept(high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if kept(middle) else (middle, high)
    return high


def find_cheapest_alone(prices: PriceTable, models: int, promise: Promise) -> tuple[Machine, int, float]:
    """For one endpoint per model: return the cheapest machine, how many an endpoint needs, and the monthly cost."""
    machine = min(prices.machine, key=lambda each: each.price_per_hour)
    instances = count_nodes(1, prices.availability, promise.availability)
    return machine, instances, prices.monthly(machine, instances * models)
