"""The ledger of rows: what a next worker finds after any death of the one before."""

import mmap
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from server.ipc.row_memory import HEAD_BYTES
from server.worker.survivors.row_ledger import RowLedger, RowReady, make_fingerprint

AREA = 1 << 16
PROGRAM = make_fingerprint("a program")


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    """Memory of a small ledger, as two workers map it one after another."""
    with mmap.mmap(-1, HEAD_BYTES + 2 * AREA) as mapped:
        yield mapped


def make_row(offset: int, model: str = "a.mar", kept: bytes = b"k", *, shared: bool = False) -> RowReady:
    """A row of 64 bytes."""
    return RowReady(offset, 64, 1, model, "v1", "tcn-1", 1.5, kept, shared)


def open_ledger(memory: mmap.mmap) -> RowLedger:
    """The ledger of a worker that finds nothing to take back."""
    ledger = RowLedger(memory, PROGRAM)
    assert ledger.recover() is None
    return ledger


def recover(memory: mmap.mmap) -> list[RowReady] | None:
    """What the next worker finds."""
    return RowLedger(memory, PROGRAM).recover()


def test_a_next_worker_finds_whole_rows_alone(memory: mmap.mmap) -> None:
    """A row that was ended is not found, one that moved is found at its new place, the newest of a model counts."""
    ledger = open_ledger(memory)
    for offset in (0, 64, 128):
        ledger.note_ready(make_row(offset, f"{offset}.mar"), None)
    ledger.note_gone(0)
    ledger.note_moved(64, 256)
    ledger.note_ready(make_row(512, "128.mar"), None)
    found = recover(memory)
    assert found is not None
    assert {row.model: row.offset for row in found} == {"64.mar": 256, "128.mar": 512}


def test_what_a_family_shares_is_kept_once(memory: mmap.mmap) -> None:
    """The next worker reads it for every row of the family."""
    ledger = open_ledger(memory)
    ledger.note_ready(make_row(0, "a.mar", shared=True), b"graph" * 100)
    before = ledger.used_bytes
    ledger.note_ready(make_row(64, "b.mar", shared=True), b"graph" * 100)
    assert ledger.used_bytes - before < 100
    after = RowLedger(memory, PROGRAM)
    assert len(after.recover() or ()) == 2
    assert after.read_shared("tcn-1") == b"graph" * 100
    assert after.read_shared("tcn-2") is None


def test_rows_of_another_program_are_not_found(memory: mmap.mmap) -> None:
    """Another version of program, torch or layout finds nothing, and its own ledger is empty."""
    open_ledger(memory).note_ready(make_row(0), None)
    other = RowLedger(memory, make_fingerprint("another"))
    assert other.recover() is None
    assert recover(memory) is None


@pytest.mark.parametrize("at", [8, 20])
def test_a_damaged_entry_ends_all_trust(memory: mmap.mmap, at: int) -> None:
    """One flipped bit in an entry, and nothing of the ledger is believed."""
    ledger = open_ledger(memory)
    ledger.note_ready(make_row(0), None)
    memory[HEAD_BYTES + at] ^= 1
    assert recover(memory) is None
    assert recover(memory) == []


def test_an_entry_without_its_length_is_not_there(memory: mmap.mmap) -> None:
    """A worker that dies in the middle of an entry has written all but its length, which comes last."""
    ledger = open_ledger(memory)
    ledger.note_ready(make_row(0, "a.mar"), None)
    end = ledger.used_bytes
    ledger.note_ready(make_row(64, "b.mar"), None)
    memory[HEAD_BYTES + end : HEAD_BYTES + end + 8] = bytes(8)
    found = recover(memory)
    assert found is not None
    assert [row.model for row in found] == ["a.mar"]


def test_a_full_ledger_says_so_and_never_finds_a_row_at_anothers_place(memory: mmap.mmap) -> None:
    """Rows without room are not noted; each that is ended is not found, however full it is."""
    ledger = open_ledger(memory)
    noted = [
        offset
        for offset in range(0, 64 * 100, 64)
        if ledger.note_ready(make_row(offset, f"{offset}", b"x" * 2000), None)
    ]
    assert 10 < len(noted) < 33
    for offset in noted[1:]:
        ledger.note_gone(offset)
    found = recover(memory)
    assert found is not None
    assert [row.offset for row in found] == [0]


class LedgerMachine(RuleBasedStateMachine):
    """Whatever happens, the next worker finds what counts, and the log stays within twice of that."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = mmap.mmap(-1, HEAD_BYTES + 2 * AREA)
        self.ledger = open_ledger(self.memory)
        self.rows: dict[int, str] = {}
        self.count = 0

    @rule(place=st.integers(0, 9), size=st.integers(0, 3000))
    def write(self, place: int, size: int) -> None:
        """A model gets this place, where another may have been."""
        self.ledger.note_gone(place * 64)
        self.rows.pop(place * 64, None)
        self.count += 1
        if self.ledger.note_ready(make_row(place * 64, f"{self.count}.mar", b"x" * size), None):
            self.rows[place * 64] = f"{self.count}.mar"

    @rule(place=st.integers(0, 9))
    def end(self, place: int) -> None:
        """A model leaves."""
        self.ledger.note_gone(place * 64)
        self.rows.pop(place * 64, None)

    @rule(place=st.integers(0, 9), free=st.integers(10, 19))
    def move(self, place: int, free: int) -> None:
        """A row goes to a place that is free."""
        if place * 64 in self.rows and free * 64 not in self.rows:
            self.ledger.note_moved(place * 64, free * 64)
            self.rows[free * 64] = self.rows.pop(place * 64)

    @rule()
    def die(self) -> None:
        """The worker dies, and the next one goes on with what it finds."""
        self.ledger = RowLedger(self.memory, PROGRAM)
        found = self.ledger.recover()
        assert found is not None
        assert {row.offset: row.model for row in found} == self.rows

    @invariant()
    def is_found(self) -> None:
        """A next worker would find exactly the rows that count."""
        found = recover(self.memory)
        assert found is not None
        assert {row.offset: row.model for row in found} == self.rows

    def teardown(self) -> None:
        """Unmap."""
        self.memory.close()


@pytest.mark.slow
def test_the_ledger_machine() -> None:
    """Random lives of ledgers; see LedgerMachine."""
    run_state_machine_as_test(LedgerMachine, settings=settings(max_examples=30, deadline=None))
