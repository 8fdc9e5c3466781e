"""`make run` as a new user has it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loadtest.runs import PROGRESS_LINE

ROOT = Path(__file__).parents[3]


@pytest.mark.e2e
def test_the_show(tmp_path: Path) -> None:
    """From an empty folder to a forecast, a burst over a cache that is too small, and lines to copy; ends by itself."""
    command = [
        sys.executable,
        "-m",
        "loadtest.cli",
        "demo",
        "first-run",
        "--once",
        "--models",
        "12",
        "--resident",
        "6",
        "--requests",
        "200",
    ]
    for listener in ("inference", "management", "metrics"):
        command += [f"--{listener}-port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert all(re.match(PROGRESS_LINE, line) for line in found.stderr.splitlines()), found.stderr
    assert re.search(r"miss .*load;dur=.*hit ", found.stdout, re.DOTALL)
    assert "200, failed 0" in found.stdout
    assert "6 of 12 models" in found.stdout
    (each_ms,) = re.findall(r"the server's rate.*?requests/s a core: ([\d.]+) ms", found.stdout)
    assert float(each_ms) > 0.01, "no processor time was counted"
    assert 'TargetModel="au/nsw1/energy.mar"' in found.stdout
    assert sorted(path.name for path in (tmp_path / ".fleetcast").iterdir()) == ["request.json", "store"]
