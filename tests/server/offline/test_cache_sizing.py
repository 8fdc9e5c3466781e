"""The advice on the cache size agrees with caches that are simulated one by one."""

import itertools
import random
from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.offline import cache_sizing as advice
from server.offline.cache_sizing import STEP, advise_cache_size

MB = 1024 * 1024

Requests = list[tuple[str, int]]


def lru_hits(requests: Requests, budget: int) -> int:
    """The plainest LRU there is."""
    held: OrderedDict[str, int] = OrderedDict()
    hits = 0
    for model, size in requests:
        hits += model in held
        held[model] = size
        held.move_to_end(model)
        while sum(held.values()) > budget:
            held.popitem(last=False)
    return hits


def draw_requests(models: int, requests: int, seed: int, size: int = 70_000) -> Requests:
    """Independent requests, rank r with popularity 1 / r."""
    rng = random.Random(seed)
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(models)))
    return [(f"m{rank}", size) for rank in rng.choices(range(models), cum_weights=weights, k=requests)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=80), st.integers(1, 40))
def test_the_ratio_is_that_of_a_real_lru(ranks: list[int], room: int) -> None:
    """Models of different sizes that are powers of two, as bins are exact there only for sums: within a bin's width."""
    requests = [(f"m{rank}", MB << rank % 3) for rank in ranks]
    found = advise_cache_size(requests, room * MB)
    least, most = (lru_hits(requests, int(room * MB * factor)) / len(requests) for factor in (0.98, 1.0))
    assert least <= found.hit_ratio <= most


def test_the_better_size_buys_what_it_says() -> None:
    """A cache of the size that is advised has the ratio that is promised, and one a little smaller has not."""
    requests = draw_requests(300, 8000, 1)
    found = advise_cache_size(requests, 5 * MB)
    assert found.better_bytes is not None
    assert found.better_ratio >= found.hit_ratio + STEP
    assert lru_hits(requests, found.better_bytes) / len(requests) == pytest.approx(found.better_ratio, abs=0.003)
    assert lru_hits(requests, int(found.better_bytes * 0.95)) / len(requests) < found.hit_ratio + STEP


def test_a_tick_that_does_not_fit_needs_all_of_it() -> None:
    """In a cyclic scan a little less than the fleet is worth nothing: the size that is named is the fleet's."""
    requests = [(f"m{i}", MB) for _ in range(10) for i in range(100)]
    found = advise_cache_size(requests, 90 * MB)
    assert found.hit_ratio == 0
    assert found.better_bytes == pytest.approx(100 * MB, rel=0.02)
    assert found.better_ratio == pytest.approx(0.9)
    assert found.next.startswith("the next 90.0 points of hit ratio cost 1")
    assert "--model-cache-bytes 101MiB about 90.0%" in found.next


def test_where_nothing_is_to_be_had_it_says_so() -> None:
    """Everything fits; only first calls miss. And a log without requests is no reason to fail."""
    fits = advise_cache_size(draw_requests(50, 1000, 2), 100 * MB)
    assert fits.better_bytes is None
    assert fits.hit_ratio == fits.most_ratio
    assert "no more memory would change that" in fits.now
    assert fits.next == ""
    empty = advise_cache_size([], MB)
    assert (empty.now, empty.next) == ("no request in it reached a model", "")


def test_sizes_that_are_not_known_are_those_before() -> None:
    """A refused request has no size: the model's last one stands in; without any the request does not count."""
    assert advise_cache_size([("a", MB), ("a", 0), ("b", 0)], 2 * MB).requests == 2
    assert advise_cache_size([("a", MB), ("a", 0)], 2 * MB).hit_ratio == 0.5


@pytest.mark.slow
def test_a_sample_of_many_models_is_close_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten times as many models as are followed: the ratio is within two points of all, in a bounded memory."""
    requests = draw_requests(10_000, 60_000, 3)
    exact = advise_cache_size(requests, 100 * MB)
    monkeypatch.setattr(advice, "SAMPLES", 1000)
    distances = advice.ReuseDistances()
    for model, size in requests:
        distances.ask(model, size)
    sampled = distances.advice(100 * MB)
    assert len(distances._models) <= 1000
    assert sampled.hit_ratio == pytest.approx(exact.hit_ratio, abs=0.02)
    assert sampled.most_ratio == pytest.approx(exact.most_ratio, abs=0.02)
    assert sampled.better_bytes == pytest.approx(exact.better_bytes, rel=0.15)
