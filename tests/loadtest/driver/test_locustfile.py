"""The Locust file under the real Locust, against a small real HTTP server. Skipped where Locust is not installed."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from loadtest.fleets.fleet import list_fleet_names
from tests.http_servers import serve_on_thread
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[3]
NAMES = list_fleet_names(6)
SAID: dict[str, str | None] = dict(zip(NAMES, ("hit", "miss", "coalesced", None, "503", "nan"), strict=True))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("locust") is None, reason="Locust is not installed: pip install locust"
)


class FleetHandler(BaseHTTPRequestHandler):
    """Answers as SAID of the model; keeps what it was asked."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    asked: ClassVar[list[tuple[str, str, bytes]]] = []

    def do_POST(self) -> None:
        """One invocation."""
        model = self.headers["X-Amzn-SageMaker-Target-Model"]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((f"{self.path} {self.headers['Content-Type']}", model, body))
        said = SAID[model]
        answer = b'{"predictions": [NaN]}' if said == "nan" else b'{"predictions": [{"mean": [1.5, 2]}]}'
        self.send_response(503 if said == "503" else 200)
        if said in ("hit", "miss", "coalesced"):
            self.send_header("X-Fleetcast-Cache", said)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the base class named it
        """Nothing."""


@pytest.fixture
def peer() -> Iterator[str]:
    """Its address."""
    FleetHandler.asked.clear()
    with serve_on_thread(ThreadingHTTPServer(("127.0.0.1", 0), FleetHandler)) as place:
        yield f"http://{place}"


def run_locust(host: str, *flags: str) -> "subprocess.CompletedProcess[str]":
    """Four users for two seconds; statistics as JSON on stdout."""
    command = [sys.executable, "-m", "locust", "-f", "loadtest/driver/locustfile.py", "--host", host]
    command += [
        "--headless",
        "--users",
        "4",
        "--spawn-rate",
        "4",
        "--run-time",
        "2s",
        "--stop-timeout",
        "5",
        "--json",
        *flags,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )


def test_rows_are_what_the_cache_said(peer: str) -> None:
    """A row for each outcome, none for a model; refusals and NaN fail; the popular are asked more often."""
    run = run_locust(peer, "--fleet-models", "6", "--fleet-zipf", "1.5")
    rows = {row["name"]: row for row in json.loads(run.stdout)}
    asked = [model for _, model, _ in FleetHandler.asked]
    counts = [asked.count(name) for name in NAMES]
    assert {name: row["num_requests"] for name, row in rows.items()} == {
        "hit": counts[0],
        "miss": counts[1],
        "coalesced": counts[2],
        "answered": counts[3] + counts[5],
        "failed": counts[4],
    }
    assert {name: row["num_failures"] for name, row in rows.items() if row["num_failures"]} == {
        "answered": counts[5],
        "failed": counts[4],
    }
    assert run.returncode == 1  # Locust's own, for failures
    assert max(counts) / sum(counts) == pytest.approx(0.525, abs=0.1)  # 1 of 1 + 2**-1.5 + ... + 6**-1.5
    assert {head for head, _, _ in FleetHandler.asked} == {"/invocations application/json"}
    assert all(
        list(json.loads(body)["instances"][0]) == ["start", "target"]
        for body in {body for *_, body in FleetHandler.asked}
    )
    assert "Locust is a closed loop" in run.stderr
    assert "fleetcast-load" in run.stderr


@pytest.mark.parametrize(
    ("host", "flags", "why"),
    [
        (
            "http://192.0.2.7",
            [],
            "no load: http://192.0.2.7 is 192.0.2.7, not this machine: loading it takes",
        ),
        ("http://127.0.0.1:9", ["--fleet-models", "0"], "no load: no models: no --fleet-store has none"),
        ("http://127.0.0.1:9", ["--fleet-store", "nowhere"], "no load: "),
    ],
)
def test_loads_that_are_refused(host: str, flags: list[str], why: str) -> None:
    """An address beyond this machine, and a fleet without models, end Locust with a line, and nothing was asked."""
    run = run_locust(host, *flags)
    assert run.returncode == 1
    assert why in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout.strip() in ("", "[]")
