"""Frames between a front and a worker: pack, unpack, large bodies in interleaved chunks under credit. Pure.

A frame is a 16-byte head (bytes that follow, version, type, id) and its payload, little-endian. A body of at most
`CHUNK` bytes travels inside its request or response. A larger one follows in DATA frames: the sender may have `WINDOW`
bytes of one body under way and gets room for more by CREDIT frames, as the receiver passes them on. So one large body
delays the others by a chunk, and one slow client holds a window of the front's memory, not a whole body.
"""

from collections import deque
from collections.abc import Iterator
from enum import IntEnum
from struct import Struct as Layout
from struct import error as LayoutError  # noqa: N812 -- beside Layout

from msgspec import Struct

VERSION = 1
CHUNK = 64 * 1024
WINDOW = 4 * CHUNK
MAX_FRAME = CHUNK + 16 * 1024  # a chunk and the longest head: name, content type and accept are bounded by the front

_HEAD = Layout("<IBBHQ")  # payload bytes, version, type, spare, id
_REQUEST = Layout("<QQHHH")  # deadline, body bytes, bytes of name, content type, accept
_RESPONSE = Layout("<BBBBQIIIHH")  # situation, cache, tier, spare, body bytes, three times, bytes of version, type
_CREDIT = Layout("<I")


class WireError(Exception):
    """The peer does not speak our frames; the connection is of no use any more."""


class FrameType(IntEnum):
    """The second byte of the head."""

    REQUEST = 1
    DATA = 2
    RESPONSE = 3
    CANCEL = 4
    CREDIT = 5


class CacheResult(IntEnum):
    """What the cache did for a request; NONE when it was refused before the cache was asked."""

    NONE = 0
    HIT = 1
    MISS = 2
    COALESCED = 3


class Tier(IntEnum):
    """Where a miss found the archive."""

    NONE = 0
    DISK = 1
    STORE = 2
    HOST = 3


class Request(Struct, frozen=True, gc=False):
    """Head of a request. `deadline_ns` on the monotonic clock of the host; `body` is all of it or the first part."""

    id: int
    deadline_ns: int
    model: str
    content_type: str
    accept: str
    body_bytes: int
    body: bytes


class Response(Struct, frozen=True, gc=False):
    """Head of a response. `situation` is 0 for success, else a `server.errors.Situation`; times in microseconds."""

    id: int
    situation: int
    cache: int
    tier: int
    version: str
    content_type: str
    queue_us: int
    load_us: int
    inference_us: int
    body_bytes: int
    body: bytes


class Data(Struct, frozen=True, gc=False):
    """The next part of the body of request or response `id`."""

    id: int
    body: bytes


class Cancel(Struct, frozen=True, gc=False):
    """Nobody waits for request `id` any more."""

    id: int


class Credit(Struct, frozen=True, gc=False):
    """Room for `room` more bytes of the body of `id`."""

    id: int
    room: int


Frame = Request | Response | Data | Cancel | Credit


def pack(frame: Frame) -> bytes:
    """The frame's bytes. Raises WireError for a body above `CHUNK`, and for texts and numbers that fit no frame."""
    try:
        return _pack(frame)
    except (LayoutError, UnicodeEncodeError) as error:
        raise WireError(f"{type(frame).__name__.lower()} {frame.id}: {error}") from error


def _pack(frame: Frame) -> bytes:
    if type(frame) is Request:
        name, kind, accept = frame.model.encode(), frame.content_type.encode(), frame.accept.encode()
        fixed = _REQUEST.pack(frame.deadline_ns, frame.body_bytes, len(name), len(kind), len(accept))
        return _framed(FrameType.REQUEST, frame.id, b"".join((fixed, name, kind, accept)), frame.body)
    if type(frame) is Response:
        version, kind = frame.version.encode(), frame.content_type.encode()
        times = (min(frame.queue_us, 2**32 - 1), min(frame.load_us, 2**32 - 1), min(frame.inference_us, 2**32 - 1))
        codes = (frame.situation, frame.cache, frame.tier, 0)
        fixed = _RESPONSE.pack(*codes, frame.body_bytes, *times, len(version), len(kind))
        return _framed(FrameType.RESPONSE, frame.id, b"".join((fixed, version, kind)), frame.body)
    if type(frame) is Data:
        return _framed(FrameType.DATA, frame.id, b"", frame.body)
    if type(frame) is Credit:
        return _framed(FrameType.CREDIT, frame.id, _CREDIT.pack(frame.room))
    return _framed(FrameType.CANCEL, frame.id, b"")


def _framed(kind: FrameType, ident: int, head: bytes, body: bytes = b"") -> bytes:
    size = len(head) + len(body)
    if size > MAX_FRAME or len(body) > CHUNK:
        raise WireError(f"a frame of {len(head)} and {len(body)} bytes: at most {MAX_FRAME}, and {CHUNK} of a body")
    return b"".join((_HEAD.pack(size, VERSION, kind, 0, ident), head, body))


