"""Hit ratios at equal memory: Fleetcast on Ray and Ray's own multiplexing, both with the same bytes for models.

Ray's cache is bounded by a count of models, so its bytes are that count times what a further model has been measured to
cost its process; Fleetcast's is bounded in bytes (`model_cache_bytes`). Both get the same traces of Zipf popularity,
after one that fills the cache. A hit is a request that no load was for.
"""

import http.client
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtest.peers.comparison import SEED
from loadtest.peers.peer_server import PeerServer, send_request
from loadtest.record import summarise_spread
from server.contract import CACHE_REQUESTS

BUDGET = 16 * 2**20  #: bytes for models: four slabs of Fleetcast's
TRACES, REQUESTS = 3, 600  #: after a first trace, which fills the cache
CONNECTIONS = 4
ZIPF = 1.0


@dataclass(frozen=True, slots=True)
class HitServer:
    """A running server with a bounded cache; `count_loads` reads how many loads it has begun."""

    server: PeerServer
    count_loads: Callable[[], int]


def make_traces(models: Sequence[str]) -> list[list[str]]:
    """Make the traces [TRACES + 1][REQUESTS] of model names: one popularity, other draws."""
    random = np.random.default_rng(SEED)
    weights = 1.0 / np.arange(1, len(models) + 1) ** ZIPF
    order = random.permutation(len(models))
    drawn = random.choice(len(models), size=(TRACES + 1, REQUESTS), p=weights / weights.sum())
    return [[models[order[each]] for each in trace] for trace in drawn]


def measure_hits(served: HitServer, traces: Sequence[Sequence[str]], body: bytes) -> dict[str, Any]:
    """Ask for the models of the traces in turn; the hit ratios of all but the first."""
    ratios = []
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for trace in traces:
            before = served.count_loads()
            list(pool.map(lambda name: served.server.ask(name, body), trace))
            ratios.append(1.0 - (served.count_loads() - before) / len(trace))
    return summarise_spread(ratios[1:])


def count_models_of_ray(mb_per_model: float) -> int:
    """How many models Ray's cache may hold for BUDGET bytes, where one costs so much."""
    return max(1, int(BUDGET / (mb_per_model * 1e6)))


def count_loads_of_ray(server: PeerServer) -> int:
    """Ask the application, which says it to a request that names no model."""
    status, data = send_request("POST", server.url + "/", b"{}")
    if status != http.client.OK:
        raise RuntimeError(f"ray answered {status}: {data[:200]!r}")
    return int(json.loads(data)["loads"])


def count_loads_of_ours(metrics: str) -> int:
    """Read the misses from the metrics listener."""
    status, data = send_request("GET", f"{metrics}/metrics")
    if status != http.client.OK:
        raise RuntimeError(f"fleetcast answered {status}: {data[:200]!r}")
    lines = data.decode().splitlines()
    return round(
        sum(float(line.rpartition(" ")[2]) for line in lines
            if line.startswith(CACHE_REQUESTS.series + "{") and 'result="miss"' in line)
    )  # fmt: skip
