"""Slots, and the banks of slabs in which rows lie: pure bookkeeping. Who comes and goes is `model_store.policy`'s.

A slot is EMPTY, LOADING (room given, numbers on their way), READY, or RETIRING (on its way out: a step in flight may
still read its numbers, so the room is not free before the cache is told `retired`).
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from enum import StrEnum

from model_store.names import ModelName


class State(StrEnum):
    """Of a slot. An empty slot is in no table: it only tells a holder of the object that its room is free again."""

    EMPTY = "empty"
    LOADING = "loading"
    READY = "ready"
    RETIRING = "retiring"


@dataclass(slots=True, eq=False)
class Slot:
    """A model's place. `offset` is the row's first byte in the pool; singles have no row and offset -1."""

    model: ModelName
    version: str
    family: str | None
    charge: int
    offset: int
    state: State
    loaded_at: float
    used_at: float = 0.0
    leases: int = 0
    #: Told to go for good (unload, superseded version): never revived, gone when the last lease ends.
    condemned: bool = False

    def __repr__(self) -> str:
        """For example `au/NSW1.mar@v1 ready 2 leases`."""
        end = " condemned" if self.condemned else ""
        return f"<{self.model}@{self.version} {self.state} {self.leases} leases{end}>"


@dataclass(slots=True, eq=False)
class Slab:
    """Rows of one size: the slots by row index, and the indices of the empty rows."""

    rows: dict[int, Slot]
    holes: set[int]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(slots=True, eq=False)
class Bank:
    """The slabs of one family by index; `open` are those with an empty row, `occupied` counts the rows that are not.

    A family without slabs has no bank.
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
        """An empty row is taken."""
        room = self.slabs[slab]
        room.rows[row] = slot
        room.holes.remove(row)
        self.occupied += 1
        if not room.holes:
            self.open.remove(slab)

    def drop(self, slab: int, row: int) -> None:
        """A row is empty again; a slab whose last row it was leaves the bank."""
        room = self.slabs[slab]
        del room.rows[row]
        room.holes.add(row)
        self.occupied -= 1
        self.open.add(slab)
        if not room.rows:
            del self.slabs[slab]
            self.open.remove(slab)


class Lost:
    """Rows that were evicted lately and have not come back: what families, also those without a bank, lack room for."""

    def __init__(self) -> None:
        self._families: OrderedDict[ModelName, str] = OrderedDict()
        self._counts: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Lost {len(self._families)} of {len(self._counts)} families>"

    def add(self, model: ModelName, family: str, most: int) -> None:
        """A model was evicted; beyond so many the oldest are forgotten."""
        self.found(model)
        self._families[model] = family
        self._counts[family] += 1
        while len(self._families) > most:
            self.found(next(iter(self._families)))

    def found(self, model: ModelName) -> None:
        """It is here again, or does not matter any more."""
        family = self._families.pop(model, None)
        if family is not None:
            self._counts[family] -= 1
            if not self._counts[family]:
                del self._counts[family]

    def of(self, family: str) -> int:
        """How many of a family."""
        return self._counts[family]


def evictable(slot: Slot) -> bool:
    """Whether the slot may be asked to go now. (Of pinned ones the policy does not know, so nobody asks.)"""
    return slot.state is State.READY and slot.leases == 0


def movable(slab: Slab) -> bool:
    """Whether all rows may be copied elsewhere: none is being written, none is read by a step for the last time."""
    return all(slot.state is State.READY for slot in slab.rows.values())
