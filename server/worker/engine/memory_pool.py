"""The memory of the model cache: one pool of bytes for each device share, in which a model is one flat row of floats.

The worker's step thread owns it. `model_store.cache.cache` decides where a row lies; this module only writes, moves and
gathers rows. Each row starts at a multiple of 64 bytes, so that one gather, through an overlapping strided view of the
whole pool, reaches the rows of all slabs of a family.
"""

import mmap
from collections.abc import Sequence

import numpy as np
import torch

from handlers.base import Float32

ALIGN_BYTES = 64
_STEP = ALIGN_BYTES // 4  # floats between two possible row starts


class Pool:
    """`budget_bytes` of the CPU's memory (for GPUs see `accelerator`). Pages that were never written use no memory.

    `memory`: at least as many bytes that are mapped already, because they outlive this process; None: private memory.
    """

    def __init__(self, budget_bytes: int, device: torch.device, memory: mmap.mmap | None = None) -> None:
        count = budget_bytes // ALIGN_BYTES * _STEP
        self.device = device
        if memory is None:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
            memory = mmap.mmap(-1, count * 4, flags=flags)
        self._memory = memory
        self.floats = torch.frombuffer(self._memory, dtype=torch.float32, count=count)
        self._views: dict[int, torch.Tensor] = {}

    def __repr__(self) -> str:
        """For example `<Pool 512.0 MB on cpu>`."""
        return f"<Pool {self.floats.numel() * 4 / 1e6:.1f} MB on {self.device}>"

    def write(self, offset: int, row: Float32) -> None:
        """Copy a row's numbers to `offset` (bytes)."""
        start = offset // 4
        self.floats[start : start + row.size].copy_(torch.from_numpy(row))

    def keep(self, offset: int, target: torch.Tensor) -> None:
        """Copy a row's numbers to memory outside of the pool."""
        target.copy_(self.floats[offset // 4 : offset // 4 + target.numel()])

    def move(self, source: int, target: int, size: int) -> None:
        """Copy `size` bytes between two places that do not overlap."""
        floats, a, b = self.floats, source // 4, target // 4
        floats[b : b + size // 4].copy_(floats[a : a + size // 4])

    def read(self, offset: int, size: int) -> Float32:
        """A copy of a row's numbers on the host, for tests and checks."""
        found: Float32 = self.floats[offset // 4 : (offset + size) // 4].cpu().numpy().copy()
        return found

    def block(self, offset: int, count: int, width: int) -> torch.Tensor:
        """A view of rows [count, width] that lie side by side from `offset` (bytes) on."""
        start = offset // 4
        return self.floats[start : start + count * width].view(count, width)

    def gather(self, offsets: Sequence[int], out: torch.Tensor) -> None:
        """Copy the rows at `offsets` (bytes) to `out` [len(offsets), row_floats], which is contiguous."""
        width = out.shape[1]
        view = self._views.get(width)
        if view is None:
            starts = (self.floats.numel() - width) // _STEP + 1
            view = self._views[width] = self.floats.as_strided((starts, width), (_STEP, 1))
        index = torch.from_numpy(np.array(offsets, dtype=np.int64) // ALIGN_BYTES)
        torch.index_select(view, 0, index.to(self.device), out=out)
