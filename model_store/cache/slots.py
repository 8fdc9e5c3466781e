"""Slots: a model's place in a cache, and what may be done with it.

A slot is EMPTY, LOADING (room given, numbers on their way), READY, or RETIRING (on its way out: a step in flight may
still read its numbers, so the room is not free before the cache is told `retired`).
"""

from dataclasses import dataclass
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


def evictable(slot: Slot) -> bool:
    """Whether the slot may be asked to go now. (Of pinned ones the policy does not know, so nobody asks.)"""
    return slot.state is State.READY and slot.leases == 0
