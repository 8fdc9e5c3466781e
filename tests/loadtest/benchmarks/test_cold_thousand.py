"""Many cold models at once, through a real server and a store of 20 ms: counts, not times."""

import asyncio
from pathlib import Path

import pytest

from handlers.forecasters import build_family
from loadtest.benchmarks.cold_thousand import ALONE_S, HIT, compare_hits, measure_round
from loadtest.benchmarks.core import write_bodies, write_fleet
from loadtest.benchmarks.steady_hits import TimedHit, ask_steadily
from loadtest.fleets.network_shape import CONFIG as TCN
from loadtest.observe.local_server import run_local_server
from loadtest.observe.moto_server import S3_ENVIRONMENT
from loadtest.observe.slow_store import read_counts, serve_slow_store

MODELS, PLACES = 80, 9


@pytest.mark.slow
def test_cold_models_are_fetched_once_each_and_few_at_a_time(tmp_path: Path) -> None:
    """All are answered, each by one GET, the store never has more requests than `store_requests`, but more than there
    are loader threads; and a model of which it has none fails alone.
    """
    names = [f"m{i}.mar" for i in range(MODELS)]
    write_fleet(tmp_path / "store", build_family("tcn", TCN), TCN, [HIT, *names])
    body = write_bodies(tmp_path)[1].read_bytes()
    flags = ["--workers", "1", "--loader-threads", "2", "--store-requests", str(PLACES), "--watch-store", "off"]
    with serve_slow_store(tmp_path / "store", 0.02) as endpoint:
        flags += ["--s3-endpoint-url", endpoint, "--model-cache-bytes", "256MiB"]
        with (
            run_local_server("s3://bench", flags, S3_ENVIRONMENT) as server,
            ask_steadily(server.inference, HIT, body) as hits,
        ):
            found = asyncio.run(measure_round(server, [*names, "missing.mar"], body, hits, {}))
        counts = read_counts(endpoint)
    assert found["failed"] == 1
    assert found["hits"] > 0
    assert found["cpu_ms_a_model worker 0"] > 0
    assert [counts.gets[name] for name in names] == [1] * MODELS
    assert 2 < counts.most_at_a_time <= PLACES


def test_hits_are_compared_with_those_alone_just_before() -> None:
    """What was due before the time alone, or after all were answered, counts in neither."""
    began, took = 100.0, 2.0
    before, alone = TimedHit(began - ALONE_S - 1, 9.0), TimedHit(began - ALONE_S / 2, 0.002)
    beside, after = [TimedHit(began, 0.003), TimedHit(began + 1.9, 0.005)], TimedHit(began + took, 9.0)
    found = compare_hits([before, alone, *beside, after], began, took)
    assert (found["hits"], found["hit_alone_p50_ms"], found["hit_p50_ms"]) == (2, 2.0, 4.0)
    assert found["hit_p50_ratio"] == 2.0
    assert compare_hits([], began, took)["hit_p50_ratio"] == 0.0
