"""Files of the disk tier: written by rename, read only where they are plain files of a bounded size."""

import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from model_store.lazy_log import log
from model_store.names import ModelName


def hash_key(source: str, name: ModelName) -> str:
    """The name of the files of an archive."""
    return hashlib.sha256(f"{source}\n{name}".encode()).hexdigest()


def write_file(path: Path, data: bytes, temp: Path) -> None:
    """Write the file atomically, by way of the folder `temp` of the same disk. Raises OSError.

    A load writes two or three files, and a thousand models may be loaded at once: so folders are made only when they
    are missed, and the draft's name is drawn once.
    """
    try:
        _write_file(path, data, temp)
    except FileNotFoundError:
        temp.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_file(path, data, temp)


def _write_file(path: Path, data: bytes, temp: Path) -> None:
    draft = f"{temp}/{secrets.token_hex(12)}"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(fd, rest) :]
        finally:
            os.close(fd)
        os.replace(draft, path)  # noqa: PTH105 -- a path object costs more than the call
    except BaseException:
        remove_file(Path(draft))
        raise


def read_file(path: Path, most: int) -> bytes:
    """A plain file of at most `most` bytes. Raises OSError for a longer one, a link, and what is no file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            raise OSError(f"{path} is not a plain file of at most {most} bytes")
        data = os.read(fd, found.st_size)
        while len(data) < found.st_size and (more := os.read(fd, found.st_size - len(data))):
            data += more
        return data
    finally:
        os.close(fd)


def iterate_files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files of a folder. Another process may change or remove the folder meanwhile."""
    try:
        paths = list(folder.iterdir())
    except OSError:
        return
    for path in paths:
        try:
            yield path, path.lstat()
        except OSError:
            continue


def remove_file(path: Path) -> None:
    """Remove the file, if it is there. A disk that refuses is logged."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("disk_remove_failed", file=str(path), error=str(error))
