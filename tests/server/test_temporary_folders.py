"""Folders of dead processes are removed by the next one; nobody else's are, and no link is followed."""

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from server.temporary_folders import LOCK_FILE, temporary_folder

PREFIX = "fleetcast-x-"
CODE = """if True:
    import signal
    from server.temporary_folders import temporary_folder
    with temporary_folder("fleetcast-x-") as folder:
        print(folder, flush=True)
        signal.pause()
"""


def start(folder: Path) -> tuple["subprocess.Popen[str]", Path]:
    """A process that holds a folder of its own there."""
    environment = {"TMPDIR": str(folder), "PYTHONPATH": ":".join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", CODE], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder and all in it, but not what its links lead to; a living process keeps its folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (killed, left), (living, kept) = start(tmp_path), start(tmp_path)
    try:
        precious = tmp_path / "precious"
        precious.mkdir()
        (precious / "file").touch()
        (left / "link").symlink_to(precious)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert left.exists()
        with temporary_folder(PREFIX) as own:
            assert {own, kept} == set(tmp_path.glob(f"{PREFIX}*"))
        assert not own.exists()
        assert (precious / "file").exists()
    finally:
        for process in (killed, living):
            process.kill()
            process.communicate()


def test_what_is_not_ours_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link in a folder's place, a link in the lock's place, a file, and a folder without a lock."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    target = tmp_path / "target"
    target.mkdir()
    (target / LOCK_FILE).touch()
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    (tmp_path / f"{PREFIX}file").touch()
    (tmp_path / f"{PREFIX}bare").mkdir()
    (tmp_path / f"{PREFIX}locked").mkdir()
    (tmp_path / f"{PREFIX}locked" / LOCK_FILE).symlink_to(target / LOCK_FILE)
    before = set(tmp_path.rglob("*"))
    with temporary_folder(PREFIX):
        pass
    assert set(tmp_path.rglob("*")) == before
