"""The ledger of a worker's rows in memory that outlives the worker: which row is whole, whose it is and what it needs.

It is a log. A row's entry is written after the row's numbers, and the entry that ends it before its place is used for
another row. So of a worker that dies at any moment, even in the middle of a copy, no half row is in the ledger; and
each entry has the checksum of its row besides. The worker's step thread owns it.

The memory has a head and two areas. The log lies in one of them. When it is full of entries that have ended, what
counts is copied to the other area, and then the head names that one: a death in between finds the old area as it was.

INVARIANT: the length of an entry is written last, so that an entry is there as a whole or not at all.
"""

import hashlib
import mmap
import zlib
from collections.abc import Iterator
from struct import Struct
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
import structlog

from server.ipc.row_memory import HEAD_BYTES, forget_pages

LAYOUT: Final = 1  #: of ledger and entries; another version's are not read
SLACK_BYTES: Final = 64 * 1024  #: of ended entries, which are not worth a copy

_HEAD = Struct("<32sI")  # the fingerprint of the program that has written it, and the area that counts
_ENTRY = Struct("<II")  # length and CRC-32 of what follows

log = structlog.get_logger()


class RowReady(msgspec.Struct, frozen=True, tag="r", array_like=True):
    """A row is whole: its place and bytes in the pool, its CRC-32, its model, and what that needs to run again.

    `kept`: what `handlers.kinds.kept_rows` keeps of the archive. `shared`: whether a `FamilyEntry` has more of it.
    """

    offset: int
    charge: int
    checksum: int
    model: str
    version: str
    family: str
    validated_at: float
    kept: bytes
    shared: bool


class RowGone(msgspec.Struct, frozen=True, tag="g", array_like=True):
    """The row at this place is not to be used any more."""

    offset: int


class FamilyEntry(msgspec.Struct, frozen=True, tag="f", array_like=True):
    """What all rows of a family need alike."""

    family: str
    shared: bytes


Entry: TypeAlias = RowReady | RowGone | FamilyEntry


class _Place(NamedTuple):
    """Where an entry lies in its area, and the family whose entry it needs; None where it needs none."""

    start: int
    size: int
    family: str | None


