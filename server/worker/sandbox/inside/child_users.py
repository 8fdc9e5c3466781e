"""The users that a template's children run as, where it is root: each has its own, which no process of another one has.

The kernel counts the processes of a user together, whichever server has started them, and lets them signal and trace
one another and use each other's files. So the templates of a host claim blocks of users, each by the name of an
abstract Unix socket: the kernel gives a name to one process, until that ends, whose children have ended before.
"""

import os
import socket
from collections import deque

FIRST_USER, USERS = 61184, 4336  #: those that no person has, as systemd's DynamicUser
BLOCK = 16  #: users that are claimed together
NAME = "\0fleetcast-code-users-{}"  #: of a block


class ChildUsers:
    """See the module. INVARIANT: a user is taken again only after it was given back."""

    def __init__(self) -> None:
        self._claims: list[socket.socket] = []
        self._free: deque[int] = deque()
        self._taken: set[int] = set()

    def __repr__(self) -> str:
        """For example `<ChildUsers 3 taken, 13 free>`."""
        return f"<ChildUsers {len(self._taken)} taken, {len(self._free)} free>"

    def take(self) -> int:
        """A user for one more child. Where all of the host's are taken, it is one that others have too."""
        if not self._free and not self._claim():
            return FIRST_USER + os.getpid() % USERS
        user = self._free.popleft()
        self._taken.add(user)
        return user

    def give_back(self, user: int) -> None:
        """No process of the user is left. One that others have too is nobody's to give back."""
        if user in self._taken:
            self._taken.remove(user)
            self._free.append(user)

    def close(self) -> None:
        """Leave all blocks to others."""
        for claim in self._claims:
            claim.close()

    def _claim(self) -> bool:
        """Claim the first block that nobody has. False where there is none."""
        for block in range(USERS // BLOCK):
            claim = socket.socket(socket.AF_UNIX)
            try:
                claim.bind(NAME.format(block))
            except OSError:
                claim.close()
                continue
            self._claims.append(claim)
            self._free.extend(range(FIRST_USER + block * BLOCK, FIRST_USER + (block + 1) * BLOCK))
            return True
        return False
