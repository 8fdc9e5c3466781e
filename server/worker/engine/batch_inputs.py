"""The inputs of one batch: the step thread decodes requests into the memory from which the batch's forward takes them.

On a device that is page-locked memory: a request's numbers are written once, where the device's copy starts from.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Self, cast

import numpy as np
import numpy.typing as npt

from handlers.base import Family, Float32, Shape
from handlers.codecs.tensors import put_rows

ALIGNED_BYTES = 64  #: as memory of torch is: sums over other addresses could be grouped otherwise

Index = npt.NDArray[np.int64]  #: where rows start in a pool, in units of `memory_pool.ALIGN_BYTES`


def allocate_rows(shape: Shape, count: int) -> Float32:
    """Memory [count, *shape] that begins where an array of torch would, so that a forward can read it as it lies."""
    floats = count * prod(shape)
    memory = np.empty(floats + ALIGNED_BYTES // 4, np.float32)
    start = -memory.ctypes.data % ALIGNED_BYTES // 4
    return memory[start : start + floats].reshape(count, *shape)


class ListedInputs(list[Float32]):
    """The inputs of a batch on the CPU: arrays of their own, which its forwards gather in pieces that stay in cache."""

    place = None

    def __repr__(self) -> str:
        """For example `<ListedInputs of 3 requests>`."""
        return f"<ListedInputs of {len(self)} requests>"

    @property
    def rows(self) -> int:
        """The rows of all requests together."""
        return sum(map(len, self))

    def keep(self, part: Float32) -> None:
        """Take a request's inputs [n, *input_shape] into the batch, behind the others."""
        self.append(part)

    keep_block = keep  #: inputs of several requests, answered as one

    def detach(self, part: Float32) -> Float32:
        """The inputs of a request that is not kept. They are its own."""
        return part


class LaneInputs:
    """The inputs of a batch on a device: in `lanes`, one after the other, or in arrays where these have no room.

    INVARIANT: what runs is in lanes alone or in arrays alone. So a batch writes over no inputs of its own, and can run
    again after it has failed.
    """

    def __init__(self, shape: Shape, lanes: Sequence[Float32]) -> None:
        """`shape`: of a row. `lanes`: memory [capacity, *shape] of forwards, which nobody else uses now."""
        self._shape, self._lanes = shape, lanes
        self._blocks, self.filled = [*lanes[:1]], [0] * len(lanes[:1])
        self._placed = self._empty(0)
        self.sizes: list[int] = []  #: rows of each request
        self._arrays = 0  # blocks that are no lanes

    def __repr__(self) -> str:
        """For example `<LaneInputs of 3 requests, rows in lanes: [3]>`."""
        where = "lanes" if self.is_staged else "arrays"
        return f"<LaneInputs of {len(self.sizes)} requests, rows in {where}: {self.filled}>"

    @classmethod
    def of(cls, family: Family, parts: Sequence[Float32]) -> Self:
        """The inputs [n, *input_shape] of requests that were decoded elsewhere."""
        inputs = cls(family.read_shape, ())
        inputs._blocks, inputs.filled = [*parts], [len(part) for part in parts]
        inputs.sizes = inputs.filled
        return inputs

    @property
    def is_staged(self) -> bool:
        """Whether all rows are in lanes."""
        return bool(self._lanes) and not self._arrays

    @property
    def rows(self) -> int:
        """The rows of all requests together."""
        return sum(self.filled)

    def place(self, rows: int) -> Float32:
        """Memory [rows, *shape] for the next request's inputs; the call after it gives the same unless it is kept."""
        if not self._blocks or self.filled[-1] + rows > len(self._blocks[-1]):
            self._begin_block(rows)
        at = self.filled[-1]
        self._placed = self._blocks[-1][at : at + rows]
        return self._placed

    def keep(self, part: Float32) -> None:
        """Take a request's inputs into the batch: what lies at the last place, or any other [n, *input_shape]."""
        if part is not self._placed:
            put_rows(part, self.place)
        self.filled[-1] += len(part)
        self.sizes.append(len(part))

    def keep_block(self, block: Float32) -> None:
        """Take the inputs [n, *shape] of several requests, which are answered as one, into the lanes they need."""
        left = block
        while len(left):
            begun = len(self._blocks)
            room = len(self._blocks[-1]) - self.filled[-1] if begun else 0
            if not room and self.is_staged and begun < len(self._lanes):
                room = len(self._lanes[begun])
            some = left[: room or len(left)]
            put_rows(some, self.place)
            self.filled[-1] += len(some)
            left = left[len(some) :]
        self.sizes.append(len(block))

    def detach(self, part: Float32) -> Float32:
        """The inputs of a request that is not kept, in memory that no other request gets."""
        if part is not self._placed:
            return part
        if self.is_staged or self.filled[-1]:
            return part.copy()
        self.filled.pop()
        self._blocks.pop()  # an array of its own, and large where the request is
        self._arrays -= 1
        return part

    def leave_lanes(self) -> None:
        """Copy the rows out of the lanes, because these are freed or will be written."""
        lanes = self._lanes
        self._blocks = [
            block[:rows].copy() if any(block is lane for lane in lanes) else block[:rows]
            for block, rows in zip(self._blocks, self.filled, strict=True)
        ]
        self._lanes, self._placed = (), self._empty(0)

    def repeat(self, starts: Index) -> Index:
        """The start of each request's model for every row of it; of rows of several models those come already."""
        return starts if self.rows == len(starts) else np.repeat(starts, self.sizes)

    def split(self, answers: Float32) -> Sequence[Float32]:
        """The answers of each request, as views; of one row each they are made when they are looked at."""
        if len(answers) == len(self.sizes):
            return cast("Sequence[Float32]", answers[:, None])
        ends = np.cumsum(self.sizes).tolist()
        return [answers[end - size : end] for end, size in zip(ends, self.sizes, strict=True)]

    def cut(self, capacity: int) -> Iterator[list[Float32]]:
        """The rows as pieces, for forwards of at most `capacity` rows."""
        pieces, room = list[Float32](), capacity
        for block, rows in zip(self._blocks, self.filled, strict=True):
            left = block[:rows]
            while len(left):
                pieces.append(left[:room])
                left, room = left[room:], room - len(pieces[-1])
                if not room:
                    yield pieces
                    pieces, room = [], capacity
        if pieces:
            yield pieces

    def _begin_block(self, rows: int) -> None:
        """Go on in the next lane, or in an array; after an array there are only arrays, because rows are in order."""
        begun = len(self._blocks)
        if self.is_staged and begun < len(self._lanes) and rows <= len(self._lanes[begun]):
            self._blocks.append(self._lanes[begun])
        else:
            self._blocks.append(self._empty(rows))
            self._arrays += 1
        self.filled.append(0)

    def _empty(self, rows: int) -> Float32:
        return np.empty((rows, *self._shape), np.float32)
