"""Starts and restarts that cannot be: one sentence, and no harm to the workers that run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.models import pack_fleet
from tests.e2e.server import Server, run_server
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e


def test_a_torch_for_the_cpu_on_a_gpu_host_is_one_sentence(tmp_path: Path) -> None:
    """The operator shows a GPU, and torch is the build for the CPU: what to do, exit code 2 and no traceback."""
    import torch  # noqa: PLC0415 -- only its version

    if torch.version.cuda is not None:
        pytest.skip("needs a torch for the CPU")
    ended = subprocess.run(
        [sys.executable, "-m", "server.cli.main", "serve", "--store", str(tmp_path), "--inference-port", "0",
         "--management-port", "0", "--metrics-port", "0", "--disk-cache", str(tmp_path / "cache")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "GPU-5a1b,MIG-77"},
        capture_output=True, text=True, check=False, timeout=2 * PATIENCE_S,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    said = [line for line in ended.stderr.splitlines() if "cannot be used" in line]
    assert len(said) == 1, ended.stderr
    assert said[0].startswith("error: cuda:")
    assert "is a build for the CPU: install one for CUDA" in said[0]
    assert "Traceback" not in ended.stderr


def test_a_restarted_worker_that_cannot_start_leaves_the_others_serving(s3: S3Server, tmp_path: Path) -> None:
    """A worker dies, and what it needs to start is gone: it is tried again and again, the log says why each time, the
    other one answers, and once the cause is mended the worker is back.
    """
    folder, away = tmp_path / "models", tmp_path / "away"
    (model,) = pack_fleet("left", 1)
    (folder / model.name).parent.mkdir(parents=True)
    (folder / model.name).write_bytes(model.data)
    with run_server(s3, tmp_path, str(folder), workers=2, watch_store="off") as server:
        server.ask(model.question(0))
        (holder,) = server.models()[model.name]["holders"]
        (victim,) = [row for row in server.processes("worker") if row["index"] != holder["worker"]]
        folder.rename(away)
        os.kill(victim["pid"], signal.SIGKILL)
        wait_until(lambda: server.said().count('"cannot_start"') >= 2, "two restarts failed")
        assert "does not exist" in server.said()
        assert server.ask(model.question(1)).cache == "hit"
        away.rename(folder)
        wait_until(lambda: _is_up(server, victim["index"]), "the worker is back")
        assert server.ask(model.question(0)).cache == "hit"


def _is_up(server: Server, index: int) -> bool:
    return any(row["up"] for row in server.processes("worker") if row["index"] == index)
