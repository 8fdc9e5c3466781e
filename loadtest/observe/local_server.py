"""Starts a Fleetcast server in its own process on loopback, for benchmarks, demos and tests."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.observe.server_access import OPEN
from server.contract import LOADED_MODELS, METRICS_PATH, PROCESSES_PATH

START_S = 60.0
STOP_S = 40.0


@dataclass(frozen=True, slots=True)
class LocalServer:
    """The addresses of its listeners, and its process."""

    inference: str
    management: str
    metrics: str
    process: "subprocess.Popen[bytes]"
    grpc: str = ""  #: empty where the server has no such listener

    def processes(self) -> list[dict[str, Any]]:
        """Return fronts and workers with their pids, as the management API lists them."""
        found: list[dict[str, Any]] = self.get(f"{self.management}{PROCESSES_PATH}").json()["processes"]
        return found

    def counters(self, name: str) -> dict[str, float]:
        """Return the samples of one series: label text -> value."""
        lines = self.get(f"{self.metrics}{METRICS_PATH}").data.decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if line.startswith((name + "{", name + " ")))
        return {sample.removeprefix(name): float(value) for sample, _, value in samples}

    def totals(self, series: str, label: str) -> dict[str, float]:
        """Sum one series by the values of one label; values not seen yet are 0."""
        sums: defaultdict[str, float] = defaultdict(float)
        for labels, value in self.counters(series).items():
            if (found := re.search(rf'[{{,]{label}="([^"]*)"', labels)) is not None:
                sums[found[1]] += value
        return sums

    def loaded_models(self) -> int:
        """Count the resident models of all workers."""
        return int(sum(self.counters(LOADED_MODELS.series).values()))

    @staticmethod
    def get(url: str) -> Any:
        """GET a URL. Raises RuntimeError for no response and for any status but 200."""
        return OPEN.request("GET", url)


@contextmanager
def run_local_server(
    store: str,
    flags: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    stderr: Any = None,
    tree: Path | None = None,
) -> Iterator[LocalServer]:
    """Run `fleetcast serve` on free ports with its own disk cache, and send it SIGTERM at the end.

    `tree`: a checkout whose server is run in the place of the installed one, in the same environment. Raises
    RuntimeError if it does not become ready; the cause is on `stderr`, by default that of this process.
    """
    with tempfile.TemporaryDirectory(prefix="fleetcast-local-") as folder:
        announce = Path(folder, "addresses.json")
        command = [
            sys.executable,
            "-P",
            "-m",
            "server.cli.main" if tree is None or (tree / "server/cli/main.py").exists() else "server.cli",
            "serve",
            "--store",
            store,
            "--announce",
            str(announce),
        ]
        for listener in ("inference", "management", "metrics"):
            command += [f"--{listener}-port", "0"]
        command += ["--disk-cache", str(Path(folder, "disk")), "--log-level", "warning", *flags]
        ahead = {"FLEETCAST_SPARE_WORKER": "off"}  # its imports would take part in what is measured
        environment = {**ahead, **os.environ, **({} if tree is None else {"PYTHONPATH": str(tree)}), **(env or {})}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, cwd=tree)
        try:
            yield LocalServer(**_wait_for_addresses(announce, process), process=process)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for_addresses(announce: Path, process: "subprocess.Popen[bytes]") -> dict[str, str]:
    """Wait for the addresses that the server announces when it is ready."""
    until = time.monotonic() + START_S
    while not announce.exists():
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with code {process.returncode} before it was ready")
        if time.monotonic() > until:
            raise RuntimeError(f"the server was not ready within {START_S:g} s")
        time.sleep(0.02)
    found: dict[str, str] = json.loads(announce.read_text())
    return found
