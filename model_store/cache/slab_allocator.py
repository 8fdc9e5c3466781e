"""Keeps account of one device share's memory: slabs for the rows of families, plain bytes for singles. Pure.

`model_store.cache.cache` decides which model gets memory, `model_store.cache.victim_selection` which is evicted for it.
"""

from dataclasses import dataclass, field

from model_store.cache.slots import Slot, State

NO_ROW = -1


@dataclass(slots=True, eq=False)
class Slab:
    """Equally large rows: the slots by row index, and the indices of the empty rows (`holes`)."""

    rows: dict[int, Slot]
    holes: set[int]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(slots=True, eq=False)
class Bank:
    """The slabs of one family by index. `open`: slabs with an empty row; `occupied`: the number of rows in use.

    INVARIANT: a family without slabs has no bank in `Room.banks`.
    """

    family: str
    row_bytes: int
    rows_per_slab: int
    slabs: dict[int, Slab] = field(default_factory=dict)
    open: set[int] = field(default_factory=set)
    occupied: int = 0

    @property
    def holes(self) -> int:
        """Empty rows."""
        return len(self.slabs) * self.rows_per_slab - self.occupied

    def put(self, slab: int, row: int, slot: Slot) -> None:
        """Fill an empty row with a slot."""
        room = self.slabs[slab]
        room.rows[row] = slot
        room.holes.remove(row)
        self.occupied += 1
        if not room.holes:
            self.open.remove(slab)

    def drop(self, slab: int, row: int) -> None:
        """Empty a row. A slab without rows leaves the bank."""
        room = self.slabs[slab]
        del room.rows[row]
        room.holes.add(row)
        self.occupied -= 1
        self.open.add(slab)
        if not room.rows:
            del self.slabs[slab]
            self.open.remove(slab)


class Room:
    """One budget of bytes: `slabs` equally large slabs, held by families' banks, and the bytes that singles hold."""

    def __init__(self, budget_bytes: int, slab_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.slab_bytes = slab_bytes
        self.slabs = budget_bytes // slab_bytes
        self.banks: dict[str, Bank] = {}
        self._free_slabs = list(range(self.slabs))[::-1]
        self._single_bytes = 0

    def __repr__(self) -> str:
        """For example `<Room 3 banks, 3.5 of 4.0 MB>`."""
        return f"<Room {len(self.banks)} banks, {self.used_bytes / 1e6:.1f} of {self.budget_bytes / 1e6:.1f} MB>"

    @property
    def used_bytes(self) -> int:
        """Slabs held by families and bytes held by singles."""
        return (self.slabs - len(self._free_slabs)) * self.slab_bytes + self._single_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that are not in use."""
        return self.budget_bytes - self.used_bytes

    def bank(self, family: str, row_bytes: int) -> Bank:
        """The family's bank; a new one, which is kept once it has a slab, for a family without."""
        bank = self.banks.get(family) or Bank(family, row_bytes, max(1, self.slab_bytes // row_bytes))
        assert bank.row_bytes == row_bytes, f"family {family} has rows of {bank.row_bytes} bytes, not of {row_bytes}"
        return bank

    def take(self, bank: Bank | None, charge: int) -> int | None:
        """The offset of an empty row of the bank, or NO_ROW for plain bytes; None if no memory is free.

        INVARIANT: the caller fills a row by `put` before it calls anything else.
        """
        if bank is not None:
            return self._take_row(bank)
        if charge > self.free_bytes:
            return None
        self._single_bytes += charge
        return NO_ROW

    def take_at(self, family: str, row_bytes: int, offset: int) -> bool:
        """Take the empty row at this very offset; False, and nothing is changed, where there is none.

        INVARIANT: as for `take`.
        """
        slab, at = divmod(offset, self.slab_bytes)
        known = self.banks.get(family)
        fits = 0 < row_bytes <= self.slab_bytes and at % row_bytes == 0 and at + row_bytes <= self.slab_bytes
        if not fits or not 0 <= slab < self.slabs or (known is not None and known.row_bytes != row_bytes):
            return False
        bank = known or self.bank(family, row_bytes)
        if slab in bank.slabs:
            return at // row_bytes in bank.slabs[slab].holes
        if slab not in self._free_slabs or self.free_bytes < self.slab_bytes:
            return False
        self._free_slabs.remove(slab)
        self._open_slab(bank, slab)
        return True

    def put(self, slot: Slot) -> None:
        """Fill the row at the slot's offset."""
        self._bank_of(slot).put(*self._row_of(slot), slot)

    def move(self, slot: Slot, offset: int) -> None:
        """Move the slot to another row. A slab that becomes empty returns to the pool."""
        self._vacate(slot)
        slot.offset = offset
        self.put(slot)

    def free(self, slot: Slot) -> None:
        """Free the slot's memory."""
        slot.state = State.EMPTY
        if slot.family is None:
            self._single_bytes -= slot.charge
        else:
            self._vacate(slot)

    def recharge(self, slot: Slot, charge: int) -> None:
        """Count other bytes for a slot of plain bytes."""
        assert slot.family is None, f"{slot!r} is a row, and a row's bytes never change"
        self._single_bytes += charge - slot.charge
        slot.charge = charge

    def _take_row(self, bank: Bank) -> int | None:
        """An empty row's offset: in the fullest slab that has one, so that others can empty, else in a new slab."""
        if bank.open:
            slab = max(bank.open, key=lambda index: len(bank.slabs[index]))
        elif self.free_bytes >= self.slab_bytes:
            slab = self._free_slabs.pop()
            self._open_slab(bank, slab)
        else:
            return None
        row = next(iter(bank.slabs[slab].holes))
        return slab * self.slab_bytes + row * bank.row_bytes

    def _open_slab(self, bank: Bank, slab: int) -> None:
        bank.slabs[slab] = Slab({}, set(range(bank.rows_per_slab)))
        bank.open.add(slab)
        self.banks[bank.family] = bank

    def _vacate(self, slot: Slot) -> None:
        bank = self._bank_of(slot)
        slab, row = self._row_of(slot)
        bank.drop(slab, row)
        if slab not in bank.slabs:
            self._free_slabs.append(slab)
        if not bank.slabs:
            del self.banks[bank.family]

    def _bank_of(self, slot: Slot) -> Bank:
        assert slot.family is not None, "a single has no row"
        return self.banks[slot.family]

    def _row_of(self, slot: Slot) -> tuple[int, int]:
        """The index of the slot's slab, and of its row within the slab."""
        slab, at = divmod(slot.offset, self.slab_bytes)
        return slab, at // slot.charge


def can_move_rows(slab: Slab) -> bool:
    """Whether all rows can be copied elsewhere: none is being written, and none is about to be freed."""
    return all(slot.state is State.READY for slot in slab.rows.values())
