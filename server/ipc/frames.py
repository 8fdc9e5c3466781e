"""The frames between a front and a worker: their fields, their bytes, and a reader that cuts a stream into them. Pure.

A frame is a 5-byte prefix (u32 bytes that follow, little-endian; u8 version) and one msgpack array, whose first element
says which frame it is. A body of at most `CHUNK` bytes travels inside its request or response. The rest of a larger one
follows in DATA frames, under credit (`server.ipc.bodies`). Every length is checked before memory is taken for it:
`MAX_FRAME` bounds the frame, and the frame bounds what is inside.
"""

from collections.abc import Iterator
from enum import IntEnum
from struct import Struct as Layout
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from server.errors import Situation

VERSION = 7
CHUNK = 64 * 1024  #: bytes of a body in one frame at most
MAX_FRAME = CHUNK + 32 * 1024  #: a chunk and the longest head: the front bounds name, types and the code's call
MOST_STAGES, MAX_STAGE_ERROR = 32, 512  #: of a traced request, and characters of why a stage failed

_PREFIX = Layout("<IB")
_encode_into = msgspec.msgpack.Encoder().encode_into

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Part = Annotated[bytes, Meta(max_length=CHUNK)]


class WireError(Exception):
    """The peer does not speak our frames, or a frame of ours would break their bounds. The connection has to end."""


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


class _Frame(Struct, array_like=True, gc=False, forbid_unknown_fields=True):
    """`id` is the request's, unique on its connection."""

    id: Count


class Request(_Frame, tag=1):
    """A request. `body` is all of the body or its first part.

    `deadline_ns` and `arrived_ns`, when it arrived at the front, are on the monotonic clock, which the host's processes
    share. `arrived_ns` 0: it arrived now.
    `alone`: it is to run in a batch of its own, because its model ran when a worker died. `client`: see InferRequest.
    `call`: a `server.ipc.handler_calls.HandlerCall` for an archive with code; empty for all others.
    """

    deadline_ns: Count
    model: str
    content_type: str
    accept: str
    body_bytes: Count
    body: Part
    arrived_ns: Count = 0
    alone: bool = False
    client: str = ""
    call: bytes = b""


class Data(_Frame, tag=2):
    """The next part of the body of request or response `id`."""

    body: Part


class Response(_Frame, tag=3):
    """A response; the body of one that is not OK is a `server.errors.Detail`. Times are in microseconds.

    `head`: a `server.ipc.handler_calls.AnswerHead`, where an archive's code was told a call; empty for all others.
    `quality`, `warnings`: the values of two headers, see `handlers.codecs.marks`.
    """

    situation: Situation
    cache: CacheResult
    tier: Tier
    version: str
    content_type: str
    queue_us: Count
    load_us: Count
    inference_us: Count
    body_bytes: Count
    body: Part
    head: bytes = b""
    quality: str = ""
    warnings: str = ""


class Cancel(_Frame, tag=4):
    """The answer to request `id` is not wanted any more."""


class Credit(_Frame, tag=5):
    """The sender of the body of `id` may send `room` more bytes."""

    room: Count


class Held(_Frame, tag=6):
    """From a front: no further request for the model of the lend `id` follows. See `server.ipc.lends`."""


class Partial(_Frame, tag=7):
    """A part of an answer that is sent while it is made, before its response; see `server.ipc.part_streams`.

    `content_type` and `head` are those of the response; only the first part's count.
    """

    content_type: str
    body: Part
    head: bytes = b""


class TracedRequest(Request, tag=8):
    """A request that is sampled for a trace, whose id is in hexadecimal. `Stages` come before its response."""

    trace_id: Annotated[str, Meta(max_length=32)] = ""


class Stage(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A part of a traced request's way through a worker: from when to when, on the monotonic clock.

    Dots in a name say what it is a part of: `load.store.get` is one of the latest `load.store` before it. `error`:
    why it failed; empty where it did not. `numbers`: what it was about, such as rows and bytes.
    """

    name: Annotated[str, Meta(max_length=64)]
    began_ns: Count
    ended_ns: Count
    numbers: Annotated[dict[Annotated[str, Meta(max_length=32)], Count], Meta(max_length=8)] = {}
    error: Annotated[str, Meta(max_length=MAX_STAGE_ERROR)] = ""


class Stages(_Frame, tag=9):
    """What a worker says of the traced request `id`, in the order in which the stages began."""

    stages: Annotated[list[Stage], Meta(max_length=MOST_STAGES)]


Frame = Request | Data | Response | Cancel | Credit | Held | Partial | TracedRequest | Stages
BODY_STARTS = (Request, Response)  #: the frames with the first part of a body; a union would be built at each check

_decode = msgspec.msgpack.Decoder(Frame).decode


def append_frame(buffer: bytearray, frame: Frame) -> None:
    """Write the frame's bytes behind what is in the buffer: the one copy of a body on its way to the socket.

    Raises WireError for what no frame can hold; the buffer is then as it was.
    """
    start = len(buffer)
    try:
        _encode_into(frame, buffer, start + _PREFIX.size)
    except (OverflowError, UnicodeEncodeError) as error:
        del buffer[start:]
        raise WireError(f"{type(frame).__name__} {frame.id}: {error}") from error
    size = len(buffer) - start - _PREFIX.size
    if size > MAX_FRAME:
        del buffer[start:]
        raise WireError(f"{type(frame).__name__} {frame.id} has {size} bytes, a frame has {MAX_FRAME} at most")
    _PREFIX.pack_into(buffer, start, size, VERSION)


class FrameReader:
    """Cuts a byte stream into frames; the beginning of an unfinished frame waits for its rest."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that `data` completes. Raises WireError for what cannot be a frame of ours.

        Of what has come before, no more than the unfinished frame is copied.
        """
        at, end = 0, len(data)
        view, rest = memoryview(data), self._rest
        try:
            if rest:
                size = _measure_frame(rest + data[: _PREFIX.size], 0)
                at = end if size is None else min(end, size - len(rest))
                self._rest = rest = b"".join((rest, view[:at]))
                if len(rest) != size:
                    return
                self._rest = b""
                yield _parse_frame(memoryview(rest)[_PREFIX.size :])
            while end - at >= _PREFIX.size:  # no call of `_measure_frame`: most of what comes is one frame
                size, version = _PREFIX.unpack_from(data, at)
                if version != VERSION or size > MAX_FRAME:
                    raise _refuse_prefix(size, version)
                start, stop = at + _PREFIX.size, at + _PREFIX.size + size
                if stop > end:
                    break
                at = stop
                yield _parse_frame(view[start:stop])
        finally:
            if at < end:
                self._rest = data[at:]


def _measure_frame(buffer: bytes, at: int) -> int | None:
    """The bytes of the frame that begins there, with its prefix; None where that is not complete. Raises WireError."""
    if len(buffer) - at < _PREFIX.size:
        return None
    size, version = _PREFIX.unpack_from(buffer, at)
    if version != VERSION or size > MAX_FRAME:
        raise _refuse_prefix(size, version)
    return _PREFIX.size + int(size)


def _refuse_prefix(size: int, version: int) -> WireError:
    return WireError(f"not a frame of version {VERSION}: version {version}, {size} bytes")


def _parse_frame(payload: memoryview) -> Frame:
    try:
        frame = _decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WireError(f"a frame of {len(payload)} bytes: {error}") from error
    if isinstance(frame, BODY_STARTS) and len(frame.body) > frame.body_bytes:
        raise WireError(f"a body of {len(frame.body)} bytes is announced as {frame.body_bytes}")
    return frame
