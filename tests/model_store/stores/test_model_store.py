"""Fetching through disk and store: requests are counted at a real S3 server, processes and crashes are real."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from model_store.archives.archive import Limits
from model_store.errors import ArchiveInvalid, ModelNotFound, StoreDenied, StoreUnavailable
from model_store.names import parse_model_name
from model_store.stores.disk_cache import DiskTier
from model_store.stores.model_store import ModelStore
from model_store.stores.object_store import open_source
from model_store.stores.store_health import PROBE
from tests.archives import make_forecaster, make_zip
from tests.patience import PATIENCE_S
from tests.s3 import Fault, S3Server

ROOT = Path(__file__).parents[3]
NAME = parse_model_name("au/NSW1.mar")

FETCH = """if True:
    import json, pathlib, sys
    from model_store.archives.archive import Limits
    from model_store.stores.disk_cache import DiskTier
    from model_store.stores.object_store import open_source
    from model_store.stores.model_store import ModelStore
    url, folder = sys.argv[1:]
    store = ModelStore(open_source(url), DiskTier(pathlib.Path(folder), url), Limits())
    print("ready", flush=True)
    sys.stdin.readline()
    found = store.fetch("au/NSW1.mar")
    print(json.dumps([found.tier, found.version]), flush=True)
"""


class Clock:
    """Wall clock of a test, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        """Seconds since the epoch."""
        return self.now


def make_archive(content: bytes = b"first") -> bytes:
    """A sound archive of kind onnx; only a session would look at its graph."""
    return make_zip({"model.onnx": content})


