"""The host memory tier: rows of evicted models, decoded and ready to copy back. Owned by the worker's step thread.

A ring of bytes: a row goes to the ring's head and overwrites the oldest ones. A model that returns leaves the shelf, so
the oldest is the one evicted longest ago, and nothing has to be kept in order. The numbers are brought and fetched by
the pool's own copies; what they read or overwrite is in their stream's order, and nobody else looks at it.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from handlers.kinds import RowModel
from model_store.cache.slots import Slot
from model_store.names import ModelName
from server.worker.model_loader import Built

TIER = "host"


@dataclass(slots=True)
class Kept:
    """A row on the shelf: where it starts (floats), and the model as a load gives it. `held`: on its way back."""

    start: int
    numbers: torch.Tensor
    built: Built
    held: bool = False

    def __repr__(self) -> str:
        """For example `<au/NSW1.mar@v1 at 4096>`."""
        return f"<{self.built.model}@{self.built.version} at {self.start}{' held' if self.held else ''}>"


class Shelf:
    """`memory` [n] float32 on the host. A copy validated `revalidate_s` ago or longer is not served, as on disk.

    `clock` is wall clock, as of `Built.validated_at`.
    """

    def __init__(self, memory: torch.Tensor, revalidate_s: float, clock: Callable[[], float] = time.time) -> None:
        self._memory, self._revalidate_s, self._clock = memory, revalidate_s, clock
        self._kept: OrderedDict[ModelName, Kept] = OrderedDict()  # from the ring's head on: the oldest first
        self._head = 0
        self.used_bytes = 0
        self.overwritten = 0  #: rows that had to go for others

    def __repr__(self) -> str:
        """For example `<Shelf 12 models, 0.8 of 1024.0 MB>`."""
        return f"<Shelf {len(self)} models, {self.used_bytes / 1e6:.1f} of {self.capacity_bytes / 1e6:.1f} MB>"

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, model: ModelName) -> bool:
        return model in self._kept

    @property
    def capacity_bytes(self) -> int:
        """All of it."""
        return self._memory.nbytes

    def keep(self, slot: Slot, body: RowModel, validated_at: float) -> torch.Tensor | None:
        """Where the numbers of this evicted model are to go; None if there is no place for them."""
        self.drop(slot.model)
        size = slot.charge // 4
        if not self._advance(size):
            return None
        numbers = self._memory[self._head : self._head + size]
        built = Built(slot.model, slot.version, TIER, 0.0, body, numbers.numpy(), None, validated_at)
        self._kept[slot.model] = Kept(self._head, numbers, built)
        self._head += size
        self.used_bytes += slot.charge
        return numbers

    def take(self, model: ModelName, *, stale: bool = False) -> Built | None:
        """The model if it is here and fresh (`stale`: or due), held until `drop`: its numbers stay where they are."""
        kept = self._kept.get(model)
        if kept is None:
            return None
        if not stale and not 0 <= self._clock() - kept.built.validated_at < self._revalidate_s:
            return None
        kept.held = True
        return kept.built

    def put_back(self, model: ModelName) -> None:
        """What was taken stays after all."""
        kept = self._kept.get(model)
        if kept is not None:
            kept.held = False

    def drop(self, model: ModelName) -> None:
        """Forget the model, if it is here: it is back, gone from the store, or to be forgotten."""
        kept = self._kept.pop(model, None)
        if kept is not None:
            self.used_bytes -= kept.numbers.nbytes

    def _advance(self, size: int) -> bool:
        """Make room at the head, moved to the start where the end is too near. False when a held row is in the way."""
        capacity = len(self._memory)
        if size > capacity:
            return False
        if self._head + size > capacity:
            if not self._clear(self._head, capacity):
                return False
            self._head = 0
        return self._clear(self._head, self._head + size)

    def _clear(self, start: int, end: int) -> bool:
        """Forget the rows that start there: the oldest ones, if any do. (A row never lies across the head.)"""
        while self._kept:
            model, oldest = next(iter(self._kept.items()))
            if not start <= oldest.start < end:
                return True
            if oldest.held:
                return False
            self.drop(model)
            self.overwritten += 1
        return True
