"""The access log of real processes agrees with what clients see, and the load tester replays it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from handlers.forecasters import build_family
from loadtest.driver.trace import read_trace
from server.access_log import Row, list_log_parts, read_rows
from server.contract import ACCESS_LOG_OUTCOMES
from tests.e2e.conftest import Serve
from tests.e2e.models import SMALL_TCN, pack_fleet
from tests.e2e.server import ROOT, Server, upload
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e


def read_log(server: Server) -> int:
    """Rows that are written."""
    return int(server.total("fleetcast_access_log_rows_total", result="written"))


def test_every_request_is_in_the_log_with_what_came_of_it(
    s3: S3Server, store: str, serve: Serve, tmp_path: Path
) -> None:
    """Misses, hits and a refusal over two workers, in the order of time, with the models' bytes; rows are there
    a second later, and those of the last second at the end; a second life of the server adds to them.
    """
    models = pack_fleet("log", 6)
    upload(s3, store, models)
    said: list[tuple[str, str]] = []
    with serve(workers=2, access_log=tmp_path / "log") as server:
        said += [(model.name, server.ask(model.question(0)).cache) for model in [*models, *models]]
        with pytest.raises(ClientError):
            server.ask(pack_fleet("none", 1)[0].question(0))
        wait_until(lambda: read_log(server) == 13, "all rows are written")
        said.append((models[0].name, server.ask(models[0].question(1)).cache))
    with serve(workers=2, access_log=tmp_path / "log") as server:
        said.append((models[1].name, server.ask(models[1].question(1)).cache))
    rows = sorted(read_rows(tmp_path / "log"), key=lambda row: row.time)
    assert [(row.model, row.outcome) for row in rows if row.outcome != "refused"] == said
    assert [row.model for row in rows if row.outcome == "refused"] == [pack_fleet("none", 1)[0].name]
    assert {row.bytes for row in rows if row.outcome != "refused"} == {build_family("tcn", SMALL_TCN).row_floats * 4}
    assert [row.bytes for row in rows if row.outcome == "refused"] == [0]
    assert [part.name for part in list_log_parts(tmp_path / "log")] == [
        "arrivals-00000001.csv.gz",
        "arrivals-00000002.csv",
    ]
    _is_the_trace_of(tmp_path / "log", rows)


def _is_the_trace_of(log: Path, rows: list[Row]) -> None:
    """The load tester reads the same."""
    trace = read_trace(log)
    assert [trace.names[i] for i in trace.model] == [row.model for row in rows]
    assert [ACCESS_LOG_OUTCOMES[i] for i in trace.outcome] == [row.outcome for row in rows]


def test_the_log_is_replayed(s3: S3Server, store: str, serve: Serve, tmp_path: Path) -> None:
    """`fleetcast-load run --profile replay` asks another server the same, which logs the same models in that order."""
    models = pack_fleet("log", 6)
    upload(s3, store, models)
    with serve(access_log=tmp_path / "log") as server:
        for model in models * 5:
            server.ask(model.question(0))
    request = tmp_path / "request.json"
    request.write_bytes(models[0].question(0).body)
    with serve(access_log=tmp_path / "again", disk_cache=tmp_path / "cache2") as server:
        flags = ["--url", server.url, "--trace", str(tmp_path / "log"), "--request", str(request)]
        run = _run_command("loadtest.cli", "run", "--profile", "replay", *flags, folder=tmp_path)
        assert run.returncode in {0, 1}, run.stdout + run.stderr  # 1: the driver was late, which is not asked here
    again = sorted(read_rows(tmp_path / "again"), key=lambda row: row.time)
    assert [row.model for row in again] == [model.name for model in models * 5]


def test_a_folder_that_cannot_be_written_ends_the_start(tmp_path: Path) -> None:
    """One line with the flag, the folder and the reason, before any worker starts; exit code 2."""
    (tmp_path / "file").touch()
    flags = ["--store", str(tmp_path), "--access-log", str(tmp_path / "file"), "--inference-port", "0"]
    flags += ["--management-port", "0", "--metrics-port", "0"]
    ended = _run_command("server.cli.main", "serve", *flags, folder=tmp_path)
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: --access-log {tmp_path / 'file'}: ")
    assert "File exists" in line


def _run_command(module: str, *arguments: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
