"""Archives that learn the error of a column which forecasts the price: trained, shown, scored and retrained."""

import json
from pathlib import Path

import numpy as np
import pytest

from handlers.codecs.codec import describe_recipe
from model_store.archives.archive import open_archive
from model_store.archives.manifest import ForecastSpec
from tests.server import markets

pytestmark = pytest.mark.slow

DAYS, HOURS = 70, 24
GAP = slice(500, 530)  #: hours without an operator's forecast


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prices that no calendar explains, and an operator who sees them coming, but is too low in the evening."""
    rng = np.random.default_rng(0)
    hours = np.arange(DAYS * HOURS)
    evening = (hours % HOURS >= 17) & (hours % HOURS < 21)
    price = 60 + np.repeat(rng.normal(0, 30, DAYS), HOURS)
    operator = price - 15 * evening + rng.normal(0, 2, len(hours))
    path = tmp_path_factory.mktemp("data") / "p.csv"
    lines = ["hour,A,pre_A,load"]
    for hour in hours.tolist():
        stamp = np.datetime64("2024-03-04T00:00") + np.timedelta64(hour, "h")
        known = "" if GAP.start <= hour < GAP.stop else f"{operator[hour]:.2f}"
        lines.append(f"{str(stamp).replace('T', ' ')},{price[hour]:.2f},{known},{hour % 24}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def store(csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of deviations, fitted to all but the last 14 days."""
    out = tmp_path_factory.mktemp("store")
    made = markets.run(
        "train", str(csv), "--time", "hour", "--target", "A", "--residual-to", "pre_{target}", "--known-future", "load",
        "--quantiles", "0.1,0.5,0.9", "--train-until", "2024-04-29", "--out", str(out),
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    return out


def read_forecast(store: Path) -> ForecastSpec:
    """The recipe of the archive in a folder."""
    spec = open_archive((store / "A.mar").read_bytes(), "A.mar").spec
    assert spec is not None
    assert spec.forecast is not None
    return spec.forecast


def test_the_operator_is_bettered_by_what_its_error_shows(csv: Path, store: Path) -> None:
    """The evening's error is learnt: most of the operator's MAE goes, by a test that is sure of it."""
    scored = markets.run(
        "backtest", str(csv), "--time", "hour", "--models", str(store), "--against", "pre_A", "--json",
        "--from", "2024-04-29",
    )  # fmt: skip
    assert scored.exit_code == 0, scored.output
    (found,) = json.loads(scored.stdout)["markets"]
    against = found["against"]
    assert against["other_mae"] > 3
    assert against["skill"] > 0.3
    assert against["p_value"] < 0.01


def test_the_archive_says_what_it_is_added_to(store: Path) -> None:
    """In its record, in `inspect`, in the description that a server gives, and as a covariate that a request needs."""
    forecast = read_forecast(store)
    assert (forecast.residual_to, forecast.dynamic_feat) == ("pre_A", ("load", "pre_A"))
    assert forecast.scaler.scale < 10, "it is of the deviations, which are small"
    shown = markets.run("inspect", str(store / "A.mar"))
    assert "residual to" in shown.output
    assert "pre_A: what the network forecasts is added to it" in shown.output
    assert describe_recipe(forecast)["residual_to"] == "pre_A"


def test_a_gap_of_the_operator_is_filled_and_not_learnt(csv: Path, store: Path) -> None:
    """Backtests across the gap answer, leave its hours out, and say so."""
    scored = markets.run(
        "backtest", str(csv), "--time", "hour", "--models", str(store), "--against", "pre_A", "--json",
        "--from", "2024-03-24", "--until", "2024-03-27",
    )  # fmt: skip
    assert scored.exit_code == 0, scored.output
    (found,) = json.loads(scored.stdout)["markets"]
    assert found["scores"]["observed"] == 3 * HOURS - (GAP.stop - GAP.start)
    assert "30 steps have no pre_A; prices there are left out" in scored.stderr


def test_retraining_keeps_the_column_and_can_add_one(csv: Path, store: Path, tmp_path: Path) -> None:
    """What was a deviation stays one, with its scaler fitted anew; an archive of prices becomes one on request."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "A.mar").write_bytes((store / "A.mar").read_bytes())
    words = (
        "retrain",
        str(csv),
        "--time",
        "hour",
        "--windows",
        "7",
        "--margin",
        "50",
        "--log",
        str(tmp_path / "log.jsonl"),
    )
    result = markets.run(*words, "--store", str(kept))
    assert result.exit_code == 0, result.output
    assert "1 published" in result.output
    assert read_forecast(kept).residual_to == "pre_A"
    assert read_forecast(kept).scaler != read_forecast(store).scaler

    plain = tmp_path / "plain"
    made = markets.run(
        "train", str(csv), "--time", "hour", "--target", "A", "--known-future", "load", "--quantiles", "0.1,0.5,0.9",
        "--out", str(plain), "--keep-worse",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    result = markets.run(*words[:-1], str(tmp_path / "2.jsonl"), "--store", str(plain), "--residual-to", "pre_{target}")
    assert result.exit_code == 0, result.output
    line = json.loads((tmp_path / "2.jsonl").read_text())
    assert line["result"] == "published"
    assert line["value"] < 0.5 * line["predecessor"], "the operator knows what the calendar does not"
    assert read_forecast(plain).dynamic_feat == ("load", "pre_A")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--residual-to", "A"], "--residual-to A: A is a target, whose future no request can know"),
        (["--residual-to", "pre"], "there is no column 'pre'"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(csv: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    """One line that names the flag or the file."""
    result = markets.run("train", str(csv), "--time", "hour", "--target", "A", *flags, "--out", str(tmp_path / "no"))
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
