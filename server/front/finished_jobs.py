"""Answers that a client fetches later by a job's number: files in the server's own folder, so that any front has them.

A job here is done before its number is given: what goes wrong is the answer to the request itself. Files are as many
and as large as the bounds say and live for `KEEP_S`; they are gone when the server is. Runs in a front, on threads.
"""

import asyncio
import contextlib
import os
import re
import secrets
import time
from hashlib import blake2b
from pathlib import Path

from server.errors import Refused, Situation
from server.ipc.sockets import make_private_folder

KEEP_S = 600.0
MOST_BYTES = 256 * 1024 * 1024  #: of all answers together
MOST_JOBS = 10_000
RETRY_MS = 10_000
NUMBER_BYTES = 16
_NUMBER = re.compile(r"[A-Za-z0-9_-]{22}")
_SUFFIX, _NEW = ".json", ".new"


class FinishedJobs:
    """The answers of one server. Fronts share the folder, and own no state of it beside."""

    def __init__(
        self, folder: Path | None, most_bytes: int = MOST_BYTES, most_jobs: int = MOST_JOBS, keep_s: float = KEEP_S
    ) -> None:
        """`folder`: None for a listener that keeps none."""
        self._folder, self._most_bytes, self._most_jobs, self._keep_s = folder, most_bytes, most_jobs, keep_s

    def __repr__(self) -> str:
        return f"<FinishedJobs in {self._folder}>"

    async def keep(self, client: str, answer: bytes) -> str:
        """Keep an answer for this client; its job's number. Raises Refused while others take all the room."""
        number = secrets.token_urlsafe(NUMBER_BYTES)
        await asyncio.to_thread(self._write, client, number, answer)
        return number

    async def read(self, client: str, number: str) -> bytes | None:
        """The answer; None for a number that is none of this client's, or too old."""
        path = self._find(client, number)
        return None if path is None else await asyncio.to_thread(self._read, path)

    async def drop(self, client: str, number: str) -> bool:
        """Forget an answer; whether there was one."""
        path = self._find(client, number)
        return path is not None and await asyncio.to_thread(_remove, path)

    def _find(self, client: str, number: str) -> Path | None:
        """INVARIANT: the name of a file is made of client and number, so that nobody else's number finds it."""
        if self._folder is None or _NUMBER.fullmatch(number) is None:
            return None
        name = blake2b(f"{client}\0{number}".encode(), digest_size=16).hexdigest()
        return self._folder / f"{name}{_SUFFIX}"

    def _write(self, client: str, number: str, answer: bytes) -> None:
        path = self._find(client, number)
        if path is None or self._folder is None:
            raise Refused(Situation.NOT_READY, "this listener keeps no jobs")
        make_private_folder(self._folder)
        self._require_room(len(answer))
        new = path.with_suffix(_NEW)
        new.write_bytes(answer)
        new.rename(path)

    def _require_room(self, size: int) -> None:
        """Remove what is too old. Raises Refused where the rest leaves no room."""
        assert self._folder is not None
        count, held, oldest = 0, 0, time.time() - self._keep_s
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):  # another front removes it too
                found = entry.stat()
                if found.st_mtime < oldest:
                    _remove(Path(entry.path))
                    continue
                count, held = count + 1, held + found.st_size
        if count >= self._most_jobs or held + size > self._most_bytes:
            message = f"finished jobs that nobody has fetched take all the room; they are kept for {self._keep_s:g} s"
            raise Refused(Situation.OVERLOADED, message, retry_ms=RETRY_MS)

    def _read(self, path: Path) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime >= time.time() - self._keep_s:
                return path.read_bytes()
        return None


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True
