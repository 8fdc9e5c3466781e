"""The judgement of growth on made-up spans: noise passes, leaks fail."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from loadtest.benchmarks.growth_checks import (
    Cost,
    Crowd,
    GrowthVerdict,
    TrafficSpan,
    compute_trend,
    judge_costs,
    judge_crowd,
    judge_flat,
    judge_no_slower,
    judge_spans,
)
from loadtest.observe.resource_counts import Census, ResourceCounts

N, DISK = 20, 500


def make_span(i: int, noise: float = 0.0) -> TrafficSpan:
    """The i-th of a sound server."""
    rng = np.random.default_rng(i)
    jitter = 1 + noise * float(rng.exponential())  # what else the machine does only adds
    files = {"disk cache/blobs": 500, "disk cache/index": 500, "disk cache/locks": 100 + i, "disk cache/temp": 0}
    counts = ResourceCounts(
        {"front 0": 20}, {"front 0": 5}, {**files, "TMPDIR": 3}, {"of models": 50, "of all else": 400}
    )
    memory = {"front 0": int(60e6 + noise * 1e6 * float(rng.normal()))}
    census = Census(counts, memory, {"front 0": 1.0}, 100)
    return TrafficSpan(
        10.0, 3000, 0, 0.7, 0.6 * jitter, 3 * jitter, 2 * jitter, 6 * jitter, {"front 0": 110 * jitter}, census, []
    )


def list_faults(spans: list[TrafficSpan]) -> list[str]:
    """What the verdicts find fault with."""
    return [verdict.what for verdict in judge_spans(spans, DISK) if not verdict.met]


def make_leaky(change: Callable[[ResourceCounts, int], ResourceCounts]) -> list[TrafficSpan]:
    """Spans whose counts change."""
    spans = [make_span(i) for i in range(N)]
    return [
        replace(each, census=replace(each.census, counts=change(each.census.counts, i))) for i, each in enumerate(spans)
    ]


def test_a_trend_is_robust() -> None:
    """The slope of a line, whatever two outliers do; flat noise has next to none; of one value there is none."""
    values = [3.0 * i for i in range(12)]
    values[3], values[8] = 1e6, -1e6
    assert compute_trend(values) == pytest.approx(3.0)
    assert abs(compute_trend(np.random.default_rng(0).normal(100, 5, 14).tolist())) < 1
    assert math.isnan(compute_trend([1.0]))
    assert not GrowthVerdict("unknown", math.nan, 1).met


def test_growth_is_of_all_values_together() -> None:
    """The limit is absolute or a share of the level, whichever is more."""
    assert judge_flat("x", [100.0, 101, 102, 103], 2.5).found == pytest.approx(3)
    assert not judge_flat("x", [100.0, 101, 102, 103], 2.5).met
    assert judge_flat("x", [100.0, 101, 102, 103], 2.5, 0.05).met


def test_a_neighbour_is_not_a_slower_server() -> None:
    """Latencies that are high for a while, early or late, are the machine's; those that never come down are ours."""
    assert judge_no_slower("p99", [2.4, 2.6, 2.5, 2.4, 7.0, 2.9, 6.5, 6.8]).met
    assert judge_no_slower("p99", [8.0, 7.5, 2.5, 2.6, 2.5, 2.4]).met
    assert not judge_no_slower("p99", [2.4, 2.6, 2.5, 4.4, 7.0, 4.9]).met
    assert not judge_no_slower("p99", [2.4]).met


def test_noise_is_let_through() -> None:
    """Of thirty noisy but sound servers none is found guilty."""
    for seed in range(30):
        spans = [replace(make_span(seed * N + i, 0.3), invalid=["late"] if i % 3 == 0 else []) for i in range(N)]
        assert list_faults(spans) == [], seed


def test_slow_leaks_are_found() -> None:
    """A third of a megabyte, a descriptor, a thread, a file or a series more after every span; a tail that grows."""
    memory = [make_span(i) for i in range(N)]
    memory = [
        replace(each, census=replace(each.census, memory={"front 0": 60_000_000 + i * 330_000}))
        for i, each in enumerate(memory)
    ]
    assert list_faults(memory) == ["memory of front 0: growth"]
    fds = make_leaky(lambda counts, i: replace(counts, descriptors={"front 0": 20 + i}))
    assert list_faults(fds) == ["descriptors of front 0: growth"]
    threads = make_leaky(lambda counts, i: replace(counts, threads={"front 0": 5 + i}))
    assert list_faults(threads) == ["threads of front 0: growth"]
    series = make_leaky(lambda counts, i: replace(counts, series={**counts.series, "of models": 50 + i}))
    assert list_faults(series) == ["series of models: growth"]
    files = make_leaky(lambda counts, i: replace(counts, files={**counts.files, "TMPDIR": 3 + i}))
    assert list_faults(files) == ["files in TMPDIR: growth"]
    tail = [replace(make_span(i), hit_p99_ms=3 + 0.4 * i) for i in range(N)]
    assert list_faults(tail) == ["p99 of a hit: best later"]
    cpu = [replace(make_span(i), cpu_us={"front 0": 110 + 5 * i}) for i in range(N)]
    assert list_faults(cpu) == ["processor time of front 0 per request: growth"]


def test_the_disk_cache_keeps_its_budget() -> None:
    """Over it by what six seconds fetch and no more; every archive has its name; nothing is left half written."""

    def count_files(**changed: int) -> list[TrafficSpan]:
        paths = {f"disk cache/{name}": n for name, n in changed.items()}
        return make_leaky(lambda counts, _: replace(counts, files={**counts.files, **paths}))

    assert (
        list_faults(count_files(blobs=1039, index=1039)) == []
    )  # 300 requests a second, of which 0.3 miss: 540 in 6 s
    assert list_faults(count_files(blobs=1041, index=1041)) == ["archives in the disk cache"]
    assert list_faults(count_files(index=499)) == ["archives without a name there, or the reverse"]
    assert list_faults(count_files(temp=1)) == ["drafts left there"]
    assert list_faults(count_files(locks=4097)) == ["lock files there"]


def test_failures_count_from_the_start() -> None:
    """Also in the spans that fill caches; a driver that was late too often says nothing, which is no pass."""
    spans = [make_span(i) for i in range(N)]
    assert list_faults([replace(spans[0], failed=1), *spans[1:]]) == ["requests failed or wrong"]
    late = [replace(each, invalid=["late"]) for each in spans]
    assert list_faults(late)[0] == "spans whose driver was late"
    assert "p99 of a hit" in list_faults(late)


def test_costs_must_not_grow() -> None:
    """A page is compared with one where as many are resident, a hit with the smallest store."""
    sound = [Cost(100, 100, 110, 0.6, 0.8), Cost(1000, 1000, 115, 0.6, 3.0), Cost(10_000, 1000, 112, 0.6, 3.2)]
    assert all(verdict.met for verdict in judge_costs(sound))
    slower = [*sound[:2], Cost(10_000, 1000, 200, 0.6, 7.0)]
    assert [verdict.met for verdict in judge_costs(slower)] == [False, False]


def test_a_crowd_in_one_worker() -> None:
    """All resident, all hits, little more than their weights; a page takes as long as with a fifth of them."""
    sound = Crowd([1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [1.0] * 5, 75_000, 1.0, 3.0)
    assert all(verdict.met for verdict in judge_crowd(sound, 5, 70_000))
    poor = Crowd([1, 2, 3, 4, 4], [0, 1, 2, 3, 4], [1.0, 2, 3, 4, 5], 170_000, 0.8, 3.0)
    assert not any(verdict.met for verdict in judge_crowd(poor, 5, 70_000))
