"""The locks of names: by ranges of one file, and by files that names share where a system has no such ranges."""

import errno
import fcntl
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import NoReturn

import pytest
from structlog.testing import capture_logs

from model_store.stores import name_locks
from model_store.stores.name_locks import NameLocks
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[3]
A, B = "abc1" + 60 * "0", "abc2" + 60 * "0"  # files for both would be one


@pytest.fixture(params=["ranges", "files"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to lock."""
    monkeypatch.setattr(name_locks, "_HAS_RANGES", request.param == "ranges")
    return str(request.param)


def start_holding(locks: NameLocks, key: str) -> tuple[threading.Thread, threading.Event]:
    """A thread that takes the lock of a download once, and the event that it has got it."""
    entered = threading.Event()

    def enter() -> None:
        with locks.hold("downloads", key):
            entered.set()

    thread = threading.Thread(target=enter)
    thread.start()
    return thread, entered


def test_a_lock_excludes_the_threads_of_a_process(tmp_path: Path, kind: str) -> None:
    """The same key waits until the lock is released; the other subject's lock of that key is another one."""
    locks = NameLocks(tmp_path)
    with locks.hold("downloads", A):
        thread, entered = start_holding(locks, A)
        with locks.hold("kept", A):
            assert not entered.wait(0.2)
    assert entered.wait(PATIENCE_S)
    thread.join()
    shown = {"ranges": {"downloads", "kept"}, "files": {"downloads-abc", "kept-abc"}}[kind]
    assert {path.name for path in tmp_path.iterdir()} == shown


@pytest.mark.skipif(not name_locks._HAS_RANGES, reason="this system has no locks of ranges that belong to an open file")
def test_names_with_a_lock_of_a_range_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Two keys that begin alike: to wait for each other would make the downloads of a cold fleet take turns."""
    locks = NameLocks(tmp_path)
    with locks.hold("downloads", A):
        thread, entered = start_holding(locks, B)
        assert entered.wait(PATIENCE_S)
        thread.join()


def test_the_kernel_releases_the_lock_of_a_killed_process(tmp_path: Path, kind: str) -> None:
    """Another process's lock blocks this one until that process is killed."""
    code = """if True:
        import pathlib, signal, sys
        from model_store.stores import name_locks
        name_locks._HAS_RANGES = sys.argv[2] == "ranges"
        with name_locks.NameLocks(pathlib.Path(sys.argv[1])).hold("downloads", sys.argv[3]):
            print("locked", flush=True)
            signal.pause()
    """
    command = [sys.executable, "-c", code, str(tmp_path), kind, A]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "locked\n"
        thread, entered = start_holding(NameLocks(tmp_path), A)
        assert not entered.wait(0.2)
        child.send_signal(signal.SIGKILL)
        assert entered.wait(PATIENCE_S)
        thread.join()


@pytest.mark.skipif(not name_locks._HAS_RANGES, reason="this system has no locks of ranges that belong to an open file")
def test_a_kernel_without_locks_of_ranges_locks_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What such a kernel answers is no failure: the lock is one of a file, and excludes."""

    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    locks = NameLocks(tmp_path)
    with capture_logs() as logs, locks.hold("downloads", A):
        thread, entered = start_holding(locks, A)
        assert not entered.wait(0.2)
    assert entered.wait(PATIENCE_S)
    thread.join()
    assert logs == []
    assert (tmp_path / "downloads-abc").exists()


def test_a_file_system_without_locks_is_logged(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The body runs all the same: to download an archive twice is better than to fail."""

    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "fcntl" if kind == "ranges" else "flock", refuse)
    with capture_logs() as logs, NameLocks(tmp_path).hold("downloads", A):
        pass
    assert [each["event"] for each in logs] == ["disk_lock_failed"]
