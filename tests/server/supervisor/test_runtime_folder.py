"""The folder of a server's sockets: private, short, removed in the end, or by the next server."""

import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.supervisor.runtime_folder import MAX_SOCKET_PATH, PREFIX, RuntimeFolder
from server.temporary_folders import LOCK_FILE, remove_abandoned


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder with a short path: one that is too long for sockets is not used."""
    with tempfile.TemporaryDirectory(prefix="ft-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _own_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_it_is_private_and_goes(tmp_path: Path) -> None:
    """Nobody else may enter; `close` leaves nothing."""
    folder = RuntimeFolder()
    assert folder.path.parent == tmp_path
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    Path(folder.socket("0.1")).touch()
    folder.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_server_is_cleaned_up_after(tmp_path: Path) -> None:
    """The next start removes what SIGKILL left; what a living server holds, and what is no folder of ours, stays."""
    code = """if True:
        import time
        from server.supervisor.runtime_folder import RuntimeFolder
        print(RuntimeFolder().path, flush=True)
        time.sleep(600)
    """
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={"TMPDIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        killed, living = [Path((child.stdout or sys.stdin).readline().strip()) for child in children]
        children[0].send_signal(signal.SIGKILL)
        children[0].wait()
        starting = tmp_path / "fleetcast-run-starting"
        starting.mkdir()
        (tmp_path / "fleetcast-run-file").touch()
        RuntimeFolder().close()
        assert not killed.exists()
        assert living.exists()
        assert starting.exists()
        assert (tmp_path / "fleetcast-run-file").exists()
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_a_removed_folder_is_made_anew_and_held(tmp_path: Path) -> None:
    """A cleaner of old files has removed it, or the lock alone: it comes back private, and is nobody's to clean up."""
    folder = RuntimeFolder()
    shutil.rmtree(folder.path)
    Path(folder.socket("0.2")).touch()
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    remove_abandoned(tmp_path, PREFIX)
    assert Path(folder.socket("0.2")).exists()
    (folder.path / LOCK_FILE).unlink()
    folder.socket("0.3")
    remove_abandoned(tmp_path, PREFIX)
    assert folder.path.exists()
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_long_temporary_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket's path always fits."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = RuntimeFolder()
    try:
        assert len(folder.socket("255.1000000")) <= MAX_SOCKET_PATH
        assert list(long.iterdir()) == []
    finally:
        folder.close()


def test_nowhere_to_go_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the folder and TMPDIR."""
    monkeypatch.setattr("server.supervisor.runtime_folder.FALLBACK", str(tmp_path / "gone"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone too"))
    with pytest.raises(OSError, match=r"gone too.*set TMPDIR to a short path"):
        RuntimeFolder()


def test_a_folder_that_was_cleaned_away_comes_back(tmp_path: Path) -> None:
    """Cleaners of old temporary files remove what looks unused: the next worker's socket still has a place."""
    folder = RuntimeFolder()
    (folder.path / "lock").unlink()
    folder.path.rmdir()
    Path(folder.socket("0.2")).touch()
    folder.close()
    assert list(tmp_path.iterdir()) == []
