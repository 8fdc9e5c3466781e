"""What the overload benchmark makes of a run, and a small one against a real server."""

import numpy as np
import pytest

from loadtest.benchmarks.overload import OverloadPlan, build_table, make_load, measure_overload, summarize_load
from loadtest.driver.profiles import Schedule
from loadtest.driver.run_result import Run

PLAN = OverloadPlan(models=4, kind="gru-192", deadline_s=0.5, seconds=2.0, burst=100)


def test_each_request_is_counted_once() -> None:
    """Two in time, one late, two refused, one expired, one lost; after the load the first second does not count."""
    at = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 2.5, 3.5, 4.0])
    status = np.array([200, 200, 200, 503, 429, 424, -1, 503, 200, 503])
    took = np.array([0.1, 0.5, 0.7, 0.002, 0.004, 0.5, 0.1, 0.002, 0.1, 0.002])
    n = len(at)
    run = Run(
        Schedule(at, np.zeros(n, np.int64), 5.0), at, at, at + took, status, np.zeros(n, np.int64), 5.0, False, 0, ()
    )
    found = summarize_load(run, PLAN, peak=2.0)
    assert (found["sent"], found["goodput_per_s"], found["goodput_of_peak"], found["late"]) == (7, 1.0, 0.5, 1)
    assert (found["refused"], found["expired"], found["other"], found["not_answered_after"]) == (2, 1, 1, 1)
    assert found["refused_ms"]["p50"] == pytest.approx(3.0)
    assert found["answered_ms"]["max"] == pytest.approx(700.0)


def test_a_load_is_followed_by_half_of_the_peak() -> None:
    """At the rates that were asked, in order."""
    load = make_load(PLAN, 300.0, 50.0)
    during = load.at < PLAN.seconds
    assert (during.sum(), (~during).sum()) == (600, 150)
    assert (np.diff(load.at) >= 0).all()
    assert set(load.model) == {0, 1, 2, 3}


@pytest.mark.e2e
def test_a_small_run() -> None:
    """All three loads are measured on a real server, and no request is lost without a word."""
    results = measure_overload(PLAN)
    assert results["peak_per_s"]["min"] > 0
    assert results["peak_per_s"]["runs"] == 4
    assert set(results["loads"]) == {"1x", "2x", "3x"}
    assert all(found["goodput_per_s"] > 0 for found in results["loads"].values())
    assert build_table(results).row_count == 3