class Reader:
    """Cuts a byte stream into frames; what is left of the last one waits for more."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that `data` completes. Raises WireError for what cannot be a frame of ours."""
        buffer = self._rest + data if self._rest else data
        at, end = 0, len(buffer)
        try:
            while end - at >= _HEAD.size:
                length, version, kind, _, ident = _HEAD.unpack_from(buffer, at)
                if version != VERSION or length > MAX_FRAME:
                    raise WireError(f"not a frame of version {VERSION}: version {version}, {length} bytes")
                start, stop = at + _HEAD.size, at + _HEAD.size + length
                if stop > end:
                    break
                at = stop
                yield _unpack(kind, ident, buffer, start, stop)
        finally:
            self._rest = buffer[at:]


def _unpack(kind: int, ident: int, buffer: bytes, at: int, stop: int) -> Frame:
    """One frame whose payload is buffer[at:stop]."""
    try:
        if kind == FrameType.REQUEST:
            deadline, size, a, b, c = _REQUEST.unpack_from(buffer, at)
            at += _REQUEST.size
            texts = (buffer[at : at + a].decode(), buffer[at + a : at + a + b].decode())
            accept = buffer[at + a + b : at + a + b + c].decode()
            return Request(ident, deadline, *texts, accept, size, _body(buffer, at + a + b + c, stop, size))
        if kind == FrameType.RESPONSE:
            situation, cache, tier, _, size, queue, load, inference, a, b = _RESPONSE.unpack_from(buffer, at)
            at += _RESPONSE.size
            texts = (buffer[at : at + a].decode(), buffer[at + a : at + a + b].decode())
            body = _body(buffer, at + a + b, stop, size)
            return Response(ident, situation, cache, tier, *texts, queue, load, inference, size, body)
        if kind == FrameType.DATA:
            return Data(ident, _body(buffer, at, stop, CHUNK))
        if kind == FrameType.CREDIT and stop - at == _CREDIT.size:
            return Credit(ident, _CREDIT.unpack_from(buffer, at)[0])
        if kind == FrameType.CANCEL and stop == at:
            return Cancel(ident)
    except (LayoutError, UnicodeDecodeError) as error:
        raise WireError(f"frame of type {kind}: {error}") from error
    raise WireError(f"no frame has type {kind} and {stop - at} bytes")


def _body(buffer: bytes, at: int, stop: int, size: int) -> bytes:
    """The payload's rest: `size` bytes, or the first part of them."""
    if at > stop or stop - at > min(size, CHUNK):
        raise WireError("the lengths inside a frame do not fit its size")
    return buffer[at:stop]


class Outbox:
    """The bodies on their way out that did not fit one frame, each under its own credit, taking turns."""

    def __init__(self) -> None:
        self._bodies: dict[int, memoryview] = {}
        self._room: dict[int, int] = {}
        self._turn: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._bodies)

    def __repr__(self) -> str:
        """For example `<Outbox 2 bodies, 300000 bytes>`."""
        return f"<Outbox {len(self._bodies)} bodies, {sum(map(len, self._bodies.values()))} bytes>"

    def start(self, ident: int, body: bytes) -> bytes:
        """The part that travels in the request's or response's own frame; the rest is kept for `chunks`."""
        if len(body) <= CHUNK:
            return body
        self._bodies[ident] = memoryview(body)[CHUNK:]
        self._room[ident] = WINDOW - CHUNK
        self._turn.append(ident)
        return body[:CHUNK]

    def credit(self, ident: int, room: int) -> None:
        """The receiver has room for more. Late credit for a finished body is nothing."""
        if room and ident in self._bodies:
            if not self._room[ident]:
                self._turn.append(ident)
            self._room[ident] += room

    def drop(self, ident: int) -> None:
        """Nobody wants the rest of this body."""
        if self._bodies.pop(ident, None) is not None and self._room.pop(ident):
            self._turn.remove(ident)

    def chunk(self) -> bytes | None:
        """The next DATA frame, round-robin over the bodies that have room; None when none has."""
        if not self._turn:
            return None
        ident = self._turn.popleft()
        body = self._bodies[ident]
        size = min(CHUNK, self._room[ident], len(body))
        frame = pack(Data(ident, bytes(body[:size])))
        if size == len(body):
            del self._bodies[ident], self._room[ident]
            return frame
        self._bodies[ident] = body[size:]
        self._room[ident] -= size
        if self._room[ident]:
            self._turn.append(ident)
        return frame


class Inbox:
    """The bodies on their way in: parts are joined until the announced size is there."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[Request, list[bytes], int]] = {}

    def __len__(self) -> int:
        return len(self._parts)

    def start(self, request: Request) -> None:
        """The first part is here, more will come."""
        self._parts[request.id] = (request, [request.body], request.body_bytes - len(request.body))

    def add(self, data: Data) -> Request | None:
        """The whole request once its last part is here. Parts of unknown (cancelled, refused) requests are dropped."""
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
        body = b"".join(parts)
        fixed = (request.id, request.deadline_ns, request.model, request.content_type, request.accept)
        return Request(*fixed, request.body_bytes, body)

    def knows(self, ident: int) -> bool:
        """Whether the body of `ident` is still on its way in."""
        return ident in self._parts

    def drop(self, ident: int) -> bool:
        """Forget a request that was cancelled while its body was under way; False if there is none such."""
        return self._parts.pop(ident, None) is not None
