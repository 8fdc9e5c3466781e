"""Folders of temporary files: whoever makes one removes those that dead processes left behind.

A folder is in use exactly while somebody holds the lock of the file `lock` in it, which the kernel releases with the
process.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

LOCK_FILE = "lock"


def make_folder(base: Path, prefix: str) -> tuple[Path, int]:
    """A new private folder, and the descriptor that holds its lock. Removes abandoned ones before. Raises OSError."""
    remove_abandoned(base, prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
    return folder, hold_lock(folder)


def hold_lock(folder: Path) -> int:
    """INVARIANT: a file of this name is locked for as long as the owner lives."""
    new = folder / f"{LOCK_FILE}.new"
    lock = os.open(new, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    new.rename(folder / LOCK_FILE)
    return lock


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A folder for as long as the block lasts. Raises OSError where none can be made."""
    folder, lock = make_folder(Path(tempfile.gettempdir()), prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_abandoned(base: Path, prefix: str) -> list[Path]:
    """Remove the folders in `base` whose names begin so, that dead processes of this user left behind; returns them."""
    removed = []
    for folder in base.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or of a kind that is none of ours
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                continue
            with hold_if_unused(folder / LOCK_FILE) as unused:
                if unused:
                    shutil.rmtree(folder, ignore_errors=True)
                    removed.append(folder)
    return removed


@contextlib.contextmanager
def hold_if_unused(lock: Path) -> Iterator[bool]:
    """Whether nobody holds the lock; it is held meanwhile. Raises OSError where there is no such file.

    A process that is just starting has a folder without a lock file for a moment: such a folder is left alone.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
