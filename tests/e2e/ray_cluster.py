"""Ray on this host for tests: an environment with Ray, and the program that keeps its nodes.

Ray's packages are in an environment of their own, which is made at the first use and kept; it finds all else in the
test's own. Ray ends with the driver, whose processes are looked for by a mark in their environment.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx

from loadtest.observe.processes import find_free_port
from tests.e2e.clients import keep_variables, make_environment
from tests.e2e.server import MARK, ROOT, Server
from tests.patience import PATIENCE_S
from tests.s3 import S3Server

RAY = "ray[serve]==2.60.0"
STARTS = 4
END_S = 60.0


def make_ray_python() -> Path:
    """The Python of an environment with Ray and all that a server needs."""
    python = make_environment(RAY)
    found = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True, env=keep_variables(),
    )  # fmt: skip
    (Path(found.stdout.strip()) / "tests-own.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@dataclass
class RayCluster:
    """The running driver. Each call is one command of `ray_driver.Driver`."""

    process: "subprocess.Popen[str]"
    mark: str
    log: Path
    proxy: str  #: address of Ray's HTTP proxy
    dashboard: str  #: where Ray's own command line deploys
    http: httpx.Client

    def do(self, command: str, **arguments: Any) -> Any:
        """Have the driver do it. Raises AssertionError where it cannot."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
        self.process.stdin.flush()
        answer = self.read()
        assert "error" not in answer, f"{command}: {answer['error']}"
        return answer["answer"]

    def read(self) -> dict[str, Any]:
        """The driver's next line, which is JSON; what Ray prints besides is passed over."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise AssertionError(f"the driver ended: {self.log.read_text()[-3000:]}")

    def run_serve(self, *arguments: str) -> str:
        """What Ray's own `serve ARGUMENTS` prints. Raises AssertionError with its words where it fails."""
        command = [str(make_ray_python().parent / "serve"), *arguments, "--address", self.dashboard]
        own = {"HOME": str(self.log.parent), "PYTHONPATH": str(ROOT)}
        variables = {**keep_variables(), **own, "NO_PROXY": "*", "RAY_AUTH_MODE": "disabled"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S, env=variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def list_servers(self) -> dict[str, Server]:
        """The replicas' servers by name."""
        return {row["name"]: self.wrap(row) for row in self.do("list_nodes")}

    def wrap(self, addresses: Mapping[str, str]) -> Server:
        """Something of the cluster as a server is asked in tests."""
        return Server(cast("Any", self.process), self.mark, self.log, addresses, http=self.http)


@contextmanager
def run_ray(s3: S3Server, folder: Path, paths: str = "") -> Iterator[RayCluster]:
    """Ray with its head alone, and the dashboard; it ends with the block, and so does all that it has started.

    `paths`: of modules, which come before all others in every process.

    A raylet ends itself where its agents take longer than 15 s to start, as on a busy machine: then Ray is started
    again.
    """
    for left in reversed(range(STARTS)):
        cluster = _start_driver(s3, folder / str(left), paths)
        try:
            started = cluster.read()["ready"]
        except AssertionError:
            _end_driver(cluster)
            if not left:
                raise
            continue
        try:
            assert started
            yield cluster
        finally:
            _end_driver(cluster)
        return


def _start_driver(s3: S3Server, folder: Path, paths: str) -> RayCluster:
    home, log, mark = folder / "home", folder / "driver.log", uuid.uuid4().hex
    port, dashboard = find_free_port(), find_free_port()
    home.mkdir(parents=True)
    variables = {
        MARK: mark,
        "HOME": str(home),
        "NO_PROXY": "*",
        "PYTHONPATH": os.pathsep.join(filter(None, [paths, str(ROOT)])),
        "RAY_AUTH_MODE": "disabled",
        "RAY_DASHBOARD_PORT": str(dashboard),
        "RAY_PORT": str(port),
        "RAY_SERVE_SESSION_ID_HEADER_KEY": "X-Amzn-SageMaker-Target-Model",
        "RAY_TMPDIR": _short_folder(mark),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_gcs_rpc_server_reconnect_timeout_s": "300",
        "RAY_gcs_storage": "rocksdb",
        "RAY_gcs_storage_path": str(folder / "gcs"),
        "RAY_raylet_start_wait_time_s": "60",
        "RAY_worker_niceness": "0",
    }
    with log.open("w") as out:
        process = subprocess.Popen(
            [make_ray_python(), "-m", "tests.e2e.ray_driver"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True, cwd=folder,
            env={**keep_variables(), **s3.env, **variables},
        )  # fmt: skip
    http = httpx.Client(timeout=PATIENCE_S, trust_env=False)
    return RayCluster(process, mark, log, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", http)


def _end_driver(cluster: RayCluster) -> None:
    process = cluster.process
    cluster.http.close()
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in cluster.wrap({}).survivors():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if process.stdout is not None:
        process.stdout.close()
    sys.stdout.write(f"--- the driver's log\n{cluster.log.read_text()[-4000:]}\n")
    shutil.rmtree(_short_folder(cluster.mark), ignore_errors=True)


def _short_folder(mark: str) -> str:
    """Sockets' paths are short, so that pytest's own folders are too long."""
    folder = Path("/tmp") / f"ray-{mark[:6]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return str(folder)
