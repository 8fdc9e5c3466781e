"""The arithmetic of `bench cores` and its table, without its servers."""

from io import StringIO

import pytest
from rich.console import Console

from loadtest import record
from loadtest.benchmarks.cores import add_ratios, build_table, compute_request_cost

BEFORE = {"front": 1.0, "worker": 2.0, "decode": 0.5, "forward": 0.25, "encode": 0.125}
AFTER = {"front": 1.5, "worker": 3.0, "decode": 0.75, "forward": 0.5, "encode": 0.25}


def test_a_request_s_time_is_that_of_all_by_their_number() -> None:
    """Microseconds; what the worker's parts do not explain is its rest."""
    assert compute_request_cost(BEFORE, AFTER, 10_000) == pytest.approx(
        {"front": 50, "worker": 100, "decode": 25, "forward": 25, "encode": 12.5, "rest": 37.5}
    )


def test_what_is_measured_is_what_the_table_shows() -> None:
    """Every column is there, of runs as they are measured."""
    run = {"requests_per_s": 12_345.0, "p50_ms": 0.6, "p99_ms": 1.2} | compute_request_cost(BEFORE, AFTER, 10_000)
    results = {"1 workers, 1 fronts, json": {name: record.summarise_spread([value] * 3) for name, value in run.items()}}
    console = Console(file=StringIO(), width=200)
    console.print(build_table(results))
    assert isinstance(console.file, StringIO)
    assert "12345 (12345-12345)" in console.file.getvalue()
    assert "38" in console.file.getvalue()


def test_turns_are_compared_in_pairs() -> None:
    """Each round's run with the one beside it; a run without another has no ratio."""
    here, beside = ([{"requests_per_s": rate} for rate in rates] for rates in ((200.0, 90.0), (100.0, 100.0)))
    runs = {"json, here": here, "json, beside": beside, "npy, here": [{"requests_per_s": 1.0}]}
    add_ratios(runs)
    assert [run["ratio"] for run in here] == [2.0, 0.9]
    assert all("ratio" not in run for run in (*beside, *runs["npy, here"]))
