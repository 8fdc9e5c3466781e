"""The gate lets an archive replace its predecessor only if it is no worse than the margin allows."""

import json
import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from handlers.forecasters import build_family, random_tensors
from handlers.training.time_series import Series, read_csv
from model_store.archives.archive import open_archive
from server.offline.evaluation import compute_scores
from server.offline.promotion_gate import GateTerms, compare_models
from server.offline.rolling_windows import InProcess, Rolling, Unfit, forecast_windows
from tests.server.markets import fill, make_forecast, open_market, pack_market, run, write_prices

GATE = GateTerms("pinball", 2.0, Rolling(most=10))
CONFIG = {"features": 2, "context_length": 24, "hidden": 8, "prediction_length": 6, "quantiles": 3}


@pytest.fixture(scope="module")
def csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One market."""
    return write_prices(tmp_path_factory.mktemp("data") / "M00.csv", ["M00"])


@pytest.fixture(scope="module")
def columns(csv: Path) -> Mapping[str, Series]:
    """Its price."""
    return {each.name: each for each in read_csv(csv, "hour", ["M00"])}


def test_the_verdict_is_the_ratio_of_both_scores(columns: Mapping[str, Series]) -> None:
    """The same windows for both, scored as a backtest does; what is worse one way is better the other."""
    a, b = open_market(0), open_market(1)
    there, back = (compare_models(GATE, InProcess(), "M00", columns, *pair) for pair in ((a, b), (b, a)))
    origins = GATE.rolling.origins(columns["M00"], [make_forecast()])
    ours, theirs = (
        compute_scores(forecast_windows(InProcess(), each, columns["M00"], origins)).pinball for each in (a, b)
    )
    assert there.worse == pytest.approx(100 * (ours / theirs - 1))
    assert {there.passed, back.passed} == {True, False}
    assert compare_models(GATE, InProcess(), "M00", columns, a, a).worse == 0
    assert str(there).startswith(f"gate: pinball {ours:.4g} against {theirs:.4g} of version")
    assert str(there).endswith("10 windows from 2024-03-21 12:00:00 to 2024-03-23 23:00:00")


def test_the_margin_is_the_operators(columns: Mapping[str, Series]) -> None:
    """What one margin refuses a wider one lets through."""
    pair = sorted(
        (open_market(0), open_market(1)),
        key=lambda m: compare_models(GATE, InProcess(), "M00", columns, m, None).candidate,
    )
    worse = compare_models(GATE, InProcess(), "M00", columns, pair[1], pair[0])
    assert not worse.passed
    wide = GateTerms("pinball", worse.worse + 1, GATE.rolling)
    assert compare_models(wide, InProcess(), "M00", columns, pair[1], pair[0]).passed


def test_archives_that_differ_are_compared_where_they_meet(columns: Mapping[str, Series]) -> None:
    """Longer forecasts and other levels: the common steps at the common levels; without any only the median decides."""
    own = open_market(0)
    longer = open_market(0, prediction_length=9, quantile_levels=(0.05, 0.5, 0.95))
    verdict = compare_models(GATE, InProcess(), "M00", columns, own, longer)
    origins = GATE.rolling.origins(columns["M00"], [make_forecast(prediction_length=9)])
    cut = forecast_windows(InProcess(), longer, columns["M00"], origins).cut(6, np.array([0.5]))
    assert verdict.predecessor == pytest.approx(compute_scores(cut).pinball)
    apart = open_market(1, quantile_levels=(0.2, 0.49, 0.8))
    with pytest.raises(Unfit, match="share no quantile level; gate by wape, mase or rmae"):
        compare_models(GATE, InProcess(), "M00", columns, own, apart)
    assert compare_models(GateTerms("rmae", 1e6, GATE.rolling), InProcess(), "M00", columns, own, apart).passed


def test_an_undefined_score_decides_nothing(columns: Mapping[str, Series]) -> None:
    """Without levels around the median there is no WAPE: that is said, and is not a pass."""
    upper = open_market(0, quantile_levels=(0.6, 0.7, 0.8))
    with pytest.raises(Unfit, match="wape is undefined there"):
        compare_models(GateTerms("wape", 2, GATE.rolling), InProcess(), "M00", columns, upper, None)


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with what `pack` needs, and a store whose archive of M00 has other numbers."""
    fill(tmp_path / "models", ["M00"])
    tmp_path.joinpath("forecast.json").write_bytes(msgspec.json.encode(make_forecast()))
    return tmp_path


