"""`fleetcast backtest`: the table, the JSON, and that one bad market does not affect the others."""

import json
import re
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handlers.evaluation.correlation import estimate_gaussian
from handlers.evaluation.scores import score_windows
from handlers.kinds import ArchiveParts, pack_model
from handlers.training.time_series import read_csv
from model_store.archives.archive import DEFAULT_LIMITS
from model_store.archives.manifest import Kind, Tails
from model_store.names import ModelName
from server.offline.rolling_windows import InProcess, open_unpublished
from tests.server.markets import HISTORY, HORIZON, fill, name_products, pack_market, run, write_prices

MARKETS = name_products(3)
WIDE = Tails(low=5, high=5, band=(0.1, 0.9))
KNOWN: dict[str, Any] = {"dynamic_feat": ("load_M00",)}


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three markets."""
    return write_prices(tmp_path_factory.mktemp("data") / "prices.csv", MARKETS)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Their archives, which want the load of the first."""
    return fill(tmp_path / "models", MARKETS, **KNOWN)


def test_every_column_with_an_archive_is_scored(csv: Path, store: Path) -> None:
    """Without targets the store says which: a row a market, the last 28 windows, and their mean."""
    store.joinpath("M02.mar").rename(store / "other.mar")
    result = run("backtest", str(csv), "--time", "hour", "--models", str(store))
    assert result.exit_code == 0, result.output
    rows = [line for line in result.output.splitlines() if line.startswith("│")]
    assert [row.split("│")[1].strip() for row in rows] == ["M00", "M01", "mean"] * 2
    assert rows[0].split("│")[-2].strip() == "28"
    assert "in 80%" in result.output


