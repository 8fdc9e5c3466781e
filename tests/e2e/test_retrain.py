"""A fleet is retrained and republished while it is served; a backtest forecasts through a server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.e2e.conftest import Serve
from tests.e2e.models import Question
from tests.e2e.server import ROOT, Answer, Load, invoke
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server
from tests.server.markets import HISTORY, HORIZON, LEVELS, name_products, pack_market, write_prices

pytestmark = pytest.mark.e2e

MARKETS = name_products(70)  #: more than are fitted together


def ask_forecast(question: Question, client: Any) -> Answer:
    """Ask; raises ClientError for a refusal, AssertionError for an answer that is no forecast."""
    answer = invoke(client, question.model, question.body)
    quantiles = json.loads(answer.body)["predictions"][0]["quantiles"]
    numbers = np.array([quantiles[str(level)] for level in LEVELS])
    assert numbers.shape == (len(LEVELS), HORIZON)
    assert (np.diff(numbers, axis=0) >= 0).all()
    return answer


def make_questions() -> list[Question]:
    """One a market."""
    instance = {"start": "2024-03-23 00:00:00", "target": [60.0] * HISTORY}
    body = msgspec.json.encode({"instances": [instance], "configuration": {"output_types": ["quantiles"]}})
    return [Question(f"{market}.mar", body, np.empty(0, np.float32)) for market in MARKETS]


def run_fleetcast(s3: S3Server, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A command in a process of its own, with the store's credentials."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "FLEETCAST_"))}
    return subprocess.run(
        [sys.executable, "-m", "server.cli.main", *arguments],
        cwd=folder, env={**plain, **s3.env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        timeout=2 * PATIENCE_S,  # fits are work, not an event
    )  # fmt: skip


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """Prices of all markets."""
    return write_prices(tmp_path / "prices.csv", MARKETS, days=10)


def fill(s3: S3Server, bucket: str) -> None:
    """An untrained archive of each market."""
    client = s3.client()
    for seed, market in enumerate(MARKETS):
        client.put_object(Bucket=bucket, Key=f"{market}.mar", Body=pack_market(seed))


def test_a_fleet_is_republished_while_it_is_served(
    s3: S3Server, store: str, serve: Serve, csv: Path, tmp_path: Path
) -> None:
    """Two groups of markets retrained under load: no request fails, every market's answers go over to its new one."""
    fill(s3, store)
    with serve() as server, Load(server, make_questions(), ask=ask_forecast) as load:
        wait_until(lambda: len({each.model for each in load.outcomes}) == len(MARKETS), "all markets are served")
        before = {each.model: each.version for each in load.outcomes}
        quick = ("--epochs", "4", "--windows", "6", "--margin", "50", "--keep-worse")
        where = ("--store", f"s3://{store}", "--reload", server.addresses["management"])
        done = run_fleetcast(s3, tmp_path, "retrain", str(csv), "--time", "hour", *where, *quick)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [json.loads(line) for line in tmp_path.joinpath("retrain.jsonl").read_text().splitlines()]
        new = {each["model"]: each["version"] for each in lines if each["result"] == "published"}
        assert len(new) == len(MARKETS), done.stdout
        assert not any(each.get("message") for each in lines)

        def is_served() -> bool:
            return {each.model: each.version for each in load.outcomes[-4 * len(MARKETS) :]} == new

        wait_until(is_served, "every market answers with its new version")
    assert [each for each in load.outcomes if each.problem] == []
    for model, version in new.items():
        seen = [each.version for each in load.outcomes if each.model == model]
        assert set(seen) == {before[model], version}


def test_a_server_gives_the_scores_of_this_process(
    s3: S3Server, store: str, serve: Serve, csv: Path, tmp_path: Path
) -> None:
    """The same windows asked through HTTP and in process: the same scores, and the version that the server says."""
    fill(s3, store)
    flags = (
        "--time",
        "hour",
        "--models",
        f"s3://{store}",
        "--windows",
        "10",
        "--json",
        "--target",
        "M03",
        "--target",
        "M07",
    )
    with serve() as server:
        through = run_fleetcast(s3, tmp_path, "backtest", str(csv), *flags, "--url", server.url)
    alone = run_fleetcast(s3, tmp_path, "backtest", str(csv), *flags)
    assert (through.returncode, alone.returncode) == (0, 0), through.stderr + alone.stderr
    ours, theirs = json.loads(alone.stdout), json.loads(through.stdout)
    assert (ours["asked"], theirs["asked"]) == ("in this process", f"through {server.url}")
    for a, b in zip(ours["markets"], theirs["markets"], strict=True):
        assert a["version"] == b["version"]
        assert a["scores"] == pytest.approx(b["scores"], rel=1e-5)