class RowLedger:
    """See the module. `fingerprint`: 32 bytes that say which program can read the rows and entries."""

    def __init__(self, memory: mmap.mmap, fingerprint: bytes) -> None:
        self._memory, self._fingerprint = memory, fingerprint
        self._area_bytes = (len(memory) - HEAD_BYTES) // 2
        self._area = 0
        self._end = 0  # of the log, within its area
        self._rows: dict[int, _Place] = {}  # by the row's place in the pool
        self._families: dict[str, _Place] = {}
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Entry).decode
        self._live_bytes = 0  # of the entries that count
        self._is_full = False

    def __repr__(self) -> str:
        """For example `<RowLedger 2500 rows, 5.1 of 16.0 MB>`."""
        return f"<RowLedger {len(self._rows)} rows, {self._end / 1e6:.1f} of {self._area_bytes / 1e6:.1f} MB>"

    @property
    def used_bytes(self) -> int:
        """Bytes of the log."""
        return self._end

    # --- after a worker ---------------------------------------------------------------------------------------------

    def recover(self) -> list[RowReady] | None:
        """The whole rows, the last written one of each model. None, and the ledger is empty, where it cannot be read.

        That is: another program has written it, or an entry is damaged. Nothing of it is trusted then.
        """
        fingerprint, self._area = _HEAD.unpack_from(self._memory)
        if fingerprint != self._fingerprint or self._area not in (0, 1):
            self.clear()
            return None
        rows: dict[int, RowReady] = {}
        try:
            for entry, place in self._read():
                self._note(entry, place)
                if isinstance(entry, RowReady):
                    rows[entry.offset] = entry
                elif isinstance(entry, RowGone):
                    rows.pop(entry.offset, None)
        except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
            log.warning("row_ledger_damaged", error=str(error))
            self.clear()
            return None
        newest = {row.model: row for row in rows.values()}
        for offset in rows.keys() - {row.offset for row in newest.values()}:
            self.note_gone(offset)
        return list(newest.values())

    def read_shared(self, family: str) -> bytes | None:
        """What all rows of the family need alike; None if nothing is there."""
        place = self._families.get(family)
        if place is None:
            return None
        entry = self._decode(self._bytes(place))
        return entry.shared if isinstance(entry, FamilyEntry) else None

    def clear(self) -> None:
        """Forget everything, and give its memory back."""
        forget_pages(self._memory, 0, len(self._memory))
        self._area = self._end = self._live_bytes = 0
        self._rows, self._families = {}, {}
        _HEAD.pack_into(self._memory, 0, self._fingerprint, 0)

    # --- of this worker ---------------------------------------------------------------------------------------------

    def has_family(self, family: str) -> bool:
        """Whether there is an entry of the family."""
        return family in self._families

    def note_ready(self, row: RowReady, shared: bytes | None) -> bool:
        """The row's numbers are in place. False where the ledger has no room: the row ends with this worker."""
        if row.shared and shared is not None and not self.has_family(row.family):
            self._append(FamilyEntry(row.family, shared))
        is_noted = (not row.shared or self.has_family(row.family)) and self._append(row)
        if not is_noted and not self._is_full:
            log.warning("row_ledger_full", rows=len(self._rows), then="further rows end with this worker")
        self._is_full = not is_noted
        return is_noted

    def note_gone(self, offset: int) -> None:
        """The place is about to be used for another row, or for none."""
        if offset in self._rows and not self._append(RowGone(offset)):
            self._drop(offset)
            self._compact()  # INVARIANT: no row is found at a place that is used for another

    def note_moved(self, offset: int, target: int) -> None:
        """The row's numbers are at `target` as well now; its old place is free."""
        place = self._rows.get(offset)
        if place is None:
            return
        entry = self._decode(self._bytes(place))
        assert isinstance(entry, RowReady), "only rows have places"
        self._append(msgspec.structs.replace(entry, offset=target))
        self.note_gone(offset)

    # --- the log ----------------------------------------------------------------------------------------------------

    def _append(self, entry: Entry) -> bool:
        """Write the entry; False if it has no room even after all that has ended is dropped.

        The log is copied when it is twice as long as what counts, so that a change costs the same however many rows
        there are, and when its area is full. Then an eighth of the area has to be free, or it would soon be full again.
        """
        payload = self._encode(entry)
        size = _ENTRY.size + len(payload)
        limit = min(self._area_bytes, 2 * self._live_bytes + SLACK_BYTES)
        if self._end + size + _ENTRY.size > limit:
            if self._live_bytes + size + _ENTRY.size + self._area_bytes // 8 > self._area_bytes:
                return False
            self._compact()
        start = self._end
        self._write(start, payload)
        self._end += size
        self._note(entry, _Place(start, size, None))
        return True

    def _note(self, entry: Entry, place: _Place) -> None:
        if isinstance(entry, RowGone):
            self._drop(entry.offset)
            return
        self._live_bytes += place.size
        if isinstance(entry, RowReady):
            self._drop(entry.offset)
            self._rows[entry.offset] = place._replace(family=entry.family if entry.shared else None)
        else:
            self._families[entry.family] = place

    def _drop(self, offset: int) -> None:
        gone = self._rows.pop(offset, None)
        if gone is not None:
            self._live_bytes -= gone.size

    def _write(self, start: int, payload: bytes) -> None:
        at = self._base(self._area) + start
        body = at + _ENTRY.size
        self._memory[body : body + len(payload)] = payload
        _ENTRY.pack_into(self._memory, at, len(payload), zlib.crc32(payload))

    def _read(self) -> Iterator[tuple[Entry, _Place]]:
        """All entries of the log. Raises ValueError or what msgspec raises for one that is damaged."""
        self._end, self._live_bytes, self._rows, self._families = 0, 0, {}, {}
        base = self._base(self._area)
        while self._end + _ENTRY.size <= self._area_bytes:
            length, checksum = _ENTRY.unpack_from(self._memory, base + self._end)
            if not length:
                return
            place = _Place(self._end, _ENTRY.size + length, None)
            if self._end + place.size > self._area_bytes:
                raise ValueError(f"an entry of {length} bytes ends outside of the ledger")
            payload = self._bytes(place)
            if zlib.crc32(payload) != checksum:
                raise ValueError(f"the checksum of the entry at {self._end} differs")
            self._end += place.size
            yield self._decode(payload), place

    def _compact(self) -> None:
        """Copy what counts to the other area, and let the head name that one."""
        source, target, end = self._base(self._area), 1 - self._area, 0
        forget_pages(self._memory, self._base(target), self._area_bytes)  # a worker may have died of this before
        used = {place.family for place in self._rows.values()}
        self._families = {family: place for family, place in self._families.items() if family in used}
        for key, place in self._families.items():
            self._families[key] = self._copy(place, target, end)
            end += place.size
        for offset, place in self._rows.items():
            self._rows[offset] = self._copy(place, target, end)
            end += place.size
        _HEAD.pack_into(self._memory, 0, self._fingerprint, target)
        forget_pages(self._memory, source, self._area_bytes)
        self._area, self._end, self._live_bytes = target, end, end

    def _copy(self, place: _Place, target: int, start: int) -> _Place:
        """Copy an entry to this start in the target area."""
        source, at = self._base(self._area) + place.start, self._base(target) + start
        self._memory[at : at + place.size] = self._memory[source : source + place.size]
        return place._replace(start=start)

    def _base(self, area: int) -> int:
        return HEAD_BYTES + area * self._area_bytes

    def _bytes(self, place: _Place) -> bytes:
        """What an entry holds."""
        at = self._base(self._area) + place.start
        return self._memory[at + _ENTRY.size : at + place.size]


def make_fingerprint(*parts: Any) -> bytes:
    """32 bytes that differ wherever one of the parts does. Pure."""
    return hashlib.sha256(repr((LAYOUT, *parts)).encode()).digest()
