"""The host's locks of archives, held by processes of one disk tier: each name locks a byte of one file.

A file for each lock would cost each cold load the making of two files, which on a disk in use may take longer than the
rest of the load; and names that shared one would wait for each other's downloads. Locks belong to the open file
(`F_OFD_SETLKW`), so that they hold between threads as well, and the kernel releases them when the process dies. Where
a system has no such locks, names share 4096 files.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal

from model_store.lazy_log import log

#: What is locked: an archive's download, or changes of the file of its kept versions.
Subject = Literal["downloads", "kept"]
_DIGITS: Final = 15  #: of a key, that say which byte: a file has 2**63 bytes that can be locked
_FLOCK: Final = struct.Struct("hhqqi")  # type, whence, start, length, process: as fcntl(2) takes it
_HAS_RANGES: Final = hasattr(fcntl, "F_OFD_SETLKW")


class NameLocks:
    """The locks whose files are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __repr__(self) -> str:
        return f"NameLocks({self.folder})"

    @contextmanager
    def hold(self, subject: Subject, key: str) -> Iterator[None]:
        """Wait for the lock and hold it. `key`: hexadecimal digits, see `disk_files.hash_key`.

        Without a usable lock file the body runs unlocked: to download an archive twice is better than to fail.
        """
        fd = self._lock(subject, key)
        try:
            yield
        finally:
            if fd is not None:
                os.close(fd)

    def _lock(self, subject: Subject, key: str) -> int | None:
        """The locked file, which its closing unlocks; None where there is none."""
        if not _HAS_RANGES:
            return self._lock_file(f"{subject}-{key[:3]}")
        fd = self._open(subject)
        if fd is None:
            return None
        try:
            place = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, int(key[:_DIGITS], 16), 1, 0)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLKW, place)
        except OSError as error:
            if error.errno == errno.EINVAL:  # the kernel does not know this kind of lock
                os.close(fd)
                return self._lock_file(f"{subject}-{key[:3]}")
            self._warn(subject, error)
        return fd

    def _lock_file(self, name: str) -> int | None:
        fd = self._open(name)
        if fd is not None:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            except OSError as error:  # a file system without locks
                self._warn(name, error)
        return fd

    def _open(self, name: str) -> int | None:
        path = f"{self.folder}/{name}"
        try:
            try:
                return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self._warn(name, error)
            return None

    def _warn(self, name: str, error: OSError) -> None:
        log.warning("disk_lock_failed", lock=name, folder=str(self.folder), error=str(error))
