"""`fleetcast correlate` turns held-out errors of real archives into a correlation archive, or prints one error line."""

import re
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from handlers.codecs.scenarios import CorrelationModel, Marginal, draw_scenarios, load_correlation
from handlers.evaluation.correlation import compute_pit, estimate_gaussian, estimate_schaake
from handlers.forecasters import get_family
from handlers.kinds import find_kind
from handlers.training.fit import ask_network, make_reference_network
from handlers.training.time_series import read_csv
from model_store.archives.archive import Archive, open_archive, read_tensors
from model_store.archives.manifest import Kind
from model_store.names import ModelName
from model_store.stores.object_store import open_source
from server.cli.setting_flags import settings_from
from server.offline.archive_location import locate_archive
from server.offline.archive_tools import describe_archive, format_description, verify_archive
from server.offline.forecast_errors import measure_errors
from server.offline.rolling_windows import Unfit
from tests.e2e.models import onnx_model
from tests.server import markets

pytestmark = pytest.mark.slow

HOURS, SINCE = 24 * 40, "2024-03-26"
COLUMNS = ("--time", "hour", "--target", "NSW1", "--target", "VIC1")


def run(*arguments: str) -> Result:
    """Run the command as the command line does."""
    return markets.run("correlate", *arguments)


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 days of two prices whose surprises are shared and last for hours, a covariate, and a store of their models."""
    folder, rng = tmp_path_factory.mktemp("market"), np.random.default_rng(0)
    lines, shared = ["hour,NSW1,VIC1,load"], 0.0
    for hour in range(HOURS):
        stamp = datetime.fromisoformat("2024-03-01") + hour * timedelta(hours=1)
        shared = 0.9 * shared + rng.normal(0, 5)
        nsw, vic = 60 + 20 * np.sin(hour / 24 * 2 * np.pi) + shared + rng.normal(0, 2, 2)
        lines.append(f"{stamp:%Y-%m-%d %H:%M},{nsw:.2f},{'' if hour % 97 == 5 else f'{vic:.2f}'},{hour % 24}")
    (folder / "prices.csv").write_text("\n".join(lines))
    made = markets.run(
        "train", str(folder / "prices.csv"), *COLUMNS, "--known-future", "load", "--out", str(folder / "store"),
        "--epochs", "1", "--architecture", "tcn", "--keep-worse", "--config", '{"channels": 4}',
        "--context-length", "48", "--prediction-length", "6",
        "--name-template", "au/{target}.mar", "--train-until", SINCE,
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    return folder


def of_market(market: Path, *more: str) -> Result:
    """The command on the market's prices and models."""
    store = ("--store", str(market / "store"), "--name-template", "au/{target}.mar")
    return run(str(market / "prices.csv"), *COLUMNS, *store, "--since", SINCE, *more)


def open_stored(path: Path) -> Archive:
    """An archive."""
    return open_archive(path.read_bytes(), path.name)


def load_archive(archive: Archive) -> CorrelationModel:
    """As a worker would load it."""
    assert archive.spec is not None
    assert archive.spec.correlation
    return load_correlation(archive.spec.correlation, read_tensors(archive))


def test_an_archive_of_held_out_errors(market: Path, tmp_path: Path) -> None:
    """Both methods: products by the models' names, the shared and lasting surprises seen, the same bytes every time."""
    for method in ("gaussian", "schaake"):
        result = of_market(market, "--method", method, "--out", str(tmp_path / "new" / f"{method}.mar"))
        assert result.exit_code == 0, result.output
        archive = open_stored(tmp_path / "new" / f"{method}.mar")
        assert (find_kind(archive).kind, archive.spec is not None) == (Kind.CORRELATION, True)
        assert archive.spec is not None
        assert archive.spec.description == (
            "estimated from prices.csv, windows from 2024-03-26 00:00:00 to 2024-04-09 18:00:00"
        )
        correlation = load_archive(archive)
        assert correlation.products == ("au/NSW1.mar", "au/VIC1.mar")
        assert correlation.horizon == 6
        values = np.tile(np.linspace(0, 10, 9), (6, 1))
        levels = np.linspace(0.001, 0.999, 9)
        found = draw_scenarios([Marginal(name, levels, values) for name in correlation.products], correlation, 50, 0)
        by_product, by_step = (np.corrcoef(found[:, 0, 3], other)[0, 1] for other in (found[:, 1, 3], found[:, 0, 4]))
        assert (by_product > 0.5, by_step > 0.5) == (True, True)
        again = of_market(market, "--method", method, "--out", str(tmp_path / "again.mar"))
        assert again.exit_code == 0, again.output
        assert open_stored(tmp_path / "again.mar").weights() == archive.weights()


