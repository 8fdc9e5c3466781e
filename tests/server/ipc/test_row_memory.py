"""Memory of rows: sealed, mapped twice, empty again when forgotten, and none where the system has none."""

import os

import pytest

from server.ipc.row_memory import area_bytes, create_row_memory, forget_pages, map_row_memory

POOL = 1 << 20


def test_what_one_mapping_wrote_another_reads_and_nobody_can_shrink_it() -> None:
    """Two mappings are the same memory, and the descriptor can be neither cut nor inherited by what is executed."""
    descriptor = create_row_memory(0, POOL)
    assert descriptor is not None
    try:
        first, second = map_row_memory(descriptor, POOL), map_row_memory(descriptor, POOL)
        first.pool[5:8] = b"row"
        first.ledger[1:4] = b"led"
        assert (second.pool[5:8], second.ledger[1:4]) == (b"row", b"led")
        assert not os.get_inheritable(descriptor)
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def test_forgotten_pages_are_zeros_and_take_no_memory() -> None:
    """What is forgotten is given back to the system."""
    descriptor = create_row_memory(0, POOL)
    assert descriptor is not None
    try:
        memory = map_row_memory(descriptor, POOL)
        memory.pool[:] = b"x" * len(memory.pool)
        before = os.fstat(descriptor).st_blocks
        forget_pages(memory.pool, 0, len(memory.pool))
        assert before - os.fstat(descriptor).st_blocks >= POOL // 512
        assert memory.pool[:] == bytes(len(memory.pool))
    finally:
        os.close(descriptor)


def test_a_system_without_such_memory_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the call is missing or refused, rows are to end with their worker."""
    monkeypatch.delattr(os, "memfd_create")
    assert create_row_memory(0, POOL) is None


def test_the_ledger_grows_with_the_pool() -> None:
    """An area is whole pages, and bounded."""
    sizes = [area_bytes(size) for size in (1, 1 << 30, 1 << 50)]
    assert sizes == sorted(sizes)
    assert all(size % os.sysconf("SC_PAGESIZE") == 0 for size in sizes)
    assert sizes[-1] == 256 << 20
