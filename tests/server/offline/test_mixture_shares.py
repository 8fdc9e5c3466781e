"""A mixture end to end with the commands of a user: trained, judged, calibrated with new weights, retrained, served."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from handlers.forecasters.mixture import SHARES
from handlers.model import open_model
from model_store.archives.archive import Archive, open_archive, read_tensors
from tests.server.markets import run, write_prices

pytestmark = pytest.mark.slow

TIME = ("--time", "hour")
REFIT = ("--epochs", "5", "--windows", "8", "--margin", "1000", "--keep-worse")


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """130 days of one market and its load."""
    return write_prices(tmp_path_factory.mktemp("data") / "prices.csv", ["M00"], days=130)


@pytest.fixture(scope="module")
def trained(csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its mixture, fitted to the first days, which no test changes."""
    out = tmp_path_factory.mktemp("store")
    parts = ("--architecture", "lear,lear:2,mlp", "--stack", "--config", '{"mlp": {"hidden": 8}}', "--epochs", "5")
    flags = (*TIME, "--target", "M00", "--known-future", "load_M00", *parts, "--train-until", "2024-05-13")
    result = run("train", str(csv), *flags, "--out", str(out), "--keep-worse")
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, for a test to change."""
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def open_stored(store: Path) -> Archive:
    """The archive as it is in the store now."""
    return open_archive(store.joinpath("M00.mar").read_bytes(), "M00.mar")


def test_calibrate_learns_new_weights_and_offsets(csv: Path, store: Path) -> None:
    """They come from the days after the fit; parts keep their numbers, and the archive is proved by a new sample."""
    before = open_stored(store)
    result = run("calibrate", str(csv), *TIME, "--models", str(store))
    assert result.exit_code == 0, result.output
    after = open_stored(store)
    old, new = read_tensors(before), read_tensors(after)
    assert not np.array_equal(old.pop(SHARES), new[SHARES])
    np.testing.assert_allclose(new.pop(SHARES).sum(0), 1, rtol=1e-5)
    assert all(np.array_equal(old[name], new[name]) for name in old)
    assert after.spec is not None
    assert after.spec.calibration
    assert open_model(after).prove()


def test_backtest_inspect_and_verify_know_it(csv: Path, store: Path) -> None:
    """Scores, the parts with their weights in words and as JSON, and a load as in a worker."""
    result = run("backtest", str(csv), *TIME, "--models", str(store), "--json")
    assert result.exit_code == 0, result.output
    (market,) = json.loads(result.stdout)["markets"]
    assert market["scores"]["rmae"] < 1
    path = str(store / "M00.mar")
    shown = run("inspect", path).output
    assert shown.count("part ") == 3
    assert "lear, weight 0." in shown
    described = json.loads(run("inspect", path, "--json").stdout)["mixture"]
    assert [(each["architecture"], each["members"]) for each in described] == [("lear", 1), ("lear", 2), ("mlp", 1)]
    assert sum(each["weight"] for each in described) == pytest.approx(1, abs=1e-3)
    assert "golden sample reproduced" in run("verify", path).output


def test_retrain_fits_parts_and_weights_anew(csv: Path, store: Path, tmp_path: Path) -> None:
    """The new archive has the same parts, other numbers and other weights."""
    before = read_tensors(open_stored(store))
    flags = (*REFIT, "--log", str(tmp_path / "log.jsonl"))
    result = run("retrain", str(csv), *TIME, "--store", str(store), *flags)
    assert result.exit_code == 0, result.output
    after = read_tensors(open_stored(store))
    assert after.keys() == before.keys()
    assert not np.array_equal(after[SHARES], before[SHARES])
    assert not np.array_equal(after["parts.0.head.weight"], before["parts.0.head.weight"])


def test_retrain_makes_mixtures_of_single_architectures(csv: Path, tmp_path: Path) -> None:
    """`--architecture lear,mlp --stack` for a fleet that was fitted by one; clients need not change."""
    store = tmp_path / "store"
    flags = (*TIME, "--target", "M00", "--architecture", "lear", "--train-until", "2024-05-13", "--out", str(store))
    assert run("train", str(csv), *flags, "--keep-worse").exit_code == 0
    mixed, log = ("--architecture", "lear,mlp", "--stack"), ("--log", str(tmp_path / "log.jsonl"))
    result = run("retrain", str(csv), *TIME, "--store", str(store), *REFIT, *mixed, *log)
    assert result.exit_code == 0, result.output
    spec = open_stored(store).spec
    assert spec is not None
    assert (spec.architecture, spec.config["stack"]) == ("mixture", True)