def test_the_desk_knows_the_archive(market: Path, tmp_path: Path) -> None:
    """`fleetcast inspect` and `verify` look into it as into any other."""
    assert of_market(market, "--out", str(tmp_path / "joint.mar")).exit_code == 0
    archive = open_stored(tmp_path / "joint.mar")
    told = dict(format_description(describe_archive(archive, (tmp_path / "joint.mar").read_bytes())))
    assert told["products"] == "au/NSW1.mar, au/VIC1.mar"
    assert told["correlation"] == "gaussian, 6 steps, 60 windows"
    place = locate_archive(settings_from({"store": str(tmp_path)}), ModelName("joint.mar"))
    assert verify_archive(place).startswith("<CorrelationModel Gaussian of 2 products, 6 steps>, ")


def test_the_table_says_what_it_rests_on(market: Path, tmp_path: Path) -> None:
    """Numbers of independent observations, shrinkage, conditions, bytes; overlapping windows are no more evidence."""
    result = of_market(market, "--out", str(tmp_path / "joint.mar"), "--every", "2")
    found = re.search(r"products .* (\d+) of (\d+)", result.stdout)
    assert found is not None, result.stdout
    independent, observed = map(int, found.groups())
    assert 178 * 6 - 20 < observed < 178 * 6  # windows of 6 steps, less the missing prices of VIC1
    assert independent < observed / 3
    assert "condition before" in result.stdout
    size = (tmp_path / "joint.mar").stat().st_size
    assert f"{size} bytes, gaussian: 2 products, 6 steps, 178 windows" in result.stdout


def test_errors_are_those_of_the_networks_and_of_no_later_price(market: Path) -> None:
    """Every window's transform, by asking the plain network for it alone; NaN where the price is missing."""
    settings, models = settings_from({"store": str(market / "store")}), {"VIC1": ModelName("au/VIC1.mar")}
    told: list[tuple[int, int]] = []
    since = datetime.fromisoformat(SINCE)
    made = measure_errors(settings, market / "prices.csv", "hour", models, since, 7, lambda *each: told.append(each))
    assert made.first == "2024-03-26 00:00:00"
    assert repr(made) == "<Residuals of 51 windows, 1 products, 6 steps>"
    assert told == [(51, 51)]
    archive = open_stored(market / "store" / "au" / "VIC1.mar")
    assert archive.spec is not None
    forecast = archive.spec.forecast
    assert forecast is not None
    network = make_reference_network(archive.spec.architecture, dict(archive.spec.config), read_tensors(archive))
    assert get_family(archive.spec).key.startswith("tcn-")
    price, load = read_csv(market / "prices.csv", "hour", ["VIC1", "load"])
    missing = 0
    for window in (0, 1, len(made.values) - 1):
        at = price.first_at(datetime.fromisoformat(SINCE)) + 7 * window
        instance = {**price.instance(at - forecast.history_length, at, 6)}
        instance["dynamic_feat"] = [load.values[at - forecast.history_length : at + 6].tolist()]
        (answer,) = ask_network(network, forecast, {"instances": [instance]})["predictions"]
        quantiles = np.array(list(answer["quantiles"].values())).T
        expected = compute_pit(np.array(forecast.quantile_levels), quantiles, price.values[at : at + 6])
        np.testing.assert_allclose(made.values[window, 0], expected, atol=1e-4)
        missing += int(np.isnan(expected).sum())
    assert np.isnan(made.values).sum() >= missing


