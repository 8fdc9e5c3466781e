"""Environments of clients that a test uses unmodified: each set of packages has its own, which is kept between runs.

A test's own environment has none of these packages: their versions exclude each other, and some bring a web framework.
"""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import OWN_VARIABLES, ROOT
from tests.patience import PATIENCE_S

FOLDER = ROOT / ".fleetcast" / "clients"
INSTALL_S = 600.0
DONE = "installed"  #: written last: an environment without it was left half-made


def make_environment(*packages: str) -> Path:
    """The Python of an environment with these packages. Skips the test where the package index cannot be reached."""
    variables = keep_variables()
    name = blake2b(f"{sys.version} {' '.join(packages)}".encode(), digest_size=6).hexdigest()
    folder = FOLDER / f"{packages[0].split('=')[0]}-{name}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        python = folder / "bin" / "python"
        if not (folder / DONE).exists():
            why = _install(folder, python, packages, variables)
            if why:
                pytest.skip(f"the clients {', '.join(packages)} cannot be installed here: {why}")
            (folder / DONE).touch()
    return python


def _install(folder: Path, python: Path, packages: Sequence[str], variables: dict[str, str]) -> str:
    """Make the environment. Why it cannot be made; empty where it is there."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True, env=variables)
    # Modules are compiled when they are imported: all of them would take longer than to fetch them.
    pip = [str(python), "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check", *packages]
    try:
        done = subprocess.run(pip, capture_output=True, text=True, timeout=INSTALL_S, check=False, env=variables)
    except subprocess.TimeoutExpired:
        return f"not within {INSTALL_S:g} s"
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200] if done.returncode else ""


def run_script(python: Path, script: str, *arguments: str, **variables: str) -> Any:
    """What a script prints as JSON on its last line. Raises AssertionError with its output where it fails."""
    done = subprocess.run(
        [python, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        env={**keep_variables(), **variables, "NO_PROXY": "*"},
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def keep_variables() -> dict[str, str]:
    """Ours without those of the test's own environment, whose packages would be taken for the client's."""
    return {name: value for name, value in os.environ.items() if not name.startswith((*OWN_VARIABLES, "PYTHON"))}
