"""`bench accuracy`: fits are shared, kept and dropped as it says, and its scores are those of their sources."""

import csv
import gzip
import time
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from loadtest import record
from loadtest.benchmarks import accuracy
from loadtest.benchmarks.accuracy_scores import (
    LEAR,
    MEAN,
    MIXTURES,
    TCN,
    WEIGHTED,
    WINDOWS,
    assess_market,
    compute_wql,
    weight_parts,
)
from loadtest.benchmarks.rolling_refits import DAYS, EVERY, HOURS, Recipe, Refits, Task, read_market, schedule_refits
from loadtest.report.accuracy import render_accuracy_page
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.slow

TRAINED_DAYS = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A market like those of Lago et al. with 120 days before the test period, and published forecasts of it."""
    folder, rng = tmp_path_factory.mktemp("epf"), np.random.default_rng(0)
    hours = (TRAINED_DAYS + DAYS) * HOURS
    load, wind = rng.normal(100, 10, hours), rng.normal(20, 5, hours)
    price = 0.5 * load - wind + rng.normal(0, 1, hours)
    stamps = [datetime(2015, 1, 1) + timedelta(hours=i) for i in range(hours)]  # noqa: DTZ001 -- wall-clock
    with gzip.open(folder / "NP.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([("datetime_local", "price", "exog1", "exog2")])
        csv.writer(file).writerows(zip(stamps, price, load, wind, strict=True))
    test = price[-DAYS * HOURS :]
    with gzip.open(folder / "NP_reference_forecasts.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([("datetime_local", "real_price", "dnn_ensemble", "lear_ensemble")])
        csv.writer(file).writerows(zip(stamps[-len(test) :], test, test, test + 1, strict=True))
    return folder


@pytest.mark.parametrize("first", [0, DAYS - 20])
def test_schedules_cover_every_day_and_share_their_fits(first: int) -> None:
    """Of a schedule no day is left out, and a fit that two of them have is one and the same task, so done once."""
    of = {every: list(schedule_refits("NP", LEAR, every, first)) for every in EVERY}
    for every, tasks in of.items():
        assert [task.day for task in tasks] == list(range(first, DAYS, every))
        assert all(task.days >= min(every, DAYS - task.day) for task in tasks)
    for coarse, fine in pairwise(EVERY):
        shared = {task.day for task in of[coarse]} & {task.day for task in of[fine]}
        assert first in shared
        assert {t for t in of[coarse] if t.day in shared} == {t for t in of[fine] if t.day in shared}


def test_the_flags_of_a_recipe_are_those_of_the_command() -> None:
    """What the record tells a user to type."""
    levels = ["--quantiles", "0.1,0.25,0.5,0.75,0.9"]  # the command's default has nine
    made = ["--architecture", "tcn", "--members", "2", "--config", '{"channels": 48}', "--epochs", "8"]
    assert TCN.flags == made + levels
    assert Recipe("x", "lear", levels=(0.1, 0.5)).flags == ["--architecture", "lear", "--quantiles", "0.1,0.5"]
    assert WINDOWS.options == {"members": 3}


def test_a_fit_is_kept_and_not_done_again(data: Path, tmp_path: Path) -> None:
    """Its file makes the task done for the next run; another recipe's is not, nor one of other prices."""
    refits, task = Refits(data, tmp_path), Task("NP", LEAR, DAYS - 1, 1)
    assert not refits.has(task)
    assert accuracy.run_tasks(refits, [task], 1, time.monotonic() + PATIENCE_S) == 1
    again = Refits(data, tmp_path)
    assert again.has(task)
    assert not again.has(task._replace(recipe=WINDOWS))
    other = tmp_path / "epf"
    other.mkdir()
    with gzip.open(other / "NP.csv.gz", "wt") as file:
        file.write("datetime_local,price,exog1,exog2\n")
    assert not Refits(other, tmp_path).has(task)
    assert [file.suffix for file in tmp_path.iterdir() if file.is_file()] == [".npz"]


def test_minutes_that_are_over_end_the_work(data: Path, tmp_path: Path) -> None:
    """Without time left no fit is waited for, though a year of them is asked for; the processes are ended."""
    tasks = list(schedule_refits("NP", LEAR, 7))
    assert accuracy.run_tasks(Refits(data, tmp_path), tasks, 1, time.monotonic()) < len(tasks)


