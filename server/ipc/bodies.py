"""Large bodies in chunks, under credit: what is yet to be sent (`Outbox`) and what has partly arrived (`Inbox`). Pure.

The sender may have `WINDOW` bytes of one body under way and gets room for more by CREDIT frames, as the receiver passes
them on. So one large body delays the others by a chunk, and one slow client holds a window of memory, not a whole body.
"""

from collections import deque
from typing import cast

import msgspec

from server.ipc.frames import CHUNK, Data, Request, WireError

WINDOW = 4 * CHUNK


class Outbox:
    """The bodies on their way out that did not fit one frame. Each has its own credit; they take turns."""

    def __init__(self) -> None:
        self._bodies: dict[int, memoryview] = {}
        self.held_bytes = 0  #: of the bodies, which stay whole until their last chunk has left
        self._room: dict[int, int] = {}
        self._turn: deque[int] = deque()  # INVARIANT: holds each body that has room once

    def __len__(self) -> int:
        return len(self._bodies)

    def __repr__(self) -> str:
        """For example `<Outbox 2 bodies, 300000 bytes>`."""
        return f"<Outbox {len(self._bodies)} bodies, {sum(map(len, self._bodies.values()))} bytes>"

    def start(self, ident: int, body: bytes) -> None:
        """Keep a body whose first `CHUNK` bytes have left in the frame of its request or response."""
        self._bodies[ident] = memoryview(body)[CHUNK:]
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
        body = self._bodies[ident]
        size = min(CHUNK, self._room[ident], len(body))
        chunk = Data(ident, cast("bytes", body[:size]))  # not copied: msgspec writes any buffer
        if size == len(body):
            self._forget(ident)
            return chunk
        self._bodies[ident] = body[size:]
        self._room[ident] -= size
        if self._room[ident]:
            self._turn.append(ident)
        return chunk

    def _forget(self, ident: int) -> int:
        """Drop a body; the room it had."""
        self.held_bytes -= memoryview(self._bodies.pop(ident).obj).nbytes
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
