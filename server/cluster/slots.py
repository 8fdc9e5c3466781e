"""A replica's place on its host: one of a few folders for the disk tier, each with the name of the node that it is.

The name stays with the folder. So a replica that is started again owns the models whose archives lie on its disk,
whatever process, Ray node or address it is by then.
"""

import fcntl
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from server.ipc.sockets import make_private_folder

NAME_FILE = "node-name"
WAIT_S = 60.0  #: for the server that was here before to end
_LOOK_S = 0.1


class NoSlot(Exception):
    """Other replicas have all places of this host; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The place is this process's until `lock` is closed, also by its children that inherit it."""

    index: int
    folder: Path
    name: str
    lock: int

    def release(self) -> None:
        """Leave the place to others."""
        os.close(self.lock)


def claim_slot(folder: Path, count: int, wait_s: float = WAIT_S) -> Slot:
    """The first free of `count` places below `folder`. Raises NoSlot, OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + wait_s
    while True:
        for index in range(count):
            if (slot := _try_slot(folder / f"node-{index}", index)) is not None:
                return slot
        if time.monotonic() >= until:
            raise NoSlot(
                f"{count} replicas of this cluster run on this host already, below {folder}: allow more with "
                "--replicas-per-host, or give each cluster a disk_cache of its own"
            )
        time.sleep(_LOOK_S)


def _try_slot(folder: Path, index: int) -> Slot | None:
    make_private_folder(folder)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    file = folder / NAME_FILE
    if not file.exists():
        draft = file.with_suffix(".new")
        draft.write_text(f"node-{uuid.uuid4().hex[:12]}\n")
        draft.replace(file)
    return Slot(index, folder, file.read_text().strip(), lock)
