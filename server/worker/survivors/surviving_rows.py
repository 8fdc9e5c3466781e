"""The rows of a worker that the next one takes back: the pool and its ledger in memory that the supervisor holds.

A row that an earlier worker has left is trusted in two steps. At the start its model gets its slot, so that it is
resident and memory is accounted for. Before its first use the row's checksum is compared and its model made of what the
ledger has kept of the archive; in idle time those follow that no request wanted. A row that is damaged is forgotten,
and its model loaded as any other. The worker's step thread owns all but `describe_row`.
"""

import mmap
import sys
import zlib
from collections.abc import Callable, Collection
from typing import NamedTuple

import msgspec
import numpy as np
import structlog
import torch

from handlers.base import Float32
from handlers.kinds import RowModel, Target
from handlers.kinds.kept_rows import KeptArchive, keep_archive, restore_model
from model_store.archives.archive import Archive
from model_store.cache.cache import Cache
from model_store.cache.slots import Slot
from model_store.errors import LoadError
from model_store.names import ModelName
from server.host import WorkerPlan
from server.ipc.row_memory import forget_pages, map_row_memory
from server.sdk import __version__
from server.worker.survivors.row_ledger import RowLedger, RowReady, make_fingerprint

log = structlog.get_logger()


class RowRecord(NamedTuple):
    """What the ledger keeps of a built model: the row's CRC-32, and its archive's small members, packed."""

    checksum: int
    own: bytes
    shared: bytes  #: empty where its family shares nothing


class SurvivingRows:
    """See the module. `pool`: the memory of the rows, for `server.worker.engine.memory_pool`."""

    def __init__(self, descriptor: int, plan: WorkerPlan, slab_bytes: int, target: Target) -> None:
        """Map the supervisor's memory for this worker. Raises OSError or ValueError where that is not possible."""
        memory = map_row_memory(descriptor, plan.budget_bytes)
        self.pool: mmap.mmap = memory.pool
        self._target = target
        program = (__version__, torch.__version__, np.__version__, sys.version, plan.budget_bytes, slab_bytes)
        self._ledger = RowLedger(memory.ledger, make_fingerprint(*program))
        self.unproven: dict[Slot, RowReady] = {}  #: residents whose rows have not been looked at yet

    def __repr__(self) -> str:
        """For example `<SurvivingRows <RowLedger 2500 rows, ...>, 12 unproven>`."""
        return f"<SurvivingRows {self._ledger!r}, {len(self.unproven)} unproven>"

    # --- rows of this worker ----------------------------------------------------------------------------------------

    def note_written(self, slot: Slot, record: RowRecord, validated_at: float) -> None:
        """The row's numbers are in its slot: from now on they outlive this process."""
        assert slot.family is not None, "only rows have a place in the pool"
        self._ledger.note_ready(
            RowReady(
                slot.offset, slot.charge, record.checksum, slot.model, slot.version, slot.family, validated_at,
                record.own, bool(record.shared),
            ),
            record.shared or None,
        )  # fmt: skip

    def note_moved(self, offset: int, target: int) -> None:
        """The row has been copied; its old place is free."""
        self._ledger.note_moved(offset, target)

    def note_gone(self, slot: Slot) -> None:
        """The slot's memory is free."""
        self.unproven.pop(slot, None)
        self._ledger.note_gone(slot.offset)

    # --- rows of an earlier worker ----------------------------------------------------------------------------------

    def adopt(self, cache: Cache, now: float, distrusted: Collection[str], *, trusts: bool) -> list[tuple[Slot, float]]:
        """Give slots to the models of an earlier worker, and say when each was validated.

        None of `distrusted`, which an earlier worker may have died of; none at all unless it `trusts` the memory.
        """
        found = self._ledger.recover()
        if not trusts:
            self._ledger.clear()
        if found is None or not trusts:
            forget_pages(self.pool, 0, len(self.pool))
            return []
        adopted = []
        for row in found:
            slot = None
            if row.model not in distrusted:
                slot = cache.adopt(ModelName(row.model), row.version, row.family, row.charge, row.offset, now)
            if slot is None:
                self._ledger.note_gone(row.offset)
                continue
            self.unproven[slot] = row
            adopted.append((slot, row.validated_at))
        if found:
            log.info("adopted_rows", models=len(adopted), of=len(found))
        return adopted

    def prove(self, slot: Slot) -> RowModel | None:
        """The model of an adopted row, whose checksum is right; None where the row is not what its ledger says."""
        row = self.unproven.pop(slot)
        numbers: Float32 = np.frombuffer(self.pool, np.float32, slot.charge // 4, slot.offset)
        if zlib.crc32(numbers.data) != row.checksum:
            log.error("row_damaged", model=slot.model, version=slot.version, then="it is loaded again")
            return None
        try:
            own = msgspec.msgpack.decode(row.kept, type=KeptArchive)
            shared = self._ledger.read_shared(row.family) if row.shared else None
            more = {} if shared is None else msgspec.msgpack.decode(shared, type=dict[str, bytes])
            kept = msgspec.structs.replace(own, shared=more)
            model = restore_model(slot.model, kept, numbers.copy(), self._target)
        except (LoadError, msgspec.MsgspecError) as error:
            log.warning("row_not_adopted", model=slot.model, error=str(error), then="it is loaded again")
            return None
        if model.family.key != slot.family or model.family.row_floats * 4 != slot.charge:
            log.warning("row_not_adopted", model=slot.model, error=f"it is of {model.family.key}, not of {slot.family}")
            return None
        return model


def describe_row(archive: Archive, model: RowModel, row: Float32) -> RowRecord | None:
    """What is to be kept beside a row that was just built; None where its kind keeps nothing. On a loader thread."""
    kept = keep_archive(archive, model.family)
    if kept is None:
        return None
    own = msgspec.msgpack.encode(msgspec.structs.replace(kept, shared={}))
    return RowRecord(zlib.crc32(row.data), own, msgspec.msgpack.encode(kept.shared) if kept.shared else b"")


def describe_no_row(archive: Archive, model: RowModel, row: Float32) -> None:
    """Keep nothing: no row outlives this worker."""
    del archive, model, row


DescribeRow = Callable[[Archive, RowModel, Float32], RowRecord | None]
