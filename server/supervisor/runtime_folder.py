"""The folder of one running server's Unix sockets: short, private, and gone when the server is.

A server that was killed leaves its folder behind. The next one that starts for the same user removes it.
"""

import os
import shutil
import tempfile
from pathlib import Path

import structlog

from server.ipc.sockets import make_private_folder
from server.temporary_folders import LOCK_FILE, hold_lock, make_folder, remove_abandoned

PREFIX = "fleetcast-run-"
MAX_SOCKET_PATH = 107  #: bytes of a Unix socket's path, which Linux bounds
LONGEST_NAME = 24  #: of a socket within the folder
FALLBACK = "/tmp"  # noqa: S108 -- short; the folder made in it is private, and its name is random

log = structlog.get_logger()


class RuntimeFolder:
    """A new private folder, locked. `close` removes it."""

    def __init__(self) -> None:
        """Raises OSError that says what to do where no folder can be made."""
        base = _short_base(tempfile.gettempdir())
        for folder in remove_abandoned(Path(base), PREFIX):
            log.info("abandoned_folder_removed", folder=str(folder))
        self.path, self._lock = make_folder(Path(base), PREFIX)

    def __repr__(self) -> str:
        return f"<RuntimeFolder {self.path}>"

    def socket(self, name: str) -> str:
        """The path of a socket in it.

        It is made anew should a cleaner of old files have removed it. Raises OSError where another user was quicker.
        """
        make_private_folder(self.path)
        if not (self.path / LOCK_FILE).exists():
            os.close(self._lock)
            self._lock = hold_lock(self.path)
        return str(self.path / name)

    def make(self, name: str) -> str:
        """The path of a folder in it, which is there. Raises OSError."""
        folder = Path(self.socket(name))
        make_private_folder(folder)
        return str(folder)

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
