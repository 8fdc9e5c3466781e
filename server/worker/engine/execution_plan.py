"""Which way a batch takes through the engine: decided from measured times, never by a guess. Pure.

There are three ways to run rows of one family. `gather` copies them into staging and runs one forward. `in_place` runs
them where they lie in the pool, those that lie side by side in one forward: it copies nothing. `repeat` runs many
inputs of one model, whose row is read once.

What is cheap depends on where the rows are. One core, 1.8 MB `mlp`, microseconds a row: of rows that the CPU's cache
holds, in place 32 against 77 gathered; of rows that it does not hold, 105 against 96, because a copy streams from
memory and a product does not. So paths are timed on the rows that were asked lately, and again as these become more.
"""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import cycle, islice, pairwise
from typing import NamedTuple

#: Rows of the forwards whose time is measured: between them time is interpolated, beyond them it is in proportion.
SIZES = (1, 8, 64)
MOST_ROWS = 64  #: of a forward in place or of one model
MARGIN = 0.1  #: what another path than `gather` must save to be taken, for times are noisy
ROUNDS = 7  #: forwards to measure a cell: the first, which binds staging, does not count, of the others the median does
PATIENCE_S = 0.01  #: a forward that takes longer is not timed: it would be felt, and its row is not what costs
RECENT = 1024  #: rows asked lately
COLD_BYTES = 64 * 1024 * 1024  #: rows that are more than this are in no CPU's cache, and more of them are no colder
UNKNOWN = float("inf")


class Path(StrEnum):
    """See the module."""

    GATHER = "gather"
    IN_PLACE = "in_place"
    REPEAT = "repeat"


Cell = tuple[Path, int]
#: What is measured, the cheapest first.
CELLS: tuple[Cell, ...] = tuple((path, size) for size in SIZES for path in Path)


class Piece(NamedTuple):
    """One forward of a plan: which of the batch's rows, and how. Only `gather` may have more than MOST_ROWS."""

    path: Path
    rows: Sequence[int]


class Table:
    """A family's measured seconds a forward, binding included: {(path, rows): seconds}, rows of SIZES.

    A path that is not measured is not taken: with an empty table every batch is gathered.
    """

    def __init__(self, seconds: Mapping[Cell, float] | None = None) -> None:
        self.seconds = dict(seconds or {})
        self._times: dict[Cell, float] = {}  # worked out before
        self.in_place_pays = any(self.pays(Path.IN_PLACE, size, of=size) for size in SIZES)

    def __repr__(self) -> str:
        """For example `<Table 8 of 9 measured>`."""
        return f"<Table {len(self.seconds)} of {len(CELLS)} measured>"

    def time(self, path: Path, rows: int) -> float:
        """Seconds of a forward of so many rows."""
        found = self._times.get((path, rows))
        if found is None:
            found = self._times[path, rows] = self._time(path, rows)
        return found

    def pays(self, path: Path, rows: int, *, of: int) -> bool:
        """Whether `rows` rows, of `of` to be run, cost less this way than as their part of one gathered forward."""
        return self.time(path, rows) < (1 - MARGIN) * self.time(Path.GATHER, of) * rows / of

    def _time(self, path: Path, rows: int) -> float:
        known = [size for size in SIZES if self.seconds.get((path, size), UNKNOWN) < UNKNOWN]
        if not known:
            return UNKNOWN
        at = bisect_left(known, rows)
        if at == len(known):
            return self.seconds[path, known[-1]] * rows / known[-1]
        low, high = known[max(at - 1, 0)], known[at]
        below, above = self.seconds[path, low], self.seconds[path, high]
        return above if low == high else below + (above - below) * (rows - low) / (high - low)


def plan(table: Table, offsets: Sequence[int], row_bytes: int) -> list[Piece]:
    """The forwards of a batch whose row i is run under the model's row at `offsets[i]` (bytes). Each row is in one.

    A piece that is the whole batch in its order has a range of rows.
    """
    count = len(offsets)
    apart = count == 1 or len(set(offsets)) == count
    if apart and not table.in_place_pays:
        return [Piece(Path.GATHER, range(count))]
    pieces, rest = (list[Piece](), list(range(count))) if apart else _repeated(table, offsets)
    if not rest:
        return pieces if len(pieces) > 1 else [Piece(pieces[0].path, range(count))]
    if table.in_place_pays:
        runs = [piece for run in _runs(rest, offsets, row_bytes) for piece in _in_place(table, run)]
        in_place = sum(table.time(Path.IN_PLACE, len(piece.rows)) for piece in runs)
        if in_place < (1 - MARGIN) * table.time(Path.GATHER, len(rest)):
            return pieces + runs if count > 1 else [Piece(Path.IN_PLACE, range(1))]
    return [*pieces, Piece(Path.GATHER, rest if pieces else range(count))]


