"""When certificates end, read from their files: standard library only, which decodes certificates of connections alone.

A certificate's validity stands behind its serial number, algorithm and issuer (RFC 5280, 4.1), in DER's simple frame of
tag, length and content.
"""

import re
import ssl
from datetime import UTC, datetime
from pathlib import Path

MAX_BYTES = 1024 * 1024  #: of a file; an authority's bundle has some 200 KiB
_BLOCK = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_SEQUENCE, _VERSION, _UTC_TIME = 0x30, 0xA0, 0x17
_LONG_FORM = 0x80
_MOST_LENGTH_BYTES = 4
_BEFORE_VALIDITY = 3  #: serial number, algorithm, issuer


def read_first_end(path: Path) -> float:
    """The Unix time at which the first certificate of a PEM file ends. Raises OSError, and ValueError that says why."""
    with path.open("rb") as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES} bytes; a file of certificates is smaller")
    blocks = _BLOCK.findall(raw)
    if not blocks:
        raise ValueError(f"{path} has no certificate in PEM")
    try:
        return min(find_end(ssl.PEM_cert_to_DER_cert(block.decode("ascii"))) for block in blocks)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} has a certificate that cannot be read: {error}") from error


def find_end(certificate: bytes) -> float:
    """The Unix time at which a certificate in DER ends. Raises ValueError or IndexError for what is none. Pure."""
    _, start, _ = _read_frame(certificate, 0, _SEQUENCE)
    _, at, _ = _read_frame(certificate, start, _SEQUENCE)
    if certificate[at] == _VERSION:
        _, _, at = _read_frame(certificate, at)
    for _ in range(_BEFORE_VALIDITY):
        _, _, at = _read_frame(certificate, at)
    _, begin, _ = _read_frame(certificate, at, _SEQUENCE)
    _, _, end = _read_frame(certificate, begin)
    tag, start, stop = _read_frame(certificate, end)
    text = certificate[start:stop].decode("ascii")
    if tag == _UTC_TIME:  # two digits of a year: 50 to 99 are of the last century
        text = ("19" if text[:2] >= "50" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _read_frame(der: bytes, at: int, wanted: int | None = None) -> tuple[int, int, int]:
    """The tag of the value at `at`, and where its content starts and ends."""
    tag, length, start = der[at], der[at + 1], at + 2
    if wanted is not None and tag != wanted:
        raise ValueError(f"tag {tag:#x} at byte {at} where {wanted:#x} has to be")
    if length & _LONG_FORM:
        count = length & ~_LONG_FORM
        if not 0 < count <= _MOST_LENGTH_BYTES:
            raise ValueError(f"a length of {count} bytes at byte {at}")
        length, start = int.from_bytes(der[start : start + count], "big"), start + count
    if start + length > len(der):
        raise ValueError(f"the value at byte {at} is cut off")
    return tag, start, start + length
