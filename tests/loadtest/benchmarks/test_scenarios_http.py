"""The benchmark of joint scenarios over HTTP, at a size for tests."""

from pathlib import Path

import pytest
from rich.console import Console

from loadtest.benchmarks.scenarios_http import build_table, measure_calls, write_store
from loadtest.driver.market_client import MarketClient
from loadtest.observe.local_server import run_local_server


@pytest.mark.e2e
def test_every_way_is_timed_and_sound(tmp_path: Path) -> None:
    """Quantiles, npy and JSON of a real server, each as often as asked; the npy answer is exactly its numbers' size."""
    names = write_store(tmp_path, 3, 6)
    with run_local_server(str(tmp_path), ["--workers", "1"]) as server, MarketClient(server.inference) as client:
        results = {"steps": 6, **measure_calls(client, names, 10, 2)}
    assert set(results["ms"]) == {"quantiles", "joint, npy", "joint, JSON"}
    assert all(0 < spread["min"] <= spread["median"] <= spread["max"] for spread in results["ms"].values())
    assert results["answer_bytes"]["joint, npy"] == 128 + 10 * 3 * 6 * 4
    console = Console(width=100)
    with console.capture() as shown:
        console.print(build_table(results))
    assert "3 products x 6 steps x 10 scenarios" in shown.get()
