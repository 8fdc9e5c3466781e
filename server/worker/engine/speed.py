"""Measures how fast a family's models answer on one core of this machine, and the lower bound. For `fleetcast doctor`.

The engine itself times the paths of a batch (`server.worker.engine.execution_plan`), on a pool of recently requested
rows that do not fit into a CPU's cache, as in a fleet. The floor of an answer is the time of its arithmetic at the rate
of a matrix product, plus that of its row at the rate of a copy; both rates are measured too. Torch runs on one thread,
like a worker on one core.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from handlers.base import Family, Float32, Shape
from server.worker.engine.cpu import Engine
from server.worker.engine.execution_plan import (
    COLD_BYTES,
    MOST_ROWS,
    RECENT,
    UNKNOWN,
    CostTable,
    Path,
    PlannedForward,
    plan_forwards,
)
from server.worker.engine.memory_pool import Pool

ROUNDS = 9  #: runs of which the fastest counts
SIDE = 512  #: side of the square matrices whose product is timed
PIECE_BYTES = 256 * 1024  #: bytes of one copy into memory that stays in cache, as a row is gathered into staging
MOST_BYTES = 4 * COLD_BYTES  #: most bytes of a family's pool, which has fewer rows if they are large


class CoreRates(NamedTuple):
    """Floating-point operations and copied bytes of one core in a second."""

    flops: float
    bytes: float

    def floor_s(self, flops: int, size: float) -> float:
        """The least seconds of `flops` operations on `size` bytes from memory."""
        return flops / self.flops + size / self.bytes


@dataclass(frozen=True, slots=True)
class FamilySpeed:
    """A family's measured paths. `flops`: of one answer; `rows`: number of models that were run in turn."""

    family: str
    row_bytes: int
    rows: int
    flops: int
    rates: CoreRates
    table: CostTable

    def answer_us(self, path: Path, rows: int) -> float | None:
        """Microseconds an answer in a batch of `rows` rows, one of SIZES; None if that was too slow to be measured."""
        seconds = self.table.seconds.get((path, rows), UNKNOWN)
        return seconds / rows * 1e6 if seconds < UNKNOWN else None

    def floor_us(self, rows: int, models: int) -> float:
        """The floor of an answer, in microseconds, in a batch of `rows` rows of `models` models."""
        return self.rates.floor_s(self.flops, self.row_bytes * models / rows) * 1e6

    def chosen_path(self, rows: int, models: int) -> Path:
        """The path of most rows of such a batch, if its models are not adjacent in memory."""
        offsets = [2 * self.row_bytes * (i % models) for i in range(rows)]
        return max(plan_forwards(self.table, offsets, self.row_bytes), key=_count_rows).path


def measure_family(family: Family, row: Float32, rates: CoreRates) -> FamilySpeed:
    """Measure the family; every row holds the numbers of one of its models."""
    size = row.nbytes
    count = max(1, min(RECENT, MOST_BYTES // size, max(2 * MOST_ROWS, 1 + COLD_BYTES // size)))
    pool = Pool(count * size, torch.device("cpu"))
    offsets = [i * size for i in range(count)]
    for offset in offsets:
        pool.write(offset, row)
    engine = Engine(pool, MOST_ROWS)
    with one_thread():
        learn_costs(engine, family, offsets)
        return FamilySpeed(family.key, size, count, count_flops(family, row), rates, engine.cost_table(family))


def learn_costs(engine: Engine, family: Family, offsets: Sequence[int]) -> None:
    """Run every model once, then time the family's paths until all are measured."""
    x = np.zeros((1, *family.input_shape), np.float32)
    for at in range(0, len(offsets), MOST_ROWS):
        some = offsets[at : at + MOST_ROWS]
        engine.run(family, some, [x] * len(some))
    while engine.learn():
        pass


def count_flops(family: Family, row: Float32) -> int:
    """Count the floating-point operations of one answer: those of the matrix products of its forward."""
    weights, x = family.bind(torch.from_numpy(row)[None]), torch.zeros(1, *family.input_shape)
    in_place = {torch.ops.aten.baddbmm_: _of_product}  # torch counts `baddbmm`, but not `baddbmm_`
    with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        family.forward(weights, x)
    return int(counter.get_total_flops())


def measure_core(size: int = COLD_BYTES) -> CoreRates:
    """Measure the best rates of this core in a tenth of a second.

    `size`: bytes that are copied repeatedly. Rows that together fit into the cache have a floor of their own.
    """
    left, right = torch.ones(SIDE, SIDE), torch.ones(SIDE, SIDE)
    product = torch.empty(SIDE, SIDE)
    pieces = torch.ones(-(-size // PIECE_BYTES), PIECE_BYTES // 4)
    cached = torch.empty(PIECE_BYTES // 4)

    def copy() -> None:
        for piece in pieces:
            cached.copy_(piece)

    with one_thread():
        return CoreRates(2 * SIDE**3 / best_s(lambda: torch.mm(left, right, out=product)), pieces.nbytes / best_s(copy))


def best_s(work: Callable[[], object]) -> float:
    """Seconds of the fastest of ROUNDS runs."""
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _of_product(_: Shape, left: Shape, right: Shape, *__: object, **___: object) -> int:
    """Count the operations of a product of matrices [B, n, k] and [B, k, m]."""
    return 2 * prod(left) * right[-1]


def _count_rows(piece: PlannedForward) -> int:
    return len(piece.rows)
