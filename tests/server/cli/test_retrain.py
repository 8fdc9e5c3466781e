"""`fleetcast retrain` refits a fleet market by market, compares and publishes archives, and continues after a kill."""

import json
import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handlers.training.fit import Fitting, fit_forecasters
from handlers.training.input_recipe import make_recipe
from handlers.training.time_series import Series, read_csv
from model_store.archives.archive import open_archive, read_tensors
from model_store.archives.manifest import Spec
from model_store.errors import StoreUnavailable
from model_store.names import ModelName
from model_store.stores.object_store import Source
from server.cli.setting_flags import settings_from
from server.offline.checkpoint import Checkpoint
from server.offline.promotion_gate import GateTerms
from server.offline.refits import refit_scalers
from server.offline.retraining import Retraining, RetrainingPlan, rebuild_forecast
from server.offline.rolling_windows import Rolling
from server.shell import progress
from tests.server.markets import fill, name_products, pack_market, run, write_prices

pytestmark = pytest.mark.slow

MARKETS = name_products(4)
QUICK = ("--epochs", "8", "--windows", "8", "--keep-worse")  # so few passes beat no naive forecast


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four markets, the last without any price."""
    return write_prices(tmp_path_factory.mktemp("data") / "prices.csv", MARKETS, empty="M03")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Their archives, untrained."""
    return fill(tmp_path / "models", MARKETS)


def read_spec(store: Path, market: str) -> Spec:
    """Of the archive in the store."""
    found = open_archive(store.joinpath(f"{market}.mar").read_bytes(), market).spec
    assert found is not None
    return found


def read_outcomes(log: Path) -> dict[str, dict[str, Any]]:
    """The log by market."""
    return {each["target"]: each for each in map(json.loads, log.read_text().splitlines())}


def retrain(csv: Path, store: Path, log: Path, *flags: str) -> tuple[int, str]:
    """Exit code, and all that was said."""
    result = run("retrain", str(csv), "--time", "hour", "--store", str(store), "--log", str(log), *QUICK, *flags)
    return result.exit_code, result.output


