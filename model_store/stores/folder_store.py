"""A local folder as a store. Runs on loader threads.

The folder's path may be a link that is swapped while the server runs (git-sync, a deployment's `current`), and files in
it may be links into `..data` (a Kubernetes volume). So links are resolved at each call, and nothing is kept open.

INVARIANT: no call reads outside the folder. A resolved path has no links, and its parts are opened one after another
without following any, so a link that is put in the way meanwhile is refused, not followed.
"""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from model_store.errors import LoadError, ModelNotFound, StoreDenied, StoreUnavailable
from model_store.names import MAX_NAME, ModelName
from model_store.stores.backend import (
    ABSENT,
    ACCEPTED,
    CHANGES,
    FAILED,
    READ_ATTEMPTS,
    Fetched,
    InvalidStoreUrl,
    StoredObject,
    Where,
    check_size,
)

#: What starts with this is not listed: Kubernetes' `..data` and its targets, and files that are being written.
HIDDEN = ".."
_LEAVES = "{name} leaves {where} by a symbolic link"
_FORBIDDEN = "{where} refuses {name!r}: {cause}; let the server's user read it"
_ABSENCES = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  #: opening a pipe must not block


class FolderStore:
    """See Backend. `path` is absolute and may be a link or lead through some."""

    def __init__(self, path: Path, max_archive_bytes: int) -> None:
        self.path = path
        self.where = Where(str(path), "the store's folder")
        self._max_archive_bytes = max_archive_bytes

    def __repr__(self) -> str:
        return f"<FolderStore {self.path}>"

    def read(self, name: ModelName, unless: str | None) -> Fetched | None:
        """See Backend. It is read again when it was written, or the folder swapped, in the middle of reading."""
        problem = self.where.explain(StoreUnavailable, FAILED, name, CHANGES)
        for _ in range(READ_ATTEMPTS):
            root = self.find_root()
            try:
                with self._open(root, name) as file:
                    return self._read_open(file, name, unless)
            except _Changed:
                continue
            except OSError as error:
                problem = self.explain_error(error, name)
                if not isinstance(problem, ModelNotFound):
                    break
        raise problem

    def read_version(self, name: ModelName) -> str:
        """See Backend."""
        try:
            with self._open(self.find_root(), name) as file:
                return _get_version(os.fstat(file))
        except OSError as error:
            raise self.explain_error(error, name) from error

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """See Backend. Links are followed within the folder; what cannot be read is left out."""
        root, folder = self.find_root(), prefix.rpartition("/")[0]
        if _find_inside(root, folder) is None:
            return
        for key in _walk_folder(root, folder, set()):
            if not key.startswith(prefix):
                continue
            target = _find_inside(root, key)
            with contextlib.suppress(OSError):  # removed meanwhile
                if target is not None and stat.S_ISREG((found := target.stat()).st_mode):
                    yield StoredObject(key, found.st_size, _get_version(found))

    def write(self, name: ModelName, data: bytes) -> str:
        """See Backend. The new file appears by rename; its folders are made."""
        root = self.find_root()
        target = root / name
        if not target.parent.resolve().is_relative_to(root):
            raise self.where.explain(StoreDenied, _LEAVES, name)
        staged = target.parent / f"{HIDDEN}{uuid.uuid4().hex}"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                staged.write_bytes(data)
                staged.replace(target)
            finally:
                staged.unlink(missing_ok=True)
            return _get_version(target.stat())
        except OSError as error:
            raise self.explain_error(error, name) from error

    def find_root(self) -> Path:
        """The folder behind all links. A store that is gone is no missing model: copies on disk are kept."""
        try:
            return self.path.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            cause = getattr(error, "strerror", None) or "a loop of links"
            raise self.where.explain(StoreUnavailable, "{where} does not exist: {cause}", "", cause) from error

    @contextlib.contextmanager
    def _open(self, root: Path, name: ModelName) -> Iterator[int]:
        """A descriptor of the file, which is a plain one. Raises OSError, ModelNotFound, StoreDenied."""
        try:
            target = (root / name).resolve(strict=True)
        except RuntimeError as error:
            raise self.where.explain(ModelNotFound, ABSENT, name, "a loop of links") from error
        if not target.is_relative_to(root):
            raise self.where.explain(StoreDenied, _LEAVES, name)
        if not stat.S_ISREG(target.stat().st_mode):
            raise self.where.explain(ModelNotFound, "{name} in {where} is not a file", name)
        file = open_beneath(root, target.relative_to(root).parts)
        try:
            yield file
        finally:
            os.close(file)

    def _read_open(self, file: int, name: ModelName, unless: str | None) -> Fetched | None:
        """The bytes of an open file. Raises OSError, _Changed, ArchiveTooLarge, ArchiveInvalid."""
        before = os.fstat(file)
        if unless == _get_version(before):
            return None
        check_size(before.st_size, self._max_archive_bytes, name, self.where)
        with os.fdopen(file, "rb", closefd=False) as reader:
            data = reader.read(before.st_size)
        if len(data) != before.st_size or _get_version(os.fstat(file)) != _get_version(before):
            raise _Changed
        return Fetched(data, _get_version(before))

    def explain_absence(self, name: str, cause: str) -> LoadError:
        """Why there is no such archive."""
        return self.where.explain(ModelNotFound, ABSENT, name, cause)

    def explain_error(self, error: OSError, name: str) -> LoadError:
        """What a failed call of the system is to those who asked for an archive."""
        cause = error.strerror or str(error)
        if error.errno in _ABSENCES:
            return self.explain_absence(name, cause)
        if isinstance(error, PermissionError):
            return self.where.explain(StoreDenied, _FORBIDDEN, name, cause)
        return self.where.explain(StoreUnavailable, FAILED, name, cause)


