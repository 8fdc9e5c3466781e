"""The disk tier: verified archives in a folder, which all workers of a host share and which survives restarts.

    blobs/{sha256 of the content}        the archive's bytes
    index/{sha256 of source and name}    a small JSON entry: name, version, blob; its mtime is the last use
    kept/{sha256 of source and name}     the versions of an archive that have served, see `kept_versions`
    locks/downloads                      locked by one download per archive and host, see `name_locks`
    locks/kept                           locked by changes of files in kept/
    temp/                                files that are being written

INVARIANT: files appear by rename, and a blob before its entry. So the index needs no lock, and a crash leaves at worst
a blob without an entry, which `evict` removes. Nothing is synced to the device: after a power failure a torn blob does
not match its name, `read` detects this, and the archive is fetched again. The workers' loader threads look up, read and
publish; the supervisor evicts, and so does a publication that finds the disk full. A disk that is not writable, or is
full of other things, never fails a load: the error is logged.

Whoever can write to the folders could give a worker another model's weights. So they must belong to this user and be
writable by nobody else: `prepare` makes them so, and refuses others. What an index file says is checked field by field
all the same: its name must be that of its source and model, its blob's name a sha256, its size that of the blob. Links,
pipes and other odd files are never opened.
"""

import errno
import hashlib
import math
import os
import re
import stat
import time
from collections.abc import Collection
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from model_store.lazy_log import log
from model_store.names import InvalidModelName, ModelName, parse_model_name
from model_store.stores.disk_files import hash_key, iterate_files, read_file, remove_file, write_file
from model_store.stores.kept_versions import KeptVersion, KeptVersions, find_last_use
from model_store.stores.load_parts import timing_part
from model_store.stores.name_locks import NameLocks

MAX_ENTRY_BYTES = 64 * 1024  #: of an index file; names, versions and sources are far shorter
_ADVICE = "archives are loaded without a disk cache: let --disk-cache be a folder that can be written to"
_SHA256 = re.compile(r"[0-9a-f]{64}")

#: Age in seconds at which a temporary file, or a blob without an entry, belongs to no running download.
GRACE_S = 600.0
#: On a full disk a part of the archives makes room, and not only what one publication needs: a sweep reads the index.
FULL_PART = 1 / 16

#: The entries (index file, model name) that share a blob -> their last use, wall clock.
Names = dict[tuple[Path, ModelName], float]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An index file: the newest version of `name` in `source` is the blob `sha256`; `validated_at` is wall clock."""

    source: str
    name: ModelName
    version: str
    sha256: str
    bytes: int
    validated_at: float


@dataclass(frozen=True, slots=True)
class Cached:
    """An archive in the index. `bytes`: its size; `validated_at`: when the store last had this version (wall clock)."""

    name: ModelName
    path: Path
    version: str
    bytes: int
    validated_at: float


class UnsafeDiskCache(OSError):
    """Others can write to the disk tier's folders; the message says which, and what to do."""


