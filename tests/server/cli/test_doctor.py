"""`fleetcast doctor`: its output without and with a store, and its exit code."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from handlers.forecasters import ARCHITECTURES, build_family, random_tensors
from handlers.kinds import ArchiveParts, pack_model
from model_store.archives.manifest import Kind
from server.access_log import AccessLog, ArrivalBuffer
from server.cli.main import app
from server.ipc.frames import CacheResult
from server.offline.store_families import describe_training
from tests.handlers.kinds.test_onnx import make_doubling

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"features": 3, "context_length": 12, "prediction_length": 4, "quantiles": 3, "channels": 8}


@pytest.fixture(autouse=True)
def _no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder without fleetcast.toml, no variables."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("FLEETCAST_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def _only_lear(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickest architecture stands for all: measuring the recurrent ones takes seconds."""
    monkeypatch.setattr("handlers.forecasters.ARCHITECTURES", {"lear": ARCHITECTURES["lear"]})


def run_doctor(*arguments: str) -> Result:
    """The command in this process."""
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["doctor", *arguments])


def make_archive(folder: Path, name: str, seed: int = 0, **config: int) -> None:
    """A small forecaster."""
    folder.mkdir(exist_ok=True)
    fields = {**SMALL, **config}
    tensors = random_tensors(build_family("tcn", fields), seed)
    (folder / name).write_bytes(
        pack_model(Kind.FORECASTER, ArchiveParts(tensors=tensors, architecture="tcn", config=fields), model_name=name)
    )


def test_every_architecture_is_measured_without_a_store() -> None:
    """The machine's facts, then a time for each architecture's ways with one of them marked, and exit code 0."""
    shown = run_doctor()
    assert shown.exit_code == 0, shown.output
    for word in ("cores", "torch", "memory", "disk cache", "open files", "GFLOP/s", *ARCHITECTURES):
        assert word in shown.output
    assert shown.output.count("*") > 3 * len(ARCHITECTURES)
    assert "store" not in shown.output


def test_a_store_is_looked_into(tmp_path: Path) -> None:
    """Its archives are counted, its families measured with how many have each; an ONNX archive has no ways."""
    for i in range(3):
        make_archive(tmp_path / "s", f"a{i}.mar", i)
    make_archive(tmp_path / "s", "b.mar", channels=4)
    (tmp_path / "s" / "o.mar").write_bytes(
        pack_model(Kind.ONNX, ArchiveParts(program=make_doubling("n", 2)), model_name="o")
    )
    answer = run_doctor("--store", str(tmp_path / "s"), "--json")
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    facts = {fact["name"]: fact for fact in found["facts"]}
    assert facts["store"]["text"].endswith("5 archives")
    assert [family["archives"] for family in found["families"]] == [3, 1]
    for family in found["families"]:
        assert set(family["batches"]) == {"1", "8", "64"}
        assert family["batches"]["64"]["gather_us"] > 0
        assert family["batches"]["8"]["of_different_models"]["taken"] in {"gather", "in_place"}
        assert (
            family["batches"]["8"]["of_one_model"]["floor_us"]
            < family["batches"]["8"]["of_different_models"]["floor_us"]
        )


