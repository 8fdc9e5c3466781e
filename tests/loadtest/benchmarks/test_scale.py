"""A small version of the scale run against a real server, in which leaks would show too."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtest.benchmarks.growth_checks import judge_counts, judge_crowd
from loadtest.benchmarks.scale import ScalePlan, app, load_crowd, measure_cost, run_traffic, serve_store, start_driver
from loadtest.fleets.fleet import Fleet, write_fleet
from server.contract import EVICTIONS
from server.shell.progress import follow_tasks

SMALL = ScalePlan(
    models=150, resident=30, disk=60, many=100, workers=2, spans=4, span_s=0.8, rate=220.0, slab_rows=8, family="tcn-8"
)


@pytest.mark.e2e
def test_nothing_leaks(tmp_path: Path) -> None:
    """Hundreds of loads and evictions later no descriptor, thread, file or series is left over, and nobody failed.

    Rooms are small, so that all tiers evict: any leak by model, load or request exceeds the verdicts' tolerance of
    three. A restart of a worker would show as another process.
    """
    store = tmp_path / "store"
    with follow_tasks() as tasks:
        write_fleet(Fleet(SMALL.models, 0, {SMALL.family: 1.0}), str(store), tasks)
        with (
            serve_store(SMALL, store, tmp_path / "run", SMALL.resident, SMALL.workers) as (server, disk, temp),
            start_driver(server, SMALL.models, tasks, "traffic", 6) as drive,
        ):
            spans = run_traffic(SMALL, server, disk, temp, drive)
            cost = measure_cost(server, SMALL.models, drive, requests=200)
            evicted = server.totals(EVICTIONS.series, "tier")
    assert [str(verdict) for verdict in judge_counts(spans, SMALL.disk) if not verdict.met] == []
    assert sum(span.requests for span in spans) > 600
    assert evicted["device"] > 100
    assert all(0.2 < span.hit_ratio < 0.95 for span in spans[1:])
    counts = spans[-1].census.counts
    assert set(counts.descriptors) == {"worker 0", "worker 1", "front 0", "supervisor"}
    assert min(counts.descriptors.values()) > 4
    assert counts.files["disk cache/blobs"] > 30
    assert counts.series["of models"] > 10
    assert 25 <= spans[-1].census.resident <= 40
    assert cost.resident == spans[-1].census.resident
    assert 5 < cost.front_us < 5000


@pytest.mark.e2e
def test_many_in_one_worker(tmp_path: Path) -> None:
    """As many as there is room for stay resident and are hits when asked again; a page lists a hundred of them."""
    store = tmp_path / "store"
    with follow_tasks() as tasks:
        write_fleet(Fleet(SMALL.many, 0, {SMALL.family: 1.0}), str(store), tasks)
        with (
            serve_store(SMALL, store, tmp_path / "crowd", SMALL.many, 1) as (server, *_),
            start_driver(server, SMALL.many, tasks, "crowd", 1) as drive,
        ):
            found = load_crowd(SMALL, server, drive)
    assert list(found.resident) == [20, 40, 60, 80, 100]
    assert len(found.memory) == len(found.page_ms) == 5
    missing, misses, *_ = judge_crowd(found, SMALL.many, SMALL.row_bytes)
    assert (missing.found, misses.found) == (0, 0)
    assert min(found.page_ms) > 0


def test_the_command_teaches() -> None:
    """Its help says what is run, how long it is by default, and that a record is written."""
    helped = CliRunner().invoke(app, ["--help"]).output
    for word in ("10000", "1000", "5000", "--no-record"):
        assert word in helped
