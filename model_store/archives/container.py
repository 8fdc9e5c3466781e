"""The members of an archive by name, and the limits and rules that zips and tars share. Pure; runs in loader threads.

Archives are untrusted input. `zip_reader` and `tar_reader` replace `zipfile` and `tarfile`, because these build a
record for every entry before entries can be counted, let entries overlap, take a damaged header for the end of a tar,
and raise a dozen types of exceptions for hostile input. Features that a model archive never needs (zip64, encryption,
several disks or gzip streams, sparse files, links) are refused with a message that names them.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from model_store.errors import ArchiveInvalid, ArchiveTooLarge
from model_store.names import is_left_by_desktop

_MIB = 1 << 20
COPIED_BYTES = 4 * _MIB  #: at most, of a member that is copied at once
INFLATED_BYTES = _MIB  #: at a time: zlib releases the interpreter, but puts its result together with it
FED_BYTES = 64 * 1024  #: packed bytes that zlib is given at a time: it copies what it leaves
_MAX_PATH = 500  # what manifest.MemberPath allows
_MAX_SHOWN = 80
_OWN_FOLDERS = ("MAR-INF/", "code/")  # folders with a meaning of their own: never stripped as the single top folder


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of an archive's size. The defaults are far above real model archives and far below what harms a host.

    `max_archive_bytes` limits the file itself, `max_entries` its headers of any type (folders too),
    `max_unpacked_bytes` the sum of all members, or the whole tar. `max_ratio` limits unpacked / packed; it applies only
    above `ratio_floor_bytes` of unpacked data, so that a small file of zeros is not refused.
    """

    max_archive_bytes: int = 1024 * _MIB
    max_entries: int = 4096
    max_unpacked_bytes: int = 2048 * _MIB
    max_ratio: float = 100.0
    ratio_floor_bytes: int = _MIB

    def check_packed(self, packed: int) -> None:
        """Raises ArchiveTooLarge if the file itself has too many bytes."""
        if packed > self.max_archive_bytes:
            raise ArchiveTooLarge(f"it has {packed} bytes, more than the {self.max_archive_bytes} allowed")

    def check_unpacked(self, unpacked: int, packed: int) -> None:
        """Raises ArchiveTooLarge if `unpacked` bytes are more than a file of `packed` bytes may hold."""
        if unpacked > self.max_unpacked_bytes:
            raise ArchiveTooLarge(f"it unpacks to more than the {self.max_unpacked_bytes} bytes allowed")
        if unpacked > self.ratio_floor_bytes and unpacked > packed * self.max_ratio:
            raise ArchiveTooLarge(
                f"its {packed} bytes unpack to more than {self.max_ratio:g} times as much: a zip bomb?"
            )

    def room(self, packed: int) -> int:
        """The most bytes that `check_unpacked` lets a file of `packed` bytes hold."""
        return min(self.max_unpacked_bytes, max(self.ratio_floor_bytes, int(packed * self.max_ratio)))


@dataclass(frozen=True, slots=True)
class ArchiveMember:
    """The place of one member in the container's data: `packed` bytes from `start`, `size` bytes after inflation."""

    start: int
    packed: int
    size: int
    deflated: bool = False
    crc32: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Container:
    """Members by their safe relative path. `data` is the zip itself, or the tar out of its gzip."""

    data: bytes = field(repr=False)
    members: Mapping[str, ArchiveMember]

    def read(self, name: str) -> bytes:
        """The member's bytes, inflated to at most the size that its header declares. Raises ArchiveInvalid.

        A large member is a view or a bytearray: to copy it would hold the interpreter, some 0.5 ms for a megabyte.
        """
        member = self.members.get(name)
        if member is None:
            raise ArchiveInvalid(f"it has no member {quote_name(name)}")
        packed = memoryview(self.data)[member.start : member.start + member.packed]
        raw = _inflate_member(packed, member.size, name) if member.deflated else cast("bytes", packed)
        if member.crc32 is not None and zlib.crc32(raw) != member.crc32:
            raise ArchiveInvalid(f"the member {quote_name(name)} is damaged: its CRC-32 differs from the one declared")
        return bytes(raw) if len(raw) <= COPIED_BYTES else raw


