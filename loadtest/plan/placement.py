"""Chooses the nodes that serve a model, and the worker of a node, both by rendezvous hashing.

The worker is chosen by the weights that the server's own router uses. What distributes requests over the nodes is not
part of the server; the same rule is assumed for it, over hashes, so that a million names take about a second.
"""

import numpy as np

from loadtest.driver.profiles import Int64
from loadtest.plan.demand import Demand, UInt64, mix_keys
from server.contract import home_weight

CHUNK = 65_536  #: number of models ranked at a time


class Placement:
    """A demand, and the places of its models on any machines. Slow results for a million names are computed once."""

    def __init__(self, demand: Demand) -> None:
        self.demand = demand
        self._keys: UInt64 | None = None
        self._homes: dict[int, Int64] = {}

    def __repr__(self) -> str:
        return f"<Placement of {self.demand!r}>"

    def homes(self, workers: int) -> Int64:
        """Return for each model [models] the index of its worker on its node; 0 for models without requests."""
        found = self._homes.get(workers)
        if found is None:
            found = self._homes[workers] = np.zeros(len(self.demand.names), np.int64)
            asked = np.flatnonzero(self.demand.asked()) if workers > 1 else found[:0]
            found[asked] = [choose_worker(self.demand.names[i], workers) for i in asked.tolist()]
        return found

    def nodes(self, nodes: int, most: int) -> Int64:
        """Return the nodes [models, most] of each model, as `rank_nodes` does."""
        if nodes == 1:
            return np.zeros((len(self.demand.names), 1), np.int64)
        if self._keys is None:
            self._keys = self.demand.keys()
        return rank_nodes(self._keys, nodes, most)


def choose_worker(model: str, workers: int) -> int:
    """Choose the worker that serves the model unless a worker is overloaded (see server/routing.py)."""
    return max(range(workers), key=lambda worker: home_weight(model, worker))


def rank_nodes(keys: UInt64, nodes: int, most: int) -> Int64:
    """Rank the nodes [keys, most] of each model, highest weight first; if one is lost, the next takes its models."""
    most = min(most, nodes)
    found = np.empty((len(keys), most), np.int64)
    for start in range(0, len(keys), CHUNK):
        part = keys[start : start + CHUNK]
        weights = np.stack([mix_keys(part, node) for node in range(nodes)], axis=1)
        best = np.argpartition(weights, nodes - most, axis=1)[:, nodes - most :]
        order = np.argsort(np.take_along_axis(weights, best, axis=1), axis=1)[:, ::-1]
        found[start : start + CHUNK] = np.take_along_axis(best, order, axis=1)
    return found
