"""Many cold models at once, through a real server and a store of 20 ms: counts, not times."""

import asyncio
from pathlib import Path

from handlers.forecasters import build_family
from loadtest.benchmarks.cold_thousand import measure_round
from loadtest.benchmarks.core import write_bodies, write_fleet
from loadtest.fleets.network_shape import CONFIG as TCN
from loadtest.observe.local_server import run_local_server
from loadtest.observe.moto_server import S3_ENVIRONMENT
from loadtest.observe.slow_store import read_counts, serve_slow_store

MODELS, PLACES = 80, 9


def test_cold_models_are_fetched_once_each_and_few_at_a_time(tmp_path: Path) -> None:
    """All are answered, each by one GET, the store never has more requests than `store_requests`, but more than there
    are loader threads; and a model of which it has none fails alone.
    """
    names = [f"m{i}.mar" for i in range(MODELS)]
    write_fleet(tmp_path / "store", build_family("tcn", TCN), TCN, ["hit.mar", *names])
    body = write_bodies(tmp_path)[1].read_bytes()
    flags = ["--workers", "1", "--loader-threads", "2", "--store-requests", str(PLACES), "--watch-store", "off"]
    with serve_slow_store(tmp_path / "store", 0.02) as endpoint:
        flags += ["--s3-endpoint-url", endpoint, "--model-cache-bytes", "256MiB"]
        with run_local_server("s3://bench", flags, S3_ENVIRONMENT) as server:
            found = asyncio.run(measure_round(server, [*names, "missing.mar"], body))
        counts = read_counts(endpoint)
    assert found["failed"] == 1
    assert [counts.gets[name] for name in names] == [1] * MODELS
    assert 2 < counts.most_at_a_time <= PLACES
