"""Errors in words: what a newcomer reads names the file, says what is wrong with it, and has no number of errno."""

import socket
from pathlib import Path

import pytest

from server.shell.errors import describe_error


def fail_at(path: Path, mode: str = "r") -> str:
    """What is said of a file that cannot be opened."""
    with pytest.raises(OSError, match=r".") as found, path.open(mode):
        pass
    return describe_error(found.value)


def test_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With where it was looked for; a folder that is missing too is named, since that is what to make."""
    monkeypatch.chdir(tmp_path)
    assert fail_at(Path("nix.csv")) == f"nix.csv does not exist in the working folder {tmp_path}"
    assert fail_at(tmp_path / "nix.csv") == f"{tmp_path}/nix.csv does not exist"
    missing = tmp_path / "no" / "o.jsonl"
    assert fail_at(missing, "w") == f"{missing} does not exist, nor its folder {tmp_path}/no"


def test_files_and_folders_that_are_mistaken_for_each_other(tmp_path: Path) -> None:
    """A folder for a file, a file for a folder, and what is there already."""
    file = tmp_path / "file"
    file.write_text("")
    assert fail_at(tmp_path) == f"{tmp_path} is a folder, and a file is needed"
    with pytest.raises(FileExistsError) as found:
        file.mkdir()
    assert describe_error(found.value) == f"{file} is a file, and a folder is needed"
    assert describe_error(PermissionError(13, "Permission denied", "x.csv")).startswith("x.csv may not be opened")


def test_other_errors_keep_their_words() -> None:
    """Those of our own say enough; those of the network are named; no number is shown."""
    assert describe_error(ValueError("--rate: above 0")) == "--rate: above 0"
    assert describe_error(OSError("nobody listens at 127.0.0.1:9")) == "nobody listens at 127.0.0.1:9"
    assert describe_error(OSError(28, "No space left on device", "out.mar")) == "out.mar: No space left on device"
    unknown = describe_error(socket.gaierror(-2, "Name or service not known"))
    assert unknown == "the name of a host is not known here (Name or service not known): look at the address"
