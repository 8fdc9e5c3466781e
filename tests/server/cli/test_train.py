"""`fleetcast train` turns a price file into archives that load, or prints one error line."""

import gzip
import json
import os
import re
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import UNSET
from typer.testing import Result

from handlers.forecasters import ARCHITECTURES
from handlers.training.fit import fit_forecasters
from handlers.training.tails import UNSEEN
from handlers.training.time_series import Series, read_csv
from model_store.archives.archive import Archive, open_archive, read_tensors
from model_store.archives.manifest import Tails
from model_store.names import ModelName
from model_store.stores.object_store import open_source
from server.cli import price_flags
from server.cli.setting_flags import settings_from
from server.offline import training
from server.offline.archive_location import locate_archive
from server.offline.archive_tools import verify_archive
from server.offline.training import choose_architecture
from tests.server import markets

pytestmark = pytest.mark.slow

HOURS = 24 * 25
QUICK = ("--architecture", "tcn", "--config", '{"channels": 4}', "--epochs", "0.5", "--keep-worse")


def run(*arguments: str) -> Result:
    """Run the command as the command line does."""
    return markets.run("train", *arguments)


@pytest.fixture(scope="module")
def prices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 days of two hourly prices, a few missing, and a load forecast of each."""
    path, rng = tmp_path_factory.mktemp("data") / "prices.csv.gz", np.random.default_rng(0)
    lines = ["hour,NSW1,VIC1,load_NSW1,load_VIC1"]
    for hour in range(HOURS):
        stamp = datetime.fromisoformat("2024-03-01") + hour * timedelta(hours=1)
        nsw, vic = 60 + 20 * np.sin(hour / 24 * 2 * np.pi) + rng.normal(0, 5, 2)
        cells = ["" if hour % 50 == 7 else f"{nsw:.2f}", f"{vic:.2f}", f"{nsw * 100:.0f}", f"{vic * 90:.0f}"]
        lines.append(f"{stamp:%Y-%m-%d %H:%M},{','.join(cells)}")
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def open_stored(store: Path, name: str) -> Archive:
    """An archive of the store."""
    return open_archive(store.joinpath(name).read_bytes(), name)


def test_archives_load_and_carry_what_was_asked_for(prices: Path, tmp_path: Path) -> None:
    """Two targets in one call: two archives that a worker's own checks accept, with the options in their records."""
    store = tmp_path / "made" / "store"
    columns = ("--time", "hour", "--target", "NSW1", "--target", "VIC1", "--known-future", "load_{target}")
    words = ("--unit", "AUD/MWh", "--time-zone", "Etc/GMT-10", "--scaling", "linear", "--prediction-length", "12")
    result = run(
        str(prices), *columns, *words, *QUICK, "--out", str(store), "--name-template", "au/{target}.mar",
        "--quantiles", "0.05,0.5,0.95", "--train-until", "2024-03-25",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for target in ("NSW1", "VIC1"):
        spec = open_stored(store, f"au/{target}.mar").spec
        assert spec is not None
        assert spec.description == "trained on prices.csv.gz, 2024-03-01 00:00:00 to 2024-03-24 23:00:00"
        forecast = spec.forecast
        assert forecast is not None
        assert (forecast.frequency, forecast.context_length, forecast.prediction_length) == ("1h", 168, 12)
        assert (forecast.unit, forecast.time_zone, forecast.scaler.kind) == ("AUD/MWh", "Etc/GMT-10", "linear")
        assert forecast.dynamic_feat == (f"load_{target}",)
        assert forecast.quantile_levels == (0.05, 0.5, 0.95)
        place = locate_archive(settings_from({"store": str(store)}), ModelName(f"au/{target}.mar"))
        assert "golden sample reproduced" in verify_archive(place)
    assert f"fleetcast serve --store {store}" in result.output


def test_the_default_levels_have_tails(prices: Path, tmp_path: Path) -> None:
    """Without --quantiles there are nine levels from 0.01 to 0.99, so that samples are not cut off at 0.1 and 0.9."""
    result = run(str(prices), "--time", "hour", "--target", "NSW1", "--out", str(tmp_path), *QUICK)
    assert result.exit_code == 0, result.output
    (archive,) = tmp_path.glob("*.mar")
    spec = open_archive(archive.read_bytes(), "m").spec
    assert spec is not None
    assert spec.forecast is not None
    assert spec.forecast.quantile_levels == (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


def test_tails_are_learnt_and_shown(prices: Path, tmp_path: Path) -> None:
    """By default samples go beyond the outer levels as far as the holdout's prices did; `--tail clamp` has none."""
    asked = (str(prices), "--time", "hour", "--target", "VIC1", *QUICK)
    for tail in ("exponential", "clamp"):
        flags = () if tail == "exponential" else ("--tail", tail)
        result = run(*asked, "--out", str(tmp_path / tail), *flags)
        assert result.exit_code == 0, result.output
    spec, flat = (open_stored(tmp_path / tail, "VIC1.mar").spec for tail in ("exponential", "clamp"))
    assert spec is not None and spec.forecast is not None and flat is not None and flat.forecast is not None  # noqa: PT018
    tails = spec.forecast.tails
    assert tails
    assert tails.band == (0.1, 0.9)
    assert sum(tails.beyond) > 0
    assert (flat.forecast.tail, flat.forecast.tails) == ("clamp", UNSET)
    assert spec.forecast.tails != Tails(low=UNSEEN, high=UNSEEN, band=(0.1, 0.9))
    shown = markets.run("inspect", str(tmp_path / "exponential" / "VIC1.mar"))
    assert "exponential beyond the levels 0.01 and 0.99, by" in " ".join(shown.output.split())


def test_the_same_seed_gives_the_same_bytes(prices: Path, tmp_path: Path) -> None:
    """Archives are reproducible, and a seed is not ignored."""
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        result = run(
            str(prices), "--time", "hour", "--target", "NSW1", *QUICK, "--seed", seed, "--out", str(tmp_path / folder)
        )
        assert result.exit_code == 0, result.output
    a, b, c = (tmp_path.joinpath(folder, "NSW1.mar").read_bytes() for folder in "abc")
    assert a == b != c


def test_archives_go_into_a_bucket(prices: Path, bucket: str) -> None:
    """`--out s3://...` stores under the prefix, for the mlp as well."""
    result = run(
        str(prices), "--time", "hour", "--target", "VIC1", "--architecture", "mlp", "--config", '{"hidden": 8}',
        "--epochs", "0.5", "--keep-worse", "--out", f"s3://{bucket}/prices",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    fetched = open_source(f"s3://{bucket}/prices").get(ModelName("VIC1.mar"))
    assert fetched is not None
    tensors = read_tensors(open_archive(fetched.data, "VIC1.mar"))
    assert tensors["second.weight"].shape == (8, 8)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_is_trained_and_proved(prices: Path, tmp_path: Path, architecture: str) -> None:
    """A forecast shorter than the default's, from a shorter context: the archive loads as a worker would load it."""
    fields = ARCHITECTURES[architecture].config.__struct_fields__
    config = json.dumps({name: 4 for name in ("hidden", "channels", "paths") if name in fields})
    lengths = (
        "--context-length",
        "20",
        "--prediction-length",
        "12",
        "--config",
        config,
        "--epochs",
        "0.1",
        "--keep-worse",
    )
    quantiles = ("--quantiles", "0.2,0.5,0.8")  # which four paths can tell
    result = run(
        str(prices), "--time", "hour", "--target", "VIC1", "--known-future", "load_{target}", *lengths,
        "--architecture", architecture, "--out", str(tmp_path), *quantiles,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    proved = verify_archive(locate_archive(settings_from({"store": str(tmp_path)}), ModelName("VIC1.mar")))
    assert proved.startswith(f"{architecture}-")
    assert proved.endswith("golden sample reproduced")


def test_a_lear_of_days_forecasts_from_midnight(prices: Path, tmp_path: Path) -> None:
    """Eight days of context and 00:00 unless told otherwise; members and another origin reach the record."""
    for flags, lengths in (((), (192, "00:00")), (("--members", "2", "--origin", "12:00"), (192, "12:00"))):
        result = run(
            str(prices), "--time", "hour", "--target", "VIC1", "--architecture", "lear", *flags, "--out", str(tmp_path)
        )
        assert result.exit_code == 0, result.output
        spec = open_stored(tmp_path, "VIC1.mar").spec
        assert spec is not None
        assert spec.forecast is not None
        assert (spec.forecast.context_length, spec.forecast.origin) == lengths
        assert spec.config["marks"] == 7
        assert spec.config.get("members", 1) == (2 if flags else 1)
        assert {channel.feature for channel in spec.forecast.inputs} >= {"monday", "sunday"}


@pytest.mark.parametrize("architecture", ["tcn", "gru"])
def test_any_architecture_can_be_an_ensemble(prices: Path, tmp_path: Path, architecture: str) -> None:
    """Members of one fit differ, and the archive is proved by its golden sample."""
    config = json.dumps({"tcn": {"channels": 4}, "gru": {"hidden": 4}}[architecture])
    result = run(
        str(prices), "--time", "hour", "--target", "VIC1", "--architecture", architecture, "--members", "3",
        "--config", config, "--epochs", "0.1", "--keep-worse", "--context-length", "30", "--out", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    biases = [read_tensors(open_stored(tmp_path, "VIC1.mar"))[f"members.{i}.head.bias"] for i in range(3)]
    assert len({bias.tobytes() for bias in biases}) == 3


def test_the_help_lists_every_architecture() -> None:
    """A line each, from the registry; and the command line that prints them imports no torch."""
    script = (
        "import sys; from server.cli.main import app; app(['train', '--help'], standalone_mode=False);"
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "COLUMNS": "200"}
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    for name, record in ARCHITECTURES.items():
        assert f"{name}: {record.summary}\n" in shown.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--target", "NSW1", "--origin", "noon"], "--origin: expected a time of day such as 00:00, or any"),
        (["--target", "NSW1", "--origin", "00:30"], "no step of 1h from 2024-03-01 00:00:00 on is at 00:30 every day"),
        (["--target", "NSW1", "--architecture", "deepar", "--members", "2"], "the mean of paths is no path"),
        (["--target", "NSW1", "--config", '{"members": 2}'], "which other options set"),
        (["--target", "SA1"], "prices.csv.gz, line 1: there is no column 'SA1'; the columns are hour, NSW1"),
        (["--target", "NSW1", "--target", "VIC1", "--name-template", "a.mar"], "put {target} into it"),
        (["--target", "NSW1", "--target", "NSW1"], "--target names a column twice"),
        (["--target", "NSW1", "--name-template", "../{target}.mar"], ".."),
        (["--target", "NSW1", "--quantiles", "0.5,0.1"], "--quantiles: expected rising levels"),
        (["--target", "NSW1", "--config", "{"], "--config: not JSON"),
        (["--target", "NSW1", "--config", '{"features": 3}'], "which other options set"),
        (["--target", "NSW1", "--config", '{"chanels": 3}'], "config of lear: Object contains unknown field `chanels`"),
        (["--target", "NSW1", "--architecture", "rnn"], "unknown architecture 'rnn'; known are "),
        (["--target", "NSW1", "--train-until", "March"], "--train-until: expected a date such as 2024-01-01"),
        (["--target", "NSW1", "--train-until", "2024-03-10"], "NSW1 has 216 steps; at least"),
        (["--target", "NSW1", "--known-future", "VIC1", "--target", "VIC1"], "--known-future VIC1: VIC1 is a target"),
        (["--target", "NSW1", "--time-zone", "NEM"], "'NEM' is not an IANA time zone, such as Europe/Berlin"),
        (["--target", "NSW1", "--frequency", "15min"], "--frequency 15min: prices.csv.gz has steps of 1h throughout"),
        (["--target", "NSW1", "--frequency", "soon"], "--frequency: expected a step such as 15min or 1h, not 'soon'"),
        (["--target", "NSW1", "--item", "NSW1"], "--item: expected COLUMN=VALUE"),
        (["--target", "NSW1", "--train-until", "2023-01-01"], "NSW1: no values to learn from"),
        (["--target", "NSW1", "--known-future", "NSW1"], "--known-future NSW1: NSW1 is a target, whose future"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(prices: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    """One line that names flag, file or column, exit code 2, and nothing written."""
    result = run(str(prices), "--time", "hour", *flags, "--out", str(tmp_path / "store"))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
    assert not (tmp_path / "store").exists()


def test_an_impossible_out_is_told_first(prices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where the folder should be: said at once, not after minutes of fitting."""
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr("server.offline.training.fit_forecasters", lambda *_, **__: pytest.fail("it was fitted first"))
    result = run(str(prices), "--time", "hour", "--target", "NSW1", "--out", str(tmp_path / "taken"))
    assert result.exit_code == 2
    assert "is not a folder" in result.stderr


def test_a_missing_file_is_said_in_a_line(tmp_path: Path) -> None:
    """No traceback for a path that is not there."""
    result = run(str(tmp_path / "no.csv"), "--time", "t", "--target", "p", "--out", str(tmp_path))
    assert (result.exit_code, "no.csv" in result.stderr) == (2, True)


def test_importing_the_command_does_not_import_torch() -> None:
    """The command line stays quick for commands that train nothing."""
    code = "import sys, server.cli.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("minutes", "flags", "architecture"),
    [(60, (), "lear"), (15, (), "lear"), (60, ("--prediction-length", "6"), "tcn"), (5, (), "tcn"), (1440, (), "tcn")],
)
def test_the_default_is_what_forecasts_such_prices_best(
    minutes: int, flags: tuple[str, ...], architecture: str
) -> None:
    """`lear` for days of hours and quarter-hours, whatever the length; `tcn` for minutes, days, and parts of a day."""
    series = Series("p", datetime(2024, 1, 1), timedelta(minutes=minutes), np.zeros(3), np.zeros((0, 3)))  # noqa: DTZ001
    assert choose_architecture(series, int(flags[1]) if flags else 0) == architecture


def test_a_dead_column_stops_only_itself(tmp_path: Path) -> None:
    """One without any price, one whose prices end early: both are named, the third is stored, and the code is 1."""
    path = markets.write_prices(tmp_path / "p.csv", ["A", "B", "C"], days=60, empty="B", since=24 * 40)
    lines = [line.split(",") for line in path.read_text().splitlines()]
    path.write_text(
        "\n".join(",".join([*row[:3], "" if i else row[3], *row[4:]]) for i, row in enumerate(lines)) + "\n"
    )
    targets = [word for target in "ABC" for word in ("--target", target)]
    result = run(str(path), "--time", "hour", *targets, "--out", str(tmp_path / "store"))
    assert result.exit_code == 1, result.output
    assert "error: B: no values in the holdout part" in result.stderr
    assert "error: C: no values to learn from" in result.stderr
    assert [each.name for each in (tmp_path / "store").iterdir()] == ["A.mar"]


def test_a_fit_that_is_no_better_than_naive_is_not_stored(tmp_path: Path) -> None:
    """Prices that repeat every day: the naive forecast has no error. A flag stores the archive all the same."""
    rows = [f"2024-{1 + day // 28:02}-{1 + day % 28:02} {hour:02}:00,{hour}" for day in range(28) for hour in range(24)]
    path = tmp_path / "p.csv"
    path.write_text("\n".join(["t,p", *rows]))
    result = run(str(path), "--time", "t", "--target", "p", "--out", str(tmp_path / "store"))
    assert result.exit_code == 2
    assert "is no better than the naive forecast's 0; it is not stored" in result.stderr
    assert not (tmp_path / "store").exists()
    result = run(str(path), "--time", "t", "--target", "p", "--keep-worse", "--out", str(tmp_path / "store"))
    assert result.exit_code == 0, result.output


def test_the_least_length_in_the_message_is_true(prices: Path, tmp_path: Path) -> None:
    """So many steps can be fitted, one fewer cannot."""
    flags = ("--time", "hour", "--target", "VIC1", "--keep-worse", "--out", str(tmp_path / "store"))
    begin = datetime.fromisoformat("2024-03-01")
    short = run(str(prices), *flags, "--train-until", str(begin + timedelta(hours=200)))
    found = re.search(r"at least (\d+) are needed", short.stderr)
    assert found
    needed = int(found[1])
    assert needed > 200
    for steps, code in ((needed - 1, 2), (needed, 0), (needed + 5, 0)):
        result = run(str(prices), *flags, "--train-until", str(begin + timedelta(hours=steps)))
        assert result.exit_code == code, (steps, needed, result.output)


def test_targets_can_be_patterns(tmp_path: Path) -> None:
    """Columns that a pattern matches, less the covariates; `backtest` and `retrain` take those that have an archive."""
    path = markets.write_prices(tmp_path / "p.csv", ["N1", "N2", "V1"], days=60)
    store = str(tmp_path / "store")
    made = run(
        str(path), "--time", "hour", "--target", "*", "--known-future", "load_{target}", "--keep-worse", "--out", store
    )
    assert made.exit_code == 0, made.output
    assert sorted(each.name for each in (tmp_path / "store").iterdir()) == ["N1.mar", "N2.mar", "V1.mar"]
    asked = ("backtest", str(path), "--time", "hour", "--models", store, "--windows", "2", "--json")
    scored = markets.run(*asked, "--target", "V1", "--target", "N*")
    assert scored.exit_code == 0, scored.output
    assert [each["target"] for each in json.loads(scored.stdout)["markets"]] == ["V1", "N1", "N2"]
    wrong = markets.run(*asked, "--target", "load*")
    assert wrong.exit_code == 2
    assert "--target load*: no price column of p.csv matches; they are N1, N2, V1" in wrong.stderr
    joint = markets.run(
        "correlate", str(path), "--time", "hour", "--store", store, "--target", "N*", "--since", "2024-04-20",
        "--out", str(tmp_path / "joint.mar"),
    )  # fmt: skip
    assert joint.exit_code == 0, joint.output
    assert "gaussian: 2 products, 24 steps" in joint.stdout


def test_a_column_whose_name_is_a_pattern_is_a_column(tmp_path: Path) -> None:
    """`price [EUR/MWh]` is the name of a column before it is a pattern."""
    path = tmp_path / "p.csv"
    path.write_text("t,price [EUR/MWh],p\n2024-01-01 00:00,1,2\n2024-01-01 01:00,1,2\n")
    assert price_flags.expand_targets(path, ["price [EUR/MWh]", "p"], ["t"]) == ["price [EUR/MWh]", "p"]
    assert price_flags.expand_targets(path, ["p*"], ["t"]) == ["price [EUR/MWh]", "p"]


def test_four_weeks_ahead(tmp_path: Path) -> None:
    """672 hours by the default flags are fitted, verified and backtested; the least length in the message is true."""
    path, store = markets.write_prices(tmp_path / "p.csv", ["A"], days=100), str(tmp_path / "store")
    flags = ("--target", "A", "--prediction-length", "672", "--quantiles", "0.5", "--keep-worse", "--out", store)
    made = run(str(path), "--time", "hour", *flags)
    assert made.exit_code == 0, made.output
    assert "a request contains 672 steps of 1h and its answer the next 672" in made.stdout
    scored = markets.run("backtest", str(path), "--time", "hour", "--models", store, "--windows", "2", "--json")
    assert scored.exit_code == 0, scored.output
    (found,) = json.loads(scored.stdout)["markets"]
    assert (found["windows"], found["scores"]["rmae"] < 1) == (2, True)
    short = run(str(path), "--time", "hour", *flags, "--train-until", "2024-04-20")
    least = re.search(r"at least (\d+) are needed", short.stderr)
    assert least, short.output
    for steps, code in ((int(least[1]) - 1, 2), (int(least[1]), 0)):
        until = str(markets.START + timedelta(hours=steps))
        assert run(str(path), "--time", "hour", *flags, "--train-until", until).exit_code == code, steps


def test_targets_are_fitted_in_groups_of_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of two, read in blocks: every archive is that of a fit of all at once, as lear's are independent."""
    path = markets.write_prices(tmp_path / "p.csv", list("ABCDE"), days=60)
    asked = (str(path), "--time", "hour", "--target", "[A-E]", "--keep-worse", "--out")
    assert run(*asked, str(tmp_path / "whole")).exit_code == 0
    sizes, reads = list[int](), list[list[str]]()

    def count_fit(some: list[Series], *more: Any) -> Any:
        sizes.append(len(some))
        return fit_forecasters(some, *more)

    def count_read(csv: Path, time: str, some: list[str], *more: Any) -> Any:
        reads.append(some)
        return read_csv(csv, time, some, *more)

    monkeypatch.setattr(training, "GROUP", 2)
    monkeypatch.setattr(training, "READ_BYTES", 1)
    monkeypatch.setattr(training, "fit_forecasters", count_fit)
    monkeypatch.setattr(training, "read_csv", count_read)
    assert run(*asked, str(tmp_path / "groups")).exit_code == 0
    assert (sizes, reads) == ([2, 2, 1], [["A", "B"], ["C", "D"], ["E"]])
    for target in "ABCDE":
        whole, group = ((tmp_path / each / f"{target}.mar").read_bytes() for each in ("whole", "groups"))
        assert whole == group


def test_a_killed_run_goes_on_after_its_last_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Archives of finished groups stay, and the same command fits only the others; other rows are fitted anew."""
    path = markets.write_prices(tmp_path / "p.csv", list("ABC"), days=60)
    asked = (str(path), "--time", "hour", "--target", "[A-C]", "--keep-worse", "--out", str(tmp_path / "store"))
    done = list[str]()

    def fit_some(some: list[Series], *more: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.extend(each.name for each in some)
        return fit_forecasters(some, *more)

    monkeypatch.setattr(training, "GROUP", 1)
    monkeypatch.setattr(training, "fit_forecasters", fit_some)
    run(*asked)
    assert done == ["A", "B"]
    before = (tmp_path / "store" / "A.mar").stat().st_mtime_ns
    done[:] = ["A"]
    result = run(*asked)
    assert result.exit_code == 0, result.output
    assert done == ["A", "C"]
    assert "A, B: there already, of the same fit" in result.output
    assert (tmp_path / "store" / "A.mar").stat().st_mtime_ns == before
    done.clear()
    run(*asked, "--half-life", "30")
    assert done == ["A", "B"], "other terms are another fit"
