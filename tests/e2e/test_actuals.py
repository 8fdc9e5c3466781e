"""Observed prices over real processes: bands follow them in every worker, and a killed server forgets none of them."""

import json
import os
import signal
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from server.sdk.client import Client, PairedPrices
from tests.e2e.forecasters import HISTORY, HORIZON, pack_hourly
from tests.e2e.server import Server, run_server
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

NAME, OTHER = "au/nsw1.mar", "au/vic1.mar"
FIRST = datetime.fromisoformat("2026-01-05")
LOW, HIGH = "0.1", "0.9"
Levels = dict[str, list[float]]


def ask_forecast(server: Server, day: int, name: str = NAME) -> Levels:
    """The levels of a day, from the same history each day."""
    start = FIRST + timedelta(days=day, hours=-HISTORY)
    instance = {"target_model": name, "start": str(start), "target": [60.0 + i % 24 for i in range(HISTORY)]}
    body = {"requests": [instance], "configuration": {"output_types": ["quantiles"], "quantiles": [LOW, "0.5", HIGH]}}
    reply = server.http.post(f"{server.url}/v1/forecasts", json=body)
    assert reply.is_success, reply.text
    found: Levels = reply.json()["predictions"][0]["quantiles"]
    return found


def send_prices(server: Server, day: int, prices: list[float]) -> dict[str, Any]:
    """What the server says of a day's prices."""
    stamps = [str(FIRST + timedelta(days=day, hours=hour)) for hour in range(HORIZON)]
    call = {"actuals": [{"target_model": NAME, "stamps": stamps, "prices": prices}]}
    reply = server.http.post(f"{server.url}/v1/actuals", json=call)
    assert reply.is_success, reply.text
    assert reply.json()["adapted"]
    (found,) = reply.json()["results"]
    return {key: found[key] for key in ("paired", "repeated", "unmatched")}


def measure_coverage(levels: Levels, prices: list[float]) -> float:
    """The share of prices inside the band."""
    return sum(a <= price <= b for a, price, b in zip(levels[LOW], prices, levels[HIGH], strict=True)) / len(prices)


def kill_server(server: Server) -> None:
    """End all processes without a word."""
    server.exit_code = -signal.SIGKILL
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not server.survivors(), "its children die with it")


def read_accuracy(server: Server) -> dict[str, Any]:
    """`/fleet/accuracy` by model."""
    found = server.http.get(f"{server.addresses['management']}/fleet/accuracy").json()
    return {row["model"]: row for row in found["models"]}


def test_bands_follow_prices_and_survive_everything(s3: S3Server, tmp_path: Path) -> None:
    """Prices far above the band: after days of them it covers them, the same in a worker that took over from one that
    was killed, after SIGKILL of the whole server and after a restart; then metrics and page say so, a repeated price
    changes nothing, and the operator has it forgotten.
    """
    models = tmp_path / "models" / "au"
    models.mkdir(parents=True)
    for seed, name in enumerate((NAME, OTHER)):
        (tmp_path / "models" / name).write_bytes(pack_hourly(seed))
    start = partial(
        run_server, s3, tmp_path, str(tmp_path / "models"), actuals=tmp_path / "state", workers=2,
        actuals_metrics=1,
    )  # fmt: skip
    with start() as server:
        before = ask_forecast(server, 0)
        prices = [b + 0.3 * (b - a) for a, b in zip(before[LOW], before[HIGH], strict=True)]
        assert measure_coverage(before, prices) == 0
        assert send_prices(server, 1, prices) == {"paired": 0, "repeated": 0, "unmatched": 24}
        for day in range(8):
            ask_forecast(server, day)
            assert send_prices(server, day, prices) == {"paired": 24, "repeated": 0, "unmatched": 0}
        after = ask_forecast(server, 8)
        assert measure_coverage(after, prices) > 0.8
        home = max(server.processes("worker"), key=lambda row: row["pid"] in find_holders(server))
        os.kill(home["pid"], signal.SIGKILL)
        wait_until(lambda: all(row["up"] for row in server.processes("worker")), "the worker is back")
        assert ask_forecast(server, 8) == after
        send_prices(server, 8, prices)
        after = ask_forecast(server, 9)
        kill_server(server)
    with start() as server:
        assert ask_forecast(server, 9) == after
        assert send_prices(server, 8, prices) == {"paired": 0, "repeated": 24, "unmatched": 0}
        ask_forecast(server, 0, OTHER)
        with Client(server.url) as client:  # the same by the SDK
            hours = {FIRST + timedelta(hours=hour): price for hour, price in enumerate(prices)}
            assert client.send_prices({OTHER: hours})[OTHER] == PairedPrices(OTHER, 24, 0, 0)
    with start() as server:
        assert ask_forecast(server, 9) == after
        check_reports(server)
        assert server.fleet("forget", NAME).json()["reset"]
        assert ask_forecast(server, 9) == before
        assert NAME not in read_accuracy(server)


def find_holders(server: Server) -> set[int]:
    """The pids of the workers that hold the model."""
    pids = {row["index"]: row["pid"] for row in server.processes("worker")}
    return {pids[holder["worker"]] for holder in server.models()[NAME]["holders"]}


def check_reports(server: Server) -> None:
    """Metrics, JSON and page agree; the second archive is `other`, as the setting has it."""
    assert server.total("fleetcast_paired_prices_total", model=NAME) == 9 * 24
    assert server.total("fleetcast_paired_prices_total", model="other") == 24
    assert server.total("fleetcast_band_coverage", model=NAME, band="0.8") > 0
    row = read_accuracy(server)[NAME]
    assert row["prices"] == 9 * 24
    assert row["bands"][1]["promised"] == 0.8
    page = server.http.get(f"{server.addresses['management']}/accuracy")
    assert NAME in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert server.http.get(f"{server.addresses['management']}/accuracy/accuracy.css").is_success


def test_a_server_without_a_folder_takes_no_prices(s3: S3Server, tmp_path: Path) -> None:
    """403 that names the setting; wrong calls are 400 with their place; a browser's is refused."""
    (tmp_path / "models").mkdir()
    with run_server(s3, tmp_path, str(tmp_path / "models")) as server:
        item = {"target_model": NAME, "stamps": ["2026-01-01 00:00"], "prices": [1.0]}
        refused = server.http.post(f"{server.url}/v1/actuals", json={"actuals": [item]})
        assert (refused.status_code, "actuals" in refused.text) == (403, True)
        wrong = server.http.post(f"{server.url}/v1/actuals", json={"actuals": [{**item, "stamps": ["soon"]}]})
        assert (wrong.status_code, json.loads(wrong.text)["error"]["field"]) == (400, "actuals[0].stamps[0]")
        called = server.http.post(
            f"{server.url}/v1/actuals", json={"actuals": [item]}, headers={"Origin": "http://evil.test"}
        )
        assert called.status_code == 403
        assert server.http.get(f"{server.addresses['management']}/fleet/accuracy").json()["kept"] is False
        assert server.fleet("forget", NAME).status_code == 403
