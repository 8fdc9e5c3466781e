"""Slots: a model's place in a cache, and its state.

A slot is EMPTY, LOADING (it has memory, its numbers are being copied), READY, or RETIRING (evicted, but a step in
flight may still read its numbers).

INVARIANT: the memory of a RETIRING slot is not free before `Cache.retired` is called for it.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from model_store.names import ModelName


class State(StrEnum):
    """The state of a slot. An EMPTY slot is in no table; the state only tells holders of the object that it is free."""

    EMPTY = "empty"
    LOADING = "loading"
    READY = "ready"
    RETIRING = "retiring"


@dataclass(slots=True, eq=False)
class Usage:
    """What was counted of a slot's requests: answers and failures, batches, and sums of seconds over the answers.

    `answered_s`: from arrival to answer; `last`: when the last answer's batch began, on the clock of the cache.
    """

    answers: int = 0
    failures: int = 0
    batches: int = 0
    answered_s: float = 0.0
    failed_s: float = 0.0
    queued_s: float = 0.0
    ran_s: float = 0.0
    last: float = 0.0

    def __repr__(self) -> str:
        """For example `<Usage 12 answers, 1 failures>`."""
        return f"<Usage {self.answers} answers, {self.failures} failures>"

    def note_answer(self, began: float, answered_s: float, queued_s: float, ran_s: float) -> None:
        """Count an answer of the batch that began then."""
        self.answers += 1
        if began != self.last:
            self.batches += 1
            self.last = began
        self.answered_s += answered_s
        self.queued_s += queued_s
        self.ran_s += ran_s


@dataclass(slots=True, eq=False)
class Slot:
    """A model's place in the cache.

    `charge`: its bytes. `offset`: the row's first byte in the pool, -1 for a single, which has no row. `leases`: how
    many running or queued requests use it. INVARIANT: a slot with leases is not evicted. `tier`: where the model was
    loaded from, in `load_s` seconds from the wish to the ready slot.
    """

    model: ModelName
    version: str
    family: str | None
    charge: int
    offset: int
    state: State
    loaded_at: float
    used_at: float = 0.0
    leases: int = 0
    #: Unloaded or replaced by a new version: never revived, retired when the last lease ends.
    condemned: bool = False
    usage: Usage = field(default_factory=Usage)
    tier: str = ""
    load_s: float = 0.0

    @property
    def group(self) -> str:
        """The key of requests that can run in one batch: the family, or the single model and its version."""
        return f"single {self.model}@{self.version}" if self.family is None else self.family

    def __repr__(self) -> str:
        """For example `au/NSW1.mar@v1 ready 2 leases`."""
        end = " condemned" if self.condemned else ""
        return f"<{self.model}@{self.version} {self.state} {self.leases} leases{end}>"


def is_evictable(slot: Slot) -> bool:
    """Whether the slot can be evicted now. (Pinned models are not checked: the policy does not rank them.)"""
    return slot.state is State.READY and slot.leases == 0