class DiskTier:
    """The archives of one source in `folder`. Byte counts and eviction include all sources that share the folder."""

    def __init__(self, folder: Path, source_url: str) -> None:
        self._folder = folder
        self._source = source_url
        self._blobs, self._index = folder / "blobs", folder / "index"
        self._locks, self._temp = NameLocks(folder / "locks"), folder / "temp"
        self._kept = KeptVersions(folder / "kept", self._temp, source_url)

    def __repr__(self) -> str:
        return f"DiskTier({self._folder}, {self._source})"

    def prepare(self) -> None:
        """Make the folders, for this user alone. Call it once for a host, before the first load.

        A disk that refuses is no error here: loads go on without it. Raises UnsafeDiskCache when a folder is not this
        user's, is a link, or can be written by others.
        """
        for folder in (self._blobs, self._index, self._kept.folder, self._locks.folder, self._temp):
            try:
                folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                folder.mkdir(exist_ok=True, mode=0o700)
                found = folder.lstat()
            except OSError as error:
                log.warning("disk_folder_failed", folder=str(folder), error=str(error), advice=_ADVICE)
                return  # the others would fail as this one
            check_private(folder, found)

    def lookup(self, name: ModelName) -> Cached | None:
        """The index entry of this name, or None. The blob may be missing or torn; `read` checks it."""
        entry = _read_entry(self._entry_path(name))
        if entry is None:
            return None
        return Cached(name, self._blobs / entry.sha256, entry.version, entry.bytes, entry.validated_at)

    def read(self, cached: Cached) -> bytes | None:
        """The archive's bytes, checked against their sha256. A missing or torn blob is forgotten and gives None."""
        with timing_part("read") as part:
            part.size = cached.bytes
            return self._read(cached)

    def _read(self, cached: Cached) -> bytes | None:
        try:
            data = read_file(cached.path, cached.bytes)
        except OSError:
            data = b""  # evicted since it was looked up, most likely
        else:
            if hashlib.sha256(data).hexdigest() == cached.path.name:
                return data
            log.warning("disk_blob_torn", model=cached.name, blob=cached.path.name, bytes=len(data))
        current = self.lookup(cached.name)
        if current and current.path == cached.path:  # another process may have published a newer one meanwhile
            self.forget(cached.name)
        remove_file(cached.path)
        return None

    def lock(self, name: ModelName) -> AbstractContextManager[None]:
        """Wait for the host's lock of this name and hold it: see `NameLocks.hold`."""
        return self._locks.hold("downloads", hash_key(self._source, name))

    def publish(self, name: ModelName, data: bytes, version: str, now: float) -> Cached | None:
        """Keep a verified archive in place of the name's older one; None if the disk refuses. Call it under `lock`."""
        digest = hashlib.sha256(data).hexdigest()
        entry = Entry(source=self._source, name=name, version=version, sha256=digest, bytes=len(data), validated_at=now)
        try:
            # Write the blob even if it exists: the old one may be torn, or another process may be evicting it.
            self._write_with_room(self._blobs / digest, data)
            self._write_with_room(self._entry_path(name), msgspec.json.encode(entry))
        except OSError as error:
            log.warning("disk_publish_failed", model=name, bytes=len(data), folder=str(self._folder), error=str(error))
            return None
        return Cached(name, self._blobs / digest, version, len(data), now)

    def validated(self, name: ModelName, now: float) -> None:
        """Record that the store still has this version. Call it under `lock`."""
        path = self._entry_path(name)
        entry = _read_entry(path)
        if entry is None:
            return
        try:
            self._write_with_room(path, msgspec.json.encode(msgspec.structs.replace(entry, validated_at=now)))
        except OSError as error:
            log.warning("disk_validate_failed", model=name, folder=str(self._folder), error=str(error))

    def touch(self, name: ModelName) -> None:
        """Record a use, for the order of eviction."""
        try:
            os.utime(self._entry_path(name))
        except OSError:
            pass  # it was evicted meanwhile, or the disk is read-only, where nothing is evicted

    def forget(self, name: ModelName) -> None:
        """Remove the name. Its blob stays until `evict`, because another name may share it."""
        remove_file(self._entry_path(name))

    # --- versions ---------------------------------------------------------------------------------------------------

    def keep_version(self, name: ModelName, version: str, now: float, *, newest: bool) -> None:
        """Keep the blob of a version that serves now, unless the name has another one by now.

        `newest`: it serves as the newest in the store, not because it was asked for by its version. INVARIANT: it does
        not wait for `lock`, which a download holds for as long as the store hangs. Raises OSError.
        """
        if self._kept.has(name, version, newest=newest):
            return
        with self._locks.hold("kept", self._kept.path(name).name):
            entry = _read_entry(self._entry_path(name))
            if entry is not None and entry.version == version:
                self._kept.add(name, KeptVersion(version, entry.sha256, entry.bytes, now), newest=newest)

    def hold_versions(self, name: ModelName, versions: Collection[str]) -> set[str]:
        """Never forget these of the kept versions, from now on; any other may be forgotten.

        Returns those that are held now. As `keep_version` it waits for no download. Raises OSError.
        """
        with self._locks.hold("kept", self._kept.path(name).name):
            self._kept.hold(name, versions)
        return {kept.version for kept in self.list_versions(name) if kept.held}

    def has_held(self) -> bool:
        """Whether versions of any source are held."""
        return any(kept.held for _, _, versions in self._kept.read_all() for kept in versions)

    def list_held(self) -> list[ModelName]:
        """The archives of this source of which versions are held."""
        return self._kept.list_held()

    def list_versions(self, name: ModelName) -> list[KeptVersion]:
        """The kept versions whose blobs are there, the one that served last first."""
        return [kept for kept in self._kept.read(name) if (self._blobs / kept.sha256).is_file()]

    def lookup_version(self, name: ModelName, version: str) -> Cached | None:
        """A kept version, or None. `read` checks its blob."""
        entry = _read_entry(self._entry_path(name))
        if entry is not None and entry.version == version:
            return Cached(name, self._blobs / entry.sha256, version, entry.bytes, entry.validated_at)
        for kept in self._kept.read(name):
            if kept.version == version:
                return Cached(name, self._blobs / kept.sha256, version, kept.bytes, kept.served_at)
        return None

    # --- eviction ---------------------------------------------------------------------------------------------------

    def used_bytes(self) -> int:
        """Bytes of all blobs; a shared blob counts once."""
        return sum(found.st_size for _, found in iterate_files(self._blobs))

    def evict(self, budget_bytes: int) -> list[ModelName]:
        """Remove the least recently used blobs, each with all its names, until the rest fits the budget.

        A blob's last use is the latest one of its names, or when another version took its place. Those of held versions
        stay. Files that crashed downloads left are removed first. Returns the evicted names.
        """
        now, files = time.time(), self._kept.read_all()
        kept = find_last_use(files)
        names, blobs = self._sweep(now, kept)
        there = {path.name for path in blobs}
        for path, changed_at, versions in files:
            if now - changed_at > GRACE_S and there.isdisjoint(each.sha256 for each in versions):
                self._forget_kept(path, changed_at)  # its versions were evicted, all of them
        used = sum(found.st_size for found in blobs.values())
        last_use = {path: max([kept.get(path.name, 0.0), *names.get(path.name, {}).values()]) for path in blobs}
        known = [path for path in blobs if path.name in names or path.name in kept]
        idle = sorted((path for path in known if last_use[path] < math.inf), key=last_use.__getitem__)
        evicted: list[ModelName] = []
        for path in idle:
            if used <= budget_bytes:
                break
            used -= blobs[path].st_size
            evicted += self._drop(path, names.get(path.name, {}))
        return evicted

    def _forget_kept(self, path: Path, changed_at: float) -> None:
        """Remove a file of `kept`, unless it has been changed since."""
        with self._locks.hold("kept", path.name), suppress(OSError):
            if path.lstat().st_mtime == changed_at:
                remove_file(path)

    def _sweep(self, now: float, kept: Collection[str]) -> tuple[dict[str, Names], dict[Path, os.stat_result]]:
        """Remove what crashes left: temporary files, blobs without entry, entries without blob. Returns the others."""
        for path, found in iterate_files(self._temp):
            if now - found.st_mtime > GRACE_S:
                remove_file(path)
        names = self._names_by_blob()  # before the blobs: an entry seen here has its blob in place, or lost it
        blobs = dict(iterate_files(self._blobs))
        for path, found in list(blobs.items()):
            if path.name not in names and path.name not in kept and now - found.st_mtime > GRACE_S:
                remove_file(path)
                del blobs[path]
        for lost in names.keys() - {path.name for path in blobs}:
            self._drop(self._blobs / lost, names[lost])
        return names, blobs

    def _drop(self, blob: Path, names: Names) -> list[ModelName]:
        for entry_path, _ in names:
            remove_file(entry_path)
        remove_file(blob)
        return [name for _, name in names]

    def _names_by_blob(self) -> dict[str, Names]:
        """The names of each blob. Unreadable entries are removed."""
        names: dict[str, Names] = {}
        for path, found in iterate_files(self._index):
            entry = _read_entry(path)
            if entry is None:
                remove_file(path)
            else:
                names.setdefault(entry.sha256, {})[path, entry.name] = found.st_mtime
        return names

    def _entry_path(self, name: ModelName) -> Path:
        return self._index / hash_key(self._source, name)

    def _write_with_room(self, path: Path, data: bytes) -> None:
        """Write the file atomically. On a full disk the least recently used archives make room. Raises OSError."""
        try:
            self._write(path, data)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._make_room(len(data)):
                raise
            self._write(path, data)

    def _make_room(self, size: int) -> bool:
        """Evict archives of at least `size` bytes; False, and nothing is evicted, where all of them are not that large.

        A file's blocks, and its folder's, may take more than its bytes, so twice as much is asked for.
        """
        used = self.used_bytes()
        if used < size:
            return False
        evicted = self.evict(used - max(2 * size, int(used * FULL_PART)))
        log.warning("disk_full", folder=str(self._folder), bytes=size, evicted=len(evicted))
        return bool(evicted)

    def _write(self, path: Path, data: bytes) -> None:
        """Write the file atomically. Raises OSError."""
        write_file(path, data, self._temp)


