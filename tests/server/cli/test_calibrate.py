"""`fleetcast calibrate` publishes archives whose bands hold; `backtest` says both, and `retrain` keeps them so."""

import json
import re
from pathlib import Path

import pytest

from model_store.archives.archive import open_archive
from model_store.archives.manifest import Calibration
from tests.server.markets import fill, name_products, pack_market, run, write_prices

pytestmark = pytest.mark.slow

MARKETS = name_products(2)
DAYS = 80


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two markets; the second has no prices for the last days."""
    return write_prices(tmp_path_factory.mktemp("data") / "p.csv", MARKETS, days=DAYS, empty="M01", since=24)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Their archives."""
    return fill(tmp_path / "models", MARKETS)


def read_calibration(archive: Path) -> Calibration | None:
    """The record of the archive in the store."""
    spec = open_archive(archive.read_bytes(), archive.name).spec
    assert spec is not None
    return spec.calibration or None


def score(csv: Path, store: Path) -> dict[str, object]:
    """The first market's line of a backtest in JSON."""
    flags = ("--time", "hour", "--models", str(store), "--target", "M00", "--windows", "120", "--json")
    found: dict[str, object] = json.loads(run("backtest", str(csv), *flags).stdout)["markets"][0]
    return found


def test_calibrated_archives_are_published_and_stay_so(csv: Path, store: Path, tmp_path: Path) -> None:
    """Coverage before and after in the table and in the backtest; the market without prices is named and kept."""
    before = score(csv, store)
    result = run("calibrate", str(csv), "--time", "hour", "--models", str(store), "--days", "40")
    assert result.exit_code == 1, result.output
    assert "covered before" in result.output
    assert "note: M00.mar does not say until when it was trained" in " ".join(result.stderr.split())
    assert "error: M01: M01.mar: 0 actual values with a band" in " ".join(result.output.split())
    assert store.joinpath("M01.mar").read_bytes() == pack_market(1)
    record = read_calibration(store / "M00.mar")
    assert record is not None
    assert (record.low, record.high, record.until) == (0.1, 0.9, "2024-05-22 23:00:00")
    after = score(csv, store)
    assert after["uncalibrated"] == before["scores"]["coverage"]  # type: ignore[index]
    assert before["uncalibrated"] is None
    assert abs(after["scores"]["coverage"] - 0.8) < 0.03 < abs(before["scores"]["coverage"] - 0.8)  # type: ignore[index]
    assert "until when the archive was calibrated" in str(after["notes"])
    table = run("backtest", str(csv), "--time", "hour", "--models", str(store), "--target", "M00")
    assert re.search(r"^M00: \d\d\.\d% covered, \d+\.\d% before its calibration$", table.stdout, re.MULTILINE)
    assert "calibrated" in run("inspect", str(store / "M00.mar")).output

    quick = (
        "--time",
        "hour",
        "--store",
        str(store),
        "--target",
        "M00",
        "--epochs",
        "2",
        "--windows",
        "8",
        "--keep-worse",
    )
    again = run("retrain", str(csv), *quick, "--log", str(tmp_path / "a.jsonl"))
    assert again.exit_code == 0, again.output
    renewed = read_calibration(store / "M00.mar")
    assert renewed is not None
    assert (renewed.windows, renewed.until) == (record.windows, record.until)
    assert renewed.sha256 != record.sha256
    assert run("verify", str(store / "M00.mar")).exit_code == 0
    refused = run("calibrate", str(csv), "--time", "hour", "--models", str(store), "--target", "M00")
    assert "was not fitted to 0 windows" in " ".join(refused.output.split())
    same = run("retrain", str(csv), *quick, "--log", str(tmp_path / "b.jsonl"))
    assert "1 unchanged" in same.output


def test_retrain_calibrates_what_was_not(csv: Path, store: Path, tmp_path: Path) -> None:
    """With --calibrate: the days are held back from the fit that offsets are learnt of, not from the published one."""
    quick = (
        "--time",
        "hour",
        "--store",
        str(store),
        "--target",
        "M00",
        "--epochs",
        "2",
        "--windows",
        "8",
        "--keep-worse",
    )
    result = run("retrain", str(csv), *quick, "--calibrate", "40", "--log", str(tmp_path / "a.jsonl"))
    assert result.exit_code == 0, result.output
    record = read_calibration(store / "M00.mar")
    assert record is not None
    assert record.windows == 160
    spec = open_archive(store.joinpath("M00.mar").read_bytes(), "m").spec
    assert spec is not None
    assert spec.trained_until == record.until


def test_the_products_of_one_archive_are_columns(csv: Path, tmp_path: Path) -> None:
    """`--target` is the archive's name, its products are columns; each has a row, and one that is missing is named."""
    store = fill(tmp_path / "models", [])
    store.joinpath("both.mar").write_bytes(pack_market(products=("M00", "load_M00")))
    store.joinpath("lost.mar").write_bytes(pack_market(products=("M00", "nowhere")))
    asked = ("calibrate", str(csv), "--time", "hour", "--models", str(store), "--target", "both", "--target", "lost")
    result = run(*asked, "--days", "60")
    assert result.exit_code == 1
    assert "both#M00" in result.output
    assert "both#load" in result.output
    assert "error: lost: " in result.stderr
    assert "nowhere" in result.stderr
    assert result.stderr.count("does not say until when") == 1
    record = read_calibration(store / "both.mar")
    assert record is not None
    assert record.windows == 240
    assert read_calibration(store / "lost.mar") is None
