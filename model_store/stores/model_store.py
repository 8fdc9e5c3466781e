"""Fetches verified archives by model name: from the disk tier, else from the object store. Runs on loader threads.

`at_hand` reads this host's disk and waits for nobody; `fetch`, `repair` and `probe` ask the store, and hang as it does.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from model_store.archives.archive import Archive, Limits, open_archive
from model_store.errors import ArchiveInvalid, LoadError, ModelNotFound, StoreUnavailable
from model_store.lazy_log import log
from model_store.names import ModelName
from model_store.stores.disk_cache import Cached, DiskTier
from model_store.stores.load_parts import timing_part
from model_store.stores.object_store import Fetched, Listed, Source
from model_store.stores.store_health import PROBE, StoreHealth

#: Further downloads of an archive that was damaged on its way.
REPAIRS = 2


@dataclass(frozen=True, slots=True)
class FetchedArchive:
    """A verified archive.

    `store_s`: seconds spent in store requests. `stale`: it is due, and the store has not been heard on it.
    `validated_at`: wall clock time when the store last had this version.
    """

    archive: Archive
    version: str
    tier: Literal["disk", "store"]
    store_s: float
    stale: bool
    validated_at: float

    @property
    def size(self) -> int:
        """Bytes that it holds in memory."""
        return len(self.archive.container.data)


class ModelStore:
    """One source behind an optional disk tier. Thread-safe. The caller makes sure that a process loads a model once.

    A disk copy that was validated within the last `revalidate_s` seconds is served without a store request. `clock` is
    wall clock time, because processes compare it; `now` is the monotonic clock.
    """

    def __init__(
        self,
        source: Source,
        disk: DiskTier | None,
        limits: Limits,
        revalidate_s: float = 60.0,
        clock: Callable[[], float] = time.time,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._disk = disk
        self._limits = limits
        self._revalidate_s = revalidate_s
        self._clock, self._now = clock, now
        self.health = StoreHealth(now)
        self._trouble: LoadError | None = None  #: what the last probe found

    def __repr__(self) -> str:
        return f"ModelStore({self._source!r}, {self._disk!r}, revalidate_s={self._revalidate_s})"

    def at_hand(self, name: ModelName, *, stale: bool = False) -> tuple[FetchedArchive | None, bool]:
        """The disk copy that can be served without asking the store: a fresh one or, with `stale`, one that is due.

        Also whether the disk has a copy, fresh or due. INVARIANT: it takes no lock, because downloads hold those for as
        long as the store hangs. Raises ArchiveInvalid.
        """
        cached = self._disk.lookup(name) if self._disk else None
        if self._disk is None or cached is None:
            return None, False
        found = self._fresh(self._disk, cached, self._clock() - self._revalidate_s)
        return found or (self._stale(self._disk, cached) if stale else None), True

    def fetch(self, name: ModelName, revalidate: bool = False) -> FetchedArchive:
        """The newest archive of this name, by at most one store request; `revalidate` makes that request in any case.

        INVARIANT: a host downloads an archive once. A process that waited for another one's download uses its blob.
        Blocks for as long as the store's time-outs allow.

        Raises:
            ModelNotFound: the store has no such key (a disk copy is forgotten).
            StoreDenied, StoreUnavailable: the disk has no copy to serve stale.
            ArchiveInvalid: the archive breaks a rule; it is not kept on disk.
        """
        asked_at = self._clock()
        if self._disk is None:
            return self._download(name, None, asked_at)
        newer_than = asked_at - (0.0 if revalidate else self._revalidate_s)
        with self._disk.lock(name):
            # Another process may have downloaded or validated it while this one waited.
            cached = self._disk.lookup(name)
            if cached is None:
                return self._download(name, self._disk, self._clock())
            return self._fresh(self._disk, cached, newer_than) or self._renew(self._disk, cached, revalidate)

    def may_be_damaged(self, broken: FetchedArchive) -> bool:
        """Whether an archive that does not build may differ from the store's: its version does not prove its bytes."""
        return not Fetched(broken.archive.container.data, broken.version).is_whole()

    def version_at_hand(self, name: ModelName, version: str) -> FetchedArchive | None:
        """This version of the archive from disk, if it was kept; no lock is taken. Raises ArchiveInvalid."""
        cached = self._disk.lookup_version(name, version) if self._disk else None
        data = self._disk.read(cached) if self._disk and cached else None
        if cached is None or data is None:
            return None
        archive = open_archive(data, name, self._limits)
        return FetchedArchive(archive, version, "disk", 0.0, stale=False, validated_at=self._clock())

    def fetch_version(self, name: ModelName, version: str) -> FetchedArchive:
        """This version of the archive from the store, while it is the newest there.

        Raises:
            ModelNotFound: the store has another version by now, or none.
            StoreDenied, StoreUnavailable, ArchiveInvalid: as `fetch`.
        """
        with self._disk.lock(name) if self._disk else contextlib.nullcontext():
            found = self._download(name, self._disk, self._clock())
        if found.version != version:
            raise ModelNotFound(
                f"version {version} of {name} is not kept on disk, and the store has version {found.version}"
            )
        return found

    def keep_version(self, name: ModelName, version: str, *, newest: bool) -> None:
        """Keep on disk a version that serves now: see `DiskTier.keep_version`."""
        if self._disk:
            self._disk.keep_version(name, version, self._clock(), newest=newest)

    def repair(self, name: ModelName, broken: FetchedArchive) -> FetchedArchive | None:
        """The archive from the store once more, or None if it is the same as `broken`, which does not build.

        Bytes damaged on their way are found by checksums that only a build reads. Call it if `may_be_damaged`.
        """
        held = broken.archive.container.data
        try:
            with self._disk.lock(name) if self._disk else contextlib.nullcontext():
                fresh = self._download(name, self._disk, self._clock())
        except LoadError as error:  # the first error says more of the archive
            log.warning("archive_not_fetched_again", model=name, error=str(error))
            return None
        if fresh.archive.container.data == held:
            return None
        log.warning("archive_damaged_in_transit", model=name, version=fresh.version)
        return fresh

    def forget(self, name: ModelName) -> None:
        """Remove the disk copy, because the worker found a fault that `fetch` does not check for."""
        if self._disk:
            self._disk.forget(name)

    def list(self, prefix: str = "") -> Iterator[Listed]:
        """The store's archives whose names start with `prefix`, lazily: see `Source.list`."""
        return self._source.list(prefix)

    def probe(self) -> None:
        """Ask the store for something that it does not have, so that `health` learns whether it answers."""
        trouble: LoadError | None = None
        with self.health.probing():
            try:
                self._ask(PROBE)
            except ModelNotFound:
                pass  # as it should be
            except LoadError as error:
                trouble = error
        if type(trouble) is not type(self._trouble) and trouble is not None:  # said once, not at each probe
            log.warning("store_does_not_serve", reason=trouble.reason, error=str(trouble))
        self._trouble = trouble

    def _ask(self, name: ModelName, unless: str | None = None) -> Fetched | None:
        """`Source.get`, whose outcome says whether the store is there."""
        asked_at = self._now()
        try:
            with timing_part("get") as part:
                found = self._source.get(name, unless=unless)
                part.size = 0 if found is None else len(found.data)
        except StoreUnavailable:
            self.health.note_failure(asked_at)
            raise
        except LoadError:
            self.health.note_answer()
            raise
        self.health.note_answer()
        return found

    def _fresh(self, disk: DiskTier, cached: Cached, newer_than: float) -> FetchedArchive | None:
        """The disk copy if it was validated after `newer_than` and not in the future (the clock may be set back)."""
        if not newer_than < cached.validated_at <= self._clock():
            return None
        data = disk.read(cached)
        return self._from_disk(disk, cached, data) if data is not None else None

    def _stale(self, disk: DiskTier, cached: Cached) -> FetchedArchive | None:
        """The disk copy, however old."""
        data = disk.read(cached)
        return self._from_disk(disk, cached, data, stale=True) if data is not None else None

    def _renew(self, disk: DiskTier, cached: Cached, forced: bool) -> FetchedArchive:
        """Revalidate by one conditional GET. While the store is out, a disk copy is served stale."""
        name, data = cached.name, disk.read(cached)
        if data is None:
            return self._download(name, disk, self._clock())
        asked_at, started = self._clock(), time.perf_counter()
        if not forced and self.health.is_out:
            return self._from_disk(disk, cached, data, stale=True)
        try:
            fetched = self._ask(name, cached.version)
        except ModelNotFound:
            disk.forget(name)
            raise
        except StoreUnavailable as error:
            log.warning("store_unavailable_serving_stale", model=name, version=cached.version, error=str(error))
            return self._from_disk(disk, cached, data, time.perf_counter() - started, stale=True)
        store_s = time.perf_counter() - started
        if fetched is not None:
            return self._keep(name, fetched, disk, asked_at, store_s)
        disk.validated(name, asked_at)
        return self._from_disk(disk, replace(cached, validated_at=asked_at), data, store_s)

    def _download(self, name: ModelName, disk: DiskTier | None, asked_at: float) -> FetchedArchive:
        started = time.perf_counter()
        fetched = self._ask(name)
        assert fetched is not None, "only a conditional GET is answered `not modified`"
        return self._keep(name, fetched, disk, asked_at, time.perf_counter() - started)

    def _keep(
        self, name: ModelName, fetched: Fetched, disk: DiskTier | None, asked_at: float, store_s: float
    ) -> FetchedArchive:
        """Open, then publish. INVARIANT: an invalid archive is never written to disk."""
        fetched, archive = self._open_sound(name, fetched)
        if disk:
            with timing_part("keep"):
                disk.publish(name, fetched.data, fetched.version, asked_at)
        return FetchedArchive(archive, fetched.version, "store", store_s, stale=False, validated_at=asked_at)

    def _open_sound(self, name: ModelName, fetched: Fetched) -> tuple[Fetched, Archive]:
        """Open the archive. One that does not open is fetched again, unless its bytes certainly are the store's."""
        for _ in range(REPAIRS):
            try:
                return fetched, open_archive(fetched.data, name, self._limits)
            except ArchiveInvalid:
                again = None if fetched.is_whole() else self._ask(name)
                if again is None or again.data == fetched.data:
                    raise
                log.warning("archive_damaged_in_transit", model=name, version=fetched.version)
                fetched = again
        return fetched, open_archive(fetched.data, name, self._limits)

    def _from_disk(
        self, disk: DiskTier, cached: Cached, data: bytes, store_s: float = 0.0, *, stale: bool = False
    ) -> FetchedArchive:
        try:
            archive = open_archive(data, cached.name, self._limits)
        except ArchiveInvalid:  # it was sound when it was published; limits or rules have changed since
            disk.forget(cached.name)
            raise
        disk.touch(cached.name)
        return FetchedArchive(archive, cached.version, "disk", store_s, stale, cached.validated_at)
