"""The execution plan of a batch: every row once, in allowed forwards, at the least measured time."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.worker.engine.execution_plan import (
    CELLS,
    COLD_BYTES,
    MOST_ROWS,
    ROUNDS,
    UNKNOWN,
    Cell,
    CostTable,
    Path,
    PathTimings,
    PlannedForward,
    plan_forwards,
)

ROW = 640
TIMES = st.floats(1e-6, 1e-2)
TABLES = st.dictionaries(st.sampled_from(CELLS), TIMES).map(CostTable)
OFFSETS = st.lists(st.integers(0, 40).map(lambda i: i * ROW), min_size=1, max_size=200)


def make_table(*, gather: float, in_place: float, repeat: float) -> CostTable:
    """A family whose forwards cost so much a row, whatever their size."""
    a_row = {Path.GATHER: gather, Path.IN_PLACE: in_place, Path.REPEAT: repeat}
    return CostTable({(path, size): a_row[path] * size for path, size in CELLS})


def count_paths(pieces: Sequence[PlannedForward]) -> dict[Path, int]:
    """How many rows go each way."""
    found: dict[Path, int] = {}
    for path, rows in pieces:
        found[path] = found.get(path, 0) + len(rows)
    return found


@pytest.mark.slow
@given(table=TABLES, offsets=OFFSETS)
def test_every_row_is_in_one_forward_that_may_be(table: CostTable, offsets: list[int]) -> None:
    """Whatever was measured: rows in place lie side by side, repeated ones are one model's, and none is left out."""
    pieces = plan_forwards(table, offsets, ROW)
    assert sorted(row for piece in pieces for row in piece.rows) == list(range(len(offsets)))
    for path, rows in pieces:
        places = [offsets[row] for row in rows]
        if path is Path.IN_PLACE:
            assert places == [places[0] + i * ROW for i in range(len(places))]
        if path is Path.REPEAT:
            assert len(set(places)) == 1
        assert path is Path.GATHER or len(rows) <= MOST_ROWS
        if isinstance(rows, range):
            assert rows == range(len(offsets))


@given(offsets=OFFSETS)
def test_what_was_not_measured_is_gathered(offsets: list[int]) -> None:
    """An empty table takes the way that every family can go."""
    assert plan_forwards(CostTable(), offsets, ROW) == [PlannedForward(Path.GATHER, range(len(offsets)))]


def test_the_cheapest_way_is_taken() -> None:
    """One model's inputs together, the others in place or gathered, as their times say."""
    offsets = [ROW * 9] * 10 + [ROW * i for i in (0, 1, 2, 5)]
    assert count_paths(plan_forwards(make_table(gather=4, in_place=9, repeat=1), offsets, ROW)) == {
        Path.REPEAT: 10,
        Path.GATHER: 4,
    }
    assert count_paths(plan_forwards(make_table(gather=4, in_place=2, repeat=1), offsets, ROW)) == {
        Path.REPEAT: 10,
        Path.IN_PLACE: 4,
    }
    assert count_paths(plan_forwards(make_table(gather=4, in_place=9, repeat=5), offsets, ROW)) == {Path.GATHER: 14}
    assert count_paths(plan_forwards(make_table(gather=4, in_place=1, repeat=2), offsets, ROW)) == {Path.IN_PLACE: 14}


def test_a_small_saving_is_noise() -> None:
    """Another way must save a tenth."""
    assert count_paths(plan_forwards(make_table(gather=1.0, in_place=0.95, repeat=0.95), [0, 0, ROW], ROW)) == {
        Path.GATHER: 3
    }
    assert count_paths(plan_forwards(make_table(gather=1.0, in_place=0.85, repeat=0.95), [0, 0, ROW], ROW)) == {
        Path.IN_PLACE: 3
    }


def test_rows_side_by_side_run_together_only_where_that_is_faster() -> None:
    """Forwards of several rows in place against one by one."""
    together = CostTable({(Path.GATHER, 1): 9, (Path.GATHER, 8): 72, (Path.IN_PLACE, 1): 4, (Path.IN_PLACE, 8): 8})
    alone = CostTable({(Path.GATHER, 1): 9, (Path.GATHER, 8): 72, (Path.IN_PLACE, 1): 4, (Path.IN_PLACE, 8): 40})
    offsets = [ROW * i for i in (3, 0, 2, 1, 7)]
    assert [list(piece.rows) for piece in plan_forwards(together, offsets, ROW)] == [[1, 3, 2, 0], [4]]
    assert [list(piece.rows) for piece in plan_forwards(alone, offsets, ROW)] == [[1], [3], [2], [0], [4]]