def test_better_archives_are_published_and_a_failure_stops_nobody(
    csv: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained beats untrained: three markets are published with their verdict, the one without prices is named.

    Meanwhile both fits of the group are counted, so that an hour of fitting is no silence.
    """
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    before = {market: store.joinpath(f"{market}.mar").read_bytes() for market in MARKETS}
    log = tmp_path / "log.jsonl"
    code, said = retrain(csv, store, log)
    assert code == 1, said
    assert "1 failed, 3 published" in said
    counted = [int(done) for done in re.findall(r"^retraining: (\d+) of 4, .*holdout loss", said, re.MULTILINE)]
    assert {2, 3} <= set(counted), said  # the missing market, and parts of the other three
    found = read_outcomes(log)
    assert "M03: no values" in found["M03"]["message"]
    assert store.joinpath("M03.mar").read_bytes() == before["M03"]
    for market in MARKETS[:3]:
        assert found[market]["result"] == "published"
        assert found[market]["worse_percent"] < 0
        new, old = read_spec(store, market), open_archive(before[market], market).spec
        assert old is not None
        assert new.forecast is not None
        assert old.forecast is not None
        assert new.weights != old.weights
        assert new.forecast.scaler != old.forecast.scaler
        assert new.trained_until == "2024-03-23 23:00:00"
        assert (new.architecture, new.config) == (old.architecture, old.config)
        assert new.forecast.quantile_levels == old.forecast.quantile_levels
        assert re.search(r"2024-03-23 23:00:00; gate: pinball .* 8 windows from 2024-03-22 00:00:00", new.description)


def test_the_same_data_again_changes_nothing(csv: Path, store: Path, tmp_path: Path) -> None:
    """The same fit gives the same numbers: they are there already, and are not published once more."""
    retrain(csv, store, tmp_path / "log.jsonl")
    before = {market: store.joinpath(f"{market}.mar").read_bytes() for market in MARKETS}
    retrain(csv, store, tmp_path / "log.jsonl")
    results = {market: each["result"] for market, each in read_outcomes(tmp_path / "log.jsonl").items()}
    assert results == {"M00": "unchanged", "M01": "unchanged", "M02": "unchanged", "M03": "failed"}
    assert before == {market: store.joinpath(f"{market}.mar").read_bytes() for market in MARKETS}


def test_nothing_is_fitted_twice(csv: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was published and what was kept out are settled before any fit while nothing changes, and the log grows."""
    log = tmp_path / "log.jsonl"
    flags = ("--target", "M0[0-2]")
    assert retrain(csv, store, log, "--epochs", "30", *flags)[0] == 0
    assert retrain(csv, store, log, "--epochs", "0.1", *flags)[0] == 0
    assert {each["result"] for each in read_outcomes(log).values()} == {"kept"}
    with monkeypatch.context() as patched:
        patched.setattr("server.offline.retraining.fit_forecasters", lambda *_, **__: pytest.fail("it was fitted"))
        code, said = retrain(csv, store, log, "--epochs", "0.1", *flags)
        assert (code, "3 kept" in said) == (0, True)
        assert "nothing has changed since it was kept" in read_outcomes(log)["M00"]["message"]
        code, said = retrain(csv, store, log, "--epochs", "30", *flags)
        assert (code, "3 unchanged" in said) == (0, True)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [each["result"] for each in lines] == ["published"] * 3 + ["kept"] * 6 + ["unchanged"] * 3
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d\+00:00", each["at"]) for each in lines)
    changed = csv.read_text().splitlines()
    cells = changed[100].split(",")
    cells[2] = "61.5"
    other = tmp_path / "prices.csv"
    other.write_text("\n".join([*changed[:100], ",".join(cells), *changed[101:]]))
    code, said = retrain(other, store, log, "--epochs", "30", *flags)
    results = {market: each["result"] for market, each in read_outcomes(log).items()}
    assert (results["M00"], results["M02"]) == ("unchanged", "unchanged")
    assert results["M01"] != "unchanged", "one cell of one market has changed"


def test_an_archive_that_train_made_of_the_same_rows_is_not_fitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fingerprint is that of the fit, whichever command made it; another half-life is another fit."""
    path = write_prices(tmp_path / "prices.csv", ["M00"], days=60)
    made = run(
        "train", str(path), "--time", "hour", "--target", "M00", "--half-life", "20", "--keep-worse",
        "--out", str(tmp_path / "models"),
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    spec = read_spec(tmp_path / "models", "M00")
    assert spec.trained_half_life == 20
    words = ("retrain", str(path), "--time", "hour", "--store", str(tmp_path / "models"), "--keep-worse", "--log")
    with monkeypatch.context() as patched:
        patched.setattr("server.offline.retraining.fit_forecasters", lambda *_, **__: pytest.fail("it was fitted"))
        result = run(*words, str(tmp_path / "1.jsonl"))
    assert "1 unchanged" in result.output
    result = run(*words, str(tmp_path / "2.jsonl"), "--half-life", "0", "--margin", "1e9")
    assert "1 published" in result.output, result.output
    again = read_spec(tmp_path / "models", "M00")
    assert not again.trained_half_life
    assert again.weights != spec.weights


def test_a_worse_archive_is_kept_out(csv: Path, store: Path, tmp_path: Path) -> None:
    """After a good fit one of hardly any steps is worse: the store keeps what it has, and the log says by how much."""
    retrain(csv, store, tmp_path / "log.jsonl", "--epochs", "30")
    before = store.joinpath("M00.mar").read_bytes()
    code, said = retrain(csv, store, tmp_path / "log.jsonl", "--epochs", "0.1", "--target", "M00")
    assert code == 0, said
    found = read_outcomes(tmp_path / "log.jsonl")["M00"]
    assert found["result"] == "kept"
    assert found["worse_percent"] > 2
    assert store.joinpath("M00.mar").read_bytes() == before


def test_another_architecture_keeps_the_contract(csv: Path, store: Path, tmp_path: Path) -> None:
    """From mlp to tcn: what clients send and get stays; a config without the architecture is refused."""
    old = read_spec(store, "M00")
    flags = ("--architecture", "tcn", "--config", '{"channels": 4}', "--target", "M00")
    code, said = retrain(csv, store, tmp_path / "log.jsonl", *flags)
    assert code == 0, said
    new = read_spec(store, "M00")
    assert new.architecture == "tcn"
    assert old.forecast is not None
    assert new.forecast is not None
    assert new.forecast.prediction_length == old.forecast.prediction_length
    assert new.forecast.quantile_levels == old.forecast.quantile_levels
    assert new.forecast.unit == old.forecast.unit
    code, said = retrain(csv, store, tmp_path / "log.jsonl", "--config", '{"hidden": 4}')
    assert code == 2
    assert "goes with --architecture" in said


def test_a_new_architecture_answers_at_the_hours_that_the_old_one_did() -> None:
    """A `lear` for six o'clock stays one, in place of a `tcn` it forecasts from any hour, and a `tcn` always does."""
    hours = np.arange(24 * 40, dtype=np.float64)
    series = Series("p", datetime(2024, 1, 1), timedelta(hours=1), hours % 24, hours[None][:0])  # noqa: DTZ001
    at_six = make_recipe(series, 192, context_length=192, prediction_length=24, weekdays=True, origin="06:00")
    any_hour = make_recipe(series, 81, context_length=192, prediction_length=24)
    assert rebuild_forecast(at_six, series, "lear", {}).origin == "06:00"
    assert not rebuild_forecast(any_hour, series, "lear", {}).origin
    assert not rebuild_forecast(at_six, series, "tcn", {}).origin


def make_plan(csv: Path, store: Path) -> RetrainingPlan:
    """What the command makes of its flags."""
    settings = settings_from({"store": str(store)})
    market_names = {market: ModelName(f"{market}.mar") for market in MARKETS}
    return RetrainingPlan(
        csv, "hour", market_names, settings, GateTerms("pinball", 2, Rolling(most=8)), Fitting(8.0), keep_worse=True
    )


def test_a_killed_run_goes_on(csv: Path, store: Path, tmp_path: Path) -> None:
    """Cut between two markets of a group: the rest is done, what was done is not touched, the numbers are the same."""
    work, whole = make_plan(csv, store), fill(tmp_path / "whole", MARKETS)
    count = 0

    def fail_as_killed(done: int) -> None:
        nonlocal count
        count += done
        if count == 2:
            raise KeyboardInterrupt

    with Checkpoint(tmp_path / "log", work.digest, len(MARKETS)) as journal, pytest.raises(KeyboardInterrupt):
        Retraining(work).run(journal, fail_as_killed)
    before = store.joinpath("M00.mar").stat().st_mtime_ns
    with Checkpoint(tmp_path / "log", work.digest, len(MARKETS)) as journal:
        assert journal.done == 2
        told: list[int] = []
        Retraining(work).run(journal, told.append)
        assert len(told) == 2
        assert journal.done == len(MARKETS)
    assert store.joinpath("M00.mar").stat().st_mtime_ns == before
    other = make_plan(csv, whole)
    with Checkpoint(tmp_path / "other", other.digest, len(MARKETS)) as journal:
        Retraining(other).run(journal, told.append)
    for market in MARKETS:
        assert read_spec(store, market).weights == read_spec(whole, market).weights


def test_a_store_out_of_reach_ends_the_run(
    csv: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage while publishing is no market's fault: the run ends, and goes on when the store is back."""
    put = Source.put

    def fail_as_out(self: Source, name: ModelName, data: bytes) -> str:
        if name == "M01.mar":
            raise StoreUnavailable("the store is out")
        return put(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Source, "put", fail_as_out)
        code, said = retrain(csv, store, tmp_path / "log.jsonl")
    assert code == 2
    assert "error: the store is out" in said
    code, said = retrain(csv, store, tmp_path / "log.jsonl")
    assert {market: each["result"] for market, each in read_outcomes(tmp_path / "log.jsonl").items()} == {
        "M00": "published", "M01": "published", "M02": "published", "M03": "failed"
    }  # fmt: skip


def test_markets_of_two_kinds_are_fitted_apart(csv: Path, store: Path, tmp_path: Path) -> None:
    """One market forecasts further than the others: all are retrained as they are."""
    store.joinpath("M01.mar").write_bytes(pack_market(prediction_length=9))
    retrain(csv, store, tmp_path / "log.jsonl")
    results = {market: each["result"] for market, each in read_outcomes(tmp_path / "log.jsonl").items()}
    assert results == {"M00": "published", "M01": "published", "M02": "published", "M03": "failed"}
    forecasts = [read_spec(store, market).forecast for market in MARKETS[:3]]
    assert [each.prediction_length for each in forecasts if each] == [6, 9, 6]


def test_a_fit_that_fails_for_one_is_done_for_the_others(store: Path, tmp_path: Path) -> None:
    """A market whose prices end early cannot be judged while it is fitted, and is fitted with others: only it fails."""
    csv = write_prices(tmp_path / "prices.csv", MARKETS, empty="M01", since=24 * 8)
    code, said = retrain(csv, store, tmp_path / "log.jsonl")
    assert code == 1, said
    found = read_outcomes(tmp_path / "log.jsonl")
    assert found["M01"]["message"] == "M01: no values in the holdout part"
    assert [found[market]["result"] for market in MARKETS] == ["published", "failed", "published", "published"]


def test_a_covariate_that_is_gone_fails_its_market_alone(csv: Path, store: Path, tmp_path: Path) -> None:
    """The file has lost a column that one archive wants: that market is named, the others are retrained."""
    store.joinpath("M02.mar").write_bytes(pack_market(dynamic_feat=("wind",)))
    retrain(csv, store, tmp_path / "log.jsonl")
    found = read_outcomes(tmp_path / "log.jsonl")
    assert found["M02"]["message"].startswith("wind: prices.csv has no such column")
    assert [found[market]["result"] for market in MARKETS[:2]] == ["published", "published"]


def test_a_server_that_is_not_there_costs_no_market(csv: Path, store: Path, tmp_path: Path) -> None:
    """The archives are published all the same, and the log says who could not be told."""
    code, said = retrain(csv, store, tmp_path / "log.jsonl", "--reload", "http://127.0.0.1:9", "--target", "M00")
    assert code == 0, said
    found = read_outcomes(tmp_path / "log.jsonl")["M00"]
    assert found["result"] == "published"
    assert "is `fleetcast serve` running there" in found["message"]


def test_a_file_that_ends_during_a_day_retrains_archives_of_an_origin(tmp_path: Path) -> None:
    """The gate's windows are the last that start at midnight, and the rows that it leaves are said."""
    csv, store, log = write_prices(tmp_path / "prices.csv", ["M00"], days=40), tmp_path / "models", tmp_path / "log"
    csv.write_text("\n".join(csv.read_text().splitlines()[:-11]) + "\n")
    fill(store, ["M00"], origin="00:00")
    code, said = retrain(csv, store, log)
    assert code == 0, said
    assert "note: 1 of 1 markets: forecasts start at 00:00" in said
    assert read_outcomes(log)["M00"]["result"] == "published"
    assert "7 later rows are not used" in read_outcomes(log)["M00"]["note"]


def test_what_is_no_better_than_naive_is_not_published(tmp_path: Path) -> None:
    """Prices that repeat every day: the market fails as in `train`, another goes on, and a flag publishes it."""
    csv, store = write_prices(tmp_path / "prices.csv", ["M00", "M01"]), fill(tmp_path / "models", ["M00", "M01"])
    rows = [line.split(",") for line in csv.read_text().splitlines()]
    flat = [",".join([row[0], row[1] if not i else str(i % 24), *row[2:]]) for i, row in enumerate(rows)]
    csv.write_text("\n".join(flat) + "\n")
    before, log = store.joinpath("M00.mar").read_bytes(), tmp_path / "log.jsonl"
    asked = ("retrain", str(csv), "--time", "hour", "--store", str(store), "--windows", "8", "--epochs", "120")
    result = run(*asked, "--log", str(log))
    assert result.exit_code == 1, result.output
    found = read_outcomes(log)
    assert "is no better than the naive forecast's 0; the old archive stays" in found["M00"]["message"]
    assert [each["result"] for each in found.values()] == ["failed", "published"], found
    assert store.joinpath("M00.mar").read_bytes() == before
    code, said = retrain(csv, store, tmp_path / "again.jsonl", "--keep-worse", "--target", "M00")
    assert code == 0, said
    found = read_outcomes(tmp_path / "again.jsonl")
    assert found["M00"]["result"] == "published"
    assert "is no better than the naive forecast's 0" in found["M00"]["note"]


def test_what_is_published_was_fitted_to_every_row(tmp_path: Path) -> None:
    """Not only to those before the gate's windows: the numbers are those of a fresh fit to the whole file."""
    csv, store = write_prices(tmp_path / "prices.csv", ["M00"]), fill(tmp_path / "models", ["M00"])
    old = read_spec(store, "M00")
    assert old.forecast is not None
    code, said = retrain(csv, store, tmp_path / "log.jsonl")
    assert code == 0, said
    series = read_csv(csv, "hour", ["M00"])
    inputs = [refit_scalers(old.forecast, series[0])]
    (fresh,) = fit_forecasters(series, inputs, old.architecture, dict(old.config), Fitting(8.0))
    stored = read_tensors(open_archive(store.joinpath("M00.mar").read_bytes(), "M00"))
    for name, numbers in fresh.tensors.items():
        np.testing.assert_array_equal(stored[name], numbers)


def test_a_weekly_retraining_publishes_what_train_would(tmp_path: Path) -> None:
    """Weekly fits of docs/backtests.md are those of `train --train-until` weekly: `retrain` gives that archive."""
    whole = write_prices(tmp_path / "prices.csv", ["M00"], days=67)
    recipe = ("--time", "hour", "--target", "M00", "--known-future", "load_M00", "--architecture", "lear")
    for folder, until in (("weekly", "2024-05-03"), ("fresh", "2024-05-10")):
        flags = ("--members", "3", "--keep-worse", "--train-until", until, "--out", str(tmp_path / folder))
        made = run("train", str(whole), *recipe, *flags)
        assert made.exit_code == 0, made.output
    code, said = retrain(whole, tmp_path / "weekly", tmp_path / "log.jsonl", "--margin", "1e9", "--epochs", "0")
    assert code == 0, said
    assert read_outcomes(tmp_path / "log.jsonl")["M00"]["result"] == "published"
    weekly, fresh = (
        read_tensors(open_archive((tmp_path / each / "M00.mar").read_bytes(), each)) for each in ("weekly", "fresh")
    )
    for name, numbers in fresh.items():
        np.testing.assert_array_equal(weekly[name], numbers)


def test_the_gate_takes_windows_that_neither_has_seen(tmp_path: Path) -> None:
    """After enough new days the archive itself is judged on them; before, its recipe on the rows before the windows."""
    whole, store = write_prices(tmp_path / "prices.csv", ["M00"], days=26), fill(tmp_path / "models", ["M00"])
    lines, said = whole.read_text().splitlines(), dict[int, str]()
    for days in (20, 21, 26):  # four windows of six hours a day
        csv = tmp_path / "now.csv"
        csv.write_text("\n".join(lines[: 1 + 24 * days]) + "\n")
        code, output = retrain(csv, store, tmp_path / f"{days}.jsonl", "--margin", "50")
        assert code == 0, output
        assert read_outcomes(tmp_path / f"{days}.jsonl")["M00"]["result"] == "published", output
        said[days] = read_spec(store, "M00").description
    assert "may have seen these windows" in read_outcomes(tmp_path / "20.jsonl")["M00"]["note"]
    assert "of its recipe, fitted to the same rows, 8 windows from 2024-03-23 00:00:00" in said[21]
    assert "of version" in said[26]
    assert "8 windows from 2024-03-28 00:00:00" in said[26]
    assert "seen" not in read_outcomes(tmp_path / "26.jsonl")["M00"].get("note", "")
    assert read_spec(store, "M00").trained_until == "2024-03-29 23:00:00"
