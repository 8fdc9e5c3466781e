"""The host memory tier: decoded rows of evicted models, ready to be copied back. The worker's step thread owns it.

The memory is a ring: a new row is written at the head and overwrites the oldest rows. A model that becomes resident
again leaves the ring, so the oldest row is the one that was evicted longest ago, and no order has to be maintained.

INVARIANT: only the pool's copies read and write the numbers, in the order of their stream.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from handlers.kinds import RowModel
from model_store.cache.slots import Slot
from model_store.names import ModelName
from server.worker.model_loader import LoadedModel

TIER = "host"


@dataclass(slots=True)
class Kept:
    """A kept row: its start (in floats), and the model as a load gives it. `held`: a load is using it."""

    start: int
    numbers: torch.Tensor
    built: LoadedModel
    held: bool = False

    def __repr__(self) -> str:
        """For example `<au/NSW1.mar@v1 at 4096>`."""
        return f"<{self.built.model}@{self.built.version} at {self.start}{' held' if self.held else ''}>"


class HostCache:
    """Keeps rows in `memory` [n] float32 on the host. A row validated `revalidate_s` ago or longer is not served.

    `clock` is wall clock time, like `LoadedModel.validated_at`.
    """

    def __init__(self, memory: torch.Tensor, revalidate_s: float, clock: Callable[[], float] = time.time) -> None:
        self._memory, self._revalidate_s, self._clock = memory, revalidate_s, clock
        self._kept: OrderedDict[ModelName, Kept] = OrderedDict()  # from the ring's head on: the oldest first
        self._head = 0
        self.used_bytes = 0
        self.overwritten = 0  #: rows that were overwritten by others

    def __repr__(self) -> str:
        """For example `<HostCache 12 models, 0.8 of 1024.0 MB>`."""
        return f"<HostCache {len(self)} models, {self.used_bytes / 1e6:.1f} of {self.capacity_bytes / 1e6:.1f} MB>"

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, model: ModelName) -> bool:
        return model in self._kept

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the whole ring."""
        return self._memory.nbytes

    def keep(self, slot: Slot, body: RowModel, validated_at: float) -> torch.Tensor | None:
        """The place for the numbers of an evicted model, which the caller copies; None if a held row is in the way."""
        self.drop(slot.model)
        size = slot.charge // 4
        if not self._advance(size):
            return None
        numbers = self._memory[self._head : self._head + size]
        built = LoadedModel(slot.model, slot.version, TIER, 0.0, body, numbers.numpy(), None, validated_at)
        self._kept[slot.model] = Kept(self._head, numbers, built)
        self._head += size
        self.used_bytes += slot.charge
        return numbers

    def take(self, model: ModelName, *, stale: bool = False) -> LoadedModel | None:
        """The model, if its row is kept and was validated recently enough (`stale`: at any time).

        INVARIANT: the row is held, and its numbers stay, until `drop` or `put_back`.
        """
        kept = self._kept.get(model)
        if kept is None:
            return None
        if not stale and not 0 <= self._clock() - kept.built.validated_at < self._revalidate_s:
            return None
        kept.held = True
        return kept.built

    def put_back(self, model: ModelName) -> None:
        """End the hold of `take`, and keep the row."""
        kept = self._kept.get(model)
        if kept is not None:
            kept.held = False

    def drop(self, model: ModelName) -> None:
        """Forget the model's row, if there is one."""
        kept = self._kept.pop(model, None)
        if kept is not None:
            self.used_bytes -= kept.numbers.nbytes

    def _advance(self, size: int) -> bool:
        """Free `size` floats at the head, which moves to the start if the end is too near. False if a row is held."""
        capacity = len(self._memory)
        if size > capacity:
            return False
        if self._head + size > capacity:
            if not self._clear(self._head, capacity):
                return False
            self._head = 0
        return self._clear(self._head, self._head + size)

    def _clear(self, start: int, end: int) -> bool:
        """Forget the rows that start in this range; they are the oldest. False if one is held.

        INVARIANT: no row lies across the head.
        """
        while self._kept:
            model, oldest = next(iter(self._kept.items()))
            if not start <= oldest.start < end:
                return True
            if oldest.held:
                return False
            self.drop(model)
            self.overwritten += 1
        return True
