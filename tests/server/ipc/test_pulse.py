"""A worker's pulse: what its observers read, alive, silent and dead."""

import subprocess
import sys
from pathlib import Path

import pytest

from server.ipc.pulse import LONGEST_TICK_S, SEATS, LoadSigns, Pulse, PulseReader, RunningModel

QUIET = LoadSigns(0.0, 0.0)
DYING = """
import os, sys
from server.ipc.pulse import LoadSigns, Pulse
pulse = Pulse(sys.argv[1])
print(flush=True)
input()
pulse.beat(LoadSigns(1.5, 0.0))
pulse.batch[:12] = b"a.mar\\nb.mar\\0"
with pulse.noting("c.mar", "load"):
    os.abort()
"""


def test_a_dead_worker_can_still_be_read(tmp_path: Path) -> None:
    """What it ran when it was aborted, and how, and what it last said of its loads."""
    path = tmp_path / "0.1.run"
    worker = subprocess.Popen(
        [sys.executable, "-c", DYING, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    worker.stdout.readline()
    reader = PulseReader(str(path))
    assert reader.running() == []
    worker.communicate("go\n")
    assert worker.returncode < 0
    assert reader.running() == [RunningModel("a.mar", "batch"), RunningModel("b.mar", "batch"), ("c.mar", "load")]
    assert reader.load_signs() == LoadSigns(1.5, 0.0)
    with pytest.raises(OSError, match=r"0.1.run"):
        PulseReader(str(path))


def test_silence_is_counted_in_the_observers_own_looks(tmp_path: Path) -> None:
    """A beat ends it; an observer that did not look for a minute has not seen a minute of silence."""
    path = str(tmp_path / "run")
    pulse, reader = Pulse(path), PulseReader(path)
    assert reader.observe(100.0) == 0.0
    assert reader.observe(100.25) == 0.25
    assert reader.observe(160.0) == 0.25 + LONGEST_TICK_S
    was_silent = reader.is_silent
    assert reader.observe(160.5) >= 1.0
    assert (was_silent, reader.is_silent) == (False, True)
    pulse.beat(QUIET)
    assert reader.observe(161.0) == reader.silent_s == 0.0


def test_what_ran_and_ended_is_not_there(tmp_path: Path) -> None:
    """Batches and runs that overlap; after an error too; a shorter name after a longer one is whole."""
    path = str(tmp_path / "run")
    pulse, reader = Pulse(path), PulseReader(path)
    with pulse.noting("a/long/name.mar", "alone"):
        with pytest.raises(ZeroDivisionError), pulse.noting("b.mar", "load"):
            len(reader.running()) / 0
        assert [each.model for each in reader.running()] == ["a/long/name.mar"]
    assert reader.running() == []
    with pulse.noting("\N{SNOWMAN}.mar", "alone"):
        assert reader.running() == [RunningModel("\N{SNOWMAN}.mar", "alone")]
    pulse.batch[:12] = b"a.mar\nb.mar\0"
    assert [each.how for each in reader.running()] == ["batch", "batch"]
    pulse.batch[0] = 0
    assert reader.running() == []


def test_more_than_there_is_room_for_runs_nevertheless(tmp_path: Path) -> None:
    """Threads beyond the seats are not noted; all seats come back."""
    path = str(tmp_path / "run")
    pulse, reader = Pulse(path), PulseReader(path)
    notes = [pulse.noting(f"{i}.mar", "alone") for i in range(SEATS + 1)]
    for note in notes:
        note.__enter__()
    assert len(reader.running()) == SEATS
    for note in notes:
        note.__exit__(None, None, None)
    assert reader.running() == []
    assert repr(pulse) == "<Pulse 0 beats, 0 models noted>"
