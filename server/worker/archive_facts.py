"""What an archive says of itself, for those who register it by TorchServe's API: its name, version and handler.

An archive that this host does not have is fetched for that, on threads apart from those of loads: the store may hang.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import msgspec

from handlers.kinds import find_kind
from model_store.archives.archive import Archive
from model_store.errors import LoadError, StoreUnavailable
from model_store.names import ModelName
from model_store.stores.model_store import ModelStore
from server.ipc.operations import ArchiveFacts

THREADS, MOST_WAITING = 2, 64


class ArchiveReader:
    """See the module. Used on the worker's event loop."""

    def __init__(self, store: ModelStore) -> None:
        self._store, self._waiting = store, 0
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="archive-facts")

    def __repr__(self) -> str:
        """For example `<ArchiveReader 2 wait>`."""
        return f"<ArchiveReader {self._waiting} wait>"

    async def read(self, model: ModelName) -> ArchiveFacts:
        """The archive's facts. Raises LoadError."""
        return _list_facts(await self._fetch(model))

    async def read_sample(self, model: ModelName) -> bytes:
        """The request of the archive's golden sample, as JSON; empty without one. Raises LoadError."""
        golden = (await self._fetch(model)).golden()
        return b"" if golden is None else msgspec.json.encode(golden.request)

    async def _fetch(self, model: ModelName) -> Archive:
        if self._waiting >= MOST_WAITING:
            raise StoreUnavailable(f"{model}: {MOST_WAITING} archives are being read already; try again")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._open, model)
        finally:
            self._waiting -= 1

    def _open(self, model: ModelName) -> Archive:
        return (self._store.at_hand(model)[0] or self._store.fetch(model)).archive


def _list_facts(archive: Archive) -> ArchiveFacts:
    """INVARIANT: it never fails for what the archive holds: whether that runs is for its load to say."""
    try:
        kind = str(find_kind(archive).kind)
    except LoadError:
        kind = ""
    if archive.mar is None:
        return ArchiveFacts(kind=kind)
    model, mar = archive.mar.model, archive.mar
    return ArchiveFacts(model.model_name, model.model_version, model.handler, mar.runtime, mar.created_on, kind)
