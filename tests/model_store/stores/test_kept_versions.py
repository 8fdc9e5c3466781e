"""The versions that the disk tier keeps: how many, which are held, and what evictions and odd files do to them."""

import os
import threading
import time
from pathlib import Path

import pytest

from model_store.names import ModelName
from model_store.stores.disk_cache import GRACE_S, DiskTier
from model_store.stores.kept_versions import MOST_KEPT
from tests.patience import PATIENCE_S

A, B = ModelName("au/a.mar"), ModelName("au/b.mar")


@pytest.fixture
def disk(tmp_path: Path) -> DiskTier:
    """An empty tier."""
    return DiskTier(tmp_path, "s3://models")


def serve(disk: DiskTier, name: ModelName, *versions: str, at: float = 1000.0) -> None:
    """Each version is published and serves, one after another."""
    for i, version in enumerate(versions):
        disk.publish(name, version.encode(), version, at + i)
        disk.keep_version(name, version, at + i, newest=True)


def list_versions(disk: DiskTier, name: ModelName) -> list[str]:
    """The kept ones."""
    return [kept.version for kept in disk.list_versions(name)]


def read(disk: DiskTier, name: ModelName, version: str) -> bytes | None:
    """The bytes of a version, whether it is the newest or a kept one."""
    cached = disk.lookup_version(name, version)
    return None if cached is None else disk.read(cached)


def test_the_last_versions_that_served_are_kept(disk: DiskTier) -> None:
    """The newest first, a bounded number of each name, with their bytes; another name's are its own."""
    serve(disk, A, "v1", "v2", "v3", "v4")
    serve(disk, B, "w1")
    assert list_versions(disk, A) == ["v4", "v3", "v2"]
    assert MOST_KEPT == 3
    assert [read(disk, A, version) for version in ("v4", "v2", "v1")] == [b"v4", b"v2", None]
    assert list_versions(disk, B) == ["w1"]
    assert list_versions(DiskTier(disk._folder, "s3://other"), A) == []


def test_what_is_published_and_does_not_serve_is_not_kept(disk: DiskTier) -> None:
    """A version that fails its golden sample is forgotten; that of another process's later download is not mistaken."""
    serve(disk, A, "v1")
    disk.publish(A, b"bad", "bad", 2000.0)
    disk.forget(A)
    disk.keep_version(A, "v0", 2001.0, newest=True)
    assert list_versions(disk, A) == ["v1"]
    assert read(disk, A, "v1") == b"v1"


def test_a_version_that_comes_back_is_the_newest_and_one_asked_for_by_name_is_not(disk: DiskTier) -> None:
    """The order says what served before what: an archive that is restored in the store is new, a rollback is not."""
    serve(disk, A, "v1", "v2")
    disk.keep_version(A, "v1", 3000.0, newest=False)
    assert list_versions(disk, A) == ["v2", "v1"]
    serve(disk, A, "v1")
    assert list_versions(disk, A) == ["v1", "v2"]


def test_a_version_asked_for_by_name_can_be_held_however_many_have_served(disk: DiskTier) -> None:
    """A canary of a new version: it displaces none that served as the newest, and later ones do not displace those."""
    serve(disk, A, "v1", "v2", "v3")
    for at, version in enumerate(("c1", "c2", "c3", "c4")):
        disk.publish(A, version.encode(), version, 2000.0 + at)
        disk.keep_version(A, version, 2000.0 + at, newest=False)
        assert disk.hold_versions(A, {version}) == {version}
    assert disk.hold_versions(A, set()) == set()
    assert [kept.version for kept in disk.list_versions(A) if not kept.asked] == ["v3", "v2", "v1"]
    assert [kept.version for kept in disk.list_versions(A) if kept.asked] == ["c4", "c3", "c2"]
    disk.keep_version(A, "c4", 3000.0, newest=True)
    assert [kept.version for kept in disk.list_versions(A) if not kept.asked] == ["c4", "v3", "v2"]


def test_what_served_until_now_is_evicted_after_what_nobody_asks_for(disk: DiskTier) -> None:
    """A version's last use is the moment in which another took its place, however long ago it began to serve."""
    serve(disk, A, "v1", at=1000.0)
    serve(disk, B, "w1", at=2000.0)
    (entry,) = (path for path in (disk._folder / "index").iterdir() if b"w1" in path.read_bytes())
    os.utime(entry, (2000.0, 2000.0))
    serve(disk, A, "v2", at=3000.0)
    assert disk.evict(budget_bytes=4) == [B]
    assert list_versions(disk, A) == ["v2", "v1"]


