"""TorchServe's own archiver in an environment of its own: it stays out of ours, as on a user's machine."""

import subprocess
import sys
import venv
from functools import cache
from pathlib import Path

import pytest

ARCHIVER = "torch-model-archiver==0.12.0"
INSTALL_S = 300


@cache
def install_archiver(folder: Path) -> Path:
    """Make an environment below `folder`, once in a process: the folder of its commands. Skips without an index."""
    home = folder / "archiver"
    venv.create(home, with_pip=False, symlinks=True)
    commands = home / "bin"
    pip = [sys.executable, "-m", "pip", "--python", str(commands / "python"), "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "install", "--quiet", ARCHIVER], capture_output=True, text=True, check=False, timeout=INSTALL_S
    )
    if done.returncode:
        pytest.skip(f"{ARCHIVER} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return commands
