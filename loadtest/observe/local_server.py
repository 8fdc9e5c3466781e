"""A Fleetcast server as a process of ours on loopback, for benchmarks, the demo and tests. A client's view of it."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3

START_S = 60.0
STOP_S = 40.0


@dataclass(frozen=True, slots=True)
class LocalServer:
    """Where it listens, and the process."""

    inference: str
    management: str
    metrics: str
    process: "subprocess.Popen[bytes]"

    def processes(self) -> list[dict[str, Any]]:
        """Fronts and workers with their pids."""
        found: list[dict[str, Any]] = self.get(f"{self.management}/fleet/processes").json()["processes"]
        return found

    def counters(self, name: str) -> dict[str, float]:
        """The samples of one metric, label text -> value."""
        lines = self.get(f"{self.metrics}/metrics").data.decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if line.startswith((name + "{", name + " ")))
        return {sample.removeprefix(name): float(value) for sample, _, value in samples}

    @staticmethod
    def get(url: str) -> Any:
        """A GET whose failure is loud."""
        reply = urllib3.request("GET", url, timeout=30.0, retries=False)
        if reply.status != 200:  # noqa: PLR2004
            raise RuntimeError(f"GET {url} answered {reply.status}: {reply.data[:500]!r}")
        return reply


@contextmanager
def serve(
    store: str, flags: Sequence[str] = (), env: Mapping[str, str] | None = None, stderr: Any = None
) -> Iterator[LocalServer]:
    """Run `fleetcast serve` on free ports with its own disk cache; ended by SIGTERM.

    Raises RuntimeError when it does not become ready, with what it said if `stderr` was not taken elsewhere.
    """
    with tempfile.TemporaryDirectory(prefix="fleetcast-local-") as folder:
        announce = Path(folder, "addresses.json")
        command = [
            sys.executable,
            "-P",
            "-m",
            "server.cli.main",
            "serve",
            "--store",
            store,
            "--announce",
            str(announce),
        ]
        for listener in ("inference", "management", "metrics"):
            command += [f"--{listener}-port", "0"]
        command += ["--disk-cache", str(Path(folder, "disk")), "--log-level", "warning", *flags]
        environment = {**os.environ, **(env or {})}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            yield LocalServer(**_addresses(announce, process), process=process)
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _addresses(announce: Path, process: "subprocess.Popen[bytes]") -> dict[str, str]:
    """What the server announces once it is ready."""
    until = time.monotonic() + START_S
    while not announce.exists():
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with code {process.returncode} before it was ready")
        if time.monotonic() > until:
            raise RuntimeError(f"the server was not ready within {START_S:g} s")
        time.sleep(0.02)
    found: dict[str, str] = json.loads(announce.read_text())
    return found
