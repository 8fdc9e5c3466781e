"""The accepted asynchronous invocations of one server, in files, so that they outlive the front that accepted them.

Every front has a folder of its own in the server's, and holds the lock of it, which the kernel releases with the
process. A job is a file in its front's folder. When a front has died another takes its jobs over, or its successor.
INVARIANT: a job lies in one folder, and only who holds the lock of that folder works on it.

What a job comes to, an answer or a failure, is written here before it is written to the bucket. INVARIANT: there is one
outcome for a job: whoever takes over a job that has one writes the same bytes again.

Admission, takeovers and what they count are under one more lock. All functions wait for the disk: they run on threads.
"""

import contextlib
import fcntl
import hashlib
import os
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from model_store.names import ModelName
from server.errors import Refused, Situation
from server.front.asynchronous.calls import AsyncCall
from server.temporary_folders import LOCK_FILE, hold_if_unused, hold_lock

ADMISSION_S = 2.0  #: longest wait for the lock that fronts hold for a moment
_JOB, _OUTCOME = ".job", ".outcome"
_FRONT = "front-"


class JobRecord(msgspec.Struct, frozen=True):
    """One accepted invocation. `accepted`: on the monotonic clock (s), which the host's processes share.

    `client`: see InferRequest. `token`: the name of its token, empty where it showed none.
    """

    call: AsyncCall
    model: ModelName
    body: bytes
    accepted: float
    request_id: bytes = b""
    client: str = ""
    token: str = ""


class Outcome(msgspec.Struct, frozen=True):
    """What is written to the bucket: the model's answer, or why there is none."""

    answered: bool
    data: bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """A job's file, whose name says what admission counts. `client` and `key` (of the output) are digests.

    `tries`: how many fronts have had it.
    """

    client: str
    key: str
    tries: int
    id: str

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.client}.{self.key}.{self.tries}.{self.id}{_JOB}"


