"""One step's computation: the rows of many models and their inputs in, answers out. Owned by the worker's step thread.

Forwards see only staging: a batch's rows are gathered into fixed memory, bound once to parameter views, so nothing that
is loaded, evicted or moved behind it can disturb a forward.
"""

from collections.abc import Sequence

import numpy as np
import torch

from handlers.base import Family, Float32
from server.bank import Pool

#: On the CPU a step is cut into forwards whose staging stays in cache (measured: 500 `tcn` models in 3.5 ms instead of
#: 5.5; 8 rows of the 1.8 MB `mlp` in 75 us a row instead of 130 for 16). A GPU has `server.accelerator`.
CPU_ROWS = 64
CPU_STAGING_BYTES = 8 * 1024 * 1024


class Staging:
    """A family's fixed memory for one forward: rows and inputs, and the parameter views bound to them by batch size."""

    def __init__(self, family: Family, max_rows: int, device: torch.device) -> None:
        self.family = family
        self.capacity = max(1, min(CPU_ROWS, max_rows, CPU_STAGING_BYTES // (family.row_floats * 4)))
        self._rows = torch.empty((self.capacity, family.row_floats), dtype=torch.float32, device=device)
        self._host = torch.empty((self.capacity, *family.input_shape), dtype=torch.float32)
        self._host_numpy: Float32 = self._host.numpy()
        self._device = device
        self._bound: dict[int, tuple[torch.Tensor, Sequence[torch.Tensor]]] = {}

    def __repr__(self) -> str:
        """For example `<Staging tcn-4f1c2a9b, 512 rows>`."""
        return f"<Staging {self.family.key}, {self.capacity} rows>"

    def rows(self, count: int) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Staging for `count` rows and its parameter views."""
        bound = self._bound.get(count)
        if bound is None:
            block = self._rows[:count]
            bound = self._bound[count] = (block, self.family.bind(block))
        return bound

    def inputs(self, parts: Sequence[Float32]) -> torch.Tensor:
        """The requests' arrays, each [n, *input_shape], one after another on the device."""
        at = 0
        for part in parts:
            self._host_numpy[at : at + len(part)] = part
            at += len(part)
        return self._host[:at].to(self._device)


class Engine:
    """The pool and the staging of every family that has run."""

    def __init__(self, pool: Pool, max_rows: int) -> None:
        self.pool = pool
        self._max_rows = max_rows
        self._staging: dict[str, Staging] = {}

    def __repr__(self) -> str:
        """For example `<Engine <Pool 512.0 MB on cpu>, 2 families>`."""
        return f"<Engine {self.pool!r}, {len(self._staging)} families>"

    def run(self, family: Family, offsets: Sequence[int], parts: Sequence[Float32]) -> list[Float32]:
        """Answers [n, *output_shape] for each request's array [n, *input_shape] under the row at its offset (bytes)."""
        staging = self._staging_of(family)
        sizes = [len(part) for part in parts]
        if sum(sizes) <= staging.capacity:
            return self._split(self._forward(staging, _repeat(offsets, sizes), parts), sizes)
        rows, flat = np.concatenate(parts), _repeat(offsets, sizes)
        chunks = [
            self._forward(staging, flat[at : at + staging.capacity], [rows[at : at + staging.capacity]]).copy()
            for at in range(0, len(flat), staging.capacity)
        ]
        return self._split(np.concatenate(chunks), sizes)

    def probe(self, family: Family, row: Float32, x: Float32) -> Float32:
        """Answers [n, *output_shape] of a model that has no place yet: its row alone, in scratch memory."""
        block = torch.from_numpy(np.repeat(row[None], len(x), axis=0)).to(self.pool.device)
        with torch.inference_mode():
            answer = family.forward(family.bind(block), torch.from_numpy(x).to(self.pool.device))
        found: Float32 = answer.cpu().numpy()
        return found

    def trim(self) -> None:
        """Give back what the next steps can make again: staging."""
        self._staging.clear()

    def _forward(self, staging: Staging, offsets: Sequence[int], parts: Sequence[Float32]) -> Float32:
        block, weights = staging.rows(len(offsets))
        with torch.inference_mode():
            x = staging.inputs(parts)
            self.pool.gather(offsets, block)
            answer: Float32 = staging.family.forward(weights, x).cpu().numpy()
        return answer

    def _staging_of(self, family: Family) -> Staging:
        staging = self._staging.get(family.key)
        if staging is None:
            staging = self._staging[family.key] = Staging(family, self._max_rows, self.pool.device)
        return staging

    @staticmethod
    def _split(answers: Float32, sizes: Sequence[int]) -> list[Float32]:
        found, at = [], 0
        for size in sizes:
            found.append(answers[at : at + size])
            at += size
        return found


def _repeat(offsets: Sequence[int], sizes: Sequence[int]) -> Sequence[int]:
    """Each offset once per row of its request."""
    if len(sizes) == sum(sizes):
        return offsets
    return [offset for offset, size in zip(offsets, sizes, strict=True) for _ in range(size)]
