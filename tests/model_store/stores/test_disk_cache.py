"""The disk tier on a real folder: crashes, torn files, shared blobs, the byte budget, disks that refuse."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from model_store.names import ModelName, parse_model_name
from model_store.stores.disk_cache import GRACE_S, MAX_ENTRY_BYTES, DiskTier, UnsafeDiskCache
from tests.patience import PATIENCE_S

ROOT = Path(__file__).parents[3]
SOURCE = "s3://fleet/v1"
A, B, C = (parse_model_name(f"au/{letter}.mar") for letter in "abc")


def run_python(code: str, *arguments: object) -> "subprocess.Popen[str]":
    """A child that runs `code` in the repository, its output readable line by line."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def used_at(disk: DiskTier, name: ModelName, age_s: float) -> None:
    """Pretend that `name` was last used `age_s` ago."""
    then = time.time() - age_s
    os.utime(disk._entry_path(name), (then, then))


def list_files(folder: Path) -> list[str]:
    """Every file below `folder` but the locks."""
    return sorted(p.relative_to(folder).parts[0] for p in folder.rglob("*") if p.is_file() and p.parent.name != "locks")


def test_what_is_published_is_there_after_a_restart(tmp_path: Path) -> None:
    """A new DiskTier on the same folder, as after a restart, finds version, time and bytes; another source does not."""
    DiskTier(tmp_path, SOURCE).publish(A, b"archive", "etag", 100.0)
    restarted = DiskTier(tmp_path, SOURCE)
    cached = restarted.lookup(A)
    assert cached is not None
    assert (cached.version, cached.bytes, cached.validated_at) == ("etag", 7, 100.0)
    assert restarted.read(cached) == b"archive"
    assert restarted.lookup(B) is None
    assert DiskTier(tmp_path, "s3://other").lookup(A) is None


def test_validation_and_a_newer_version_replace_the_entry(tmp_path: Path) -> None:
    """`validated` moves the time only; `publish` moves the name to the new bytes; `forget` drops it."""
    disk = DiskTier(tmp_path, SOURCE)
    disk.publish(A, b"old", "1", 100.0)
    disk.validated(A, 200.0)
    old = disk.lookup(A)
    assert old is not None
    assert (old.version, old.validated_at) == ("1", 200.0)
    disk.publish(A, b"new", "2", 300.0)
    new = disk.lookup(A)
    assert new is not None
    assert disk.read(new) == b"new"
    disk.forget(A)
    assert disk.lookup(A) is None
    disk.validated(A, 400.0)
    disk.touch(A)
    assert disk.lookup(A) is None