def test_errors_of_ones_own(tmp_path: Path) -> None:
    """--residuals takes an array of any models' errors, without prices or store."""
    errors = np.random.default_rng(0).normal(size=(60, 2, 4)).cumsum(axis=2)
    np.save(tmp_path / "e.npy", errors.astype(np.float32))
    for method, expected in (("gaussian", estimate_gaussian), ("schaake", estimate_schaake)):
        out = tmp_path / f"{method}.mar"
        result = run(
            "--residuals", str(tmp_path / "e.npy"), "--target", "de.mar#spot", "--target", "fr.mar", "--out", str(out),
            "--method", method,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        estimate = expected(errors.astype(np.float32).astype(np.float64), ("de.mar#spot", "fr.mar"))
        for name, tensor in read_tensors(open_stored(out)).items():
            np.testing.assert_array_equal(tensor, estimate.tensors[name])


def test_an_archive_goes_into_a_bucket(bucket: str, tmp_path: Path) -> None:
    """`--out s3://...` stores it under its key."""
    np.save(tmp_path / "e.npy", np.random.default_rng(0).normal(size=(60, 1, 2)))
    result = run("--residuals", str(tmp_path / "e.npy"), "--target", "de.mar", "--out", f"s3://{bucket}/eu/joint.mar")
    assert result.exit_code == 0, result.output
    fetched = open_source(f"s3://{bucket}/eu").get(ModelName("joint.mar"))
    assert fetched is not None
    assert (
        repr(load_archive(open_archive(fetched.data, "joint.mar")))
        == "<CorrelationModel Gaussian of 1 products, 2 steps>"
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "give a CSV file with --time, or --residuals"),
        (("{prices}",), "give a CSV file with --time, or --residuals"),
        (("{prices}", "--time", "hour", "--residuals", "{prices}"), "give a CSV file with --time, or --residuals"),
        (("--residuals", "{prices}"), "not an array of numbers"),
        (("--residuals", "{shape}"), "an array [5, 2], but expected [windows, 1, steps]: a row for each --target"),
        (("--residuals", "{few}"), "5 of 5 windows can be used, and 8 are the least"),
        (("--residuals", "{infinite}"), "a value is infinite"),
        (("--residuals", "{text}"), "not one array of numbers"),
        (("{prices}", "--time", "hour", "--since", "soon"), "--since: expected a date such as 2024-01-01"),
        (
            ("{prices}", "--time", "hour", "--since", "2025-01-01"),
            "a window needs 210 of history and 6 to forecast",
        ),
        (("{prices}", "--time", "hour", "--name-template", "no.mar"), "no.mar"),
        (("{daily}", "--time", "hour"), "au/NSW1.mar forecasts steps of 1h, but NSW1 has 1D"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(market: Path, tmp_path: Path, flags: tuple[str, ...], said: str) -> None:
    """One line, exit code 2, nothing written."""
    files: dict[str, Any] = {
        "shape": np.zeros((5, 2)),
        "few": np.random.default_rng(0).normal(size=(5, 1, 2)),
        "infinite": np.full((9, 1, 2), np.inf),
        "text": np.array(["a", "b"]),
    }
    for name, array in files.items():
        np.save(tmp_path / f"{name}.npy", array)
    days = [datetime(2023, 1, 1) + timedelta(days=day) for day in range(800)]  # noqa: DTZ001 -- as in the file
    rows = "\n".join(f"{day:%Y-%m-%d},{day.day},1" for day in days)
    (tmp_path / "daily.csv").write_text(f"hour,NSW1,load\n{rows}")
    places = {name: str(tmp_path / f"{name}.npy") for name in files}
    places |= {"prices": str(market / "prices.csv"), "daily": str(tmp_path / "daily.csv")}
    store: tuple[str, ...] = ("--store", str(market / "store"))
    if "--name-template" not in flags:
        store += ("--name-template", "au/{target}.mar")
    result = run(
        *(flag.format(**places) for flag in flags), "--target", "NSW1", *store, "--out", str(tmp_path / "o.mar")
    )
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
    assert not (tmp_path / "o.mar").exists()


def test_a_dead_target_stops_only_itself(market: Path, tmp_path: Path) -> None:
    """One without prices in the windows, one without an archive: both are named, the third is estimated."""
    lines = [line.split(",") for line in (market / "prices.csv").read_text().splitlines()]
    csv = tmp_path / "prices.csv"
    csv.write_text(
        "\n".join(",".join([*row, "QLD1" if not i else "5"]) for i, row in enumerate(lines[:700])) + "\n"
        + "\n".join(",".join([row[0], row[1], "", row[3], ""]) for row in lines[700:]) + "\n"
    )  # fmt: skip
    store = ("--store", str(market / "store"), "--name-template", "au/{target}.mar")
    asked = (str(csv), *COLUMNS, "--target", "QLD1", *store, "--since", str(datetime(2024, 3, 31)))  # noqa: DTZ001
    result = run(*asked, "--out", str(tmp_path / "joint.mar"))
    assert result.exit_code == 1, result.output
    assert "error: VIC1: " in result.stderr
    assert "no step of the history has a value" in result.stderr
    assert "error: QLD1: " in result.stderr
    assert load_archive(open_stored(tmp_path / "joint.mar")).products == ("au/NSW1.mar",)
    errors = np.random.default_rng(0).normal(size=(20, 2, 3))
    errors[:, 1] = np.nan
    np.save(tmp_path / "e.npy", errors)
    own = ("--residuals", str(tmp_path / "e.npy"), "--target", "a", "--target", "b", "--out", str(tmp_path / "e.mar"))
    result = run(*own)
    assert result.exit_code == 1
    assert "error: b: no error is observed" in result.stderr
    assert load_archive(open_stored(tmp_path / "e.mar")).products == ("a",)


def test_an_archive_without_forecast_is_told(market: Path, tmp_path: Path) -> None:
    """An ONNX model has no quantiles to hold prices against."""
    (tmp_path / "m.mar").write_bytes(onnx_model("m.mar", 0).data)
    settings = settings_from({"store": str(tmp_path)})
    with pytest.raises(Unfit, match=r"m\.mar answers tensors, not forecasts"):
        measure_errors(settings, market / "prices.csv", "hour", {"NSW1": ModelName("m.mar")}, None, 0, lambda *_: None)


def test_importing_the_command_does_not_import_torch() -> None:
    """`fleetcast serve` has it in its command line."""
    code = "import sys, server.cli.correlate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
