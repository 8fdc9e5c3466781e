"""How much of the disk a folder takes, also as files that are open and deleted."""

import os
from pathlib import Path

import pytest

from server.worker.sandbox import memory_use
from server.worker.sandbox.memory_use import is_folder_larger

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