class Learning:
    """What a family's paths cost, and which forward to time next to know it better.

    `row_bytes` of the family; rows are known by their offsets in the pool (bytes).
    """

    def __init__(self, row_bytes: int) -> None:
        self.table = Table()
        self._row_bytes = row_bytes
        self._recent: deque[int] = deque(maxlen=RECENT)
        self._row_s = UNKNOWN
        self._bytes = 0  # of the rows that the table was measured on
        self._news = False
        self._left: deque[tuple[Cell, list[int]]] = deque()
        self._taken: list[float] = []  # of the cell that is being measured

    def __repr__(self) -> str:
        """For example `<Learning <Table 8 of 9 measured> on 2.1 MB>`."""
        return f"<Learning {self.table!r} on {self._bytes / 1e6:.1f} MB>"

    def ran(self, offsets: Sequence[int], seconds: float) -> None:
        """A batch of these rows took so long."""
        self._recent.extend(offsets)
        self._news = True
        self._row_s = min(self._row_s, seconds / len(offsets))

    def next(self) -> tuple[Cell, list[int]] | None:
        """A forward to time now, as its cell and its rows; None when nothing is to be learnt."""
        if not self._left and self._news:
            self._news = False
            rows = sorted(set(self._recent))
            size = min(len(rows) * self._row_bytes, COLD_BYTES)
            if size >= 2 * self._bytes:
                self._bytes = size
                self._left.extend(self._forwards(rows))
        return self._left[0] if self._left else None

    def took(self, seconds: float) -> None:
        """What the forward that `next` gave took."""
        cell, _ = self._left.popleft()
        self._taken.append(seconds)
        if len(self._taken) == ROUNDS:
            self.table = Table({**self.table.seconds, cell: sorted(self._taken[1:])[ROUNDS // 2]})
            self._taken.clear()

    def _forwards(self, rows: Sequence[int]) -> Iterator[tuple[Cell, list[int]]]:
        """ROUNDS forwards a cell, as different as there are rows; none for cells with too few rows or too slow."""
        for cell in CELLS:
            batches = list(islice(self._batches(cell, rows), ROUNDS))
            if cell[1] * self._row_s < PATIENCE_S:
                yield from ((cell, batch) for batch in islice(cycle(batches), ROUNDS))

    def _batches(self, cell: Cell, rows: Sequence[int]) -> Iterator[list[int]]:
        """Batches for a cell, as different as there are rows; none if there are too few."""
        path, size = cell
        if path is Path.REPEAT:
            yield from ([row] * size for row in _spread(rows))
        elif path is Path.GATHER:
            yield from (list(part) for part in zip(*[iter(_spread(rows))] * size, strict=False))
        else:
            runs = _runs(range(len(rows)), rows, self._row_bytes)
            yield from (
                [rows[i] for i in run[at : at + size]] for run in runs for at in range(0, len(run) - size + 1, size)
            )


def _spread(rows: Sequence[int]) -> list[int]:
    """The rows in an order in which neighbours in memory are far apart."""
    return [rows[i] for start in range(16) for i in range(start, len(rows), 16)]


def _repeated(table: Table, offsets: Sequence[int]) -> tuple[list[Piece], list[int]]:
    """Models asked so often that it pays to run their inputs apart from the others, and the rows that are left."""
    count = len(offsets)
    times = Counter(offsets)
    sizes = {size for size in {min(of_one, MOST_ROWS) for of_one in times.values()} if _repeat_pays(table, size, count)}
    if not sizes:  # the most common case: 64 requests of 500 models have a model or two in common
        return [], list(range(count))
    rows: dict[int, list[int]] = {}
    for i, offset in enumerate(offsets):
        rows.setdefault(offset, []).append(i)
    apart = [same for same in rows.values() if min(len(same), MOST_ROWS) in sizes]
    pieces = [Piece(Path.REPEAT, part) for same in apart for part in _cut(same)]
    return pieces, sorted(set(range(count)).difference(*apart))


def _repeat_pays(table: Table, size: int, of: int) -> bool:
    """Whether so many inputs of one model cost less by themselves than as part of a batch, and than one by one."""
    cheap = size > 1 and table.pays(Path.REPEAT, size, of=of)
    return cheap and table.time(Path.REPEAT, size) < size * table.time(Path.IN_PLACE, 1)


def _runs(rows: Sequence[int], offsets: Sequence[int], row_bytes: int) -> Iterator[list[int]]:
    """The rows by place, cut wherever the next does not lie side by side with the one before."""
    ordered = sorted(rows, key=offsets.__getitem__)
    run = ordered[:1]
    for before, row in pairwise(ordered):
        if offsets[row] != offsets[before] + row_bytes:
            yield run
            run = []
        run.append(row)
    yield run


def _in_place(table: Table, run: Sequence[int]) -> list[Piece]:
    """A run as forwards of several rows, or row by row where that is no slower."""
    together = [Piece(Path.IN_PLACE, part) for part in _cut(run)]
    if sum(table.time(Path.IN_PLACE, len(piece.rows)) for piece in together) < len(run) * table.time(Path.IN_PLACE, 1):
        return together
    return [Piece(Path.IN_PLACE, [row]) for row in run]


def _cut(rows: Sequence[int]) -> list[Sequence[int]]:
    return [rows[at : at + MOST_ROWS] for at in range(0, len(rows), MOST_ROWS)]
