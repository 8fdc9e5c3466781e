"""The versions of archives that have served: the disk tier keeps the last ones, so that a rollback needs no store.

A version is noted when its model was built, proved and served, in one small file for each name. It names a blob of the
disk tier, so that keeping it costs no copy. INVARIANT: whoever changes or removes a file holds its lock (`kept` of
`name_locks`), and waits for no store meanwhile.
"""

import math
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import msgspec

from model_store.names import ModelName
from model_store.stores.disk_files import hash_key, iterate_files, read_file, write_file

MOST_KEPT = 3  #: versions of a name that have served as the newest, and of the others; beside those that are held
MAX_FILE_BYTES = 1024 * 1024  #: a thousand held versions
_SHA256 = re.compile(r"[0-9a-f]{64}")


class KeptVersion(msgspec.Struct, frozen=True):
    """A version that has served, since `served_at` (wall clock). `held`: it must not be forgotten.

    `until`: when another one took its place, 0 before that. `asked`: it has served because it was asked for by its
    version, and never as the newest, so that no other version came after it.
    """

    version: str
    sha256: str
    bytes: int
    served_at: float
    held: bool = False
    until: float = 0.0
    asked: bool = False


class _File(msgspec.Struct, frozen=True, kw_only=True):
    """What a file says: the versions of `name` in `source`, the one that served last first."""

    source: str
    name: ModelName
    versions: tuple[KeptVersion, ...]


class KeptVersions:
    """The files of one source in `folder`; they are written by way of `temp`."""

    def __init__(self, folder: Path, temp: Path, source: str) -> None:
        self.folder, self._temp, self._source = folder, temp, source

    def __repr__(self) -> str:
        return f"KeptVersions({self.folder}, {self._source})"

    def read(self, name: ModelName) -> Sequence[KeptVersion]:
        """The versions of this name, the one that served last first. Their blobs may be gone."""
        found = _read(self.path(name))
        return () if found is None or (found.source, found.name) != (self._source, name) else found.versions

    def has(self, name: ModelName, version: str, *, newest: bool) -> bool:
        """Whether the version is noted already, as the one that served last where it is the `newest`."""
        kept = self.read(name)
        if newest:
            return bool(kept) and kept[0].version == version and not kept[0].asked
        return any(each.version == version for each in kept)

    def add(self, name: ModelName, kept: KeptVersion, *, newest: bool) -> None:
        """Note a version, and forget the oldest ones. Raises OSError."""
        before = self.read(name)
        if self.has(name, kept.version, newest=newest):
            return  # by another process meanwhile
        held = any(each.held for each in before if each.version == kept.version)
        others = [each for each in before if each.version != kept.version]
        if newest:
            served = [msgspec.structs.replace(each, until=kept.served_at) for each in others[:1] if not each.asked]
            self._write(name, [msgspec.structs.replace(kept, held=held), *served, *others[len(served) :]])
        else:  # behind the newest: at the end it would be the next to be forgotten, before anybody holds it
            self._write(name, [*others[:1], msgspec.structs.replace(kept, asked=True), *others[1:]])

    def hold(self, name: ModelName, versions: Collection[str]) -> None:
        """Hold these versions and no others. Raises OSError."""
        before = self.read(name)
        after = [msgspec.structs.replace(each, held=each.version in versions) for each in before]
        if after != list(before):
            self._write(name, after)

    def list_held(self) -> list[ModelName]:
        """The names of this source that have held versions."""
        found = (_read(path) for path, _ in iterate_files(self.folder))
        return sorted(
            file.name for file in found if file and file.source == self._source and any(k.held for k in file.versions)
        )

    def read_all(self) -> list[tuple[Path, float, Sequence[KeptVersion]]]:
        """All files of all sources: path, time of the last change, versions."""
        found = ((path, about.st_mtime, _read(path)) for path, about in iterate_files(self.folder))
        return [(path, changed_at, () if file is None else file.versions) for path, changed_at, file in found]

    def _write(self, name: ModelName, versions: Sequence[KeptVersion]) -> None:
        free = [each for each in versions if not each.held]
        served = [each for each in free if not each.asked][:MOST_KEPT]  # canaries do not displace what they may fail to
        asked = [each for each in free if each.asked][:MOST_KEPT]
        left = tuple(each for each in versions if each.held or each in served or each in asked)
        write_file(
            self.path(name), msgspec.json.encode(_File(source=self._source, name=name, versions=left)), self._temp
        )

    def path(self, name: ModelName) -> Path:
        """The name's file."""
        return self.folder / hash_key(self._source, name)


def find_last_use(files: Iterable[tuple[Path, float, Sequence[KeptVersion]]]) -> dict[str, float]:
    """When the blobs of kept versions served last, as far as is noted: infinity for those that are held.

    That of a newest one is when it began to. Its entry in the index says more.
    """
    blobs: dict[str, float] = {}
    for _, _, versions in files:
        for kept in versions:
            used_at = math.inf if kept.held else max(kept.served_at, kept.until)
            blobs[kept.sha256] = max(used_at, blobs.get(kept.sha256, 0.0))
    return blobs


def _read(path: Path) -> _File | None:
    """A file that is whole and says what its own name says; None for any other."""
    try:
        found = msgspec.json.decode(read_file(path, MAX_FILE_BYTES), type=_File)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):  # none, torn by a crash, or forged
        return None
    sound = all(_SHA256.fullmatch(each.sha256) and each.bytes >= 0 for each in found.versions)
    return found if sound and path.name == hash_key(found.source, found.name) else None