def test_an_access_log_says_what_more_memory_would_buy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds over 24 models of 4 KiB and room for 16 of them: all miss, and room for 24 is what is named, for
    people with the flag to set and for programs as numbers. A log that is none ends it in a line.
    """
    make_archive(tmp_path / "s", "a.mar")
    log, kept = AccessLog(tmp_path / "log", 2**20), ArrivalBuffer()
    for i in range(72):
        kept.note(f"m{i % 24}.mar", float(i), 4096, CacheResult.MISS)
    log.write(kept.hand_over([]).rows)
    log.close()
    for name, value in {"MODEL_CACHE_BYTES": "65536", "SLAB_BYTES": "65536", "WORKERS": "1"}.items():
        monkeypatch.setenv(f"FLEETCAST_{name}", value)
    monkeypatch.setattr("rich._console", Console(width=80))  # what a command that printed earlier leaves in the process
    flags = ["--store", str(tmp_path / "s"), "--access-log", str(tmp_path / "log")]
    advice = json.loads(run_doctor(*flags, "--json").stdout)["access_log"]
    assert (advice["requests"], advice["budget_bytes"], advice["hit_ratio"]) == (72, 65536, 0.0)
    assert advice["better_bytes"] == pytest.approx(24 * 4096, rel=0.02)
    assert advice["better_ratio"] == pytest.approx(2 / 3)
    assert "the next 66.7 points of hit ratio cost 33KiB: with --model-cache-bytes 97KiB" in run_doctor(*flags).output
    other = tmp_path / "other.csv"
    other.write_text("what is this?\n")
    wrong = run_doctor("--store", str(tmp_path / "s"), "--access-log", str(other))
    assert wrong.exit_code == 2
    assert "other.csv, line 1: an access log begins with the line time,model,bytes,outcome" in wrong.output


def test_many_archives_are_sampled(tmp_path: Path) -> None:
    """Of more than twenty archives no more are loaded, from all over the listing."""
    for i in range(45):
        make_archive(tmp_path / "s", f"m{i:02}.mar", channels=4 if i == 44 else 8)
    found = json.loads(run_doctor("--store", str(tmp_path / "s"), "--json").stdout)
    assert sum(family["archives"] for family in found["families"]) <= 20
    assert "45 archives" in str(found["facts"])


def test_an_archive_that_would_not_load_is_a_no(tmp_path: Path) -> None:
    """Exit code 1, the archive named with its reason; the others are measured all the same."""
    make_archive(tmp_path / "s", "good.mar")
    (tmp_path / "s" / "bad.mar").write_bytes(b"no zip")
    answer = run_doctor("--store", str(tmp_path / "s"))
    assert answer.exit_code == 1
    assert "would not load: bad.mar" in answer.output
    assert "tcn-" in answer.output


@pytest.mark.usefixtures("_only_lear")
@pytest.mark.parametrize(
    ("store", "code", "said"), [("none", 1, ["does not exist"]), ("", 0, ["0 archives", "fleetcast pack"])]
)
def test_a_store_without_archives(tmp_path: Path, store: str, code: int, said: list[str]) -> None:
    """The cause or the command that makes archives is shown, and the built-in architectures are measured instead.

    Only a store that cannot be read is an error; an empty one is none.
    """
    answer = run_doctor("--store", str(tmp_path / store))
    assert answer.exit_code == code
    assert all(words in answer.output for words in [*said, "lear"])


def test_settings_are_as_serve_would_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's store is looked into without a flag; what is wrong there ends it in a line, store or no store."""
    make_archive(tmp_path / "s", "a.mar")
    Path("fleetcast.toml").write_text('store = "s"\n')
    assert "s: 1 archives" in run_doctor().output
    Path("fleetcast.toml").write_text("workers = -1\n")
    answer = run_doctor()
    assert answer.exit_code == 2
    assert "--workers" in answer.output


def test_the_help_teaches() -> None:
    """Columns, mark and exit code are explained before anybody has to ask."""
    text = " ".join(run_doctor("--help").output.split())
    for words in (
        "fleetcast doctor --store s3://",
        "run in place",
        "* marks the way",
        "The floor is",
        "exit code is 1",
    ):
        assert words in text


def test_a_store_says_until_when_its_archives_were_trained() -> None:
    """The range of what is known, and how many do not say."""
    fact = describe_training(["2024-02-01 00:00:00", "", "2024-01-01 00:00:00"])
    assert fact.text == "2024-01-01 00:00:00 to 2024-02-01 00:00:00"
    assert fact.advice.startswith("1 of 3 archives do not say")
    assert not describe_training(["2024-02-01 00:00:00"]).advice
