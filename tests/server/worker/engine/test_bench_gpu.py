"""The GPU benchmark's own logic, on a fake device in small: that it measures right answers, and what it prints."""

import json
import subprocess
import sys

import pytest
import torch

from loadtest.benchmarks.gpu import build_table
from server.worker.engine.bench_gpu import GpuBenchSizes, measure_gpu
from tests.patience import PATIENCE_S
from tests.server.fake_device import FakeDevice


@pytest.mark.slow
def test_everything_is_measured_and_shown() -> None:
    """On a device that does things late: every check of answers in the benchmark holds, and its table can be made.

    (The times of a fake device mean nothing.)
    """
    found = measure_gpu(FakeDevice(), GpuBenchSizes(tick=12, resident=20, rounds=2, copy_floats=1000))
    found = json.loads(json.dumps(found)) | {"device": "a fake"}
    assert found["tick"]["ratio"] > 0
    assert found["tick"]["floor_ms"]["sum"] > 0
    assert found["scattered"]["resident"] == 20
    shown = build_table(found)
    assert shown.row_count == 7 + 2 * 4


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so() -> None:
    """Exit code 2 and a sentence that names what is missing, no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "loadtest.cli", "bench", "gpu", "--no-save"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("no CUDA device here (torch")
    assert "Traceback" not in done.stderr