def test_a_market_is_scored_by_what_was_reached(data: Path, tmp_path: Path) -> None:
    """One recipe fitted once is one row, better than the naive forecast; the perfect published forecast has rMAE 0."""
    refits = Refits(data, tmp_path)
    (task,) = schedule_refits("NP", LEAR, DAYS)
    assert refits.done(task) > 0
    found = assess_market(data, refits, "NP")
    (row,) = found["rows"]
    assert (row["name"], row["every"]) == (LEAR.name, DAYS)
    assert 0 < row["rmae"] < 0.5
    assert 0.6 < row["coverage"] < 0.9
    perfect = dict.fromkeys(("rmae", "rmae_weekly", "mae", "rmse", "smape"), 0)
    assert found["published"]["dnn_ensemble"] == perfect
    assert row["p_rival"] == 1, "a perfect rival is better on every day"
    assert found["published"]["lear_ensemble"]["mae"] == pytest.approx(1)
    results = {
        "test_days": DAYS,
        "minutes": 1,
        "markets": {"NP": found},
        "not_reached": ["tcn once: 1 of 1 fits of <NP>"],
        "published_wql": accuracy.PUBLISHED_WQL,
        "commands": {LEAR.name: LEAR.flags},
    }
    html = render_accuracy_page(record.make_record("accuracy", 0, record.describe_machine(), results))
    assert f"{row['rmae']:.3f}" in html
    assert "1 of 1 fits of &lt;NP&gt;" in html
    assert accuracy.list_failures({"NP": found}, {"NP": row["mae"]}) == []
    assert "by train and backtest" in accuracy.list_failures({"NP": found}, {"NP": 2 * row["mae"]})[0]
    worse = {"NP": {"rows": [row | {"rmae": 0.64}]}}
    assert "rMAE 0.640 is above 0.63" in accuracy.list_failures(worse, {"NP": row["mae"]})[0]


def test_what_was_forecast_knows_no_later_price(data: Path, tmp_path: Path) -> None:
    """Other prices from the fit's day on leave the first day's forecast as it was, bit by bit."""
    other = tmp_path / "epf"
    other.mkdir()
    series, day = read_market(data, "NP"), DAYS - 3
    at = (TRAINED_DAYS + day) * HOURS
    price = series.values.copy()
    price[at:] += 1000
    with gzip.open(other / "NP.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows([("datetime_local", "price", "exog1", "exog2")])
        stamps = (series.stamp(i) for i in range(len(price)))
        csv.writer(file).writerows(zip(stamps, price, *series.known, strict=True))
    task, found = Task("NP", LEAR, day, 1), []
    for folder in (data, other):
        kept = tmp_path / f"kept-{folder.parent.name}"
        Refits(folder, kept).done(task)
        with np.load(next(kept.glob("*.npz"))) as file_of:
            found.append(file_of["quantiles"])
    np.testing.assert_array_equal(*found)


def test_weights_go_to_who_was_better_and_come_from_the_past() -> None:
    """Equal in the first week, then nearly all for the better one; what comes later changes no earlier day."""
    y, levels = np.random.default_rng(0).normal(size=(28, 24)), np.array([0.5])
    parts = np.stack([y + 0.1, y + 3.0])[..., None]
    mixed = weight_parts(parts, y, levels)[..., 0] - y
    np.testing.assert_allclose(mixed[:7], 1.55)
    assert (mixed[7:] < 0.11).all()
    later = y.copy()
    later[14:] -= 50
    np.testing.assert_array_equal(weight_parts(parts, later, levels)[:14], weight_parts(parts, y, levels)[:14])
    assert set(MIXTURES) == {MEAN, WEIGHTED}


def test_wql_is_the_mean_over_windows() -> None:
    """Of two windows, by hand: |error| / mean |y| for the median, the mean |y| being at least 1."""
    y = np.array([[10.0, 30.0], [0.0, 0.5]])
    q = np.array([[12.0, 26.0], [0.5, 0.5]])[..., None]
    assert compute_wql(y, q, np.array([0.5])) == pytest.approx((3 / 20 + 0.25 / 1) / 2)