def pack(desk: Path, csv: Path, seed: int, *flags: str) -> tuple[int, str, bytes]:
    """`fleetcast pack --gate` of seeded weights: exit code, what it said, and what is in the store."""
    save_file(random_tensors(build_family("mlp", CONFIG), seed), desk / "w.safetensors")
    out = desk / "models" / "M00.mar"
    result = run(
        "pack", str(out), "--architecture", "mlp", "--config", json.dumps(CONFIG),
        "--weights", str(desk / "w.safetensors"),
        "--forecast", str(desk / "forecast.json"), "--description", "by hand",
        "--gate", str(csv), "--gate-time", "hour", *flags,
    )  # fmt: skip
    return result.exit_code, result.output, out.read_bytes() if out.exists() else b""


def test_pack_refuses_a_worse_archive_and_notes_a_pass(desk: Path, csv: Path, columns: Mapping[str, Series]) -> None:
    """Of two archives the worse is refused with exit code 1 and the store is as before; the better one is written."""
    out = desk / "models" / "M00.mar"
    gate = GateTerms("pinball", 0, Rolling(most=28))
    better, worse = sorted(
        (0, 1), key=lambda i: compare_models(gate, InProcess(), "M00", columns, open_market(i), None).candidate
    )
    before = pack_market(better)
    out.write_bytes(before)
    code, said, found = pack(desk, csv, worse, "--gate-margin", "0")
    assert (code, found) == (1, before)
    assert "M00.mar is worse than its predecessor: gate: pinball" in said
    assert "and the margin is 0 %; nothing is written" in said
    out.write_bytes(pack_market(worse))
    code, said, found = pack(desk, csv, better)
    assert code == 0, said
    spec = open_archive(found, "M00.mar").spec
    assert spec is not None
    assert spec.description.startswith("by hand; gate: pinball ")
    assert "28 windows from" in spec.description
    assert pack(desk, csv, worse, "--gate-margin", "100000")[0] == 0


@pytest.mark.parametrize("there", [b"", b"PK broken"])
def test_without_a_predecessor_there_is_nothing_to_be_worse_than(desk: Path, csv: Path, there: bytes) -> None:
    """The first of its name passes, and so does whatever replaces an archive that cannot be opened."""
    out = desk / "models" / "M00.mar"
    out.unlink()
    if there:
        out.write_bytes(there)
    code, said, found = pack(desk, csv, 3, "--gate-score", "mase")
    assert code == 0, said
    spec = open_archive(found, "M00.mar").spec
    assert spec is not None
    assert "against no predecessor" in spec.description


def test_the_gates_file_is_read_by_the_flags_of_backtest(desk: Path, csv: Path, tmp_path: Path) -> None:
    """Another notation, ends of intervals, another zone, several items: the scores are those of the plain file."""
    rows = [line.split(",") for line in csv.read_text().splitlines()[1:]]
    other = tmp_path / "other.csv"
    lines = ["hour,M00,unique_id"]
    for stamp, price, *_ in rows:
        end = datetime.fromisoformat(stamp) + timedelta(hours=1)
        moved = end + timedelta(hours=10)  # Brisbane's clock, which never changes
        lines += [f"{moved:%d.%m.%Y %H.%M},{price},here", f"{moved:%d.%m.%Y %H.%M},5,there"]
    other.write_text("\n".join(lines) + "\n")
    flags = ("--stamps-zone", "Australia/Brisbane", "--interval-ending", "--time-format", "%d.%m.%Y %H.%M")
    (desk / "models" / "M00.mar").write_bytes(pack_market(0))
    code, said, found = pack(
        desk, other, 1, "--gate-margin", "1e9", *flags, "--item", "unique_id=here", "--time", "hour"
    )
    assert code == 0, said
    (desk / "models" / "M00.mar").write_bytes(pack_market(0))
    code, _, plain = pack(desk, csv, 1, "--gate-margin", "1e9")
    assert code == 0
    said_of = []
    for each in (found, plain):
        spec = open_archive(each, "M00.mar").spec
        assert spec is not None
        said_of.append(re.sub(r"version [^,]*", "", spec.description))
    assert said_of[0] == said_of[1]
    code, said, _ = pack(desk, other, 1, "--interval-ending", "--item", "here")
    assert (code, "--item: expected COLUMN=VALUE" in said) == (2, True)
