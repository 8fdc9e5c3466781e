"""The folder of one running server's Unix sockets: short, private, and gone when the server is.

A server that was killed leaves its folder behind. The next one that starts for the same user removes it: a folder is
in use exactly while somebody holds its lock, which the kernel releases with the process.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import structlog

from server.ipc.sockets import make_private_folder

PREFIX = "fleetcast-run-"
LOCK_FILE = "lock"
MAX_SOCKET_PATH = 107  #: bytes of a Unix socket's path, which Linux bounds
LONGEST_NAME = 24  #: of a socket within the folder
FALLBACK = "/tmp"  # noqa: S108 -- short; the folder made in it is private, and its name is random

log = structlog.get_logger()


class RuntimeFolder:
    """A new private folder, locked. `close` removes it."""

    def __init__(self) -> None:
        """Raises OSError that says what to do where no folder can be made."""
        base = _short_base(tempfile.gettempdir())
        remove_abandoned(Path(base))
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        self._lock = self._make_lock()

    def __repr__(self) -> str:
        return f"<RuntimeFolder {self.path}>"

    def socket(self, name: str) -> str:
        """The path of a socket in it.

        It is made anew should a cleaner of old files have removed it. Raises OSError where another user was quicker.
        """
        make_private_folder(self.path)
        if not (self.path / LOCK_FILE).exists():
            os.close(self._lock)
            self._lock = self._make_lock()
        return str(self.path / name)

    def _make_lock(self) -> int:
        """INVARIANT: a file of this name is locked for as long as the server lives."""
        new = self.path / f"{LOCK_FILE}.new"
        lock = os.open(new, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        new.rename(self.path / LOCK_FILE)
        return lock

    def close(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _short_base(wanted: str) -> str:
    """Where the folder is made. Raises OSError when a socket's path would be too long everywhere."""
    for base in (wanted, FALLBACK):
        longest = len(os.fsencode(base)) + len(PREFIX) + 8 + 2 + LONGEST_NAME
        if longest <= MAX_SOCKET_PATH and os.access(base, os.W_OK | os.X_OK):
            return base
    raise OSError(
        f"the folder of temporary files {wanted} cannot hold Unix sockets: its path is too long, or it cannot be "
        f"written to, and so is {FALLBACK}; set TMPDIR to a short path"
    )


def remove_abandoned(base: Path) -> None:
    """Remove the folders in `base` that killed servers of this user left behind."""
    for folder in base.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or of a kind that is none of ours
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                continue
            with _hold_if_unused(folder / LOCK_FILE) as unused:
                if unused:
                    shutil.rmtree(folder, ignore_errors=True)
                    log.info("abandoned_folder_removed", folder=str(folder))


@contextlib.contextmanager
def _hold_if_unused(lock: Path) -> Iterator[bool]:
    """Whether nobody holds the lock; it is held meanwhile. Raises OSError where there is no such file.

    A server that is just starting has a folder without a lock file for a moment: such a folder is left alone.
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
