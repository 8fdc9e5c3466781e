"""`fleetcast batch` answers every line once and in order, also after interruptions."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from server.cli.main import app
from server.offline.batch_inference import index_lines
from server.offline.checkpoint import RECORD, Checkpoint, OtherWork
from tests.e2e.models import Model, pack_forecaster
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
TCN = {"features": 1, "context_length": 20, "prediction_length": 6, "quantiles": 3, "channels": 4, "layers": 2}
WORK = b"w" * 32


def make_line(model: Model, seed: int) -> dict[str, Any]:
    """A request of a batch."""
    (instance,) = json.loads(model.question(seed).body)["instances"]
    return {"target_model": model.name, "item_id": seed, **instance}


def make_command(*arguments: str) -> list[str]:
    """The command line."""
    return [sys.executable, "-m", "server.cli.main", "batch", *arguments]


def make_environment(folder: Path, env: dict[str, str] | None = None) -> dict[str, str]:
    """Paths of this checkout, a cache of this test."""
    cache = {"FLEETCAST_DISK_CACHE": str(folder / "cache")}
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **cache, **(env or {})}


def run(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """The command to its end."""
    return subprocess.run(
        make_command(*arguments),
        cwd=folder,
        env=make_environment(folder, env),
        capture_output=True,
        text=True,
        check=False,
    )


def read_answers(file: Path) -> list[dict[str, Any]]:
    """Its lines."""
    return [json.loads(text) for text in file.read_text().splitlines()]


@pytest.mark.e2e
def test_every_line_in_its_place(s3: S3Server, tmp_path: Path) -> None:
    """S3 to S3: mixed models, wrong lines among them; in order, right, and each archive is fetched once."""
    bucket, models = s3.bucket(), [pack_forecaster(f"au/m{i}.mar", i, config=TCN, forecast=True) for i in range(5)]
    for model in models:
        s3.put(bucket, f"models/{model.name}", model.data)
    s3.put(bucket, "models/broken.mar", b"nothing")
    asked: list[Any] = [make_line(models[i * 7 % 5], i) for i in range(400)]
    asked[10], asked[20], asked[30] = "no object", {"target_model": "none.mar"}, {"target_model": "broken.mar"}
    asked[40] = {**asked[40], "target": [1.0]}
    asked[50] = {**asked[50], "configuration": {"output_types": ["mean"]}}
    text = [json.dumps(each) for each in asked]
    text[60] = ""
    text[70] = '{"target_model": "au/m1.mar", "start'
    s3.put(bucket, "in.jsonl", "\n".join(text).encode())
    flags = ["--models", f"s3://{bucket}/models", "--configuration", '{"output_types": ["quantiles"]}']
    done = run(tmp_path, f"s3://{bucket}/in.jsonl", f"s3://{bucket}/out.jsonl", *flags, env=s3.env)
    assert (done.returncode, done.stdout) == (1, "")
    assert "400 lines answered, 6 of them with an error" in done.stderr
    out = s3.client().get_object(Bucket=bucket, Key="out.jsonl")["Body"].read().decode().splitlines()
    found = [json.loads(each) for each in out]
    codes = {i: each["error"]["code"] for i, each in enumerate(found) if "error" in each}
    bad = dict.fromkeys((10, 40, 60, 70), "bad_request")
    assert codes == {**bad, 20: "not_found", 30: "archive_failed"}
    assert found[40]["error"]["field"] == "target"
    assert set(found[50]) == {"item_id", "start", "time_zone", "mean"}
    for i, each in enumerate(found):
        if i not in codes and i != 50:
            assert each.pop("item_id") == i
            models[i * 7 % 5].question(i).check(json.dumps({"predictions": [each]}).encode())
    fetched = Counter(path for method, path, _ in s3.requests if method == "GET" and f"{bucket}/models/au" in path)
    assert set(fetched.values()) == {1}
    assert len(fetched) == 5
    assert not list((tmp_path / "cache").rglob("*.jsonl*"))


def has_answers(index_file: Path, count: int) -> bool:
    """Whether the checkpoint has so many."""
    return index_file.exists() and index_file.stat().st_size >= count * RECORD.size


@pytest.mark.e2e
def test_a_killed_run_goes_on(s3: S3Server, tmp_path: Path) -> None:
    """SIGKILL in the middle, twice: the same command answers what is left; the bytes are as if nothing had happened."""
    bucket, models = s3.bucket(), [pack_forecaster(f"m{i}.mar", i, config=TCN, forecast=True) for i in range(12)]
    for model in models:
        s3.put(bucket, model.name, model.data)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(make_line(models[i % 12], i)) + "\n" for i in range(600)))
    flags = ["--models", f"s3://{bucket}"]
    whole = run(tmp_path, "in.jsonl", "whole.jsonl", *flags, env=s3.env)
    assert whole.returncode == 0, whole.stderr
    index_file = tmp_path / "out.jsonl.index"
    for held, answered in (("m2", 60), ("m9", 200)):
        with s3.hold(f"{bucket}/{held}.mar"):
            killed = subprocess.Popen(
                make_command("in.jsonl", "out.jsonl", *flags),
                cwd=tmp_path,
                env=make_environment(tmp_path, s3.env),
                stderr=subprocess.DEVNULL,
            )
            wait_until(partial(has_answers, index_file, answered), "a part is answered")
            killed.send_signal(signal.SIGKILL)
            killed.wait()
    assert not (tmp_path / "out.jsonl").exists()
    seen = len(s3.seen("GET", f"{bucket}/m0.mar"))
    again = run(tmp_path, "in.jsonl", "out.jsonl", *flags, env=s3.env)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(s3.seen("GET", f"{bucket}/m0.mar")) == seen  # its lines were done
    assert sorted(path.name for path in tmp_path.glob("out.*")) == ["out.jsonl"]


@pytest.mark.e2e
def test_a_store_that_is_away_ends_the_run(s3: S3Server, tmp_path: Path) -> None:
    """No line is given up for a store that may be back: the command says so, and goes on when it is run again."""
    bucket, model = s3.bucket(), pack_forecaster("m.mar", 1, config=TCN, forecast=True)
    s3.put(bucket, model.name, model.data)
    (tmp_path / "in.jsonl").write_text(json.dumps(make_line(model, 1)) + "\n")
    variables = {**s3.env, "FLEETCAST_STORE_RETRIES": "0"}
    with s3.outage():
        away = run(tmp_path, "in.jsonl", "out.jsonl", "--models", f"s3://{bucket}", env=variables)
    assert away.returncode == 2
    assert away.stderr.startswith("error: ")
    assert run(tmp_path, "in.jsonl", "out.jsonl", "--models", f"s3://{bucket}", env=variables).returncode == 0
    assert len(read_answers(tmp_path / "out.jsonl")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl", "out.jsonl"], "none.jsonl"),
        (["in.jsonl", "no/folder/out.jsonl"], "no/folder/out.jsonl"),
        (["s3://bucket", "out.jsonl"], "give a path or s3://bucket/key"),
        (["in.jsonl", "out.jsonl", "--configuration", "[1]"], "Expected `object`"),
        (["in.jsonl", "out.jsonl", "--models", "s3:/x"], "s3:/x"),
    ],
)
def test_what_cannot_be_started(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says what is wrong; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEETCAST_DISK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "in.jsonl").write_text("{}\n")
    (tmp_path / "models").mkdir()
    done = CliRunner().invoke(app, ["batch", *arguments, *([] if "--models" in arguments else ["--models", "models"])])
    assert done.exit_code == 2, done.exception
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_other_work_is_not_mixed(tmp_path: Path) -> None:
    """A journal of another input, store or configuration is refused by name."""
    with Checkpoint(tmp_path / "o", WORK, 2) as journal:
        journal.add([(0, b"a\n")])
    with pytest.raises(OtherWork, match=r"o\.index belongs to another"):
        Checkpoint(tmp_path / "o", b"x" * 32, 2)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=12))
def test_torn_files_lose_only_what_was_torn(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, texts: list[bytes]
) -> None:
    """Cut either file anywhere, as a crash may: what is kept is whole, what is not kept is answered again."""
    out = tmp_path_factory.mktemp("j") / "o"
    order = data.draw(st.permutations(range(len(texts))))
    with Checkpoint(out, WORK, len(texts)) as journal:
        for one in order:
            journal.add([(one, texts[one])])
    for file in (journal.part, journal.index):
        size = file.stat().st_size
        os.truncate(file, data.draw(st.integers(0, size)))
    with Checkpoint(out, WORK, len(texts)) as again:
        kept = [i for i in order if not again.left()[i]]
        assert kept == order[: len(kept)]
        again.add([(i, texts[i]) for i in order[len(kept) :]])
        assert list(again.in_order()) == texts
        again.finish(out)
    assert out.read_bytes() == b"".join(texts)


def test_long_lines_are_not_kept(tmp_path: Path) -> None:
    """A line beyond the limit is passed over in pieces; those after it keep their places."""
    short = b'{"target_model": "a.mar"}'
    (tmp_path / "in").write_bytes(short + b"\n" + b"x" * 10_000 + b"\n" + short)
    steps: list[int] = []
    with (tmp_path / "in").open("rb") as file:
        found = index_lines(file, 100, steps.append)
    assert found.size.tolist() == [26, 10_001, 25]
    assert found.start.tolist() == [0, 26, 10_027]
    assert found.model.tolist() == [0, -1, 0]
    assert sum(steps) == 10_052
