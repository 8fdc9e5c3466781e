"""Observed prices over real processes: bands follow them in every worker, and a killed server forgets none of them."""

import json
import os
import signal
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handlers.evaluation.correlation import estimate_gaussian
from handlers.kinds import ArchiveParts, pack_model
from model_store.archives.manifest import Kind
from server.sdk.client import Client, PairedPrices
from tests.e2e.forecasters import HISTORY, HORIZON, pack_hourly, pack_paths
from tests.e2e.server import Server, run_server
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

NAME, OTHER, ALIAS = "au/nsw1.mar", "au/vic1.mar", "nsw1@stable"
PAIR, PATHS = "au/pair.mar", "au/paths.mar"
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


def send_prices(server: Server, day: int, prices: list[float], name: str = NAME) -> dict[str, Any]:
    """What the server says of a day's prices."""
    stamps = [str(FIRST + timedelta(days=day, hours=hour)) for hour in range(HORIZON)]
    call = {"actuals": [{"target_model": name, "stamps": stamps, "prices": prices}]}
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
        wait_until(
            lambda: all(row["up"] and row["pid"] != home["pid"] for row in server.processes("worker")),
            "the worker is back",
        )
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
        assert NAME not in read_accuracy(server), "until the next forecast of it is kept, which takes a second at most"
        assert ask_forecast(server, 9) == before


def pack_correlation(*names: str) -> bytes:
    """A correlation of two markets."""
    found = estimate_gaussian(np.random.default_rng(1).standard_normal((100, 2, HORIZON)), names)
    parts = ArchiveParts(correlation=found.record, tensors=found.tensors)
    return pack_model(Kind.CORRELATION, parts, model_name="joint")


def ask_scenarios(server: Server, day: int, *names: str) -> list[list[list[float]]]:
    """Joint scenarios of a day [N][S][T]: five, which are the levels 0.1, 0.3, 0.5, 0.7 and 0.9 in some order."""
    start = FIRST + timedelta(days=day, hours=-HISTORY)
    target = [60.0 + i % 24 for i in range(HISTORY)]
    return ask_joint(server, [{"target_model": name, "start": str(start), "target": target} for name in names])


def ask_joint(server: Server, items: list[dict[str, Any]]) -> list[Any]:
    """The samples of each item."""
    drawn = {"joint": True, "correlation": "joint.mar", "num_samples": 5, "seed": 1}
    reply = server.http.post(f"{server.url}/v1/forecasts", json={"requests": items, "configuration": drawn})
    assert reply.is_success, reply.text
    return [prediction["samples"] for prediction in reply.json()["predictions"]]


def check_margin(samples: list[list[float]], levels: Levels) -> None:
    """The scenarios of a forecast have its levels at every step."""
    ranked = np.sort(np.array(samples), axis=0)
    for level, row in ((LOW, 0), ("0.5", 2), (HIGH, 4)):
        np.testing.assert_allclose(ranked[row], levels[level], rtol=1e-5)


def manage_server(server: Server, path: str, body: Any = None) -> Any:
    """A management call that succeeds."""
    reply = server.http.post(f"{server.addresses['management']}/fleet/{path}", json=body)
    assert reply.is_success, reply.text
    return reply.json()


def test_bands_follow_prices_by_alias_in_joint_scenarios_and_after_a_rollback(
    s3: S3Server, store: str, tmp_path: Path
) -> None:
    """Clients ask for joint scenarios of an alias and another archive, and send prices by the alias: scenarios, levels
    by the alias and by the archive's own name all follow, and the other archive stays as it was. So they do when the
    alias names a version, and a version that the archive is rolled back to goes on with what was learnt.
    """
    for seed, name in enumerate((NAME, OTHER)):
        s3.put(store, name, pack_hourly(seed))
    s3.put(store, "joint.mar", pack_correlation(NAME, OTHER))
    with run_server(s3, tmp_path, f"s3://{store}", actuals=tmp_path / "state", workers=2, revalidate_s=600) as server:
        before, other = ask_forecast(server, 0), ask_forecast(server, 0, OTHER)
        version = server.fleet("load", NAME).json()["version"]
        manage_server(server, f"alias/{ALIAS}", {"model": NAME})
        prices = [b + 0.3 * (b - a) for a, b in zip(before[LOW], before[HIGH], strict=True)]
        for day in range(8):
            for samples, levels in zip(ask_scenarios(server, day, ALIAS, OTHER), (before, other), strict=True):
                if day == 0:
                    check_margin(samples, levels)
            assert send_prices(server, day, prices, ALIAS) == {"paired": 24, "repeated": 0, "unmatched": 0}
        after = ask_forecast(server, 8)
        assert measure_coverage(after, prices) > 0.8
        assert ask_forecast(server, 8, ALIAS) == after
        ours, theirs = ask_scenarios(server, 8, ALIAS, OTHER)
        check_margin(ours, after)
        check_margin(theirs, other)
        manage_server(server, f"alias/{ALIAS}", {"model": NAME, "version": version})
        assert ask_forecast(server, 8, ALIAS) == after
        check_margin(ask_scenarios(server, 8, ALIAS, OTHER)[0], after)
        assert send_prices(server, 8, prices, ALIAS) == {"paired": 24, "repeated": 0, "unmatched": 0}
        learnt = ask_forecast(server, 9)
        assert learnt != after
        s3.put(store, NAME, pack_hourly(5))
        manage_server(server, f"reload/{NAME}")
        assert ask_forecast(server, 9) != learnt, "another network"
        assert manage_server(server, f"rollback/{NAME}")["version"] == version
        assert ask_forecast(server, 9) == learnt
        assert set(read_accuracy(server)) == {NAME, OTHER}