def test_the_numbers_are_those_of_the_scores(csv: Path, store: Path) -> None:
    """JSON: the scores of the windows asked for, in which the archive's covariate was found by its name."""
    result = run(
        "backtest", str(csv), "--time", "hour", "--models", str(store), "--target", "M01", "--json",
        "--from", "2024-03-10", "--until", "2024-03-20 12:00", "--every", "24",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["markets"]
    prices, load = read_csv(csv, "hour", ["M01", "load_M00"])
    own = open_unpublished(pack_market(1, **KNOWN), ModelName("M01.mar"), DEFAULT_LIMITS)
    origins = np.arange(6 * 24, 16 * 24 + 12 - HORIZON + 1, 24)
    requests: list[dict[str, object]] = [
        {
            "start": prices.stamp(origin - HISTORY),
            "target": [None if isnan(price) else price for price in prices.values[origin - HISTORY : origin].tolist()],
            "dynamic_feat": [load.values[origin - HISTORY : origin + HORIZON].tolist()],
        }
        for origin in origins.tolist()
    ]
    ask, _ = InProcess().of(own)
    y = prices.values[origins[:, None] + np.arange(HORIZON)]
    nothing = np.full(y.shape, np.nan)
    expected = score_windows(y, ask(requests), np.array([0.1, 0.5, 0.9]), nothing, np.full(len(y), np.nan))
    assert (found["first"], found["last"], found["windows"]) == ("2024-03-10 00:00:00", "2024-03-20 05:00:00", 11)
    for name in ("pinball", "wql", "wape", "crps", "coverage", "observed"):
        assert found["scores"][name] == pytest.approx(getattr(expected, name), rel=1e-12)
    assert found["scores"]["rmae"] > 0
    assert sum(found["calibration"]["share"]) == pytest.approx(1)
    assert len(found["by_hour"]["model"]) == 24


@pytest.mark.slow
def test_a_bad_market_stops_no_other(csv: Path, store: Path) -> None:
    """A broken archive and a missing one are named and end the command with 1; the third market is scored."""
    store.joinpath("M00.mar").write_bytes(b"PK nothing")
    store.joinpath("M01.mar").unlink()
    targets = [word for market in MARKETS for word in ("--target", market)]
    result = run("backtest", str(csv), "--time", "hour", "--models", str(store), "--json", *targets)
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert [each["target"] for each in found["markets"]] == ["M02"]
    assert set(found["failed"]) == {"M00", "M01"}
    assert "error: M01: M01.mar is not in" in result.stderr


def test_an_archive_of_another_frequency_is_named(csv: Path, store: Path) -> None:
    """What the whole backtest of a market fails for is said once, not asked window by window."""
    store.joinpath("M01.mar").write_bytes(pack_market(frequency="1D"))
    result = run("backtest", str(csv), "--time", "hour", "--models", str(store), "--target", "M01")
    assert result.exit_code == 1
    assert "error: M01: M01.mar forecasts steps of 1D, but M01 has 1h" in result.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--from", "yesterday"], "--from: expected a date such as 2024-01-01, not 'yesterday'"),
        (["--target", "X9"], "there is no column 'X9'"),
        (["--name-template", "no/{target}.mar"], "has no archive no/{target}.mar of any column"),
        (["--models", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(csv: Path, store: Path, flags: list[str], said: str) -> None:
    """And nothing else: exit code 2, or 1 where it is one market's."""
    store.joinpath("X9.mar").write_bytes(pack_market())
    result = run("backtest", str(csv), "--time", "hour", "--models", str(store), *flags)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_report_is_one_file_that_needs_nothing_else(csv: Path, store: Path, tmp_path: Path) -> None:
    """Every market in the table, names escaped, nothing fetched from anywhere."""
    html = tmp_path / "report.html"
    result = run("backtest", str(csv), "--time", "hour", "--models", str(store), "--html", str(html))
    assert result.exit_code == 0, result.output
    text = html.read_text()
    assert text.count('<th scope="row">M0') == 3
    assert "default-src 'none'" in text
    assert not re.search(r"<(link|img|iframe)|<script[^>]* src|@import|url\(", text)


def test_a_file_that_ends_during_a_day_is_scored_up_to_the_last_whole_window(csv: Path, tmp_path: Path) -> None:
    """Archives that forecast from midnight: backtest, gate and correlation take the last windows, and say so."""
    lines = csv.read_text().splitlines()
    short = tmp_path / "short.csv"
    short.write_text("\n".join([lines[0], *lines[8:-11]]) + "\n")  # from 07:00 to 12:00
    store = fill(tmp_path / "models", MARKETS, origin="00:00")
    result = run("backtest", str(short), "--time", "hour", "--models", str(store), "--json")
    assert result.exit_code == 0, result.output
    (found, *_) = json.loads(result.stdout)["markets"]
    assert (found["first"], found["last"]) == ("2024-03-06 00:00:00", "2024-03-23 05:00:00")
    note = "forecasts start at 00:00, so the last window ends at 2024-03-23 05:00:00; 7 later rows are not used"
    assert found["notes"] == [note]
    assert f"note: M00, M01, M02: {note}" in result.stderr
    targets = [word for market in MARKETS for word in ("--target", market)]
    joint = ("--store", str(store), "--since", "2024-03-07", "--out", str(store / "joint.mar"))
    result = run("correlate", str(short), "--time", "hour", *targets, *joint)
    assert result.exit_code == 0, result.output
    assert f"note: short.csv: {note}" in result.stderr
    assert "17 windows" in result.stdout


def test_windows_that_an_archive_was_fitted_to_are_said(csv: Path, tmp_path: Path) -> None:
    """`trained_until` lies within the windows of one market, before those of another, and is unknown of the third."""
    store = fill(tmp_path / "models", MARKETS)
    for seed, until in ((0, "2024-03-22 23:00:00"), (1, "2024-03-01 00:00:00")):
        store.joinpath(f"M{seed:02}.mar").write_bytes(pack_market(seed, trained_until=until))
    flags = ("--windows", "8", "--json")
    result = run("backtest", str(csv), "--time", "hour", "--models", str(store), *flags)
    assert result.exit_code == 0, result.output
    said = "4 of 8 windows are in-sample: the archive was trained until 2024-03-22 23:00:00, and its scores there"
    first, *others = json.loads(result.stdout)["markets"]
    assert [note for note in first["notes"] if note.startswith(said)]
    assert not [note for other in others for note in other["notes"]]
    assert f"note: M00: {said}" in result.stderr
    targets = [word for market in MARKETS for word in ("--target", market)]
    joint = ("--store", str(store), "--since", "2024-03-20", "--out", str(store / "joint.mar"))
    result = run("correlate", str(csv), "--time", "hour", *targets, *joint)
    assert result.exit_code == 0, result.output
    assert "note: prices.csv: M00.mar: 12 of 16 windows are in-sample" in result.stderr


def test_a_market_of_which_nothing_is_observed_is_no_success(tmp_path: Path) -> None:
    """Its prices end before the windows: it is named and the exit code is 1, the other is scored."""
    csv = write_prices(tmp_path / "prices.csv", ["M00", "M01"], empty="M01", since=24 * 10)
    store = fill(tmp_path / "models", ["M00", "M01"])
    result = run("backtest", str(csv), "--time", "hour", "--models", str(store), "--windows", "8", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert [each["target"] for each in found["markets"]] == ["M00"]
    assert found["failed"]["M01"].startswith("M01: no price is observed in the 8 windows from 2024-03-22 00:00:00 to")


@pytest.mark.slow
def test_scenarios_are_scored(csv: Path, tmp_path: Path) -> None:
    """The share of windows whose mean is outside all scenarios: with flat tails all of a flat forecast's are."""
    found = {}
    for tail, changes in {"clamp": {}, "exponential": {"tail": "exponential", "tails": WIDE}}.items():
        store = fill(tmp_path / tail, MARKETS[:2], **changes)
        store.joinpath("joint.mar").write_bytes(make_correlation([f"{each}.mar" for each in MARKETS[:2]]))
        flags = ("--time", "hour", "--models", str(store), "--scenarios", "joint.mar")
        result = run("backtest", str(csv), *flags)
        assert result.exit_code == 0, result.output
        assert "of the windows have a mean outside all 100 joint scenarios" in result.output
        told = json.loads(run("backtest", str(csv), *flags, "--json").stdout)["markets"]
        found[tail] = [each["outside_scenarios"] for each in told]
        online = run("backtest", str(csv), *flags, "--online")
        assert "with adaptive bands, whose levels a server draws scenarios from" in online.output
        told = json.loads(run("backtest", str(csv), *flags, "--online", "--json").stdout)["markets"]
        assert [each["outside_scenarios"] for each in told] == found[tail], "as they are without prices"
        assert all(0 <= each["online"]["outside_scenarios"] <= 1 for each in told)
    assert min(found["clamp"]) > 0.5
    assert max(found["exponential"]) < 0.2
    lacking = run("backtest", str(csv), "--time", "hour", "--models", str(store), "--scenarios", "M00.mar")
    assert "M00.mar is no correlation" in lacking.output


def make_correlation(names: list[str]) -> bytes:
    """An archive of products and steps that move together."""
    numbers = np.random.default_rng(5)
    errors = numbers.standard_normal((200, 1, 1)) + 0.1 * numbers.standard_normal((200, len(names), HORIZON))
    estimate = estimate_gaussian(errors, tuple(names))
    parts = ArchiveParts(correlation=estimate.record, tensors=estimate.tensors)
    return pack_model(Kind.CORRELATION, parts, model_name="joint")


def test_the_archive_is_scored_beside_a_column(tmp_path: Path) -> None:
    """The operator's column: errors by hand in JSON, a table of its own, a section of the page, and a wrong name."""
    csv = write_prices(tmp_path / "p.csv", MARKETS[:1])
    lines = csv.read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    operator = [
        "" if i % 40 == 3 or not row[1] else f"{float(row[1]) + 3 * (-1) ** i:.2f}" for i, row in enumerate(rows)
    ]
    made = [f"{line},{price}" for line, price in zip(lines[1:], operator, strict=True)]
    csv.write_text("\n".join([f"{lines[0]},pre_M00", *made]) + "\n")
    store = fill(tmp_path / "models", MARKETS[:1])
    asked = ("backtest", str(csv), "--time", "hour", "--models", str(store), "--against", "pre_{target}")
    result = run(*asked, "--json", "--html", str(tmp_path / "r.html"))
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["markets"]
    against = found["against"]
    assert against["column"] == "pre_M00"
    assert against["other_mae"] == pytest.approx(3, abs=0.01)
    assert against["skill"] == pytest.approx(1 - against["mae"] / against["other_mae"])
    assert against["observed"] < found["scores"]["observed"]
    assert against["p_value"] > 0.99, "random weights are worse than an operator who is 3 off"
    page = (tmp_path / "r.html").read_text()
    assert "Beside a column of the file" in page
    assert f'<td data-head="MAE">{against["mae"]:.3f}</td>' in page
    shown = run(*asked)
    assert "pre_M00" in shown.output
    wrong = run(*asked[:-1], "pre")
    assert wrong.exit_code == 2
    assert "p.csv has no column 'pre'" in wrong.stderr


def test_adaptive_bands_are_replayed(csv: Path, store: Path) -> None:
    """A second table with coverage as it is and as it would be; the same in the JSON; a server cannot replay."""
    asked = ["backtest", str(csv), "--time", "hour", "--models", str(store), "--online"]
    result = run(*asked)
    assert result.exit_code == 0, result.output
    assert "adaptive bands" in result.output
    assert " > " in result.output
    found = json.loads(run(*asked, "--json").stdout)["markets"][0]["online"]
    assert [band["nominal"] for band in found["bands"]] == [0.8]
    assert found["pinball_adaptive"] > 0
    refused = run(*asked, "--url", "http://127.0.0.1:1")
    assert refused.exit_code != 0
    assert "--online" in refused.output


@pytest.mark.slow
def test_recipes_are_fitted_anew(csv: Path, tmp_path: Path) -> None:
    """With --refit a fit to the rows before forecasts in place of random weights, and is better; a server cannot."""
    store = fill(tmp_path / "models", MARKETS[:1])
    path = store / "M00.mar"
    path.write_bytes(pack_market(0, trained_until="2024-03-05 00:00:00"))
    asked = ["backtest", str(csv), "--time", "hour", "--models", str(store), "--target", "M00", "--windows", "8"]
    asked += ["--online", "--json"]
    (plain,) = json.loads(run(*asked).stdout)["markets"]
    result = run(*asked, "--refit", "2")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["markets"]
    assert found["scores"]["pinball"] < plain["scores"]["pinball"]
    assert any("was fitted anew every 2 days to the rows before" in note for note in found["notes"])
    assert found["online"]["pinball_fixed"] == pytest.approx(found["scores"]["pinball"])
    refused = run(*asked, "--refit", "2", "--url", "http://127.0.0.1:1")
    assert refused.exit_code != 0
    assert "leave out --url" in refused.output


def test_prices_in_different_units_have_no_mean(csv: Path, tmp_path: Path) -> None:
    """Relative scores have one; those in EUR and AUD have none, neither in the table nor in JSON."""
    store = fill(tmp_path / "models", MARKETS[:2])
    store.joinpath("M01.mar").write_bytes(pack_market(1, unit="AUD/MWh"))
    told = run("backtest", str(csv), "--time", "hour", "--models", str(store), "--json")
    mean = json.loads(told.stdout)["mean"]
    assert (mean["pinball"], mean["crps"]) == (None, None)
    assert mean["rmae"] > 0
    shown = run("backtest", str(csv), "--time", "hour", "--models", str(store)).output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if line.startswith("│")]
    means = [row for row in rows if row[0] == "mean"]
    assert [row[1] for row in means] == ["-", "-"]
    assert "of the median" in shown


@pytest.mark.slow
def test_each_product_of_an_archive_is_a_market(csv: Path, tmp_path: Path) -> None:
    """Its name is that of the archive, its products are columns of the file: each has a row, joint scenarios by its
    name in the correlation, and a replay by its own prices, beside an archive of one.
    """
    store = fill(tmp_path / "models", MARKETS[2:])
    (store / "lu.mar").write_bytes(pack_market(7, products=tuple(MARKETS[:2])))
    names = [f"lu.mar#{each}" for each in MARKETS[:2]]
    (store / "joint.mar").write_bytes(make_correlation([*names, "M02.mar"]))
    asked = ["backtest", str(csv), "--time", "hour", "--models", str(store), "--target", "lu", "--target", "M02"]
    more = ["--online", "--scenarios", "joint.mar"]
    result = run(*asked, *more, "--json")
    assert result.exit_code == 0, result.output
    found = {each["target"]: each for each in json.loads(result.stdout)["markets"]}
    assert {name: each["model"] for name, each in found.items()} == {
        "lu#M00": "lu.mar#M00", "lu#M01": "lu.mar#M01", "M02": "M02.mar",
    }  # fmt: skip
    for each in found.values():
        assert each["windows"] == 28
        assert each["uncalibrated"] is None
        assert 0 <= each["online"]["outside_scenarios"] <= 1
        assert each["online"]["pinball_adaptive"] < each["online"]["pinball_fixed"]
    scores = [found[f"lu#{each}"]["scores"]["pinball"] for each in MARKETS[:2]]
    assert scores[0] != scores[1]
    alone = json.loads(run(*asked[:-2], "--json").stdout)["markets"]
    assert [each["scores"]["pinball"] for each in alone] == scores
    assert "lu#M01" in run(*asked, *more).output
    calibrated = run("calibrate", *asked[1:-2], "--days", "1000")
    assert calibrated.exit_code == 1, "twenty days are too few"
    for flag, value in {"--refit": "7", "--against": "M02", "--url": "http://127.0.0.1:1"}.items():
        refused = run(*asked[:-2], flag, value)
        assert refused.exit_code == 1
        assert f"lu.mar has 2 products; leave out {flag}, which takes one" in re.sub(r"\s+", " ", refused.stderr)


@pytest.mark.slow
def test_a_calibrated_archive_of_products_is_scored_on_top_of_its_offsets(tmp_path: Path) -> None:
    """`calibrate` gives each product offsets; the backtest tells the coverage before, and adapts on top of them."""
    csv = write_prices(tmp_path / "long.csv", MARKETS[:2], days=70)
    store = tmp_path / "models"
    store.mkdir()
    (store / "lu.mar").write_bytes(pack_market(7, products=tuple(MARKETS[:2])))
    asked = [str(csv), "--time", "hour", "--models", str(store), "--target", "lu"]
    assert run("calibrate", *asked, "--days", "60").exit_code == 0
    found = json.loads(run("backtest", *asked, "--online", "--json").stdout)["markets"]
    for each in found:
        assert each["uncalibrated"] < each["scores"]["coverage"] - 0.2
        (band,) = each["online"]["bands"]
        assert band["fixed"] == pytest.approx(each["scores"]["coverage"])
        assert band["adaptive"] > 0.6
    assert found[0]["uncalibrated"] != found[1]["uncalibrated"]
