"""The command that loads a fleet, and what it makes of a run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from loadtest import summary
from loadtest.fleet import make_fleet
from loadtest.load import app
from loadtest.local import serve
from loadtest.processes import free_port

ROOT = Path(__file__).parents[2]


def fleetcast_load(folder: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    """The command, in a folder of its own."""
    command = [sys.executable, "-m", "loadtest.load", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.e2e
def test_a_fleet_of_its_own(tmp_path: Path) -> None:
    """From an empty folder to percentiles, hits, loads and memory; the exit code says what the verdict says."""
    flags = ["--models", "12", "--resident", "4", "--rate", "100", "--seconds", "1", "--warmup", "0.5"]
    found = fleetcast_load(tmp_path, *flags)
    valid = "valid the driver kept its schedule" in found.stdout
    assert (found.returncode, found.stderr) == (0 if valid else 1, "")
    rows = {name: int(n) for name, n in re.findall(r"│ (all|hit|miss|coalesced) +│ +(\d+) │", found.stdout)}
    assert rows["all"] == sum(rows.values()) - rows["all"] > 50
    assert rows["miss"] > 10
    ratio = f"{rows['hit'] / rows['all']:.3f}"
    assert re.findall(r"hit ratio(?: by /metrics)? +│ (\S+)", found.stdout) == [ratio, ratio]
    assert re.search(r"loads from disk +│ \d+, [\d.]+ ms each", found.stdout)
    assert re.search(r"memory of worker 0 +│ \d{2,3}\.\d MB", found.stdout)


@pytest.mark.e2e
def test_a_server_that_runs(tmp_path: Path) -> None:
    """The names come from the store; without --metrics-url the server's own figures are left out."""
    make_fleet(str(tmp_path), 3)
    with serve(str(tmp_path), ["--workers", "1"]) as server:
        flags = ["--url", server.inference, "--store", str(tmp_path), "--seconds", "0.5", "--warmup", "0"]
        found = CliRunner().invoke(app, flags)
    assert "3 models of" in found.stdout
    assert re.search(r"miss +│ +3 ", found.stdout)
    assert "failed" not in found.stdout
    assert "/metrics" not in found.stdout


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--url", "http://127.0.0.1:1"], "--url needs --store: the models' names come from there"),
        (["--store", "."], "--store and --metrics-url are those of the server at --url"),
        (["--url", "http://192.0.2.7", "--store", "."], "192.0.2.7 is 192.0.2.7, not this machine"),
        (["--url", "http://127.0.0.1:1", "--store", "nowhere"], "nowhere"),
        (["--url", "http://127.0.0.1:1", "--store", ".", "--metrics-url", "http://127.0.0.1:1"], "refused"),
    ],
)
def test_flags_that_cannot_be(flags: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says why there is no load: no names, an address beyond this machine, no store, no metrics."""
    monkeypatch.chdir(tmp_path)
    make_fleet(".", 1)
    found = CliRunner().invoke(app, [*flags, "--warmup", "0"])
    assert found.exit_code == 1
    line = found.output.splitlines()[-1]
    assert line.startswith("no load: ")
    assert why in line


def test_a_distribution_is_what_was_measured() -> None:
    """Percentiles to three digits, from a microsecond to an hour."""
    seconds = np.random.default_rng(0).lognormal(-6, 2, 20_000)
    found = summary.distribution(seconds)
    for percentile in summary.PERCENTILES:
        low, high = (np.percentile(seconds, percentile, method=method) * 1e3 for method in ("lower", "higher"))
        assert low * 0.998 - 0.001 <= found[f"p{percentile:g}_ms"] <= high * 1.002 + 0.001
    assert found["max_ms"] == seconds.max() * 1e3
    assert found["count"] == 20_000
    assert summary.distribution(np.array([1e-9, 1e5]))["count"] == 2


def test_the_slowest_over_time() -> None:
    """Every request is in the span in which it was due; spans without requests are blank, the rest on a log scale."""
    at, latency = np.array([0.0, 0.5, 59.999]), np.array([0.001, 0.010, 0.100])
    slots = summary.worst(at, latency, 60.0)
    assert [slots[0], slots[-1], sum(slots)] == [10.0, 100.0, 110.0]
    assert summary.sparkline([1.0, 0.0, 10.0, 100.0]) == "▁ ▅█"
    assert summary.sparkline([0.0]) == " "


def test_no_server_is_no_load(tmp_path: Path) -> None:
    """An address nobody listens on is said in a line, not blamed on the driver."""
    make_fleet(str(tmp_path / "store"), 1)
    address = f"http://127.0.0.1:{free_port()}"
    done = fleetcast_load(tmp_path, "--url", address, "--store", str(tmp_path / "store"), "--seconds", "1")
    assert done.returncode == 1
    assert "no load: " in done.stderr
    assert "Traceback" not in done.stderr
