"""The memory of a worker's rows that outlives the worker: made by the supervisor, mapped by one worker after another.

It is memory without a file (memfd), so it goes when the supervisor and the worker that maps it are gone. In front lies
a ledger of what is in it (see `server.worker.survivors.row_ledger`), behind it the pool of rows. Pages that were never
written take no memory; the others count as shared memory (shmem) of the worker's cgroup, within `model_cache_bytes`.
"""

import fcntl
import mmap
import os
from typing import Final, NamedTuple

import structlog

HEAD_BYTES: Final = 4096
LEAST_AREA_BYTES: Final = 1 << 20  #: of one of the ledger's two areas
MOST_AREA_BYTES: Final = 256 << 20
LEDGER_SHARE: Final = 16  #: an area has the pool's bytes divided by this: rows of 16 KiB have a KiB each

log = structlog.get_logger()


class RowMemory(NamedTuple):
    """The mapped parts: the ledger with `HEAD_BYTES` and two equal areas, and the pool."""

    ledger: mmap.mmap
    pool: mmap.mmap


def area_bytes(pool_bytes: int) -> int:
    """The bytes of one of the ledger's two areas, whole pages. Pure."""
    return _round_up(min(MOST_AREA_BYTES, max(LEAST_AREA_BYTES, pool_bytes // LEDGER_SHARE)))


def create_row_memory(index: int, pool_bytes: int) -> int | None:
    """A descriptor of empty memory for a worker's pool of so many bytes; None where this system has no such memory.

    It is closed on exec, and sealed: nobody can shrink it below a worker that reads it, or let it grow.
    """
    try:
        descriptor = os.memfd_create(f"fleetcast-rows-{index}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError) as error:  # not Linux, or refused by a sandbox's filter
        log.warning("rows_die_with_their_worker", worker=index, why=str(error))
        return None
    try:
        os.ftruncate(descriptor, _ledger_bytes(pool_bytes) + _round_up(pool_bytes))
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError as error:
        os.close(descriptor)
        log.warning("rows_die_with_their_worker", worker=index, why=str(error))
        return None
    return descriptor


def map_row_memory(descriptor: int, pool_bytes: int) -> RowMemory:
    """Map what `create_row_memory` has made for a pool of as many bytes. Raises OSError, ValueError."""
    ledger = _ledger_bytes(pool_bytes)
    return RowMemory(mmap.mmap(descriptor, ledger), mmap.mmap(descriptor, _round_up(pool_bytes), offset=ledger))


def forget_pages(memory: mmap.mmap, start: int, size: int) -> None:
    """Give the whole pages of a range back to the system: they read as zeros afterwards, and take no memory."""
    memory.madvise(mmap.MADV_REMOVE, start, size)


def _ledger_bytes(pool_bytes: int) -> int:
    return HEAD_BYTES + 2 * area_bytes(pool_bytes)


def _round_up(size: int) -> int:
    return -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
