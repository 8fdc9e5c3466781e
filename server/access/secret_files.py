"""Reads the operator's files of secrets: bounded, and never one that other users of the host can write to."""

import os
import stat
from pathlib import Path

MAX_FILE_BYTES = 1024 * 1024


def read_secret_file(path: Path, what: str, setting: str) -> tuple[os.stat_result, bytes]:
    """The file's status and content. Raises ValueError that says what is wrong with which file of which setting."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{what} {path} cannot be read: {error.strerror} ({setting})") from error
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"{what} {path} can be written by others: chmod go-w {path} ({setting})")
    if len(raw) > MAX_FILE_BYTES:
        raise ValueError(f"{what} {path} has more than {MAX_FILE_BYTES} bytes ({setting})")
    return found, raw
