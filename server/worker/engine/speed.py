"""How fast a family's models answer on one core of this machine, and how fast they could. For `fleetcast doctor`.

The paths of a batch (`server.worker.engine.execution_plan`) are timed by the engine itself, on a pool of rows that were
all asked just now and are more than a CPU's cache holds: as a fleet finds them. The floor of an answer is its
arithmetic at the rate of a matrix product plus its row at the rate of a copy, both measured here too. Torch; one
thread, as a worker on one core.
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
from server.worker.engine.execution_plan import COLD_BYTES, MOST_ROWS, RECENT, UNKNOWN, Path, Piece, Table, plan
from server.worker.engine.memory_pool import Pool

ROUNDS = 9  #: of what has a fastest
SIDE = 512  #: of the square matrices whose product is timed
PIECE_BYTES = 256 * 1024  #: copied at a time, into memory that stays in cache, as a row is gathered into staging
MOST_BYTES = 4 * COLD_BYTES  #: of a family's pool: large rows are fewer


class Rates(NamedTuple):
    """What one core does a second."""

    flops: float
    bytes: float

    def floor_s(self, flops: int, size: float) -> float:
        """The least that so much arithmetic on so many bytes from memory takes."""
        return flops / self.flops + size / self.bytes


@dataclass(frozen=True, slots=True)
class Pace:
    """A family's measured paths. `flops` of one answer; `rows`: how many models' rows were asked in turn."""

    family: str
    row_bytes: int
    rows: int
    flops: int
    rates: Rates
    table: Table

    def us(self, path: Path, rows: int) -> float | None:
        """Microseconds an answer in a batch of so many rows, which is one of SIZES; None where that was not measured,
        because it takes so long that a worker would not.
        """
        seconds = self.table.seconds.get((path, rows), UNKNOWN)
        return seconds / rows * 1e6 if seconds < UNKNOWN else None

    def floor_us(self, rows: int, models: int) -> float:
        """The floor of an answer in a batch of so many rows of so many models."""
        return self.rates.floor_s(self.flops, self.row_bytes * models / rows) * 1e6

    def taken(self, rows: int, models: int) -> Path:
        """The way that most rows of such a batch go, its models apart in memory."""
        offsets = [2 * self.row_bytes * (i % models) for i in range(rows)]
        return max(plan(self.table, offsets, self.row_bytes), key=_size).path


def pace(family: Family, row: Float32, rates: Rates) -> Pace:
    """Measure the family with the numbers of one of its models in every row."""
    size = row.nbytes
    count = max(1, min(RECENT, MOST_BYTES // size, max(2 * MOST_ROWS, 1 + COLD_BYTES // size)))
    pool = Pool(count * size, torch.device("cpu"))
    offsets = [i * size for i in range(count)]
    for offset in offsets:
        pool.write(offset, row)
    engine = Engine(pool, MOST_ROWS)
    with one_thread():
        learn(engine, family, offsets)
        return Pace(family.key, size, count, flops(family, row), rates, engine.table(family))


def learn(engine: Engine, family: Family, offsets: Sequence[int]) -> None:
    """Ask every model once, then time the family's paths until nothing is to be learnt."""
    x = np.zeros((1, *family.input_shape), np.float32)
    for at in range(0, len(offsets), MOST_ROWS):
        some = offsets[at : at + MOST_ROWS]
        engine.run(family, some, [x] * len(some))
    while engine.learn():
        pass


def flops(family: Family, row: Float32) -> int:
    """Floating-point operations of one answer: the products of its forward."""
    weights, x = family.bind(torch.from_numpy(row)[None]), torch.zeros(1, *family.input_shape)
    in_place = {torch.ops.aten.baddbmm_: _of_product}  # torch counts a `baddbmm`, but not one in place
    with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        family.forward(weights, x)
    return int(counter.get_total_flops())


def rates(size: int = COLD_BYTES) -> Rates:
    """The best of what this core did just now, in a tenth of a second. `size`: bytes that are copied over and over, so
    that rows which are fewer, and stay in cache, have their own floor.
    """
    left, right = torch.ones(SIDE, SIDE), torch.ones(SIDE, SIDE)
    product = torch.empty(SIDE, SIDE)
    pieces = torch.ones(-(-size // PIECE_BYTES), PIECE_BYTES // 4)
    cached = torch.empty(PIECE_BYTES // 4)

    def copy() -> None:
        for piece in pieces:
            cached.copy_(piece)

    with one_thread():
        return Rates(2 * SIDE**3 / best_s(lambda: torch.mm(left, right, out=product)), pieces.nbytes / best_s(copy))


def best_s(work: Callable[[], object]) -> float:
    """Seconds of the fastest of ROUNDS."""
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes on one thread meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _of_product(_: Shape, left: Shape, right: Shape, *__: object, **___: object) -> int:
    """Of matrices [B, n, k] and [B, k, m]."""
    return 2 * prod(left) * right[-1]


def _size(piece: Piece) -> int:
    return len(piece.rows)