class _Changed(Exception):
    """The file was written while it was read."""


def open_folder(path: str, max_archive_bytes: int) -> FolderStore:
    """The store of a folder's path. Raises InvalidStoreUrl if there is no such folder."""
    folder = Path(path).expanduser().absolute()  # not resolved: a link may be swapped later
    if path and folder.exists() and not folder.is_dir():
        raise InvalidStoreUrl(f"{str(folder)!r} is a file, and a store is a folder of archives: name the folder")
    if not path or not folder.is_dir():
        raise InvalidStoreUrl(f"the model folder {str(folder)!r} does not exist; accepted are {ACCEPTED}")
    return FolderStore(folder, max_archive_bytes)


def open_beneath(root: Path | int, parts: Sequence[str], flags: int = 0) -> int:
    """A descriptor of what lies at `parts` below `root`, by no link; `flags` are for the last part. Raises OSError."""
    file = os.open(root, READ_FLAGS | os.O_DIRECTORY) if isinstance(root, Path) else os.dup(root)
    for at, part in enumerate(parts):
        folder = file
        try:
            file = os.open(part, READ_FLAGS | (flags if at == len(parts) - 1 else 0), dir_fd=folder)
        finally:
            os.close(folder)
    return file


def _find_inside(root: Path, key: str) -> Path | None:
    """The path behind all links, or None if it does not exist or is not in `root`."""
    try:
        target = (root / key).resolve(strict=True)
    except (OSError, RuntimeError):
        return None
    return target if target.is_relative_to(root) else None


def _walk_folder(root: Path, folder: str, followed: set[Path]) -> Iterator[str]:
    """The keys of all that is no folder. A folder is reached by links at most once, and never from within itself."""
    try:
        with os.scandir(root / folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError:  # removed meanwhile, or not readable
        return
    for entry in entries:
        if entry.name.startswith(HIDDEN):
            continue
        key = f"{folder}/{entry.name}" if folder else entry.name
        within = entry.is_dir(follow_symlinks=False) or _is_new_link(root, folder, key, followed)
        if within and len(key) <= MAX_NAME:
            yield from _walk_folder(root, key, followed)
        else:
            yield key


def _is_new_link(root: Path, folder: str, key: str, followed: set[Path]) -> bool:
    """Whether it is a link to a folder of the store that no link has led to yet; it is remembered."""
    if not (root / key).is_symlink():
        return False
    target, here = _find_inside(root, key), _find_inside(root, folder)
    if target is None or here is None or not target.is_dir() or here.is_relative_to(target) or target in followed:
        return False
    followed.add(target)
    return True


def _get_version(found: os.stat_result) -> str:
    """A new one for every change: writing in place with the old time of modification still moves `ctime`."""
    return f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_ctime_ns:x}-{found.st_size:x}"
