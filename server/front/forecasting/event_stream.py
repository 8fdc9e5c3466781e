"""Amazon's event stream: the frames that boto3 reads of a response stream (CONTRACTS 11). Pure.

A frame is its length and that of its headers, their CRC-32, the headers, the payload, and the CRC-32 of all before.
"""

import zlib
from struct import pack

import msgspec

PART_BYTES = 256 * 1024  #: most of one frame's payload
_STRING = 7  #: the type of a header's value
MEDIA = "application/vnd.amazon.eventstream"


class EventWriter:
    """Makes the frames of an answer that comes in pieces: a line each where it is JSON Lines.

    No frame has more than `PART_BYTES`, which is also the most that is kept of a line whose end has not come.
    """

    def __init__(self, *, lines: bool) -> None:
        self._lines, self._rest = lines, bytearray()

    def __repr__(self) -> str:
        """For example `<EventWriter with 20 bytes of a line>`."""
        return f"<EventWriter with {len(self._rest)} bytes of a line>"

    def write(self, piece: bytes | bytearray) -> bytes:
        """The frames of all that is whole with this piece; empty where nothing is."""
        self._rest += piece
        frames, at = list[bytes](), 0
        while (end := self._find_end(at)) > at:
            frames.append(write_frame(bytes(self._rest[at:end])))
            at = end
        del self._rest[:at]
        return b"".join(frames)

    def finish(self) -> bytes:
        """The frame of what is left, which is a last line without its end; empty where nothing is."""
        rest, self._rest = bytes(self._rest), bytearray()
        return write_frame(rest) if rest else b""

    def _find_end(self, at: int) -> int:
        """The end of the frame that begins `at`; `at` itself where more has to come."""
        size = len(self._rest)
        if not self._lines:
            return min(size, at + PART_BYTES)
        line = self._rest.find(b"\n", at, at + PART_BYTES)
        if line >= 0:
            return line + 1
        return at + PART_BYTES if size - at >= PART_BYTES else at


def write_frame(payload: bytes) -> bytes:
    """One event of the kind PayloadPart."""
    return _write_message(
        (
            (b":event-type", b"PayloadPart"),
            (b":content-type", b"application/octet-stream"),
            (b":message-type", b"event"),
        ),
        payload,
    )


def write_exception(kind: str, message: str, code: str | None = None) -> bytes:
    """The frame that ends a broken stream: boto3 raises `kind` with this message. `code`: of a ModelStreamError."""
    said = {"Message": message} if code is None else {"Message": message, "ErrorCode": code}
    kinds = (b":exception-type", kind.encode()), (b":content-type", b"application/json")
    return _write_message((*kinds, (b":message-type", b"exception")), msgspec.json.encode(said))


def _write_message(headers: tuple[tuple[bytes, bytes], ...], payload: bytes) -> bytes:
    fields = b"".join(_write_header(name, value) for name, value in headers)
    head = pack(">II", 16 + len(fields) + len(payload), len(fields))
    frame = b"".join((head, pack(">I", zlib.crc32(head)), fields, payload))
    return frame + pack(">I", zlib.crc32(frame))


def _write_header(name: bytes, value: bytes) -> bytes:
    return pack(">B", len(name)) + name + pack(">BH", _STRING, len(value)) + value
