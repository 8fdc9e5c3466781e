"""What an archive says of itself, read from a real folder store; a store that hangs lets only so many wait."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any, cast

import pytest

from model_store.archives.archive import Limits
from model_store.errors import ModelNotFound, StoreUnavailable
from model_store.names import ModelName
from model_store.stores.model_store import ModelStore
from model_store.stores.object_store import open_source
from server.ipc.operations import ArchiveFacts
from server.worker import archive_facts
from server.worker.archive_facts import ArchiveReader
from tests.archives import make_graph, make_zip

MANIFEST = {
    "runtime": "python",
    "createdOn": "01/01/2025 00:00:00",
    "model": {"modelName": "probe", "modelVersion": "1.5", "handler": "handler.py"},
}


def test_facts_are_the_manifests(tmp_path: Path) -> None:
    """A TorchServe archive says all of it, one of ours its kind; a missing one is not found."""
    members = {"MAR-INF/MANIFEST.json": json.dumps(MANIFEST).encode(), "handler.py": b""}
    (tmp_path / "probe.mar").write_bytes(make_zip(members))
    (tmp_path / "graph.mar").write_bytes(make_graph(1))
    (tmp_path / "odd.mar").write_bytes(make_zip({"x": b""}))
    reader = ArchiveReader(ModelStore(open_source(str(tmp_path)), None, Limits()))

    async def check() -> None:
        probe = await reader.read(ModelName("probe.mar"))
        assert probe == ArchiveFacts("probe", "1.5", "handler.py", "python", "01/01/2025 00:00:00", "code")
        assert (await reader.read(ModelName("graph.mar"))).kind == "graph"
        assert await reader.read(ModelName("odd.mar")) == ArchiveFacts(), "whether it runs is for its load to say"
        with pytest.raises(ModelNotFound):
            await reader.read(ModelName("nosuch.mar"))

    asyncio.run(check())


def test_waiting_readers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many is refused at once; the others go on when the store does."""
    monkeypatch.setattr(archive_facts, "MOST_WAITING", 3)
    goes_on = threading.Event()

    class Hanging:
        def at_hand(self, model: ModelName) -> Any:
            goes_on.wait()
            raise ModelNotFound(f"{model} is not there")

    reader = ArchiveReader(cast("ModelStore", Hanging()))

    async def check() -> None:
        waiting = [asyncio.create_task(reader.read(ModelName(f"{i}.mar"))) for i in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(StoreUnavailable, match="3 archives are being read"):
            await reader.read(ModelName("more.mar"))
        goes_on.set()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(each) for each in ended] == [ModelNotFound] * 3

    asyncio.run(check())
