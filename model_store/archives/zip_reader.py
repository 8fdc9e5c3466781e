"""Reads zips (`.mar`). Source: APPNOTE.TXT 6.3; `container` says why `zipfile` is not used. Pure; loader threads."""

import stat
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from model_store.archives.container import ArchiveMember, Container, Gathering, Limits
from model_store.errors import ArchiveInvalid

_END = struct.Struct("<4s4H2LH")  # end record: signature, disks, counts, directory's size and start, comment length
_ENTRY = struct.Struct("<4s6H3L5H2L")  # one entry of the central directory
_LOCAL = struct.Struct("<4s5H3L2H")  # the header before a member's bytes
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 0x2041  # bits 0, 6 and 13 of the flags
_LOCATOR_BYTES = 20  # of the zip64 end record, right before the end record
_MAX_16, _MAX_32 = 0xFFFF, 0xFFFFFFFF  # where a zip64 record has the real number


class _Entry(NamedTuple):
    """One entry of the central directory. `mode`: the unix mode; `header`: the offset of the member's local header."""

    name: bytes
    mode: int
    header: int
    member: ArchiveMember


def read_zip(data: bytes, limits: Limits) -> Container:
    """The members of a zip. Deflated members are inflated when they are read.

    Raises:
        ArchiveTooLarge: a limit of `limits` is exceeded.
        ArchiveInvalid: not a valid zip, or a member breaks a rule for paths or types.
    """
    count, start, end = _find_directory(data)
    found = Gathering(limits, len(data))
    found.count(count)
    spans = []
    for entry in _read_entries(data, count, start, end):
        kind = stat.S_IFMT(entry.mode)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            what = "a symbolic link" if kind == stat.S_IFLNK else f"a special file (mode {entry.mode:o})"
            raise ArchiveInvalid(f"the member {entry.name[:80]!r} is {what}; only files and folders are read")
        if entry.name.endswith(b"/"):
            found.add_folder(entry.name)
        else:
            found.add_file(entry.name, entry.member)
        spans.append((entry.header, entry.member.start + entry.member.packed))
    spans.sort()
    for (_, before), (after, _) in pairwise(spans):
        if after < before:
            raise ArchiveInvalid(f"two members overlap at byte {after}: a zip bomb?")
    return found.container(data)


def _find_directory(data: bytes) -> tuple[int, int, int]:
    """The central directory: its declared number of entries, its first byte, and the byte after its last."""
    end = data.rfind(b"PK\5\6", max(0, len(data) - _END.size - _MAX_16))
    if end < 0 or end + _END.size > len(data):
        raise ArchiveInvalid("the zip is truncated: its end record is missing")
    _, disk, first_disk, here, count, size, start, comment = _END.unpack_from(data, end)
    zip64 = data[max(0, end - _LOCATOR_BYTES) : end].startswith(b"PK\6\7")
    if zip64 or count == _MAX_16 or _MAX_32 in (size, start):
        raise ArchiveInvalid(
            "the zip uses zip64 records; pack it again without them (zip from a file, not from a pipe)"
        )
    if disk or first_disk or here != count:
        raise ArchiveInvalid("the zip is spread over several disks")
    if end + _END.size + comment != len(data) or start + size != end:
        raise ArchiveInvalid("the zip is damaged: its end record does not fit its size (truncated, or bytes added)")
    return count, start, end


def _read_entries(data: bytes, count: int, start: int, end: int) -> Iterator[_Entry]:
    at = start
    for _ in range(count):
        if at + _ENTRY.size > end:
            raise ArchiveInvalid(f"the zip's directory ends before its {count} entries")
        signature, _, _, flags, method, _, _, crc, packed, size, *lengths, _, _, mode, header = _ENTRY.unpack_from(
            data, at
        )
        name = data[at + _ENTRY.size : at + _ENTRY.size + lengths[0]]
        at += _ENTRY.size + sum(lengths)
        if signature != b"PK\1\2" or at > end:
            raise ArchiveInvalid("the zip's directory is damaged")
        if flags & _ENCRYPTED:
            raise ArchiveInvalid(f"the member {name[:80]!r} is encrypted")
        if method not in (_STORED, _DEFLATED):
            raise ArchiveInvalid(f"the member {name[:80]!r} has compression method {method}; use stored or deflate")
        if method == _STORED and packed != size:
            raise ArchiveInvalid(f"the member {name[:80]!r} is stored, but its sizes differ: {packed} and {size}")
        first = _first_byte(data, header, name)
        if first + packed > start:
            raise ArchiveInvalid(f"the member {name[:80]!r} reaches into the zip's directory")
        yield _Entry(name, mode >> 16, header, ArchiveMember(first, packed, size, method == _DEFLATED, crc))
    if at != end:
        raise ArchiveInvalid(f"the zip's directory has more than the {count} entries it declares")


def _first_byte(data: bytes, header: int, name: bytes) -> int:
    """The offset of a member's bytes, which follow its local header. Both headers must have the same name."""
    if header + _LOCAL.size > len(data):
        raise ArchiveInvalid(f"the member {name[:80]!r} lies beyond the end of the zip")
    signature, *_, name_length, extra_length = _LOCAL.unpack_from(data, header)
    start: int = header + _LOCAL.size
    if signature != b"PK\3\4" or data[start : start + name_length] != name:
        raise ArchiveInvalid(f"the member {name[:80]!r} has no local header of its name")
    return start + int(name_length) + int(extra_length)
