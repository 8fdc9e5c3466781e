"""Tests of limits in seconds are repeated where the machine stood still, and nowhere else."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import patience
from tests.patience import MOST_STALLED, STALL_S, repeat_in_stalls

ROOT = Path(__file__).parents[1]
WATCHES = """
from tests.patience import StallWatch
with StallWatch() as watch:
    print("watches", flush=True)
    input()
print(watch.longest_s)
"""


def test_a_process_that_stands_still_notices_it() -> None:
    """Stopped by a signal and sent on."""
    with subprocess.Popen(
        [sys.executable, "-c", WATCHES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "watches\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2 * STALL_S)
        process.send_signal(signal.SIGCONT)
        found, _ = process.communicate("\n")
    assert float(found) >= STALL_S


def test_only_what_fails_in_a_stall_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that fails while the machine turns is the test's failure, and so is the last one of all."""
    trials = list[int]()

    def fail(i: int) -> None:
        trials.append(i)
        raise AssertionError(f"trial {i}")

    monkeypatch.setattr(patience, "STALL_S", 1e9)
    with pytest.raises(AssertionError, match="trial 0"):
        repeat_in_stalls(fail)
    monkeypatch.setattr(patience, "STALL_S", 0.0)
    with pytest.raises(AssertionError, match=f"trial {MOST_STALLED - 1}"):
        repeat_in_stalls(fail)
    assert trials == [0, *range(MOST_STALLED)]
    repeat_in_stalls(trials.append)
    assert trials[MOST_STALLED + 1 :] == [0]
