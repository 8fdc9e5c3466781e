"""The members of an .npz file: a zip archive of .npy files as `numpy.savez` writes it. Pure: no numpy, no copies.

Members are stored, not compressed: nothing is unpacked here, so that no file can be larger than its body. Checksums are
not compared: what carried the body has its own.
Source: APPNOTE.TXT of PKWARE, 4.3.
"""

from struct import Struct as Layout

from server.front.columns.npy_header import BadNpy

ZIP = b"PK\x03\x04"
SUFFIX = ".npy"
_END, _ENTRY, _LOCAL = Layout("<4s4H2IH"), Layout("<4s6H3I5H2I"), Layout("<4s5H3I2H")
_ENCRYPTED = 1
COMPRESSED = "the members are compressed; write them by np.savez: HTTP has Content-Encoding to compress a body"


def find_members(view: memoryview, most: int, most_name: int) -> dict[str, memoryview]:
    """The bytes of each member by its name without `.npy`. Raises BadNpy."""
    at = len(view) - _END.size
    if at < 0 or bytes(view[at : at + 4]) != b"PK\x05\x06":
        raise BadNpy("the .npz file ends early, or has bytes or a comment behind its directory")
    _, _, _, _, count, size, first, _ = _END.unpack_from(view, at)
    if count > most:
        raise BadNpy(f"{count} members, {most} are the most")
    if first + size != at:
        raise BadNpy("the directory of the .npz file does not lie where its end says")
    found, left, place = dict[str, memoryview](), len(view), first
    for _ in range(count):
        if place + _ENTRY.size > at:
            raise BadNpy("the directory of the .npz file is shorter than its entries")
        mark, _, _, flags, method, _, _, _, packed, unpacked, named, more, said, *_, begins = _ENTRY.unpack_from(
            view, place
        )
        place += _ENTRY.size
        name = _read_name(view[place : min(place + named, at)], most_name)
        place += named + more + said
        if mark != b"PK\x01\x02" or name in found:
            raise BadNpy(f"the directory of the .npz file is damaged, or has the member {name!r} twice")
        if method or flags & _ENCRYPTED or packed != unpacked:
            raise BadNpy(COMPRESSED)
        left -= packed
        if left < 0:
            raise BadNpy("members of the .npz file lie on each other")
        found[name] = _cut_member(view[:first], begins, packed, name)
    return found


def _read_name(raw: memoryview, most: int) -> str:
    try:
        name = bytes(raw[: 4 * most + len(SUFFIX)]).decode()
    except UnicodeDecodeError:
        raise BadNpy("the name of a member is not UTF-8") from None
    if not name.endswith(SUFFIX):
        raise BadNpy(f"the member {name[:40]!r} is no .npy file")
    return name.removesuffix(SUFFIX)


def _cut_member(view: memoryview, begins: int, size: int, name: str) -> memoryview:
    if begins + _LOCAL.size <= len(view):
        head = _LOCAL.unpack_from(view, begins)
        start = begins + _LOCAL.size + head[9] + head[10]
        if head[0] == ZIP and start + size <= len(view):
            return view[start : start + size]
    raise BadNpy(f"the member {name[:40]!r} lies outside of the .npz file")
