"""Reads gzipped tars (SageMaker `model.tar.gz`, `torch-model-archiver --archive-format tgz`).

Pure; runs in loader threads. Sources: POSIX.1-2017 `pax` (ustar and pax headers), GNU tar's long names, RFC 1952.
`container` says why `tarfile` is not used; also, its pax parser takes quadratic time over hostile headers before Python
3.11.10.
"""

import re
import zlib
from typing import NamedTuple

from model_store.archives.container import ArchiveMember, Container, Gathering, Limits, inflate
from model_store.archives.step_budget import StepBudget
from model_store.errors import ArchiveInvalid, ArchiveTooLarge

_BLOCK = 512
_PIECE = 64 * 1024
_FILES = (b"0", b"\0", b"7")
_FOLDER, _LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"5", b"L", b"K", b"x", b"g"
_REMARKS = (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL)
_WITH_DATA = (*_FILES, *_REMARKS)
_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a fifo",
    b"S": "a sparse file",
}
MAX_PAX_RECORDS = 20_000  #: in all pax headers of one tar; writers make up to six for a member
MAX_REMARK_BYTES = 1024 * 1024  #: of one pax header or long name
MAX_PADDING_BYTES = 16 * 1024 * 1024  #: zeros behind the last member; tar itself writes at most 10 KiB
_PAX_LENGTH = re.compile(rb"(\d{1,9}) ")


class _Header(NamedTuple):
    """One tar header. Its data are `size` bytes from `start`."""

    type: bytes
    name: bytes
    start: int
    size: int


def read_tar_gz(data: bytes, limits: Limits) -> Container:
    """The members of a gzipped tar. It is unpacked into memory as a whole, because gzip has no random access.

    Raises:
        ArchiveTooLarge: a limit of `limits` is exceeded.
        ArchiveInvalid: not a valid gzip or tar, or a member breaks a rule for paths or types.
    """
    raw = _unpack_gzip(data, limits)
    found = Gathering(limits, len(data))
    records = StepBudget(MAX_PAX_RECORDS, "pax records")
    long_name, at = b"", 0
    while (header := _read_header(raw, at)) is not None:
        found.count()
        at = header.start + (header.size + _BLOCK - 1) // _BLOCK * _BLOCK
        content = slice(header.start, header.start + header.size)
        if header.type == _LONG_NAME:
            long_name = bytes(raw[content]).rstrip(b"\0")
        elif header.type == _PAX:
            long_name = _pax_path(bytes(raw[content]), records) or long_name
        elif header.type not in (_PAX_GLOBAL, _LONG_LINK):  # both are ignored: a long link's own header is refused
            _add_member(found, header, long_name or header.name)
            long_name = b""
    return found.container(raw)


def _add_member(found: Gathering, header: _Header, name: bytes) -> None:
    if header.type == _FOLDER:
        found.add_folder(name)
    elif header.type in _FILES:
        found.add_file(name, ArchiveMember(header.start, header.size, header.size))
    else:
        what = _REFUSED.get(header.type, f"of the unknown type {header.type!r}")
        raise ArchiveInvalid(f"the member {name[:80]!r} is {what}; only files and folders are read")


def _unpack_gzip(data: bytes, limits: Limits) -> bytes:
    room = limits.room(len(data))
    inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        raw, read = inflate(inflater, data, room + 1)
    except zlib.error as error:
        raise ArchiveInvalid(f"the gzip is damaged: {error}") from error
    limits.check_unpacked(len(raw), len(data))
    if not inflater.eof:
        raise ArchiveInvalid("the gzip is truncated")
    if not _is_zeros(memoryview(data)[read:]):
        raise ArchiveInvalid("bytes follow the gzip stream; pack the folder again as one tar.gz")
    return raw


def _read_header(raw: bytes, at: int) -> _Header | None:
    """The header at byte `at`; None at the end mark, after which all bytes must be zero."""
    block = bytes(raw[at : at + _BLOCK])
    if len(block) < _BLOCK:
        raise ArchiveInvalid("the tar is truncated" if at else "the gzip does not hold a tar: it is too short for one")
    if block.count(0) == _BLOCK:
        if len(raw) - at > MAX_PADDING_BYTES:
            raise ArchiveTooLarge(f"more than the {MAX_PADDING_BYTES} bytes of padding allowed follow its last member")
        if not _is_zeros(memoryview(raw)[at:]):
            raise ArchiveInvalid(f"the tar is damaged: bytes follow its end mark at byte {at}")
        return None
    checksum = sum(block) - sum(block[148:156]) + 8 * 32  # the field itself counts as spaces
    if _parse_octal(block[148:156]) != checksum:
        what = f"the tar is damaged at byte {at}: a header" if at else "the gzip does not hold a tar: its first block"
        raise ArchiveInvalid(f"{what} has a wrong checksum")
    kind = block[156:157]
    size = _parse_octal(block[124:136]) if kind in _WITH_DATA else 0  # no bytes follow a folder or a link
    if size is None:
        raise ArchiveInvalid(f"the tar header at byte {at} has a size that is not octal")
    if at + _BLOCK + size > len(raw):
        raise ArchiveInvalid(f"the tar is truncated: the member at byte {at} declares {size} bytes")
    if kind in _REMARKS and size > MAX_REMARK_BYTES:
        raise ArchiveTooLarge(f"the tar header at byte {at} has {size} bytes of names or remarks: too many")
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return _Header(kind, prefix + b"/" + name if prefix else name, at + _BLOCK, size)


def _is_zeros(view: memoryview) -> bool:
    """Whether all bytes are zero; a piece at a time, so that other threads get the interpreter."""
    return not any(bytes(view[at : at + _PIECE]).strip(b"\0") for at in range(0, len(view), _PIECE))


def _parse_octal(digits: bytes) -> int | None:
    text = digits.strip(b" \0")
    return int(text, 8) if re.fullmatch(b"[0-7]+", text) else None


def _pax_path(records: bytes, budget: StepBudget) -> bytes:
    """The `path` of a pax header; empty if it has none. A record is `<length> <key>=<value>` and a line feed."""
    path, at = b"", 0
    while at < len(records):
        budget.spend()
        match = _PAX_LENGTH.match(records, at)
        end = at + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(records) or records[end - 1 : end] != b"\n":
            raise ArchiveInvalid("a pax header of the tar is damaged")
        key, _, value = records[match.end() : end - 1].partition(b"=")
        if key == b"size" or key.startswith(b"GNU.sparse"):
            raise ArchiveInvalid(f"a pax header of the tar sets {key[:80]!r}; huge and sparse files are not read")
        path = value if key == b"path" else path
        at = end
    return path
