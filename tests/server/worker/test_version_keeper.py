"""What a worker serves is kept on disk, and loaded by its version without the store."""

from pathlib import Path
from typing import Any, cast

import pytest

from handlers.kinds import Target
from handlers.work import SessionLimits, WorkLimits
from model_store.archives.archive import Limits
from model_store.names import ModelName, at_version
from model_store.stores.disk_cache import DiskTier
from model_store.stores.model_store import ModelStore
from model_store.stores.object_store import open_source
from server.worker import version_keeper
from server.worker.model_loader import AskStore, BuildFetched, LoadedModel, ModelLoader
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


class Noting:
    """A store that lists what it was told to keep; it fails for one version."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, str, bool]] = []

    def keep_version(self, name: ModelName, version: str, *, newest: bool) -> None:
        """Write it down."""
        if version == "bad":
            raise OSError("the disk refuses")
        self.kept.append((name, version, newest))


def make_loaded(model: ModelName, version: str, tier: str = "store") -> LoadedModel:
    """A model of which only its name, version and tier are read."""
    return LoadedModel(model, version, tier, 0.0, cast("Any", None), None, None)


def test_notes_wait_for_a_lull_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """While models are loaded none is written, so that a burst has the processor; then all are, in order, and a failure
    costs one. From HURRY_FROM notes on they are written at once, and beyond MOST_WAITING none is taken.
    """
    monkeypatch.setattr(version_keeper, "FEW", 0)
    monkeypatch.setattr(version_keeper, "LULL_S", 1000.0)
    monkeypatch.setattr(version_keeper, "LONGEST_S", 1000.0)
    monkeypatch.setattr(version_keeper, "MOST_WAITING", 5)
    monkeypatch.setattr(version_keeper, "HURRY_FROM", 10)
    store = Noting()
    keeper = VersionKeeper(cast("ModelStore", store))
    for version in ("v0", "bad", "v2", "v3"):
        keeper.note(make_loaded(NAME, version))
    keeper.note(make_loaded(NAME, "v3", tier="host"))
    assert repr(keeper) == "<VersionKeeper 4 waiting>"
    assert store.kept == []
    monkeypatch.setattr(version_keeper, "HURRY_FROM", 5)
    keeper.note(make_loaded(at_version(NAME, "v4"), "v4"))
    keeper.note(make_loaded(NAME, "too many"))  # unless the thread has begun to write already
    wanted = [(NAME, "v0", True), (NAME, "v2", True), (NAME, "v3", True), (NAME, "v4", False)]
    wait_until(lambda: store.kept[:4] == wanted, "all are kept")
    monkeypatch.setattr(version_keeper, "LULL_S", 0.0)
    keeper.note(make_loaded(NAME, "v5"))
    keeper._thread.shutdown()
    assert store.kept[-1] == (NAME, "v5", True)


def test_a_few_notes_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version before is on disk when the next one is deployed, and a rollback to it follows at once."""
    monkeypatch.setattr(version_keeper, "LULL_S", 1000.0)
    monkeypatch.setattr(version_keeper, "LONGEST_S", 1000.0)
    store = Noting()
    keeper = VersionKeeper(cast("ModelStore", store))
    for version in ("v0", "v1"):
        keeper.note(make_loaded(NAME, version))
    wait_until(lambda: [kept for _, kept, _ in store.kept] == ["v0", "v1"], "both are kept")


def test_what_is_noted_while_others_are_written_is_written_too() -> None:
    """Notes come one after another from a thread that writes and pauses: none is left behind."""
    store = Noting()
    keeper = VersionKeeper(cast("ModelStore", store))
    for i in range(500):
        keeper.note(make_loaded(NAME, f"v{i}"))
        if i % 100 == 0:
            keeper._hurry.set()
            wait_until(lambda: len(keeper._waiting) == 0, "all are written")
    keeper._hurry.set()
    keeper._thread.shutdown()
    assert [version for _, version, _ in store.kept] == [f"v{i}" for i in range(500)]
