"""What a child takes: memory, measured again where it has done something, and the disk, with files that are deleted."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from server.worker.sandbox import memory_use
from server.worker.sandbox.memory_use import is_folder_larger, measure_memory

MIB = 1024 * 1024


def test_a_folder_is_measured_with_what_is_deleted_and_no_link_is_followed(tmp_path: Path) -> None:
    """A sparse file takes no more than its blocks; a loop of links ends."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    (inside / "file").write_bytes(bytes([1]) * MIB)
    (inside / "loop").symlink_to(tmp_path)
    with (inside / "sparse").open("wb") as sparse:
        sparse.truncate(1 << 40)
    assert is_folder_larger(tmp_path, MIB // 2)
    assert not is_folder_larger(tmp_path, 2 * MIB)
    with (inside / "gone").open("wb") as gone:
        gone.write(bytes([1]) * 2 * MIB)
        gone.flush()
        (inside / "gone").unlink()
        assert not is_folder_larger(tmp_path, 2 * MIB)
        assert is_folder_larger(tmp_path, 2 * MIB, os.getpid())
    assert not is_folder_larger(tmp_path / "nosuch", MIB)


def test_a_folder_of_countless_files_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To count them all would take the time of the others."""
    monkeypatch.setattr(memory_use, "MAX_FILES", 3)
    for i in range(4):
        (tmp_path / str(i)).touch()
    assert is_folder_larger(tmp_path, MIB)


def test_a_child_that_does_nothing_is_measured_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is one that has touched a few pages; one that has written to many at once, with what it has started."""
    measured: list[int] = []

    def count_measurement(pid: int) -> int:
        measured.append(pid)
        return measure_memory(pid)

    monkeypatch.setattr(memory_use, "measure_memory", count_measurement)
    code = """
import sys
held = []
for line in sys.stdin:
    held.append(bytearray(b"x") * int(line))
    print("held", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None

        def hold(size: int) -> None:
            """Have the child take so many bytes more."""
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(b"%d\n" % size)
            child.stdin.flush()
            assert child.stdout.readline() == b"held\n"

        hold(20_000_000)
        sampler = memory_use.MemorySampler()
        first = sampler.measure([child.pid], now=0.0)
        assert sampler.measure([child.pid], now=1.0) == first
        assert measured == [child.pid]
        hold(100)  # a page or two, as with each request
        assert sampler.measure([child.pid], now=1.5) == first
        assert measured == [child.pid]
        hold(20_000_000)
        assert sampler.measure([child.pid], now=2.0)[child.pid] >= first[child.pid] + 19_000_000
        sampler.measure([child.pid], now=2.0 + memory_use.REMEASURE_S)
        assert len(measured) == 3
        child.stdin.close()
    assert sampler.measure([], now=40.0) == {}


@pytest.mark.slow
def test_threads_that_end_meanwhile_hide_nothing() -> None:
    """A child that starts threads all the time is measured with what it has started: one of them has often ended
    between the list of them and the look at it.
    """
    code = """
import os, threading, time
if os.fork() == 0:
    held = bytearray(b"x") * 40_000_000
    os.write(1, b"held\\n")
    time.sleep(1000)
while True:
    threads = [threading.Thread(target=time.sleep, args=(0.001,)) for _ in range(20)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == b"held\n"
            sizes = [measure_memory(child.pid) for _ in range(200)]
        finally:
            os.killpg(child.pid, signal.SIGKILL)
    assert min(sizes) >= 40_000_000
