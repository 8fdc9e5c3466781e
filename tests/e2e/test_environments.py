"""What hosts and base images do to a process: no home, variables of other programs, cleaners of temporary files."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from server.contract import CACHE_RESULTS
from tests.e2e.conftest import Serve
from tests.e2e.models import pack_fleet
from tests.e2e.server import Server, is_answered, upload
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e


def kill_process(server: Server, kind: str) -> None:
    """SIGKILL, and wait until the supervisor has another one."""
    (old,) = server.processes(kind)
    os.kill(old["pid"], signal.SIGKILL)
    wait_until(lambda: [row for row in server.processes(kind) if row["pid"] not in (None, old["pid"])], f"a new {kind}")


@pytest.mark.parametrize("home", ["none", "unwritable"])
def test_without_a_home_models_are_served(s3: S3Server, store: str, tmp_path: Path, serve: Serve, home: str) -> None:
    """HOME is unset, so the user's entry decides; or it leads nowhere: loads go on, and the log says what to set."""
    (model,) = pack_fleet("homeless", 1)
    upload(s3, store, [model])
    where: dict[str, str | None] = (
        {"HOME": None, "FLEETCAST_DISK_CACHE": str(tmp_path / "own")}
        if home == "none"
        else {"HOME": "/dev/null/nobody"}
    )
    with serve(disk_cache=None, environment=where) as server:
        assert server.ask(model.question(0)).cache == "miss"
        server.fleet("unload", model.name)
        assert server.ask(model.question(1)).cache == "miss"
        advice = "--disk-cache be a folder that can be written to"
        if home == "unwritable":
            wait_until(lambda: advice in server.said(), "the log says what to set")
    assert (advice in server.said()) == (home == "unwritable")


def test_an_unknown_home_says_what_to_do(tmp_path: Path) -> None:
    """No HOME, and a user whom /etc/passwd does not know: one line names both ways out, not a traceback."""
    nobody = "import pwd; pwd.getpwuid = lambda uid: {}[uid]; from server.cli.main import main; main()"
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "FLEETCAST_DISK_CACHE")}
    ended = subprocess.run(
        [sys.executable, "-c", nobody, "serve", "--store", str(tmp_path)],
        env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    assert ended.returncode == 2
    assert "set HOME, or give a whole path" in ended.stderr
    assert "--disk-cache" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("exists", [True, False])
def test_a_prometheus_folder_of_the_image_is_not_used(
    s3: S3Server, store: str, tmp_path: Path, serve: Serve, *, exists: bool
) -> None:
    """PROMETHEUS_MULTIPROC_DIR, of a folder that is there or not: it serves, counts, and puts no file into it."""
    (model,) = pack_fleet("counted", 1)
    upload(s3, store, [model])
    folder = tmp_path / "prometheus"
    if exists:
        folder.mkdir()
    with serve(environment={"PROMETHEUS_MULTIPROC_DIR": str(folder)}) as server:
        server.ask(model.question(0))
        assert server.total("fleetcast_inference_requests_total") == 1
        kill_process(server, "worker")
        wait_until(lambda: is_answered(server, model), "it is served again")
        counted = {
            result: server.total("fleetcast_model_cache_requests_total", result=result) for result in CACHE_RESULTS
        }
        assert counted["miss"] == 1, "its row outlives the worker"
        assert counted["hit"] >= 1, "and the next one counts too"
    assert not exists or list(folder.iterdir()) == []


def test_a_removed_folder_of_sockets_costs_nothing(s3: S3Server, store: str, serve: Serve) -> None:
    """A cleaner removes it while the server runs: requests go on, new fronts and workers find each other again."""
    (model,) = pack_fleet("cleaned", 1)
    upload(s3, store, [model])
    with tempfile.TemporaryDirectory() as temporary:  # its path is short, as those of sockets must be
        with serve(environment={"TMPDIR": temporary}) as server:
            server.ask(model.question(0))
            for kind in ("front", "worker"):
                (folder,) = Path(temporary).glob("fleetcast-run-*")
                shutil.rmtree(folder)
                assert server.ask(model.question(1)).cache == "hit"
                kill_process(server, kind)
                wait_until(lambda: is_answered(server, model), f"it is served after the {kind} was killed")
        assert list(Path(temporary).iterdir()) == []
