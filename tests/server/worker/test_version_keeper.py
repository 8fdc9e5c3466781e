"""What a worker serves is kept on disk, and loaded by its version without the store."""

from pathlib import Path

import pytest

from handlers.kinds import Target
from handlers.work import SessionLimits, WorkLimits
from model_store.archives.archive import Limits
from model_store.names import ModelName, at_version
from model_store.stores.disk_cache import DiskTier
from model_store.stores.model_store import ModelStore
from model_store.stores.object_store import open_source
from server.worker.model_loader import AskStore, BuildFetched, ModelLoader
from server.worker.version_keeper import VersionKeeper
from tests.e2e.models import pack_forecaster
from tests.patience import wait_until
from tests.server.worker.loads import run_load

NAME = ModelName("nsw1.mar")


def test_a_version_that_served_is_loaded_without_the_store(tmp_path: Path) -> None:
    """Two versions are loaded and noted, in order; the first comes from disk then, by steps of the disk lane alone. One
    that is not on disk is asked of the store; a model from host memory, or a version by name, changes no order.
    """
    (tmp_path / "store").mkdir()
    source = open_source(str(tmp_path / "store"))
    disk = DiskTier(tmp_path / "cache", source.url)
    store = ModelStore(source, disk, Limits())
    loader = ModelLoader(store, Target("cpu", 1, WorkLimits(100.0, 10**9), SessionLimits(1 << 30, 60.0, loops=False)))
    keeper = VersionKeeper(store)
    versions: list[str] = []
    for seed in (1, 2):
        data = pack_forecaster(NAME, seed).data
        source.put(NAME, data)
        built = run_load(loader.load(NAME, revalidate=True))
        keeper.note(built)
        versions.insert(0, built.version)
        wait_until(lambda: [kept.version for kept in disk.list_versions(NAME)] == versions, "the version is kept")
    newest, first = versions
    with pytest.raises(StopIteration) as ended:
        next(loader.load(at_version(NAME, first)))
    assert (ended.value.value.version, ended.value.value.tier) == (first, "disk")
    keeper.note(ended.value.value)
    store.forget(NAME)
    for blob in (tmp_path / "cache" / "blobs").iterdir():
        blob.unlink()
    steps = loader.load(at_version(NAME, newest))
    assert next(steps) == AskStore(has_copy=False)
    assert next(steps) == BuildFetched(stale=False, size=len(data))
    keeper._thread.shutdown()
    assert [kept.version for kept in disk._kept.read(NAME)] == versions
