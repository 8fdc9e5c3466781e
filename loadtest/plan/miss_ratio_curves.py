"""Miss-ratio curves: the share of requests whose model is absent, by cache size, under the server's own policies.

A small fleet is replayed completely. Of a large one, a sample of the *models*, chosen by a hash of their names, is
replayed in a cache smaller by the same factor, a miniature simulation (SHARDS: C. Waldspurger et al., "Efficient MRC
Construction with SHARDS", FAST 2015, and "Cache Modeling and Optimization using Miniature Simulations", ATC 2017).
Misses are divided by the requests that a sample of this size would expect, so that it matters little whether the most
popular model is in the sample (their SHARDS-adj). Three samples that share no model give the standard error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.driver.profiles import Int64
from loadtest.plan.costs import DEFAULT
from loadtest.plan.demand import Demand, mix_keys
from loadtest.plan.simulate import list_models, make_cache
from loadtest.plan.simulated_worker import SimulatedWorker
from server.contract import SLAB_BYTES

SIZES = (
    0.05,
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
    1.0,
    1.1,
)  #: cache sizes as shares of the size of the fleet; beyond 1 because slabs are not filled completely
SAMPLES, SAMPLED_MODELS, SAMPLED_REQUESTS = 3, 8_192, 250_000
ROWS = 8  #: least number of models in a slab of a miniature


@dataclass(frozen=True, slots=True)
class MissRatioCurve:
    """`miss_ratio` [sizes] of a policy for caches of `cache_bytes` [sizes]; `error` [sizes] is one standard error."""

    policy: str
    cache_bytes: Sequence[int]
    miss_ratio: Sequence[float]
    error: Sequence[float]
    rate: float  #: the share of the models that was replayed, in each sample


def compute_curve(
    demand: Demand,
    policy: str,
    sizes: Sequence[float] = SIZES,
    *,
    most_models: int = SAMPLED_MODELS,
    most_requests: int = SAMPLED_REQUESTS,
    look: Callable[[], None] = lambda: None,
) -> MissRatioCurve:
    """Compute one policy's curve; `look` is called len(sizes) times. Raises ValueError for an unknown policy."""
    asked = len(np.flatnonzero(demand.asked()))
    requests = len(demand.schedule.at) + (0 if demand.warm is None else len(demand.warm.at))
    rate = min(1.0, max(min(most_models / asked, most_requests / requests), min(1.0, 500 / asked)))
    samples = _draw_samples(demand, rate)
    ratios = np.empty((len(samples), len(sizes)))
    caches = [round(share * demand.fleet_bytes) for share in sizes]
    for j, cache_bytes in enumerate(caches):
        for i, sample in enumerate(samples):
            ratios[i, j] = _compute_miss_ratio(demand, sample, policy, cache_bytes)
        look()
    error = ratios.std(axis=0, ddof=1) / np.sqrt(len(samples)) if len(samples) > 1 else np.zeros(len(sizes))
    return MissRatioCurve(policy, caches, ratios.mean(axis=0).tolist(), error.tolist(), rate)


def _draw_samples(demand: Demand, rate: float) -> list[Int64]:
    """Draw the models of each sample; no model is in two samples."""
    if rate >= 1:
        return [np.arange(len(demand.names))]
    spread = mix_keys(demand.keys(), 0) / 2.0**64
    return [
        np.flatnonzero((spread >= i * rate) & (spread < (i + 1) * rate)) for i in range(min(SAMPLES, int(1 / rate)))
    ]


def _compute_miss_ratio(demand: Demand, sample: Int64, policy: str, cache_bytes: int) -> float:
    charge = demand.charge[sample]
    largest, scale = int(charge.max()), float(charge.sum()) / demand.fleet_bytes
    budget = max(round(cache_bytes * scale), largest)
    slab = min(SLAB_BYTES, max(round(SLAB_BYTES * scale), ROWS * largest), budget)
    worker = SimulatedWorker(make_cache(budget, slab, policy), DEFAULT, np.random.default_rng(0))
    among = np.zeros(len(demand.names), np.bool_)
    among[sample] = True
    if demand.warm is not None:
        worker.fill(list_models(demand, demand.warm.model[among[demand.warm.model]]))
    counted = demand.schedule.model[among[demand.schedule.model]]
    misses = len(counted) - worker.fill(list_models(demand, counted))
    expected = len(demand.schedule.model) * len(sample) / len(demand.names)
    return min(1.0, misses / expected)