def test_a_crash_between_blob_and_index_leaves_nothing_visible(tmp_path: Path) -> None:
    """Killed after the blob, before its entry: the name is unknown, the next publish works, the lock is free."""
    code = """if True:
        import sys, signal, pathlib
        from model_store.stores.disk_cache import DiskTier
        disk = DiskTier(pathlib.Path(sys.argv[1]), sys.argv[2])
        write = DiskTier._write
        def stop_before_index(self, path, data):
            if path.parent.name == "index":
                print("blob written", flush=True)
                signal.pause()
            write(self, path, data)
        DiskTier._write = stop_before_index
        with disk.lock("au/a.mar"):
            disk.publish("au/a.mar", b"x" * 1000, "1", 100.0)
    """
    with run_python(code, tmp_path, SOURCE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "blob written\n"
        child.send_signal(signal.SIGKILL)
    disk = DiskTier(tmp_path, SOURCE)
    assert list_files(tmp_path) == ["blobs"]
    assert disk.lookup(A) is None
    with disk.lock(A):
        cached = disk.publish(A, b"x" * 1000, "1", 100.0)
    assert cached is not None
    assert disk.read(cached) == b"x" * 1000
    assert disk.used_bytes() == 1000


@pytest.mark.parametrize("damage", [b"", b"x" * 999, b"x" * 999 + b"\0"])
def test_a_torn_blob_is_noticed_and_forgotten(tmp_path: Path, damage: bytes) -> None:
    """A blob that a power failure left empty, short or with zeros is not served, and the next publish repairs it."""
    disk = DiskTier(tmp_path, SOURCE)
    cached = disk.publish(A, b"x" * 1000, "1", 100.0)
    assert cached is not None
    cached.path.write_bytes(damage)
    assert disk.read(cached) is None
    assert disk.lookup(A) is None
    again = disk.publish(A, b"x" * 1000, "1", 100.0)
    assert again is not None
    assert disk.read(again) == b"x" * 1000


def test_a_torn_entry_is_no_entry(tmp_path: Path) -> None:
    """An index file cut short reads as unknown, and eviction removes it."""
    disk = DiskTier(tmp_path, SOURCE)
    disk.publish(A, b"x", "1", 100.0)
    entry = disk._entry_path(A)
    entry.write_bytes(entry.read_bytes()[:20])
    assert disk.lookup(A) is None
    disk.evict(1_000)
    assert not entry.exists()


def test_a_lost_blob_spares_a_newer_entry(tmp_path: Path) -> None:
    """A reader that holds an old lookup while another process publishes must not forget the newer archive."""
    disk = DiskTier(tmp_path, SOURCE)
    old = disk.publish(A, b"old", "1", 100.0)
    assert old is not None
    disk.publish(A, b"new", "2", 200.0)
    old.path.unlink()
    assert disk.read(old) is None
    current = disk.lookup(A)
    assert current is not None
    assert disk.read(current) == b"new"


def test_eviction_is_by_last_use_down_to_the_budget(tmp_path: Path) -> None:
    """The least recently used names are evicted first, no more than needed, and each is reported."""
    disk = DiskTier(tmp_path, SOURCE)
    for name, fill, age_s in ((A, b"a", 30.0), (B, b"b", 20.0), (C, b"c", 10.0)):
        disk.publish(name, fill * 1000, "1", 100.0)
        used_at(disk, name, age_s)
    assert disk.used_bytes() == 3000
    assert disk.evict(3000) == []
    disk.touch(A)
    assert disk.evict(2999) == [B]
    assert disk.used_bytes() == 2000
    assert disk.evict(1000) == [C]
    assert disk.lookup(A) is not None
    assert disk.used_bytes() == 1000


def test_names_that_share_a_blob_go_together(tmp_path: Path) -> None:
    """A shared blob counts once and is as recent as its most recent name; evicting it reports all its names."""
    disk = DiskTier(tmp_path, SOURCE)
    disk.publish(A, b"same" * 250, "1", 100.0)
    disk.publish(B, b"same" * 250, "1", 100.0)
    disk.publish(C, b"c" * 1000, "1", 100.0)
    for name, age_s in ((A, 30.0), (B, 10.0), (C, 20.0)):
        used_at(disk, name, age_s)
    assert disk.used_bytes() == 2000
    assert disk.evict(1999) == [C]
    shared = disk.lookup(A)
    assert shared is not None
    assert disk.read(shared) == b"same" * 250
    disk.forget(A)
    assert disk.used_bytes() == 1000
    disk.publish(A, b"same" * 250, "1", 100.0)
    assert sorted(disk.evict(0)) == sorted([A, B])
    assert list_files(tmp_path) == []


def test_leftovers_go_after_their_grace(tmp_path: Path) -> None:
    """Temporary files and blobs without entry stay while a download may still own them, then go."""
    disk = DiskTier(tmp_path, SOURCE)
    disk.publish(A, b"old", "1", 100.0)
    disk.publish(A, b"new", "2", 100.0)
    (tmp_path / "temp" / "dead").write_bytes(b"half")
    disk.evict(1_000)
    assert list_files(tmp_path) == ["blobs", "blobs", "index", "temp"]
    then = time.time() - GRACE_S - 1
    for path in [*(tmp_path / "temp").iterdir(), *(tmp_path / "blobs").iterdir()]:
        os.utime(path, (then, then))
    assert disk.evict(1_000) == []
    assert list_files(tmp_path) == ["blobs", "index"]
    assert disk.used_bytes() == 3


def test_an_entry_without_blob_goes(tmp_path: Path) -> None:
    """What was evicted between a publish's two renames leaves an entry without a blob, which the next sweep removes."""
    disk = DiskTier(tmp_path, SOURCE)
    cached = disk.publish(A, b"x", "1", 100.0)
    assert cached is not None
    cached.path.unlink()
    assert disk.evict(1_000) == []
    assert list_files(tmp_path) == []


def test_the_lock_excludes_threads_and_dies_with_its_process(tmp_path: Path) -> None:
    """Another process's lock blocks this one until that process is killed."""
    code = """if True:
        import sys, signal, pathlib
        from model_store.stores.disk_cache import DiskTier
        with DiskTier(pathlib.Path(sys.argv[1]), sys.argv[2]).lock("au/a.mar"):
            print("locked", flush=True)
            signal.pause()
    """
    disk, entered = DiskTier(tmp_path, SOURCE), threading.Event()

    def enter() -> None:
        with disk.lock(A):
            entered.set()

    with run_python(code, tmp_path, SOURCE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "locked\n"
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.2)
        child.send_signal(signal.SIGKILL)
        assert entered.wait(PATIENCE_S)
        thread.join()


def test_made_up_names_do_not_fill_the_disk_with_locks(tmp_path: Path) -> None:
    """All names lock parts of two files."""
    disk = DiskTier(tmp_path, SOURCE)
    for i in range(300):
        with disk.lock(parse_model_name(f"no/such/{i}.mar")):
            pass
        disk.hold_versions(parse_model_name(f"no/such/{i}.mar"), set())
    assert {path.name: path.stat().st_size for path in (tmp_path / "locks").iterdir()} == {"downloads": 0, "kept": 0}


def test_a_folder_that_cannot_be_written_is_logged_not_raised(tmp_path: Path) -> None:
    """A file where the folder should be: nothing is kept, nothing raises, each refusal is logged."""
    (tmp_path / "cache").write_text("in the way")
    disk = DiskTier(tmp_path / "cache", SOURCE)
    with capture_logs() as logs, disk.lock(A):
        assert disk.lookup(A) is None
        assert disk.publish(A, b"x", "1", 100.0) is None
        disk.validated(A, 200.0)
        disk.touch(A)
        disk.forget(A)
    assert [entry["event"] for entry in logs][:2] == ["disk_lock_failed", "disk_publish_failed"]
    assert disk.used_bytes() == 0
    assert disk.evict(0) == []


def test_a_full_disk_is_logged_not_raised(tmp_path: Path) -> None:
    """A write that the kernel refuses half-way leaves the older version served and no half file behind."""
    disk = DiskTier(tmp_path, SOURCE)
    disk.publish(A, b"old", "1", 100.0)
    code = """if True:
        import sys, resource, pathlib
        from model_store.stores.disk_cache import DiskTier
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # writes beyond fail as on a full disk
        disk = DiskTier(pathlib.Path(sys.argv[1]), sys.argv[2])
        print(disk.publish("au/a.mar", b"x" * 100_000, "2", 100.0))
    """
    with run_python(code, tmp_path, SOURCE) as child:
        output, _ = child.communicate(timeout=PATIENCE_S)
    assert child.returncode == 0
    assert "disk_publish_failed" in output
    assert output.endswith("None\n")
    cached = disk.lookup(A)
    assert cached is not None
    assert disk.read(cached) == b"old"
    assert list_files(tmp_path) == ["blobs", "index"]


FULL = """if True:
    import os, pathlib, sys
    from model_store.stores.disk_cache import DiskTier
    disk = DiskTier(pathlib.Path(sys.argv[1]), sys.argv[2])
    names = [f"au/{i}.mar" for i in range(12)]
    for age, name in enumerate(reversed(names)):
        assert disk.publish(name, os.urandom(100_000), "1", 100.0)  # as soon as the disk is full the oldest make room
        os.utime(disk._entry_path(name), (1_000 + age, 1_000 + age))
    held = [name for name in names if disk.lookup(name) and disk.read(disk.lookup(name))]
    too_large = disk.publish("au/large.mar", os.urandom(2_000_000), "1", 100.0)
    disk.validated(names[0], 200.0)
    assert (too_large, disk.lookup(names[0]).validated_at) == (None, 200.0)
    assert held == names[: len(held)] == [name for name in names if disk.lookup(name)]
    print(len(held))
"""


@pytest.mark.slow
def test_on_a_full_disk_the_least_recently_used_make_room(tmp_path: Path) -> None:
    """A file system of 1 MiB that nobody sweeps: each new archive is kept, the oldest ones go. What is larger than all
    of them evicts none.
    """
    mount = 'mount -t tmpfs -o size=1m none "$1" && shift && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(tmp_path)]
    if subprocess.run([*command, "true"], capture_output=True, check=False, timeout=PATIENCE_S).returncode:
        pytest.skip("file systems cannot be mounted here")
    run = [*command, sys.executable, "-c", FULL, str(tmp_path), SOURCE]
    child = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert child.returncode == 0, child.stderr
    assert 6 <= int(child.stdout.splitlines()[-1]) <= 10, "about a megabyte of them"
    assert "disk_full" in child.stdout + child.stderr


def test_a_disk_that_is_full_of_other_things_is_not_emptied_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses whatever is evicted: an archive larger than all others is dropped, and these stay."""
    disk = DiskTier(tmp_path, SOURCE)
    disk.publish(A, b"old", "1", 100.0)

    def refuse(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, f"no space for {path} of {len(data)} bytes")

    monkeypatch.setattr(disk, "_write", refuse)
    with capture_logs() as logs:
        assert disk.publish(B, b"larger", "1", 100.0) is None
        assert disk.lookup(A) is not None
        assert disk.publish(B, b"b", "1", 100.0) is None
    assert [entry["event"] for entry in logs] == ["disk_publish_failed", "disk_full", "disk_publish_failed"]


def test_reprs_are_honest(tmp_path: Path) -> None:
    """The tier's repr names folder and source."""
    assert repr(DiskTier(tmp_path, SOURCE)) == f"DiskTier({tmp_path}, {SOURCE})"


# --- forged folders and files ---------------------------------------------------------------------------------------


def forge(disk: DiskTier, path: Path, owner: ModelName, /, **fields: object) -> Path:
    """An index file at `path` that says what an attacker wants."""
    disk.publish(owner, b"x", "1", 100.0)
    entry = json.loads(disk._entry_path(owner).read_bytes())
    disk.forget(owner)
    path.write_text(json.dumps({**entry, **fields}))
    return path


@pytest.mark.parametrize("forged", ["/etc/victim", "../../victim", "", "0" * 63, "0" * 64 + "/../../victim", "G" * 64])
def test_an_entry_never_names_a_file_outside(tmp_path: Path, forged: str) -> None:
    """A blob's name is a sha256: a sweep over an entry that names another file removes the entry and nothing else."""
    disk, victim = DiskTier(tmp_path / "cache", SOURCE), tmp_path / "victim"
    victim.write_text("mine")
    entry = forge(disk, disk._entry_path(A), A, sha256=forged.replace("/etc/victim", str(victim)))
    assert disk.lookup(A) is None
    disk.evict(0)
    assert (victim.exists(), entry.exists()) == (True, False)


@pytest.mark.parametrize(
    "fields", [{"name": B}, {"source": "s3://other"}, {"name": "../a.mar"}, {"bytes": -1}, {"bytes": "many"}]
)
def test_an_entry_speaks_for_its_own_name_alone(tmp_path: Path, fields: dict[str, object]) -> None:
    """An entry whose fields do not belong to its file's name, or are out of range, is no entry, and is removed."""
    disk = DiskTier(tmp_path, SOURCE)
    entry = forge(disk, disk._entry_path(A), A, **fields)
    assert disk.lookup(A) is None
    disk.evict(1000)
    assert not entry.exists()


def test_odd_files_are_not_opened(tmp_path: Path) -> None:
    """A link, a pipe and an endless entry in the index, a blob longer than its entry says: unknown at once."""
    disk = DiskTier(tmp_path, SOURCE)
    kept = disk.publish(A, b"archive", "1", 100.0)
    assert kept is not None
    target = tmp_path / "target"
    disk._entry_path(A).rename(target)
    disk._entry_path(A).symlink_to(target)
    os.mkfifo(disk._entry_path(B))
    disk._entry_path(C).write_bytes(b" " * (MAX_ENTRY_BYTES + 1))
    assert [disk.lookup(name) for name in (A, B, C)] == [None, None, None]
    kept = disk.publish(A, b"archive", "1", 100.0)
    assert kept is not None
    kept.path.write_bytes(b"archive and more")
    assert disk.read(kept) is None


def test_folders_are_made_for_this_user_alone(tmp_path: Path) -> None:
    """Whatever the umask: what `prepare` makes, nobody else may write to, and it accepts it again after a restart."""
    before = os.umask(0)
    try:
        DiskTier(tmp_path / "cache", SOURCE).prepare()
    finally:
        os.umask(before)
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (tmp_path / "cache").iterdir()} == {0o700}
    DiskTier(tmp_path / "cache", SOURCE).prepare()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    """The message names the folder, its mode and what to do."""
    disk = DiskTier(tmp_path, SOURCE)
    disk.prepare()
    (tmp_path / "index").chmod(mode)
    with pytest.raises(UnsafeDiskCache, match=rf"index can be written by other users \(mode {mode:o}\).*remove it"):
        disk.prepare()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to somebody else")
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """Its owner could write to it; a link leads to anybody's."""
    disk = DiskTier(tmp_path, SOURCE)
    disk.prepare()
    os.chown(tmp_path / "blobs", 12345, -1)
    with pytest.raises(UnsafeDiskCache, match="belongs to user 12345"):
        disk.prepare()
    (tmp_path / "blobs").rename(tmp_path / "elsewhere")
    (tmp_path / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeDiskCache, match="not a folder"):
        disk.prepare()
