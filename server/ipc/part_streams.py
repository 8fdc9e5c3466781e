"""Answers that are sent while they are made: the parts on their way to a front, under credit. Pure.

A part is a `Partial` frame, or several where it is larger than a chunk; the answer's `Response` follows the last of
them with the last part. The sender may have `WINDOW` bytes of one answer under way. What waits for a slow client waits
here, and nothing waits for it: what may wait is the caller's to bound, by `held_bytes`.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from server.ipc.bodies import WINDOW
from server.ipc.frames import CHUNK, Partial, Response


@dataclass(slots=True)
class _Stream:
    room: int = WINDOW
    waiting: deque[Partial] = field(default_factory=deque)
    last: Response | None = None


class PartStreams:
    """See the module. One for each connection to a front."""

    def __init__(self) -> None:
        self._streams: dict[int, _Stream] = {}
        self.held_bytes = 0  #: of parts that wait

    def __repr__(self) -> str:
        """For example `<PartStreams 2 answers, 300000 bytes wait>`."""
        return f"<PartStreams {len(self._streams)} answers, {self.held_bytes} bytes wait>"

    def has(self, ident: int) -> bool:
        """Whether parts of the answer were sent, or wait, and its end has not been sent."""
        return ident in self._streams

    def add(self, part: Partial) -> Iterator[Partial | Response]:
        """What can be sent now that there is this part too."""
        stream = self._streams.setdefault(part.id, _Stream())
        for each in cut_part(part):
            stream.waiting.append(each)
            self.held_bytes += len(each.body)
        return self._take(part.id, stream)

    def end(self, response: Response) -> Iterator[Partial | Response]:
        """What can be sent now that there is the end; an answer without parts is its end."""
        stream = self._streams.setdefault(response.id, _Stream())
        stream.last = response
        return self._take(response.id, stream)

    def add_credit(self, ident: int, room: int) -> Iterator[Partial | Response]:
        """What can be sent now that the client has taken so many bytes."""
        stream = self._streams.get(ident)
        if stream is None:
            return iter(())
        stream.room += room
        return self._take(ident, stream)

    def drop(self, ident: int) -> None:
        """Forget an answer that is not wanted any more."""
        stream = self._streams.pop(ident, None)
        if stream is not None:
            self.held_bytes -= sum(len(part.body) for part in stream.waiting)

    def _take(self, ident: int, stream: _Stream) -> Iterator[Partial | Response]:
        while stream.waiting and stream.room > 0:
            part = stream.waiting.popleft()
            stream.room -= len(part.body)
            self.held_bytes -= len(part.body)
            yield part
        if stream.last is not None and not stream.waiting:
            del self._streams[ident]
            yield stream.last


def cut_part(part: Partial) -> Iterator[Partial]:
    """The part in frames of a chunk at most; the head is said once."""
    yield Partial(part.id, part.content_type, part.body[:CHUNK], part.head)
    for at in range(CHUNK, len(part.body), CHUNK):
        yield Partial(part.id, "", part.body[at : at + CHUNK])