def test_each_product_follows_its_own_prices(s3: S3Server, store: str, tmp_path: Path) -> None:
    """Of an archive of two products one is observed, by the SDK and an alias: its levels, scenarios and row of accuracy
    follow, and the other's stay; after SIGKILL both are as they were. A call without a product, or with a wrong one, is
    refused with those that there are, and takes nothing. An archive of paths follows as well.
    """
    s3.put(store, PAIR, pack_hourly(3, products=2))
    s3.put(store, PATHS, pack_paths(1))
    s3.put(store, "joint.mar", pack_correlation(f"{PAIR}#product0", f"{PAIR}#product1"))
    start = partial(run_server, s3, tmp_path, f"s3://{store}", actuals=tmp_path / "state", workers=2)
    with start() as server:
        manage_server(server, f"alias/{ALIAS}", {"model": PAIR})
        before = ask_products(server, 0)
        prices = [b + 0.3 * (b - a) for a, b in zip(before[1][LOW], before[1][HIGH], strict=True)]
        wrong = {"": "name one as `product`: product0, product1", "gas": "no product 'gas'; it has product0, product1"}
        for product, said in wrong.items():
            named = {"product": product} if product else {}
            items: list[dict[str, Any]] = [{"target_model": PAIR, "stamps": ["2026-01-05"], "prices": [1.0], **each}
                     for each in ({"product": "product1"}, named)]  # fmt: skip
            reply = server.http.post(f"{server.url}/v1/actuals", json={"actuals": items})
            assert (reply.status_code, said in reply.json()["error"]["message"]) == (400, True), reply.text
        with Client(server.url) as client:
            for day in range(8):
                ask_products(server, day)
                name = ALIAS if day % 2 else PAIR
                hours = {FIRST + timedelta(days=day, hours=hour): price for hour, price in enumerate(prices)}
                told = client.send_prices({(name, "product1"): hours})
                assert told == {(name, "product1"): PairedPrices(name, 24, 0, 0, "product1")}
        after = ask_products(server, 8)
        assert after[0] == before[0]
        assert measure_coverage(after[1], prices) > 0.8
        (drawn,) = ask_joint(server, [ask_pair(8)])
        for i, levels in enumerate(after):
            check_margin([sample[i] for sample in drawn], levels)
        lows = ask_forecast(server, 0, PATHS)[LOW]
        assert send_prices(server, 0, [low - 50 for low in lows], PATHS)["paired"] == 24
        assert all(np.array(ask_forecast(server, 0, PATHS)[LOW]) < lows)
        rows = read_accuracy(server)
        assert {name: row["prices"] for name, row in rows.items()} == {
            PATHS: 24, f"{PAIR}#product0": 0, f"{PAIR}#product1": 192,
        }  # fmt: skip
        assert server.total("fleetcast_paired_prices_total", model=f"{PAIR}#product1") == 192
        kill_server(server)
    with start() as server:
        assert ask_products(server, 8) == after
        assert server.fleet("forget", PAIR).json()["reset"]
        assert ask_products(server, 8) == before
        assert set(read_accuracy(server)) == {PATHS}


def ask_pair(day: int) -> dict[str, Any]:
    """An item for a day of the two products, from the same history each day."""
    start = FIRST + timedelta(days=day, hours=-HISTORY)
    return {"target_model": PAIR, "start": str(start), "target": [[60.0 + i % 24 for i in range(HISTORY)]] * 2}


def ask_products(server: Server, day: int) -> list[Levels]:
    """The levels of each of the two products for a day."""
    body = {
        "requests": [ask_pair(day)],
        "configuration": {"output_types": ["quantiles"], "quantiles": [LOW, "0.5", HIGH]},
    }
    reply = server.http.post(f"{server.url}/v1/forecasts", json=body)
    assert reply.is_success, reply.text
    found = reply.json()["predictions"][0]["quantiles"]
    return [{level: rows[product] for level, rows in found.items()} for product in range(2)]


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
