"""Amazon's event stream: the frames that boto3 reads of a response stream (CONTRACTS 11). Pure.

A frame is its length and that of its headers, their CRC-32, the headers, the payload, and the CRC-32 of all before.
"""

import zlib
from collections.abc import Iterator
from struct import pack

from server.front.slices import Slices, join_parts

PART_BYTES = 256 * 1024  #: most of one frame's payload
_STRING = 7  #: the type of a header's value
MEDIA = "application/vnd.amazon.eventstream"


def write_events(body: bytes, *, lines: bool) -> Slices[bytes]:
    """The frames of an answer: a line each where it is JSON Lines, and no more than `PART_BYTES` each."""
    return (yield from join_parts(_write_frames(memoryview(body), lines=lines)))


def _write_frames(body: memoryview, *, lines: bool) -> Iterator[bytes]:
    whole = body.obj
    at = 0
    while at < len(body):
        end = min(len(body), at + PART_BYTES)
        if lines and isinstance(whole, (bytes, bytearray)):
            line = whole.find(b"\n", at, end)
            end = end if line < 0 else line + 1
        yield write_frame(bytes(body[at:end]))
        at = end


def write_frame(payload: bytes) -> bytes:
    """One event of the kind PayloadPart."""
    headers = b"".join(
        (
            _write_header(b":event-type", b"PayloadPart"),
            _write_header(b":content-type", b"application/octet-stream"),
            _write_header(b":message-type", b"event"),
        )
    )
    head = pack(">II", 16 + len(headers) + len(payload), len(headers))
    frame = b"".join((head, pack(">I", zlib.crc32(head)), headers, payload))
    return frame + pack(">I", zlib.crc32(frame))


def _write_header(name: bytes, value: bytes) -> bytes:
    return pack(">B", len(name)) + name + pack(">BH", _STRING, len(value)) + value
