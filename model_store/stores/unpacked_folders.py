"""Folders as archives: SageMaker unpacks what it has downloaded before it names it. Runs on loader threads.

A folder of the store is the archive of its files, packed when it is read. One that holds a single archive and nothing
else stands for that archive.

INVARIANT: no link is followed, so that nothing outside the folder is read; a folder that holds one is refused.
"""

import contextlib
import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from model_store.errors import ArchiveInvalid, ArchiveTooLarge, StoreUnavailable
from model_store.names import ModelName, is_left_by_desktop
from model_store.stores.backend import CHANGES, FAILED, READ_ATTEMPTS, Fetched, StoredObject, check_size
from model_store.stores.folder_store import READ_FLAGS, FolderStore, open_beneath

ARCHIVE_ENDS = (".mar", ".tar.gz", ".tgz", ".zip")
MAX_FILES = 4096  #: of a folder, as many as an archive may have entries
MAX_PATH = 500  #: characters of a file's path below the folder
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class FolderFile:
    """One file of an unpacked archive. `stamp` is another one after every change."""

    path: str
    size: int
    stamp: str


class UnpackedStore:
    """See Backend. `alone`: the store's folder itself is the only archive, under this name.

    A file of the store that is an archive is read as it is.
    """

    def __init__(self, files: FolderStore, max_archive_bytes: int, alone: ModelName | None = None) -> None:
        self._files, self._max_archive_bytes, self._alone = files, max_archive_bytes, alone

    def __repr__(self) -> str:
        return f"<UnpackedStore of {self._files!r}>"

    def read(self, name: ModelName, unless: str | None) -> Fetched | None:
        """See Backend. It is packed again when a file was changed in the middle."""
        for _ in range(READ_ATTEMPTS):
            with self._open_folder(name) as folder:
                if folder is None:
                    return self._files.read(name, unless)
                try:
                    found = self._list_files(folder, name)
                    only = _find_only_archive(found)
                    if only is not None:
                        return self._files.read(self._name_file(name, only), unless)
                    version = _digest(found)
                    if version == unless:
                        return None
                    data = _pack(folder, found)
                    if _digest(self._list_files(folder, name)) == version:
                        return Fetched(data, version)
                except OSError as error:
                    raise self._files.explain_error(error, name) from error
        raise self._files.where.explain(StoreUnavailable, FAILED, name, CHANGES)

    def read_version(self, name: ModelName) -> str:
        """See Backend."""
        with self._open_folder(name) as folder:
            if folder is None:
                return self._files.read_version(name)
            try:
                found = self._list_files(folder, name)
            except OSError as error:
                raise self._files.explain_error(error, name) from error
            only = _find_only_archive(found)
            return _digest(found) if only is None else self._files.read_version(self._name_file(name, only))

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """See Backend. Files alone: which of the folders are archives is said by those who ask for them."""
        return self._files.list(prefix)

    def write(self, name: ModelName, data: bytes) -> str:
        """See Backend."""
        return self._files.write(name, data)

    @contextlib.contextmanager
    def _open_folder(self, name: ModelName) -> Iterator[int | None]:
        """A descriptor of the folder; None where the name is a file's. Raises LoadError."""
        if self._alone is not None and name != self._alone:
            raise self._files.explain_absence(name, f"this server has one model, {self._alone}")
        root = self._files.find_root()
        try:
            place = root if self._alone is not None else (root / name).resolve(strict=True)
            inside = place.is_relative_to(root) and stat.S_ISDIR(place.stat().st_mode)
            folder = open_beneath(root, place.relative_to(root).parts, os.O_DIRECTORY) if inside else None
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
            known = error if isinstance(error, OSError) else OSError(str(error))
            raise self._files.explain_error(known, name) from error
        try:
            yield folder
        finally:
            if folder is not None:
                os.close(folder)

    def _name_file(self, name: ModelName, file: FolderFile) -> ModelName:
        return ModelName(file.path if self._alone is not None else f"{name}/{file.path}")

    def _list_files(self, folder: int, name: ModelName) -> Sequence[FolderFile]:
        """The files, sorted. Raises OSError, ArchiveInvalid, ArchiveTooLarge."""
        found = sorted(_walk(folder, "", [], name), key=lambda file: file.path)
        if not found:
            raise self._files.explain_absence(name, "its folder has no file")
        check_size(sum(file.size for file in found), self._max_archive_bytes, name, self._files.where)
        return found


def _walk(folder: int, prefix: str, found: list[FolderFile], name: str) -> list[FolderFile]:
    """Add the files below the folder to `found`, which is bounded. Raises OSError, ArchiveInvalid, ArchiveTooLarge."""
    with os.scandir(folder) as entries:
        for entry in entries:
            path = f"{prefix}{entry.name}"
            if is_left_by_desktop(path):
                continue
            if len(found) >= MAX_FILES or len(path) > MAX_PATH:
                raise ArchiveTooLarge(f"{name}: its folder has more than {MAX_FILES} files, or a path is too long")
            if entry.is_dir(follow_symlinks=False):
                inner = os.open(entry.name, READ_FLAGS | os.O_DIRECTORY, dir_fd=folder)
                try:
                    _walk(inner, f"{path}/", found, name)
                finally:
                    os.close(inner)
            elif entry.is_file(follow_symlinks=False):
                about = entry.stat(follow_symlinks=False)
                stamp = f"{about.st_ino:x}-{about.st_mtime_ns:x}-{about.st_ctime_ns:x}"
                found.append(FolderFile(path, about.st_size, stamp))
            else:
                raise ArchiveInvalid(f"{name}: {path!r} is a link or no file: put the file itself there")
    return found


def _find_only_archive(files: Sequence[FolderFile]) -> FolderFile | None:
    only = files[0] if len(files) == 1 else None
    return only if only is not None and "/" not in only.path and only.path.endswith(ARCHIVE_ENDS) else None


def _digest(files: Sequence[FolderFile]) -> str:
    """The version of a folder: another one after every change of a file."""
    text = "\n".join(f"{file.path}\0{file.size}\0{file.stamp}" for file in files)
    return "folder-" + hashlib.blake2b(text.encode(errors="replace"), digest_size=_DIGEST_BYTES).hexdigest()


def _pack(folder: int, files: Sequence[FolderFile]) -> bytes:
    """A zip of the files as they are, none compressed. A file that has grown is cut. Raises OSError."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for file in files:
            opened = open_beneath(folder, file.path.split("/"))
            with os.fdopen(opened, "rb") as reader:
                entry = zipfile.ZipInfo(file.path.encode(errors="replace").decode())
                entry.external_attr = 0o600 << 16
                archive.writestr(entry, reader.read(file.size))
    return packed.getvalue()