def test_nobody_waits_for_a_download(disk: DiskTier) -> None:
    """The lock of a name, which a request to a store that hangs holds, is in the way of no rollback and no eviction."""
    serve(disk, A, "v1", "v2")
    disk.publish(A, b"v3", "v3", 2000.0)
    held: list[set[str]] = []

    def keep_versions() -> None:
        disk.keep_version(A, "v3", 2000.0, newest=True)
        held.append(disk.hold_versions(A, {"v1"}))
        disk.evict(budget_bytes=1000)

    working = threading.Thread(target=keep_versions)
    with disk.lock(A):
        working.start()
        working.join(timeout=PATIENCE_S / 10)
        waits = working.is_alive()
    working.join()
    assert (waits, held) == (False, [{"v1"}])
    assert list_versions(disk, A) == ["v3", "v2", "v1"]


def test_held_versions_are_never_forgotten(disk: DiskTier) -> None:
    """However many follow; let go, it is the next to be forgotten."""
    serve(disk, A, "v1")
    disk.hold_versions(A, {"v1"})
    serve(disk, A, "v2", "v3", "v4", "v5")
    assert list_versions(disk, A) == ["v5", "v4", "v3", "v1"]
    disk.hold_versions(A, set())
    assert list_versions(disk, A) == ["v5", "v4", "v3"]


def test_evictions_take_old_versions_first_and_held_ones_never(disk: DiskTier) -> None:
    """Old blobs of kept versions are no leftovers; over budget the version that served longest ago goes, then its name
    is served without it.
    """
    serve(disk, A, "v1", "v2", "v3")
    disk.hold_versions(A, {"v1"})
    old = time.time() - 2 * GRACE_S
    for blob in (disk._folder / "blobs").iterdir():
        os.utime(blob, (old, old))
    assert disk.evict(budget_bytes=1000) == []
    assert list_versions(disk, A) == ["v3", "v2", "v1"]
    assert disk.evict(budget_bytes=4) == []
    assert list_versions(disk, A) == ["v3", "v1"]
    assert disk.evict(budget_bytes=0) == [A]
    assert list_versions(disk, A) == ["v1"]
    assert read(disk, A, "v1") == b"v1"
    disk.hold_versions(A, set())
    assert disk.evict(budget_bytes=0) == []
    assert (list_versions(disk, A), read(disk, A, "v1")) == ([], None)


def test_files_whose_versions_are_gone_go_too(disk: DiskTier) -> None:
    """Else a file would stay for each archive that has ever served. A new one may wait for its blob."""
    serve(disk, A, "v1")
    serve(disk, B, "w1")
    kept = disk._folder / "kept"
    for file in kept.iterdir():
        os.utime(file, (1.0, 1.0))
    assert disk.evict(budget_bytes=2) == [A]
    serve(disk, A, "v2")
    disk.evict(budget_bytes=0)
    assert len(list(kept.iterdir())) == 2
    for file in kept.iterdir():
        os.utime(file, (1.0, 1.0))
    disk.evict(budget_bytes=0)
    assert list(kept.iterdir()) == []


@pytest.mark.slow
def test_a_file_that_changes_meanwhile_is_not_removed(disk: DiskTier) -> None:
    """An eviction that finds the versions of a file gone, while another process notes a new one under the lock."""
    serve(disk, A, "v1")
    (path,) = (disk._folder / "kept").iterdir()
    for file in (path, *(disk._folder / "blobs").iterdir()):
        os.utime(file, (1.0, 1.0))
    (disk._folder / "blobs" / disk.list_versions(A)[0].sha256).unlink()
    evicting = threading.Thread(target=disk.evict, args=(1000,))
    with disk._locks.hold("kept", path.name):
        evicting.start()
        evicting.join(timeout=0.5)  # long enough to remove it, were there no lock
        os.utime(path)
    evicting.join()
    assert path.is_file()


@pytest.mark.parametrize("content", [b"", b"{", b'{"source":"s3://models","name":"au/b.mar","versions":[]}', b"\xff"])
def test_odd_files_are_no_versions(disk: DiskTier, content: bytes) -> None:
    """A file that is torn, or of another name, keeps nothing and ends no eviction; the next version replaces it."""
    serve(disk, A, "v1")
    (path,) = (disk._folder / "kept").iterdir()
    path.write_bytes(content)
    assert list_versions(disk, A) == []
    disk.evict(budget_bytes=1000)
    serve(disk, A, "v2")
    assert list_versions(disk, A) == ["v2"]


def test_a_torn_blob_is_no_version(disk: DiskTier) -> None:
    """Its bytes are checked against their hash before anybody gets them."""
    serve(disk, A, "v1", "v2")
    cached = disk.lookup_version(A, "v1")
    assert cached is not None
    cached.path.write_bytes(b"xx")
    assert disk.read(cached) is None
    assert list_versions(disk, A) == ["v2"]
    assert read(disk, A, "v2") == b"v2"