def run_fetcher(bucket: str, folder: Path) -> "subprocess.Popen[str]":
    """A worker's process in small: it fetches NAME once it is told to."""
    child = subprocess.Popen(
        [sys.executable, "-c", FETCH, f"s3://{bucket}", str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def start(child: "subprocess.Popen[str]") -> None:
    """Let the child fetch."""
    assert child.stdin is not None
    child.stdin.write("go\n")
    child.stdin.flush()


@pytest.fixture
def clock() -> Clock:
    """Time stands until the test moves it."""
    return Clock()


@pytest.fixture
def store(bucket: str, tmp_path: Path, clock: Clock) -> ModelStore:
    """The bucket's archives through a disk tier in `tmp_path`, revalidated after 60 s; quick to give up."""
    source = open_source(f"s3://{bucket}", timeout_s=2.0, retries=1)
    return ModelStore(source, DiskTier(tmp_path, source.url), Limits(), 60.0, clock)


def test_a_cold_fetch_is_one_get_and_then_none(s3: S3Server, bucket: str, store: ModelStore) -> None:
    """The first fetch costs one GET, the second, within the revalidation interval, nothing."""
    version = s3.put(bucket, NAME, make_archive())
    cold, warm = store.fetch(NAME), store.fetch(NAME)
    assert (cold.tier, cold.version, cold.stale) == ("store", version, False)
    assert cold.store_s > 0.0
    assert (warm.tier, warm.version, warm.store_s) == ("disk", version, 0.0)
    assert warm.archive.read("model.onnx") == b"first"
    assert s3.seen("GET", bucket) == [206]


def test_without_a_disk_tier_every_fetch_is_one_get(s3: S3Server, bucket: str) -> None:
    """The disk tier is optional."""
    s3.put(bucket, NAME, make_archive())
    store = ModelStore(open_source(f"s3://{bucket}"), None, Limits())
    assert [store.fetch(NAME).tier, store.fetch(NAME, revalidate=True).tier] == ["store", "store"]
    store.forget(NAME)
    assert [listed.name for listed in store.list()] == [NAME]
    assert s3.seen("GET", NAME)[-2:] == [206, 206]


def test_a_due_copy_is_revalidated_once(s3: S3Server, bucket: str, store: ModelStore, clock: Clock) -> None:
    """After the interval one conditional GET (304) makes the copy fresh again; `revalidate` asks at any time."""
    s3.put(bucket, NAME, make_archive())
    store.fetch(NAME)
    clock.now += 61.0
    due, fresh = store.fetch(NAME), store.fetch(NAME)
    assert (due.tier, due.stale) == ("disk", False)
    assert due.store_s > 0.0
    assert fresh.store_s == 0.0
    forced = store.fetch(NAME, revalidate=True)
    assert forced.tier == "disk"
    assert s3.seen("GET", bucket) == [206, 304, 304]


def test_a_copy_says_when_it_was_last_validated(s3: S3Server, bucket: str, store: ModelStore, clock: Clock) -> None:
    """The moment the store was asked: at the download, and again at a 304; a fresh copy from disk keeps it."""
    s3.put(bucket, NAME, make_archive())
    found = [store.fetch(NAME).validated_at]
    for seconds in (30.0, 31.0, 1.0):
        clock.now += seconds
        found.append(store.fetch(NAME).validated_at)
    assert found == [1_000.0, 1_000.0, 1_061.0, 1_061.0]


def test_a_clock_set_back_does_not_freeze_a_copy(s3: S3Server, bucket: str, store: ModelStore, clock: Clock) -> None:
    """A copy validated in the future is due."""
    s3.put(bucket, NAME, make_archive())
    store.fetch(NAME)
    clock.now -= 3_600.0
    store.fetch(NAME)
    assert s3.seen("GET", bucket) == [206, 304]


def test_a_changed_archive_replaces_the_copy(s3: S3Server, bucket: str, store: ModelStore, clock: Clock) -> None:
    """A new version in the store is fetched when the copy is due, and kept."""
    s3.put(bucket, NAME, make_archive())
    store.fetch(NAME)
    version = s3.put(bucket, NAME, make_archive(b"second"))
    assert store.fetch(NAME).archive.read("model.onnx") == b"first"
    clock.now += 61.0
    changed = store.fetch(NAME)
    assert (changed.tier, changed.version) == ("store", version)
    assert store.fetch(NAME).archive.read("model.onnx") == b"second"


def test_a_deleted_archive_is_forgotten(s3: S3Server, bucket: str, store: ModelStore, clock: Clock) -> None:
    """404 for a due copy is the store's word: not found, and no copy comes back in a later outage."""
    s3.put(bucket, NAME, make_archive())
    store.fetch(NAME)
    s3.delete(bucket, NAME)
    clock.now += 61.0
    with pytest.raises(ModelNotFound):
        store.fetch(NAME)
    with s3.outage(bucket), pytest.raises(StoreUnavailable):
        store.fetch(NAME)


def test_a_refusal_is_no_outage(s3: S3Server, bucket: str, store: ModelStore, clock: Clock) -> None:
    """403 is an answer: the copy is not served as if the store were away."""
    s3.put(bucket, NAME, make_archive())
    store.fetch(NAME)
    clock.now += 61.0
    s3.inject(Fault(match=bucket, status=403))
    with pytest.raises(StoreDenied):
        store.fetch(NAME)


def test_with_the_store_down_a_due_copy_is_served_stale(
    s3: S3Server, bucket: str, store: ModelStore, clock: Clock
) -> None:
    """An outage is logged, and while it lasts no load asks; an answered probe ends it, and the copy is fresh again."""
    version = s3.put(bucket, NAME, make_archive())
    store.fetch(NAME)
    clock.now += 61.0
    with s3.outage(bucket), capture_logs() as logs:
        stale, again = store.fetch(NAME), store.fetch(NAME)
        asked = len(s3.seen("GET", bucket))
        clock.now += 3_600.0
        assert store.fetch(NAME).stale
        assert len(s3.seen("GET", bucket)) == asked
        assert store.fetch(NAME, revalidate=True).stale
        assert len(s3.seen("GET", bucket)) > asked
        store.probe()
        assert store.health.failing_s() > 0
    assert (stale.tier, stale.version, stale.stale) == ("disk", version, True)
    assert stale.store_s > 0.0
    assert (again.stale, again.store_s) == (True, 0.0)
    assert logs[0]["event"] == "store_unavailable_serving_stale"
    store.probe()
    assert store.health.failing_s() == 0
    assert not store.fetch(NAME).stale
    assert s3.probes[-1] == ("GET", f"/{bucket}/{PROBE}", 404)


def test_a_probe_says_once_what_is_wrong_with_the_store(s3: S3Server, bucket: str, store: ModelStore) -> None:
    """A bucket that is not there fails the health and is logged with its address; a store that answers is no news."""
    absent = ModelStore(open_source(f"s3://{bucket}-absent/fleet"), None, Limits())
    with capture_logs() as logs:
        store.probe()
        absent.probe()
        absent.probe()
    (said,) = logs
    assert (said["event"], said["reason"]) == ("store_does_not_serve", "store_unavailable")
    assert f"s3://{bucket}-absent/fleet" in said["error"]
    assert (absent.health.failing_s() > 0, store.health.failing_s()) == (True, 0)
    with s3.outage(bucket), capture_logs() as logs:
        store.probe()
    assert [each["event"] for each in logs] == ["store_does_not_serve"]


def test_what_is_at_hand_waits_for_nobody(s3: S3Server, bucket: str, store: ModelStore, clock: Clock) -> None:
    """A fresh copy, and a due one if it may be stale, are read while a download holds the name's lock; no request."""
    assert store._disk is not None
    with store._disk.lock(NAME):
        assert store.at_hand(NAME) == (None, False)
    s3.put(bucket, NAME, make_archive())
    store.fetch(NAME)
    requests = len(s3.seen("GET", bucket))
    with store._disk.lock(NAME):
        fresh, _ = store.at_hand(NAME)
        clock.now += 61.0
        assert store.at_hand(NAME) == (None, True)
        due, has_copy = store.at_hand(NAME, stale=True)
    assert has_copy
    assert fresh is not None
    assert due is not None
    assert (fresh.stale, due.stale, due.tier, due.version) == (False, True, "disk", fresh.version)
    assert len(s3.seen("GET", bucket)) == requests


def test_a_cold_fetch_with_the_store_down_fails(s3: S3Server, bucket: str, store: ModelStore) -> None:
    """Without a copy there is nothing to serve."""
    with s3.outage(bucket), pytest.raises(StoreUnavailable, match="connection was cut"):
        store.fetch(NAME)


def test_a_broken_archive_is_never_kept(s3: S3Server, bucket: str, store: ModelStore, tmp_path: Path) -> None:
    """What does not open is refused before it is published, each time it is asked for."""
    s3.put(bucket, NAME, make_archive()[:40])
    for _ in range(2):
        with pytest.raises(ArchiveInvalid):
            store.fetch(NAME)
    assert not (tmp_path / "blobs").exists()
    assert s3.seen("GET", bucket) == [206, 206]


def test_a_broken_new_version_leaves_the_old_copy(
    s3: S3Server, bucket: str, store: ModelStore, clock: Clock, tmp_path: Path
) -> None:
    """A bad upload is reported and the good copy stays on disk, ready if the upload is undone."""
    version = s3.put(bucket, NAME, make_archive())
    store.fetch(NAME)
    s3.put(bucket, NAME, b"not an archive")
    clock.now += 61.0
    with pytest.raises(ArchiveInvalid):
        store.fetch(NAME)
    cached = DiskTier(tmp_path, open_source(f"s3://{bucket}").url).lookup(NAME)
    assert cached is not None
    assert cached.version == version


def test_a_copy_that_no_longer_opens_is_forgotten(s3: S3Server, bucket: str, store: ModelStore, tmp_path: Path) -> None:
    """Stricter limits after a restart refuse the copy, and the next fetch asks the store again."""
    s3.put(bucket, NAME, make_archive())
    store.fetch(NAME)
    source = open_source(f"s3://{bucket}")
    strict = ModelStore(source, DiskTier(tmp_path, source.url), Limits(max_entries=0))
    strict._clock = store._clock
    with pytest.raises(ArchiveInvalid):
        strict.fetch(NAME)
    assert s3.seen("GET", bucket) == [206]
    assert store.fetch(NAME).tier == "store"


def test_forget_makes_the_next_fetch_ask(s3: S3Server, bucket: str, store: ModelStore) -> None:
    """What the worker found broken deeper is fetched whole, not revalidated."""
    s3.put(bucket, NAME, make_archive())
    store.fetch(NAME)
    store.forget(NAME)
    assert store.fetch(NAME).tier == "store"
    assert s3.seen("GET", bucket) == [206, 206]


def test_a_torn_blob_is_fetched_again(s3: S3Server, bucket: str, store: ModelStore, tmp_path: Path) -> None:
    """A copy damaged on disk is never served: one plain GET repairs it."""
    s3.put(bucket, NAME, make_archive())
    store.fetch(NAME)
    (blob,) = (tmp_path / "blobs").iterdir()
    blob.write_bytes(blob.read_bytes()[:-1])
    repaired = store.fetch(NAME)
    assert repaired.tier == "store"
    assert repaired.archive.read("model.onnx") == b"first"
    assert s3.seen("GET", bucket) == [206, 206]


def test_an_unusable_disk_does_not_fail_a_load(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    """With a file in the way of the folder the archive comes from the store each time, and it is logged."""
    (tmp_path / "cache").write_text("in the way")
    s3.put(bucket, NAME, make_archive())
    store = ModelStore(open_source(f"s3://{bucket}"), DiskTier(tmp_path / "cache", "s3://x"), Limits())
    with capture_logs() as logs:
        assert store.fetch(NAME).archive.read("model.onnx") == b"first"
    assert {"disk_lock_failed", "disk_publish_failed"} <= {entry["event"] for entry in logs}


def test_two_processes_download_once(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    """Two workers that miss at the same moment cost one GET: the second waits and takes the first one's blob."""
    version = s3.put(bucket, NAME, make_archive(os.urandom(100_000)))
    s3.inject(Fault(match=NAME, delay_s=0.4))  # long enough for the second to arrive while the first downloads
    children = [run_fetcher(bucket, tmp_path), run_fetcher(bucket, tmp_path)]
    for child in children:
        start(child)
    answers = sorted(json.loads(child.communicate(timeout=PATIENCE_S)[0]) for child in children)
    assert answers == [["disk", version], ["store", version]]
    assert s3.seen("GET", bucket) == [206]


def test_a_restart_reuses_what_a_killed_process_left(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    """A worker killed during its download holds up nobody; one that finished leaves its blob to the next process."""
    version = s3.put(bucket, NAME, make_archive())
    with s3.hold(NAME), run_fetcher(bucket, tmp_path) as killed:
        start(killed)
        while not any(fault.match == NAME and fault.times == 0 for fault in s3.faults):
            os.sched_yield()  # its request has not reached the proxy yet
        killed.send_signal(signal.SIGKILL)
    for tier in ("store", "disk"):
        with run_fetcher(bucket, tmp_path) as child:
            start(child)
            assert json.loads(child.communicate(timeout=PATIENCE_S)[0]) == [tier, version]


@pytest.mark.slow
def test_stores_that_are_written_alike_do_not_share_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`./models` of two projects, and one bucket name at two endpoints, are four stores to one disk cache."""
    for project, seed in (("a", 1), ("b", 2)):
        models = tmp_path / project / "models"
        models.mkdir(parents=True)
        (models / NAME).parent.mkdir(parents=True, exist_ok=True)
        (models / NAME).write_bytes(make_forecaster(seed))
    found = []
    for project in "ab":
        monkeypatch.chdir(tmp_path / project)
        source = open_source("./models")
        found.append(ModelStore(source, DiskTier(tmp_path / "cache", source.url), Limits()).fetch(NAME))
    assert [each.tier for each in found] == ["store", "store"]
    assert found[0].archive.weights() != found[1].archive.weights()
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    urls = {open_source("s3://bucket/x", endpoint_url=f"http://127.0.0.1:{port}").url for port in (1, 2)}
    assert len(urls) == 2


def test_a_store_that_fails_says_for_how_long(s3: S3Server, bucket: str, store: ModelStore) -> None:
    """Also where a copy on disk is served meanwhile. An answer ends it, also that there is no such key."""
    s3.put(bucket, NAME, make_archive())
    store.fetch(NAME)
    assert store.health.failing_s() == 0.0
    with s3.outage(bucket):
        assert store.fetch(NAME, revalidate=True).stale
        first = store.health.failing_s()
        with pytest.raises(StoreUnavailable):
            store.fetch(parse_model_name("au/other.mar"))
        assert 0.0 < first < store.health.failing_s()
    with pytest.raises(ModelNotFound):
        store.fetch(parse_model_name("au/other.mar"))
    assert store.health.failing_s() == 0.0


def test_a_kept_version_is_read_without_the_store(s3: S3Server, bucket: str, store: ModelStore) -> None:
    """Replaced in the store: the version that served before comes from disk, also while the store is gone, and the
    newest stays the newest. A version that neither has is not found; the newest is fetched where the disk has lost it.
    """
    first = s3.put(bucket, NAME, make_archive())
    store.fetch(NAME)
    store.keep_version(NAME, first, newest=True)
    second = s3.put(bucket, NAME, make_archive(b"second"))
    assert store.fetch(NAME, revalidate=True).version == second
    with s3.outage(bucket):
        found = store.version_at_hand(NAME, first)
        assert found is not None
        assert (found.version, found.tier, found.archive.container.data) == (first, "disk", make_archive())
        assert store.version_at_hand(NAME, second) is not None
    assert store.fetch(NAME).version == second
    assert store.version_at_hand(NAME, "v0") is None
    with pytest.raises(ModelNotFound, match=f"version v0 of {NAME} is not kept on disk, and the store has .* {second}"):
        store.fetch_version(NAME, "v0")
    store.forget(NAME)
    assert store.version_at_hand(NAME, second) is None
    assert store.fetch_version(NAME, second).tier == "store"