def test_times_between_and_beyond_what_was_measured() -> None:
    """Interpolated between sizes, in proportion beyond them, unknown without any."""
    measured = CostTable({(Path.GATHER, 1): 10.0, (Path.GATHER, 8): 24.0, (Path.GATHER, 64): UNKNOWN})
    assert [measured.forward_time(Path.GATHER, rows) for rows in (1, 4, 8, 80)] == [10, 16, 24, 240]
    assert measured.forward_time(Path.REPEAT, 1) == UNKNOWN


def learn(learning: PathTimings, cost: dict[Path, float] | None = None) -> set[Cell]:
    """Time whatever it asks for; the cells that were."""
    done: set[Cell] = set()
    while (forward := learning.next_timing()) is not None:
        (path, size), offsets = forward
        assert len(offsets) == size
        learning.record_timing((cost or {}).get(path, 1.0) * size)
        done.add((path, size))
    return done


def test_paths_are_measured_on_rows_that_ran() -> None:
    """Cells for which there are rows enough; rows apart have no forward side by side; nothing is measured twice."""
    learning = PathTimings(ROW)
    assert learning.next_timing() is None
    learning.record_batch([0, 2 * ROW, 4 * ROW], 3e-6)
    assert learn(learning) == {
        (Path.GATHER, 1),
        (Path.IN_PLACE, 1),
        (Path.REPEAT, 1),
        (Path.REPEAT, 8),
        (Path.REPEAT, 64),
    }
    learning.record_batch([0, 2 * ROW, 4 * ROW], 3e-6)
    assert learn(learning) == set()


def test_more_rows_are_measured_again() -> None:
    """What is cheap for rows in the CPU's cache is not for many: the table is made anew as the rows become twice as
    many, until they are more than a cache holds.
    """
    learning = PathTimings(ROW)
    for rows, expected in ((8, True), (12, False), (16, True), (100, True), (150, False), (200, True)):
        learning.record_batch([i * ROW for i in range(rows)], rows * 1e-6)
        assert bool(learn(learning)) is expected, rows
    assert learn(learning) == set()
    assert learning.table.forward_time(Path.GATHER, 64) == 64
    large = PathTimings(COLD_BYTES)
    large.record_batch([0], 1e-6)
    assert learn(large)
    large.record_batch([COLD_BYTES], 1e-6)
    assert not learn(large)


def test_slow_families_are_left_alone() -> None:
    """A forward that would be felt is not timed."""
    learning = PathTimings(ROW)
    learning.record_batch([i * ROW for i in range(64)], 64 * 0.001)
    assert {size for _, size in learn(learning)} == {1, 8}


def test_a_slow_first_batch_does_not_decide_for_good() -> None:
    """The first batch of a family binds staging, perhaps on a busy machine: what it left out is measured later."""
    learning = PathTimings(ROW)
    learning.record_batch([i * ROW for i in range(64)], 64 * 0.02)
    assert learn(learning) == set()
    learning.record_batch([i * ROW for i in range(64)], 64 * 0.001)
    assert {size for _, size in learn(learning)} == {1, 8}
    learning.record_batch([i * ROW for i in range(64)], 64 * 0.0009)
    assert learn(learning) == set()
    fast = PathTimings(ROW)
    fast.record_batch([i * ROW for i in range(64)], 64 * 0.001)
    assert {size for _, size in learn(fast, dict.fromkeys(Path, 1e-5))} == {1, 8, 64}  # the forwards of 1 said so


def test_the_median_counts_and_the_first_forward_does_not() -> None:
    """One slow forward, or the one that binds staging, decides nothing."""
    learning = PathTimings(ROW)
    learning.record_batch([0], 1e-6)
    for seconds in (100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 50.0)[:ROUNDS]:
        assert learning.next_timing() == ((Path.GATHER, 1), [0])
        learning.record_timing(seconds)
    assert learning.table.forward_time(Path.GATHER, 1) == pytest.approx(4.0)
    assert repr(learning) == "<PathTimings <CostTable 1 of 9 measured> on 0.0 MB>"
