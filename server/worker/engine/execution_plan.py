"""Plans the forwards of a batch by measured times. Pure.

There are three ways (paths) to run rows of one family. `gather` copies them into staging and runs one forward.
`in_place` runs them where they lie in the pool, adjacent rows in one forward, and copies nothing. `repeat` runs many
inputs of one model and reads its row once.

Which path is cheapest depends on where the rows are. For example, one core and an `mlp` of 1.8 MB, in microseconds a
row: for rows in the CPU's cache in place takes 32 and gathered 77; for other rows 105 and 96, because a copy streams
from memory and a product does not. So paths are timed on recently requested rows, and again when these become more.
"""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import cycle, islice, pairwise
from typing import NamedTuple

#: Rows of the forwards that are timed. Times between them are interpolated, times beyond them are proportional.
SIZES = (1, 8, 64)
MOST_ROWS = 64  #: most rows of a forward in place or of one model
MARGIN = 0.1  #: share of time that another path must save over `gather`, because times are noisy
ROUNDS = 7  #: forwards that measure a cell; the median counts, without the first one, which binds staging
PATIENCE_S = 0.01  #: a longer forward is not timed: it would delay requests, and its time hardly depends on the path
RECENT = 1024  #: how many recently requested rows are kept
COLD_BYTES = 64 * 1024 * 1024  #: more bytes of rows than this do not fit into a CPU's cache
UNKNOWN = float("inf")


class Path(StrEnum):
    """A way to run rows; see the module."""

    GATHER = "gather"
    IN_PLACE = "in_place"
    REPEAT = "repeat"


Cell = tuple[Path, int]
#: All measured combinations, the cheapest first.
CELLS: tuple[Cell, ...] = tuple((path, size) for size in SIZES for path in Path)


class PlannedForward(NamedTuple):
    """One forward of a plan: its path and the indices of the batch's rows. Only `gather` may exceed MOST_ROWS."""

    path: Path
    rows: Sequence[int]


class CostTable:
    """A family's measured seconds of a forward with its binding: {(path, rows): seconds} for rows of SIZES.

    A path that is not measured is not taken; with an empty table every batch is gathered.
    """

    def __init__(self, seconds: Mapping[Cell, float] | None = None) -> None:
        self.seconds = dict(seconds or {})
        self._times: dict[Cell, float] = {}  # interpolated times
        self.in_place_pays = any(self.pays_off(Path.IN_PLACE, size, of=size) for size in SIZES)

    def __repr__(self) -> str:
        """For example `<CostTable 8 of 9 measured>`."""
        return f"<CostTable {len(self.seconds)} of {len(CELLS)} measured>"

    def forward_time(self, path: Path, rows: int) -> float:
        """Seconds of a forward of `rows` rows."""
        found = self._times.get((path, rows))
        if found is None:
            found = self._times[path, rows] = self._interpolate(path, rows)
        return found

    def pays_off(self, path: Path, rows: int, *, of: int) -> bool:
        """Whether `rows` of `of` rows cost less by this path than their share of one gathered forward."""
        return self.forward_time(path, rows) < (1 - MARGIN) * self.forward_time(Path.GATHER, of) * rows / of

    def _interpolate(self, path: Path, rows: int) -> float:
        known = [size for size in SIZES if self.seconds.get((path, size), UNKNOWN) < UNKNOWN]
        if not known:
            return UNKNOWN
        at = bisect_left(known, rows)
        if at == len(known):
            return self.seconds[path, known[-1]] * rows / known[-1]
        low, high = known[max(at - 1, 0)], known[at]
        below, above = self.seconds[path, low], self.seconds[path, high]
        return above if low == high else below + (above - below) * (rows - low) / (high - low)


def plan_forwards(table: CostTable, offsets: Sequence[int], row_bytes: int) -> list[PlannedForward]:
    """The forwards of a batch whose row i runs under the model's row at `offsets[i]` (bytes).

    INVARIANT: each row of the batch is in exactly one forward. A forward of the whole batch in order has a range.
    """
    count = len(offsets)
    apart = count == 1 or len(set(offsets)) == count
    if apart and not table.in_place_pays:
        return [PlannedForward(Path.GATHER, range(count))]
    pieces, rest = (list[PlannedForward](), list(range(count))) if apart else _split_repeated(table, offsets)
    if not rest:
        return pieces if len(pieces) > 1 else [PlannedForward(pieces[0].path, range(count))]
    if table.in_place_pays:
        runs = [piece for run in _find_runs(rest, offsets, row_bytes) for piece in _in_place(table, run)]
        in_place = sum(table.forward_time(Path.IN_PLACE, len(piece.rows)) for piece in runs)
        if in_place < (1 - MARGIN) * table.forward_time(Path.GATHER, len(rest)):
            return pieces + runs if count > 1 else [PlannedForward(Path.IN_PLACE, range(1))]
    return [*pieces, PlannedForward(Path.GATHER, rest if pieces else range(count))]


