"""Compressed bodies, of requests and of answers: gzip and deflate (RFC 9110, 8.4.1); of requests zstd (RFC 8878) too.

A body is unpacked in pieces, and the event loop runs between two of them. Whoever takes the pieces bounds their sum, so
that a body which unpacks to more than is allowed costs no more memory than one that is sent as it is. Runs in a front.
"""

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from server.errors import Refused, Situation

PIECE_BYTES = 256 * 1024  #: unpacked at a time, 1 ms or less
FED_BYTES = 64 * 1024  #: packed bytes that zlib is given at a time: it copies what it leaves
PACKED_HERE = 64 * 1024  #: bytes of an answer; a longer one is packed in a thread, without the interpreter's lock
PACK_LEVEL = 1  #: twice as fast as the usual 6; answers of numbers become a few per cent longer
MAX_ACCEPT_BYTES = 1024  #: of an Accept-Encoding that are looked at
PACKINGS = ("gzip", "deflate")  #: of answers
CODINGS = (*PACKINGS, "zstd")
_SAME = {"": "", "identity": "", "x-gzip": "gzip"}  #: no coding, and an old name (RFC 9110, 8.4.1.3)
#: A zstd stream's window, which is taken before anything is unpacked: RFC 8878 (3.1.1.1.2) says that 8 MiB are enough.
ZSTD_WINDOW_BYTES = 8 * 1024 * 1024
#: Packed bytes that zstd is given at a time: it gives all that comes of them, and 4 bytes can become 128 KiB.
ZSTD_FED_BYTES = 32
_RAW, _ZLIB, _GZIP = -zlib.MAX_WBITS, zlib.MAX_WBITS, 16 + zlib.MAX_WBITS
_ZLIB_METHOD, _ZLIB_CHECK = 8, 31  # RFC 1950: the low four bits of the first byte, and what divides the first two


def find_coding(headers: Mapping[bytes, bytes]) -> str:
    """The body's coding, one of `CODINGS`, or empty where it is sent as it is. Raises Refused for any other."""
    named = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
    coding = _SAME.get(named, named)
    if coding and coding not in CODINGS:
        message = f"Content-Encoding {named[:80]!r} is not served; send {' or '.join(CODINGS)}, or the body as it is"
        raise Refused(Situation.UNSUPPORTED_CODING, message, field="content-encoding")
    return coding


def unpack(body: bytes, coding: str) -> Callable[[], Awaitable[MutableMapping[str, Any]]]:
    """A function that gives the unpacked body piece by piece, as ASGI's `http.request` messages.

    It raises Refused where the body is damaged, ends early, or is followed by other bytes.
    """
    if coding == "zstd":
        return _unpack_zstd(body)
    inflater = zlib.decompressobj(_GZIP if coding == "gzip" else _ZLIB if _is_zlib(body) else _RAW)
    packed, at = memoryview(body), 0

    async def next_piece() -> MutableMapping[str, Any]:
        nonlocal at
        await asyncio.sleep(0)
        fed = packed[at : at + FED_BYTES]
        try:
            piece = inflater.decompress(fed, PIECE_BYTES)
        except zlib.error:
            raise _refused(f"the body is not sound {coding}") from None
        at += len(fed) - len(inflater.unused_data if inflater.eof else inflater.unconsumed_tail)
        if inflater.eof and at < len(packed):
            raise _refused(f"{len(packed) - at} bytes follow the {coding} stream of the body")
        if not inflater.eof and not piece and at == len(packed):
            raise _refused(f"the {coding} stream of the body ends early")
        return {"type": "http.request", "body": piece, "more_body": not inflater.eof}

    return next_piece


def _unpack_zstd(body: bytes) -> Callable[[], Awaitable[MutableMapping[str, Any]]]:
    """`unpack` of one zstd frame. A piece has at most 1 MiB more than `PIECE_BYTES`."""
    import zstandard  # noqa: PLC0415 - few clients send it: a front that gets none does without the library

    inflater = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()
    packed, at = memoryview(body), 0

    async def next_piece() -> MutableMapping[str, Any]:
        nonlocal at
        await asyncio.sleep(0)
        piece, end = bytearray(), min(at + FED_BYTES, len(packed))
        try:
            while at < end and not inflater.eof and len(piece) < PIECE_BYTES:
                piece += inflater.decompress(packed[at : at + ZSTD_FED_BYTES])
                at += ZSTD_FED_BYTES
        except zstandard.ZstdError as error:
            raise _refused(f"the body is not sound zstd: {error}") from None
        behind = len(inflater.unused_data) + max(0, len(packed) - at) if inflater.eof else 0
        if behind:
            raise _refused(f"{behind} bytes follow the zstd frame of the body")
        if not inflater.eof and at >= len(packed):
            raise _refused("the zstd frame of the body ends early")
        return {"type": "http.request", "body": piece, "more_body": not inflater.eof}

    return next_piece


def choose_coding(headers: Mapping[bytes, bytes]) -> str:
    """The coding of `PACKINGS` that Accept-Encoding names with the highest weight, the first of equals; empty for none.

    `*` and a missing header choose none: a client that wants packed answers names how.
    """
    best, highest = "", 0.0
    for each in headers.get(b"accept-encoding", b"")[:MAX_ACCEPT_BYTES].decode("latin-1").lower().split(","):
        name, _, parameter = each.partition(";")
        coding = _SAME.get(name.strip(), name.strip())
        weight = _parse_weight(parameter)
        if coding in PACKINGS and weight > highest:
            best, highest = coding, weight
    return best


async def pack(body: bytes, coding: str) -> bytes:
    """The body in a coding of `PACKINGS`."""
    if len(body) <= PACKED_HERE:
        return _pack(body, coding)
    return await asyncio.to_thread(_pack, body, coding)


def _pack(body: bytes, coding: str) -> bytes:
    packer = zlib.compressobj(PACK_LEVEL, wbits=_GZIP if coding == "gzip" else _ZLIB)
    return packer.compress(body) + packer.flush()


def _parse_weight(parameter: str) -> float:
    name, _, value = parameter.strip().partition("=")
    if name.strip() != "q":
        return 1.0
    try:
        return float(value)
    except ValueError:
        return 0.0


def _is_zlib(body: bytes) -> bool:
    """`deflate` means a zlib stream, but some clients send the bare deflate stream that is in one."""
    return len(body) > 1 and body[0] & 15 == _ZLIB_METHOD and int.from_bytes(body[:2]) % _ZLIB_CHECK == 0


def _refused(message: str) -> Refused:
    return Refused(Situation.BAD_REQUEST, message, field="content-encoding")