@dataclass(slots=True)
class Gathering:
    """Collects the members of a container of `packed` bytes as its reader finds them, and checks the shared rules."""

    limits: Limits
    packed: int
    members: dict[str, ArchiveMember] = field(default_factory=dict)
    entries: int = 0
    unpacked: int = 0

    def count(self, entries: int = 1) -> None:
        """Count headers of any type before they are read. Raises ArchiveTooLarge."""
        self.entries += entries
        if self.entries > self.limits.max_entries:
            raise ArchiveTooLarge(f"it has more than the {self.limits.max_entries} entries allowed")

    def add_folder(self, raw_name: bytes) -> None:
        """Check a folder's name; folders are not kept. Raises ArchiveInvalid."""
        if raw_name not in (b".", b"./"):  # `tar -C folder .` begins with it
            safe_path(raw_name.removesuffix(b"/"))

    def add_file(self, raw_name: bytes, member: ArchiveMember) -> None:
        """Add a file. Those that desktops leave (`._x`, `.DS_Store`, `__MACOSX/`) are checked and counted, not kept.

        Raises:
            ArchiveInvalid: its name is unsafe or repeated.
            ArchiveTooLarge: the sum of all sizes exceeds the limit.
        """
        name = safe_path(raw_name)
        if name in self.members:
            raise ArchiveInvalid(f"it has two members named {quote_name(name)}")
        self.unpacked += member.size
        self.limits.check_unpacked(self.unpacked, self.packed)
        if not is_left_by_desktop(name):
            self.members[name] = member

    def container(self, data: bytes) -> Container:
        """The container. Names are relative to the single top folder, if there is one (torch-model-archiver's tgz)."""
        if not self.members:
            raise ArchiveInvalid("it has no members")
        top = next(iter(self.members)).partition("/")[0] + "/"
        if top in _OWN_FOLDERS or not all(name.startswith(top) for name in self.members):
            return Container(data, self.members)
        return Container(data, {name.removeprefix(top): member for name, member in self.members.items()})


def quote_name(name: str) -> str:
    """The name quoted for a message, and shortened."""
    return repr(name if len(name) <= _MAX_SHOWN else name[:_MAX_SHOWN] + "...")


def safe_path(raw: bytes) -> str:
    """The member's relative path without a leading `./`. Raises ArchiveInvalid for a path that is not safe."""
    try:
        name = raw.decode()
    except UnicodeDecodeError as error:
        raise ArchiveInvalid(f"the member name {raw[:80]!r} is not UTF-8") from error
    if len(name) > _MAX_PATH:
        raise ArchiveInvalid(f"the member name {quote_name(name)} has {len(name)} characters, more than {_MAX_PATH}")
    if not name.isprintable():
        raise ArchiveInvalid(f"the member name {quote_name(name)} has a NUL, control or unprintable character")
    if "\\" in name:
        raise ArchiveInvalid(f"the member name {quote_name(name)} has a backslash")
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        raise ArchiveInvalid(f"the member name {quote_name(name)} is absolute; members must be relative")
    path = name.removeprefix("./")
    for segment in path.split("/"):
        if segment in ("", ".", ".."):
            raise ArchiveInvalid(f"the member name {quote_name(name)} has the segment {segment!r}")
    return path


def inflate(inflater: "zlib._Decompress", packed: bytes | memoryview, most: int) -> tuple[bytes, int]:
    """At most so many bytes, piece by piece, and how many packed ones were read. Raises zlib.error."""
    view, raw, at = memoryview(packed), bytearray(), 0
    while not inflater.eof and len(raw) < most:
        fed = view[at : at + FED_BYTES]
        piece = inflater.decompress(fed, min(INFLATED_BYTES, most - len(raw)))
        at += len(fed) - len(inflater.unused_data if inflater.eof else inflater.unconsumed_tail)
        if not piece and at == len(view):
            break
        raw += piece
    return cast("bytes", raw), at


def _inflate_member(packed: memoryview, size: int, name: str) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        raw, _ = inflate(inflater, packed, size + 1)
    except zlib.error as error:
        raise ArchiveInvalid(f"the member {quote_name(name)} is damaged: {error}") from error
    if len(raw) > size:
        raise ArchiveInvalid(
            f"the member {quote_name(name)} inflates to more than the {size} bytes its header declares"
        )
    if len(raw) < size or not inflater.eof:
        raise ArchiveInvalid(f"the member {quote_name(name)} ends early: its header declares {size} bytes")
    return raw
