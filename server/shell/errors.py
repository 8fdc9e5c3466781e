"""Puts an error into words for a shell: what was wrong, where, and what to do. Pure but for the working folder."""

import os
import socket
from pathlib import Path


def describe_error(error: BaseException) -> str:
    """The error in words: of the operating system's the file comes first, and no number is shown."""
    if isinstance(error, socket.gaierror):
        return f"the name of a host is not known here ({error.strerror or error}): look at the address"
    if (
        not isinstance(error, OSError)
        or not error.strerror
        or not isinstance(error.filename, str | bytes | os.PathLike)
    ):
        return str(error)
    name = os.fsdecode(error.filename)
    if isinstance(error, FileNotFoundError):
        return f"{name} does not exist{_explain_absence(Path(name))}"
    if isinstance(error, IsADirectoryError):
        return f"{name} is a folder, and a file is needed"
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"{name} is a file, and a folder is needed" if Path(name).is_file() else f"{name} is there already"
    if isinstance(error, PermissionError):
        return f"{name} may not be opened by this user: permission denied"
    return f"{name}: {error.strerror}"


def _explain_absence(path: Path) -> str:
    """Where it was looked for, as far as that helps."""
    if not path.is_absolute():
        return f" in the working folder {Path.cwd()}"
    return "" if path.parent.is_dir() else f", nor its folder {path.parent}"
