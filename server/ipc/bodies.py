"""Large bodies in chunks, under credit: what is yet to be sent (`Outbox`) and what has partly arrived (`Inbox`). Pure.

The sender may have `WINDOW` bytes of one body under way and gets room for more by CREDIT frames, as the receiver passes
them on. So one large body delays the others by a chunk, and one slow client holds a window of memory, not a whole body.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import cast

import msgspec

from server.ipc.frames import CHUNK, Data, Request, WireError

WINDOW = 4 * CHUNK


class PartedBody:
    """A large body whose parts lie where they are: a slice of it is joined only where it goes over a border."""

    def __init__(self, parts: Sequence[bytes | memoryview]) -> None:
        self._parts = [memoryview(part) for part in parts]
        self._ends = list(accumulate(map(len, self._parts)))

    def __repr__(self) -> str:
        """For example `<PartedBody of 3 parts, 2500000 bytes>`."""
        return f"<PartedBody of {len(self._parts)} parts, {len(self)} bytes>"

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __bytes__(self) -> bytes:
        return b"".join(self._parts)

    def __getitem__(self, cut: slice) -> bytes | memoryview:
        at, end, _ = cut.indices(len(self))
        found = list[memoryview]()
        for i in range(bisect_right(self._ends, at), len(self._parts)):
            first = self._ends[i] - len(self._parts[i])
            if first >= end:
                break
            found.append(self._parts[i][max(0, at - first) : end - first])
        return found[0] if len(found) == 1 else b"".join(found)


class Outbox:
    """The bodies on their way out that did not fit one frame. Each has its own credit; they take turns."""

    def __init__(self) -> None:
        self._bodies: dict[int, PartedBody | memoryview] = {}
        self._sent: dict[int, int] = {}
        self.held_bytes = 0  #: of the bodies, which stay whole until their last chunk has left
        self._room: dict[int, int] = {}
        self._turn: deque[int] = deque()  # INVARIANT: holds each body that has room once

    def __len__(self) -> int:
        return len(self._bodies)

    def __repr__(self) -> str:
        """For example `<Outbox 2 bodies, 300000 bytes>`."""
        left = sum(map(len, self._bodies.values())) - sum(self._sent.values())
        return f"<Outbox {len(self._bodies)} bodies, {left} bytes>"

    def start(self, ident: int, body: bytes | PartedBody) -> None:
        """Keep a body whose first `CHUNK` bytes have left in the frame of its request or response."""
        self._bodies[ident] = body if isinstance(body, PartedBody) else memoryview(body)
        self._sent[ident] = CHUNK
        self.held_bytes += len(body)
        self._room[ident] = WINDOW - CHUNK
        self._turn.append(ident)

    def add_credit(self, ident: int, room: int) -> None:
        """The receiver has room for more. Credit for a finished body changes nothing."""
        if room and ident in self._bodies:
            if not self._room[ident]:
                self._turn.append(ident)
            self._room[ident] += room

    def drop(self, ident: int) -> None:
        """Forget the rest of this body."""
        if ident in self._bodies and self._forget(ident):
            self._turn.remove(ident)

    def next_chunk(self) -> Data | None:
        """The next DATA frame, round-robin over the bodies that have room; None when none has."""
        if not self._turn:
            return None
        ident = self._turn.popleft()
        body, sent = self._bodies[ident], self._sent[ident]
        size = min(CHUNK, self._room[ident], len(body) - sent)
        chunk = Data(ident, cast("bytes", body[sent : sent + size]))  # not copied: msgspec writes any buffer
        if sent + size == len(body):
            self._forget(ident)
            return chunk
        self._sent[ident] += size
        self._room[ident] -= size
        if self._room[ident]:
            self._turn.append(ident)
        return chunk

    def _forget(self, ident: int) -> int:
        """Drop a body; the room it had."""
        self.held_bytes -= len(self._bodies.pop(ident))
        del self._sent[ident]
        return self._room.pop(ident)


class Inbox:
    """The requests of which a part has arrived. Parts are joined once the announced size is there."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[Request, list[bytes], int]] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def start(self, request: Request) -> None:
        """The first part of a request's body is here."""
        self._parts[request.id] = (request, [request.body], request.body_bytes - len(request.body))

    def add(self, data: Data) -> Request | None:
        """The whole request once its last part is here. Parts of unknown (cancelled, refused) requests are dropped.

        Raises WireError for more body than was announced.
        """
        entry = self._parts.get(data.id)
        if entry is None:
            return None
        request, parts, missing = entry
        missing -= len(data.body)
        if missing < 0:
            raise WireError(f"request {data.id} has more body than it announced")
        parts.append(data.body)
        if missing:
            self._parts[data.id] = (request, parts, missing)
            return None
        del self._parts[data.id]
        return msgspec.structs.replace(request, body=b"".join(parts))

    def knows(self, ident: int) -> bool:
        """Whether the body of `ident` is still on its way in."""
        return ident in self._parts

    def drop(self, ident: int) -> bool:
        """Forget a request that was cancelled while its body was under way; False if there is none such."""
        return self._parts.pop(ident, None) is not None
