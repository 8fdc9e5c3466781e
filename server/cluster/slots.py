"""A replica's place on its host: one of a few folders for the disk tier, each with the name of the node that it is.

The name stays with the folder. So a replica that is started again owns the models whose archives lie on its disk,
whatever process, Ray node or address it is by then.
"""

import fcntl
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.ipc.sockets import make_private_folder

NAME_FILE = "node-name"
LOCK, OWN_LOCK = "lock", "replica"  #: files that the server with its replica, and the replica alone, hold
WAIT_S = 60.0  #: for the server that was here before to end
_LOOK_S = 0.1


class NoSlot(Exception):
    """Other replicas have all places of this host; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The place is this process's until both locks are closed: `lock` also by its children that inherit it."""

    index: int
    folder: Path
    name: str
    lock: int
    own: int  #: inherited by nobody: who finds it free knows that the replica is gone, though its server may still end

    def release(self) -> None:
        """Leave the place to others."""
        os.close(self.lock)
        os.close(self.own)


def claim_slot(folder: Path, count: int, wait_s: float = WAIT_S) -> Slot:
    """One of `count` places below `folder`. Raises NoSlot, OSError.

    1. Where a replica is gone and its server has not ended yet: who comes next is that node. The end is waited for,
       though other places may be free.
    2. Else the first free place, and so after `wait_s`.
    3. Else whichever is free first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + wait_s
    claims = [_Claim(folder / f"node-{index}", index) for index in range(count)]
    try:
        while True:
            is_late = time.monotonic() >= until
            if (slot := _choose(claims, is_late=is_late)) is not None:
                return slot
            if is_late:
                raise NoSlot(
                    f"{count} replicas of this cluster run on this host already, below {folder}: allow more with "
                    "--replicas-per-host, or give each cluster a disk_cache of its own"
                )
            time.sleep(_LOOK_S)
    finally:
        for claim in claims:
            claim.leave()


def _choose(claims: Sequence["_Claim"], *, is_late: bool) -> Slot | None:
    """The place to take now. INVARIANT: what is waited for stays claimed, and nothing else, so that others may come."""
    if is_late or all(claim.own is None for claim in claims):
        for claim in claims:
            claim.take_own()
    held = [claim for claim in claims if claim.own is not None]
    ending = next((claim for claim in held if claim.is_in_use()), None)
    chosen = [ending] if ending is not None and not is_late else held
    for claim in held:
        if claim not in chosen:
            claim.leave()
    return next((slot for claim in chosen if (slot := claim.take()) is not None), None)


class _Claim:
    """What this process has of a place while it looks for one."""

    def __init__(self, folder: Path, index: int) -> None:
        self._folder, self._index = folder, index
        self.own: int | None = None

    def __repr__(self) -> str:
        return f"<_Claim on {self._folder.name}>"

    def take_own(self) -> None:
        """Be its replica, where there is none."""
        if self.own is None:
            make_private_folder(self._folder)
            self.own = _lock(self._folder / OWN_LOCK)

    def is_in_use(self) -> bool:
        """Whether a server is still there."""
        lock = _lock(self._folder / LOCK)
        if lock is not None:
            os.close(lock)
        return lock is None

    def take(self) -> Slot | None:
        """The place, unless a server is still there."""
        assert self.own is not None, "its replica is this process"
        lock = _lock(self._folder / LOCK)
        if lock is None:
            return None
        file = self._folder / NAME_FILE
        if not file.exists():
            draft = file.with_suffix(".new")
            draft.write_text(f"node-{uuid.uuid4().hex[:12]}\n")
            draft.replace(file)
        own, self.own = self.own, None
        return Slot(self._index, self._folder, file.read_text().strip(), lock, own)

    def leave(self) -> None:
        """Let others be its replica."""
        if self.own is not None:
            os.close(self.own)
            self.own = None


def _lock(file: Path) -> int | None:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
