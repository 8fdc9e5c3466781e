"""A small version of the prefetch benchmark against a real server, and its summary of a run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loadtest.benchmarks.prefetch import LEARNT, PrefetchPlan, PrefetchResult, measure_ticks, summarize_run
from loadtest.driver.run_result import CACHE, Run
from loadtest.fleets.fleet import make_fleet

SMALL = PrefetchPlan(
    models=30, others=90, rate=60.0, every_s=3.0, spread_s=0.2, ticks=LEARNT + 3, slab_rows=8, family="tcn-8", seed=1
)
MOSTLY = 0.5  #: the share of cold calls that tells a tick with prefetch from one without


def run_small(folder: Path, prefetch: str, ticks: int = SMALL.ticks, slower: float = 1.0) -> PrefetchResult:
    """A run of the small plan; `slower`: so many times as long between the ticks, and as much less other traffic."""
    make_fleet(str(folder), SMALL.models + SMALL.others, SMALL.seed, SMALL.family)
    paced = replace(
        SMALL, ticks=ticks, every_s=SMALL.every_s * slower, spread_s=SMALL.spread_s * slower, rate=SMALL.rate / slower
    )
    return measure_ticks(paced, folder, prefetch, lambda _: None)


@pytest.mark.e2e
def test_a_learnt_tick_is_warm(tmp_path: Path) -> None:
    """On a real server, by the wall clock: of the ticks that can be foreseen at least one is mostly hits.

    Mostly and one, since a machine may be late for the others: their share is what the benchmark records. On a machine
    that is too busy to keep the schedule at all the clock goes slower once.
    """
    on = run_small(tmp_path / "usual", "on")
    if on.invalid or min(on.cold) >= MOSTLY:
        on = run_small(tmp_path / "slow", "on", slower=4.0)
    assert on.failed == 0
    assert min(on.cold) < MOSTLY, f"cold by tick: {on.cold}, loads ahead of time: {on.prefetched}"
    assert on.prefetched["used"] >= SMALL.models // 2


@pytest.mark.e2e
def test_without_prefetch_every_tick_is_cold(tmp_path: Path) -> None:
    """The same traffic evicts most of the fleet between two ticks: what the test above is measured against."""
    off = run_small(tmp_path, "off", LEARNT + 1)
    assert off.failed == 0
    assert min(off.cold) > MOSTLY
    assert not sum(off.prefetched.values())


def test_the_fleet_s_ticks_are_told_from_other_traffic() -> None:
    """Shares and latencies are of the fleet's calls after the ticks that teach; the others' are of the same time."""
    due = SMALL.schedule()
    n, fleet = len(due.at), due.model < SMALL.models
    late = due.at >= LEARNT * SMALL.every_s
    assert int(fleet.sum()) == SMALL.models * SMALL.ticks
    cache = np.where(fleet & (due.at < (LEARNT + 1) * SMALL.every_s), CACHE.index("miss"), CACHE.index("hit"))
    cache[~fleet & late] = CACHE.index("coalesced")
    latency = np.where(fleet, 0.002, 0.005)
    run = Run(due, due.at, due.at, due.at + latency, np.full(n, 200), cache, SMALL.seconds, False, 0, [])
    seen = summarize_run(SMALL, run, {"used": 3.0}, 1.5)
    assert list(seen.cold) == [1.0, 0.0, 0.0]
    assert seen.cold_share == pytest.approx(1 / 3)
    assert list(seen.p99_ms) == pytest.approx([2.0] * 3)
    assert seen.others == pytest.approx({"cold": 1.0, "p50_ms": 5.0, "p99_ms": 5.0})
    assert (seen.failed, list(seen.invalid)) == (0, [])
