"""A horizon of four weeks, 672 hours, through all commands and a running server: none of them has a limit below it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.e2e.server import Server, run_server
from tests.patience import PATIENCE_S
from tests.s3 import S3Server
from tests.server import markets

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

AHEAD, MARKETS, LAST = 672, ("A", "B"), "2024-06-10"


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 days of two markets."""
    return markets.write_prices(tmp_path_factory.mktemp("data") / "p.csv", MARKETS, days=160)


@pytest.fixture(scope="module")
def store(csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network of each, fitted to all but the last 62 days, calibrated on these, and a correlation of both."""
    folder = tmp_path_factory.mktemp("store")
    quick = ("--architecture", "mlp", "--config", '{"hidden": 4}', "--epochs", "0.5", "--keep-worse")
    known = ("--known-future", "load_{target}", "--quantiles", "0.1,0.5,0.9", "--train-until", LAST)
    run("train", csv, "--target", "[AB]", "--prediction-length", str(AHEAD), *quick, *known, "--out", str(folder))
    run("calibrate", csv, "--models", str(folder), "--days", "56")
    many = ("--target", "[AB]", "--since", LAST, "--every", "24")
    run("correlate", csv, "--store", str(folder), *many, "--out", str(folder / "joint.mar"))
    return folder


@pytest.fixture(scope="module")
def server(store: Path, s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of that folder."""
    with run_server(s3, tmp_path_factory.mktemp("server"), str(store)) as found:
        yield found


def run(command: str, csv: Path, *flags: str) -> str:
    """A command that must end well; what it printed."""
    result = markets.run(command, str(csv), "--time", "hour", *flags)
    assert result.exit_code == 0, result.output
    return result.stdout


def make_request(market: str, configuration: dict[str, Any]) -> dict[str, Any]:
    """Seven days of history, and a load forecast for these and 672 hours."""
    history = 168
    rows = {"target": [50.0 + hour % 24 for hour in range(history)], "dynamic_feat": [[1000.0] * (history + AHEAD)]}
    instance = {"start": "2024-06-03 00:00:00", **rows}
    return {"instances": [instance], "configuration": configuration} if not market else {
        "target_model": f"{market}.mar", **instance
    }  # fmt: skip


def test_backtests_score_here_and_through_the_server(csv: Path, store: Path, server: Server) -> None:
    """Windows of four weeks one after another, and the same numbers from the server."""
    asked = ("--models", str(store), "--from", LAST, "--json")
    here, there = [json.loads(run("backtest", csv, *asked, *more))["markets"] for more in ((), ("--url", server.url))]
    assert [(each["target"], each["windows"]) for each in here] == [("A", 2), ("B", 2)]
    for mine, other in zip(here, there, strict=True):
        assert mine["scores"]["pinball"] == pytest.approx(other["scores"]["pinball"], rel=1e-4)
        assert mine["uncalibrated"] != mine["scores"]["coverage"], "its calibration reaches four weeks ahead"


def test_one_call_answers_672_steps(server: Server) -> None:
    """Mean, quantiles and samples of every step."""
    body = make_request("", {"output_types": ["mean", "quantiles", "samples"], "num_samples": 20, "seed": 1})
    reply = httpx.post(
        f"{server.url}/invocations",
        json=body,
        headers={"X-Amzn-SageMaker-Target-Model": "A.mar"},
        timeout=PATIENCE_S,
    )
    assert reply.status_code == 200, reply.text
    (found,) = reply.json()["predictions"]
    assert len(found["mean"]) == AHEAD
    assert np.shape(found["samples"]) == (20, AHEAD)
    assert (np.diff([found["quantiles"][level] for level in ("0.1", "0.5", "0.9")], axis=0) >= 0).all()


def test_joint_scenarios_of_four_weeks_are_answered_and_bounded(server: Server) -> None:
    """Both markets together; more scenarios than an answer may hold are refused before they are drawn."""
    requests = [make_request(market, {}) for market in MARKETS]
    asked = {"joint": True, "correlation": "joint.mar", "num_samples": 50, "seed": 1}
    reply = httpx.post(
        f"{server.url}/v1/forecasts", json={"requests": requests, "configuration": asked}, timeout=PATIENCE_S
    )
    assert reply.status_code == 200, reply.text
    for prediction in reply.json()["predictions"]:
        assert np.shape(prediction["samples"]) == (50, AHEAD)
    many = {"requests": requests, "configuration": {**asked, "num_samples": 10_000}}
    refused = httpx.post(f"{server.url}/v1/forecasts", json=many, timeout=PATIENCE_S)
    assert refused.status_code == 400, refused.text[:300]