def check_private(folder: Path, found: os.stat_result) -> None:
    """Raises UnsafeDiskCache unless it is a folder of this user that nobody else may write to. `found`: by `lstat`."""
    if not stat.S_ISDIR(found.st_mode):
        raise UnsafeDiskCache(f"{folder} is not a folder (disk_cache): remove it, or choose another --disk-cache")
    if found.st_uid != os.geteuid():
        raise UnsafeDiskCache(
            f"{folder} belongs to user {found.st_uid}, not to user {os.geteuid()} who runs this server, and could hold "
            f"forged files (disk_cache): remove it, or choose another --disk-cache"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UnsafeDiskCache(
            f"{folder} can be written by other users (mode {stat.S_IMODE(found.st_mode):o}), so that it could hold "
            f"forged files (disk_cache): remove it, and the server makes it anew for itself alone"
        )


def _read_entry(path: Path) -> Entry | None:
    """An index file that is whole and says what its own name says; None for any other."""
    try:
        entry = msgspec.json.decode(read_file(path, MAX_ENTRY_BYTES), type=Entry)
        parse_model_name(entry.name)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, InvalidModelName):  # none, torn by a crash, or forged
        return None
    sound = _SHA256.fullmatch(entry.sha256) and entry.bytes >= 0 and path.name == hash_key(entry.source, entry.name)
    return entry if sound else None
