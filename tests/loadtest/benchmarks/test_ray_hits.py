"""The hit ratio at equal memory, of servers that are made up here: what is counted, and for which traces."""

import threading
from typing import Any

import pytest

from loadtest.benchmarks.ray_hits import (
    BUDGET,
    REQUESTS,
    TRACES,
    HitServer,
    count_models_of_ray,
    make_traces,
    measure_hits,
)

NAMES = [f"m{i}" for i in range(500)]


class CountingCache:
    """A server that keeps the models that it has loaded, all of them or none."""

    def __init__(self, *, keeps: bool) -> None:
        self.keeps, self.loads, self.known = keeps, 0, set[str]()
        self.lock = threading.Lock()

    def ask(self, model: str, body: bytes) -> None:
        """Load it where it is not known."""
        del body
        with self.lock:
            if model not in self.known:
                self.loads += 1
            if self.keeps:
                self.known.add(model)


@pytest.mark.parametrize("keeps", [True, False])
def test_a_hit_is_a_request_without_a_load(keeps: bool) -> None:
    """A cache without bounds misses in the first trace that counts the models that the one before has not asked, and
    fewer later; one that keeps nothing misses always.
    """
    server: Any = CountingCache(keeps=keeps)
    traces = make_traces(NAMES)
    found = measure_hits(HitServer(server, lambda: server.loads), traces, b"")
    assert len(traces) - 1 == found["runs"] == TRACES
    first, second = (set(trace) for trace in traces[:2])
    assert found["min"] == (pytest.approx(1 - len(second - first) / REQUESTS) if keeps else 0.0)
    assert found["max"] == 0.0 if not keeps else found["max"] > found["min"]


def test_traces_are_popular_and_the_same_each_time() -> None:
    """One model in fifty has a good part of the requests; two runs ask for the same."""
    traces = make_traces(NAMES)
    assert traces == make_traces(NAMES)
    assert [len(trace) for trace in traces] == [REQUESTS] * (TRACES + 1)
    most = sorted(NAMES, key=traces[0].count, reverse=True)[:10]
    assert all(sum(trace.count(name) for name in most) > REQUESTS / 4 for trace in traces)


def test_rays_count_is_the_budget_in_its_own_models() -> None:
    """Never zero, also where a model is larger than the budget."""
    assert count_models_of_ray(BUDGET / 1e6 / 100) in (99, 100)
    assert count_models_of_ray(1e6) == 1