class PathTimings:
    """Measures a family's paths: says which forward to time next, and keeps the table of times.

    `row_bytes`: bytes of the family's rows. Rows are identified by their offsets in the pool (bytes).
    """

    def __init__(self, row_bytes: int) -> None:
        self.table = CostTable()
        self._row_bytes = row_bytes
        self._recent: deque[int] = deque(maxlen=RECENT)
        self._row_s = UNKNOWN
        self._bytes = 0  # bytes of the rows that the table was measured on
        self._news = False  # whether a batch has run since the last look at `_recent`
        self._skipped_s = 0.0  # `_row_s` when forwards were left out because they would take too long
        self._left: deque[tuple[Cell, list[int]]] = deque()  # forwards still to be timed
        self._taken: list[float] = []  # times of the cell that is being measured

    def __repr__(self) -> str:
        """For example `<PathTimings <CostTable 8 of 9 measured> on 2.1 MB>`."""
        return f"<PathTimings {self.table!r} on {self._bytes / 1e6:.1f} MB>"

    def record_batch(self, offsets: Sequence[int], seconds: float) -> None:
        """Record a batch of these rows and the seconds that it took."""
        self._recent.extend(offsets)
        self._news = True
        self._row_s = min(self._row_s, seconds / len(offsets))

    def next_timing(self) -> tuple[Cell, list[int]] | None:
        """The cell and the rows of the forward to time next; None if nothing has to be measured.

        A cell whose forward would take PATIENCE_S is left out. It is tried again once rows have become twice as fast.
        """
        if not self._left and self._news:
            self._news = False
            rows = sorted(set(self._recent))
            size = min(len(rows) * self._row_bytes, COLD_BYTES)
            if size >= 2 * self._bytes or 2 * self._row_s <= self._skipped_s:
                self._bytes, self._skipped_s = size, 0.0
                self._left.extend(self._forwards(rows))
        while self._left and not self._taken and self._left[0][0][1] * self._row_s >= PATIENCE_S:
            self._skipped_s = self._row_s
            self._left.popleft()
        return self._left[0] if self._left else None

    def record_timing(self, seconds: float) -> None:
        """Record the seconds of the forward that `next_timing` returned."""
        cell, offsets = self._left.popleft()
        self._row_s = min(self._row_s, seconds / len(offsets))  # the first batches of a family are slower than the rest
        self._taken.append(seconds)
        if len(self._taken) == ROUNDS:
            self.table = CostTable({**self.table.seconds, cell: sorted(self._taken[1:])[ROUNDS // 2]})
            self._taken.clear()

    def _forwards(self, rows: Sequence[int]) -> Iterator[tuple[Cell, list[int]]]:
        """ROUNDS forwards for each cell, of different rows if possible; none if rows are too few."""
        for cell in CELLS:
            batches = list(islice(self._batches(cell, rows), ROUNDS))
            yield from ((cell, batch) for batch in islice(cycle(batches), ROUNDS))

    def _batches(self, cell: Cell, rows: Sequence[int]) -> Iterator[list[int]]:
        """Batches of different rows for a cell; none if there are too few rows."""
        path, size = cell
        if path is Path.REPEAT:
            yield from ([row] * size for row in _spread_rows(rows))
        elif path is Path.GATHER:
            yield from (list(part) for part in zip(*[iter(_spread_rows(rows))] * size, strict=False))
        else:
            runs = _find_runs(range(len(rows)), rows, self._row_bytes)
            yield from (
                [rows[i] for i in run[at : at + size]] for run in runs for at in range(0, len(run) - size + 1, size)
            )


def _spread_rows(rows: Sequence[int]) -> list[int]:
    """The rows in an order that keeps neighbours in memory far apart."""
    return [rows[i] for start in range(16) for i in range(start, len(rows), 16)]


def _split_repeated(table: CostTable, offsets: Sequence[int]) -> tuple[list[PlannedForward], list[int]]:
    """Forwards of models with so many inputs that `repeat` pays, and the other rows."""
    count = len(offsets)
    times = Counter(offsets)
    sizes = {size for size in {min(of_one, MOST_ROWS) for of_one in times.values()} if _repeat_pays(table, size, count)}
    if not sizes:  # the most common case: 64 requests for 500 models have one or two models in common
        return [], list(range(count))
    rows: dict[int, list[int]] = {}
    for i, offset in enumerate(offsets):
        rows.setdefault(offset, []).append(i)
    apart = [same for same in rows.values() if min(len(same), MOST_ROWS) in sizes]
    pieces = [PlannedForward(Path.REPEAT, part) for same in apart for part in _cut_to_most(same)]
    return pieces, sorted(set(range(count)).difference(*apart))


def _repeat_pays(table: CostTable, size: int, of: int) -> bool:
    """Whether `size` inputs of one model cost less by `repeat` than in the gathered batch, and than one by one."""
    cheap = size > 1 and table.pays_off(Path.REPEAT, size, of=of)
    return cheap and table.forward_time(Path.REPEAT, size) < size * table.forward_time(Path.IN_PLACE, 1)


def _find_runs(rows: Sequence[int], offsets: Sequence[int], row_bytes: int) -> Iterator[list[int]]:
    """The rows as runs of rows that are adjacent in memory."""
    ordered = sorted(rows, key=offsets.__getitem__)
    run = ordered[:1]
    for before, row in pairwise(ordered):
        if offsets[row] != offsets[before] + row_bytes:
            yield run
            run = []
        run.append(row)
    yield run


def _in_place(table: CostTable, run: Sequence[int]) -> list[PlannedForward]:
    """A run as forwards of several rows, or row by row if that is no slower."""
    together = [PlannedForward(Path.IN_PLACE, part) for part in _cut_to_most(run)]
    if sum(table.forward_time(Path.IN_PLACE, len(piece.rows)) for piece in together) < len(run) * table.forward_time(
        Path.IN_PLACE, 1
    ):
        return together
    return [PlannedForward(Path.IN_PLACE, [row]) for row in run]


def _cut_to_most(rows: Sequence[int]) -> list[Sequence[int]]:
    return [rows[at : at + MOST_ROWS] for at in range(0, len(rows), MOST_ROWS)]