class Journal:
    """See the module. `most` jobs are under way in the server, `most_per_client` of them of one known client."""

    def __init__(self, folder: Path, most: int, most_per_client: int) -> None:
        """The folder is the server's, and private. Raises OSError."""
        self._folder, self._most, self._most_per_client = folder, most, most_per_client
        self._outcomes = folder / "outcomes"
        self._outcomes.mkdir(mode=0o700, exist_ok=True)
        self._own = Path(tempfile.mkdtemp(prefix=_FRONT, dir=folder))
        self._lock, self._deciding = hold_lock(self._own), threading.Lock()

    def __repr__(self) -> str:
        """For example `<Journal front-k2j3, at most 1024 jobs>`."""
        return f"<Journal {self._own.name}, at most {self._most} jobs>"

    def close(self) -> None:
        """Leave the jobs to others, as a front that dies does."""
        os.close(self._lock)

    def write(self, record: JobRecord) -> Entry:
        """Keep a job. Raises Refused where there are too many, where its output is another's, or nothing can be kept.

        Whoever accepts it says so to its client only then.
        """
        client = _digest(record.client) if record.client else "open"
        entry = Entry(client, _digest(record.call.output), 1, uuid.uuid4().hex)
        try:
            with self._admission():
                self._check_room(entry, record.client)
                self._keep_folder()
                _write_whole(self._own / entry.name, msgspec.msgpack.encode(record))
        except OSError as error:
            message = f"the request cannot be kept ({error.strerror}): see the server's folder of temporary files"
            raise Refused(Situation.NOT_READY, message) from error
        return entry

    def read(self, entry: Entry) -> JobRecord:
        """The job. Raises Refused where its file is gone or broken."""
        try:
            return msgspec.msgpack.decode((self._own / entry.name).read_bytes(), type=JobRecord)
        except (OSError, msgspec.MsgspecError) as error:
            raise Refused(Situation.INTERNAL, "the request was lost with the server's temporary files") from error

    def decide(self, entry: Entry, outcome: Outcome) -> Outcome:
        """Keep what the job has come to. Returns what is written to the bucket: an earlier outcome, if there is one."""
        with self._deciding:  # a thread of a job that was cancelled may still be here
            found = self.find_outcome(entry)
            if found is None:
                with contextlib.suppress(OSError):  # the disk is full: the outcome lives as long as this front
                    _write_whole(self._outcomes / f"{entry.id}{_OUTCOME}", msgspec.msgpack.encode(outcome))
            return outcome if found is None else found

    def find_outcome(self, entry: Entry) -> Outcome | None:
        """What the job had come to with a front before."""
        try:
            return msgspec.msgpack.decode((self._outcomes / f"{entry.id}{_OUTCOME}").read_bytes(), type=Outcome)
        except (OSError, msgspec.MsgspecError):
            return None

    def remove(self, entry: Entry) -> None:
        """The job is done. INVARIANT: the job goes before its outcome, so that no job loses the one it had."""
        for path in (self._own / entry.name, self._outcomes / f"{entry.id}{_OUTCOME}"):
            with contextlib.suppress(OSError):
                path.unlink()

    def adopt(self) -> list[Entry]:
        """Take over the jobs of fronts that have died."""
        adopted = list[Entry]()
        dead = [each for each in self._folder.glob(f"{_FRONT}*") if each != self._own and _is_abandoned(each)]
        if not dead:
            return adopted
        with self._admission():
            for folder in dead:
                with contextlib.suppress(OSError), hold_if_unused(folder / LOCK_FILE) as unused:
                    if unused:
                        self._take_over(folder, adopted)
            self._remove_orphans()
        return adopted

    def _take_over(self, folder: Path, adopted: list[Entry]) -> None:
        for entry in _list_entries(folder):
            ours = replace(entry, tries=entry.tries + 1)
            (folder / entry.name).rename(self._own / ours.name)
            adopted.append(ours)
        for path in folder.iterdir():  # the lock, and what was half written
            path.unlink()
        folder.rmdir()

    def _remove_orphans(self) -> None:
        """Remove outcomes whose jobs were done when their front died."""
        kept = {entry.id for entry in self._list_all()}
        for path in self._outcomes.iterdir():
            if path.name.partition(".")[0] not in kept:
                path.unlink(missing_ok=True)

    def _check_room(self, entry: Entry, client: str) -> None:
        """Raises Refused where the server has too many jobs, or its client; or a job under way has the same output."""
        entries = list(self._list_all())
        if len(entries) >= self._most:
            message = f"{self._most} asynchronous requests wait or run already (async_jobs); try again later"
            raise Refused(Situation.OVERLOADED, message)
        if client and Counter(each.client for each in entries)[entry.client] >= self._most_per_client:
            message = f"{client} has {self._most_per_client} asynchronous requests that wait or run already"
            raise Refused(Situation.OVERLOADED, f"{message} (async_jobs_per_client); try again later")
        if any(each.key == entry.key for each in entries):
            message = "a request that waits or runs already answers to the same place; give another Filename"
            raise Refused(Situation.BAD_REQUEST, message)

    def _list_all(self) -> Iterator[Entry]:
        """All jobs of the server, whoever has them."""
        for folder in self._folder.glob(f"{_FRONT}*"):
            with contextlib.suppress(OSError):  # taken over meanwhile by nobody: that is under the same lock
                yield from _list_entries(folder)

    def _keep_folder(self) -> None:
        """Make the folder anew should a cleaner of old files have removed it, or its lock."""
        if not (self._own / LOCK_FILE).exists():
            self._own.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._outcomes.mkdir(mode=0o700, exist_ok=True)
            os.close(self._lock)
            self._lock = hold_lock(self._own)

    @contextlib.contextmanager
    def _admission(self) -> Iterator[None]:
        """Alone among the server's fronts. Raises OSError where another, which may be stopped, does not let go."""
        lock = os.open(self._folder / "admission", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            _wait_for_lock(lock)
            yield
        finally:
            os.close(lock)


def _wait_for_lock(lock: int) -> None:
    until = time.monotonic() + ADMISSION_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.002)
        else:
            return


def _is_abandoned(folder: Path) -> bool:
    """Whether nobody holds its lock. A folder without one belongs to a front that is just starting."""
    try:
        with hold_if_unused(folder / LOCK_FILE) as unused:
            return unused
    except OSError:
        return False


def _list_entries(folder: Path) -> Iterator[Entry]:
    for path in folder.iterdir():
        if path.suffix == _JOB:
            client, key, tries, ident = path.stem.split(".")
            yield Entry(client, key, int(tries), ident)


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there as a whole or not at all. Raises OSError, and nothing is left then."""
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_bytes(data)
        new.rename(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
