"""`bench goals`: one small market through the commands of a user, and goals that are judged by hand."""

import csv
import gzip
import json
import os
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from loadtest import record
from loadtest.benchmarks import goals
from loadtest.benchmarks.accuracy import PUBLISHED_WQL
from loadtest.benchmarks.accuracy_scores import list_last_fits
from loadtest.benchmarks.rolling_refits import MARKETS, TIME
from server.cli.architecture_flags import parse_architecture

pytestmark = pytest.mark.slow

DAYS, TESTED = 150, 16
GERMAN_FILE = "distributionalnn/DE.csv"  #: Datasets/DE.csv of github.com/gmarcjasz/distributionalnn


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A market whose price follows its load and wind, and published forecasts of its last year that are 1 off."""
    folder, rng = tmp_path_factory.mktemp("epf"), np.random.default_rng(0)
    hours = DAYS * 24
    load, wind = rng.normal(100, 10, hours), rng.normal(20, 5, hours)
    price = 0.5 * load - wind + rng.normal(0, 1, hours)
    stamps = [f"{datetime(2015, 1, 1) + timedelta(hours=i):%Y-%m-%d %H:%M:%S}" for i in range(hours)]  # noqa: DTZ001
    with gzip.open(folder / "NP.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([(TIME, "price", "exog1", "exog2"), *zip(stamps, price, load, wind, strict=True)])
    with gzip.open(folder / "NP_reference_forecasts.csv.gz", "wt", newline="") as file:
        last = slice(-TESTED * 24, None)
        csv.writer(file).writerows([(TIME, "dnn_ensemble"), *zip(stamps[last], price[last] + 1, strict=True)])
    return folder


def test_a_market_passes_all_commands_and_is_not_run_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every measure of a goal is there; what is kept is used by the next run, which needs no prices for it. The record
    has the markets of all runs of this commit.
    """
    records = tmp_path / "records"
    monkeypatch.setattr(record, "RECORDS", records)
    asked = ["--data", str(data), "--markets", "NP", "--days", str(TESTED), "--refit", "8", "--architecture", "lear"]
    asked += ["--keep", str(tmp_path)]
    result = CliRunner().invoke(goals.app, asked, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (kept,) = tmp_path.glob("*.json")
    found = json.loads(kept.read_text())
    assert found["windows"] == TESTED
    assert found["rmae"] < 0.5
    assert found["rival_mae"] == pytest.approx(1)
    assert 0 < found["p_rival"] <= 1
    assert [band["nominal"] for band in found["bands"]] == [0.98, 0.9, 0.8, 0.5]
    assert found["retrained_mae"] == pytest.approx(found["fresh_mae"], rel=goals.FRESH)
    assert 0 <= found["outside_scenarios"] <= 1
    assert 0 <= found["outside_fixed"] <= 1
    kept.write_text(json.dumps({**found, "rmae": 0.1234}))
    kept.with_name(kept.name.replace("-NP.json", "-PJM.json")).write_text(json.dumps(found))
    again = CliRunner().invoke(goals.app, asked, catch_exceptions=False)
    assert "0.123" in again.output
    (saved,) = records.glob("*-goals.json")
    results = json.loads(saved.read_text())["results"]
    assert results["markets"] == {"NP": {**found, "rmae": 0.1234}, "PJM": found}
    assert {goal["goal"] for goal in results["goals"]} >= {"NP: rMAE", "PJM: rMAE"}


def test_goals_are_judged_by_what_was_reached() -> None:
    """Of one market by hand: what is reached, what is missed, and what lies outside on both sides."""
    bands = [{"nominal": each, "fixed": 0.1, "adaptive": each - 0.015} for each in (0.98, 0.9, 0.8, 0.5)]
    bands[2]["adaptive"] = 0.77
    each: dict[str, Any] = {"rmae": 0.5, "bands": bands, "pinball": 1.0, "pinball_adaptive": 1.01}
    each |= {"outside_scenarios": 0.005, "outside_fixed": 0.02, "retrained_mae": 2.0, "fresh_mae": 2.001}
    found = {goal["goal"]: goal["good"] for goal in goals.judge_markets({"NP": each})}
    assert found == {
        "NP: rMAE": True,
        "NP: band of 90% is off by": True,
        "NP: band of 80% is off by": False,
        "NP: band of 50% is off by": True,
        "NP: adaptive bands add to the pinball loss": False,
        "NP: days outside all scenarios": False,
        "NP: retrain differs from a fresh fit by": True,
    }
    german = {goals.GERMAN: each | {"crps": 2.5, "mae": 3.5}}
    judged = [goal["good"] for goal in goals.judge_markets(german)][:2]
    assert judged == [True, False], "half of the CRPS is what the paper prints"


def test_the_wql_is_beside_seasonal_naive_over_all_five_markets() -> None:
    """A geometric mean: half of the naive one's everywhere is .5; without one of the markets nothing is said."""
    half = {name: PUBLISHED_WQL["Seasonal Naive"][name] / 2 for name in MARKETS}
    (goal,) = goals.judge_wql(half)
    assert goal["reached"] == pytest.approx(0.5)
    assert not goal["good"]
    assert list(goals.judge_wql({"NP": 0.01})) == []


def test_the_last_days_are_fitted_as_often_as_the_rest() -> None:
    """At the largest known interval that is no longer: 20 days have three weekly fits, and one where fits are rarer."""
    recipe = goals.Run(Path(), "lear", 7, 728).recipe
    fits = {every: [(task.day, task.days) for task in list_last_fits("NP", recipe, every)] for every in (7, 14, 28)}
    weekly = [(708, 20), (715, 7), (722, 6)]
    assert fits == {7: weekly, 14: weekly, 28: [(708, 20)]}


@pytest.mark.parametrize("text", ["lear:3,ddnn,ddnn:2@linear", "lear:3", "lear"])
def test_the_recipe_is_that_of_its_flags(text: str) -> None:
    """What is fitted in the process is what a user would type."""
    recipe, several = goals.Run(Path(), text, 28, 728).recipe, "," in text
    assert (recipe.architecture, recipe.options) == parse_architecture(text, "{}", stack=several)
    if several:
        assert recipe.flags[:3] == ["--architecture", text, "--stack"]


def test_german_prices_are_those_of_the_paper() -> None:
    """2,192 days without a gap, of which the last 554 are tested. Skipped without the file, which is not ours."""
    path = Path(os.environ.get("FLEETCAST_DATA", ""), GERMAN_FILE)
    if not path.exists():
        pytest.skip(f"FLEETCAST_DATA names no folder with {GERMAN_FILE}")
    case = goals.read_german(path)
    assert len(case.rows) == 2192 * 24
    assert case.stamp(case.days) == "2019-06-27 00:00:00"
    assert case.rows[-1][TIME] == "2020-12-31 23:00:00"
    assert list(case.rows[0]) == [TIME, "price", *goals.GERMAN_KNOWN]
