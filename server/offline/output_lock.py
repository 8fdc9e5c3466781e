"""Keeps two runs from writing one output at the same time. The second is refused, and told which run writes.

A local output is held by a lock on the file `OUT.lock`, which the kernel releases with the process. An output in S3 is
held by the object `OUT.lock` as well: a lease, which its run renews and which another may take when it has not been
renewed for LEASE_S. Times are the store's own, so that clocks need not agree. A lease is written on the condition that
its ETag is still the one that was read. AWS, MinIO and others check that; with a store that does not, two runs that
start in the same moment are not told apart. Where an ETag is a hash of the body, as MD5 is, a renewal does not change
it: the condition tells holders apart, not renewals, and a run whose lease was taken learns so when it renews next.
"""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import msgspec

SUFFIX = ".lock"
LEASE_S = 60.0  #: a lease is over when it has not been renewed for so long
RENEWALS = 4  #: within LEASE_S
MAX_HOLDER_BYTES = 500  #: of a lock file that are read
TAKEN = 412  #: the object is not the one that was read
TAKEN_MEANWHILE = 409  #: another write of it is under way
DENIED, UNKNOWN_HERE = 403, 501
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}  #: a file system without locks

log = logging.getLogger(__name__)  #: on standard error: these commands set up no logs of their own


class OutputInUse(ValueError):
    """Another run writes to the same output."""


class LeaseLost(ValueError):
    """The lease on an output in S3 could not be renewed in time, so that another run may write to it."""


def _describe_self() -> str:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {started}"


# --- a local output -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hold_file(out: Path) -> Iterator[None]:
    """Hold the output while the block lasts. Raises OutputInUse, OSError."""
    lock = out.with_name(out.name + SUFFIX)
    descriptor = _open_locked(lock, out)
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, _describe_self().encode(), 0)
        yield
    finally:
        lock.unlink(missing_ok=True)  # before the lock is released: the next holder makes a file of its own
        os.close(descriptor)


def _open_locked(lock: Path, out: Path) -> int:
    """A descriptor of the lock file that is locked, and still the file of that name. Raises OutputInUse, OSError."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, MAX_HOLDER_BYTES, 0).decode(errors="replace")
            os.close(descriptor)
            raise OutputInUse(_explain(str(out), holder)) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            log.warning("%s is not locked against other runs: its file system has no locks: %s", out, error)
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        os.close(descriptor)  # its holder has ended between our two calls, and removed it


def _explain(out: str, holder: str) -> str:
    return f"{out} is being written by {holder or 'another process'}: wait until it has ended, or write elsewhere"


# --- an output in S3 ------------------------------------------------------------------------------------------------


class Holder(msgspec.Struct):
    """What a lease's object says."""

    holder: str
    token: str  #: of one run


class Lease:
    """Held from `take` to `release`, and renewed by a thread of its own. Both use `client`, which is boto3's.

    `own` is a local file with the token, which only one process uses at a time. A run that was killed is known by it:
    the same command takes its lease over at once.
    """

    def __init__(self, client: Any, bucket: str, key: str, own: Path, lease_s: float = LEASE_S) -> None:
        self._client, self._object = client, {"Bucket": bucket, "Key": key + SUFFIX}
        self._out, self._own, self._lease_s = f"s3://{bucket}/{key}", own, lease_s
        self._body = msgspec.json.encode(Holder(_describe_self(), uuid.uuid4().hex))
        self._version = ""  # ETag of what we have written last
        self._renewed_at = 0.0
        self._ended, self._writing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __repr__(self) -> str:
        """For example `<Lease of s3://answers/today.jsonl held>`."""
        return f"<Lease of {self._out} {'held' if self._version else 'not held'}>"

    def take(self) -> None:
        """Take it, or go on without where the store lets us read or write none.

        Raises OutputInUse, and botocore's errors.
        """
        before = self._own.read_text() if self._own.exists() else ""
        try:
            condition = self._find_condition(before)
            self._own.write_text(msgspec.json.decode(self._body, type=Holder).token)
            self._write(condition)
        except Exception as error:
            if _status(error) in (TAKEN, TAKEN_MEANWHILE) or _is_missing(error):
                raise OutputInUse(_explain(self._out, "a run that has started in this moment")) from error
            if _status(error) not in (DENIED, UNKNOWN_HERE):
                raise
            log.warning("%s is not locked against other runs: %s: %s", self._out, self._object["Key"], error)
        else:
            self._thread.start()

    def _find_condition(self, before: str) -> dict[str, str]:
        """The condition of a write that takes the lease. Raises OutputInUse where another run holds it."""
        try:
            found = self._client.get_object(**self._object)
        except Exception as error:
            if _is_missing(error):
                return {"IfNoneMatch": "*"}
            raise
        now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
        age_s = (now - found["LastModified"]).total_seconds()
        try:
            held = msgspec.json.decode(found["Body"].read(MAX_HOLDER_BYTES), type=Holder)
        except msgspec.MsgspecError:
            held = Holder("another program", "")
        if age_s < self._lease_s and not (before and held.token == before):
            left = f"{self._lease_s - age_s:.0f} s from now unless it goes on"
            raise OutputInUse(_explain(self._out, f"{held.holder} (its lease {self._object['Key']} ends {left})"))
        return {"IfMatch": found["ETag"]}

    def require(self) -> None:
        """Renew it now. Raises LeaseLost where another run may write to the output."""
        if not self._version:
            return
        try:
            with self._writing:
                self._write({"IfMatch": self._version})
        except Exception as error:
            if _status(error) == TAKEN or _is_missing(error) or time.monotonic() - self._renewed_at >= self._lease_s:
                message = f"{self._out}: this run has lost its lease {self._object['Key']}, another may write there now"
                raise LeaseLost(f"{message}: {error}") from error

    def release(self) -> None:
        """Let others have the output."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            with contextlib.suppress(Exception):  # it then ends by itself
                self.require()
                self._client.delete_object(**self._object)
        self._own.unlink(missing_ok=True)

    def _write(self, condition: dict[str, str]) -> None:
        version = self._client.put_object(**self._object, Body=self._body, **condition)["ETag"]
        self._version, self._renewed_at = version, time.monotonic()

    def _keep(self) -> None:
        while not self._ended.wait(self._lease_s / RENEWALS):
            with contextlib.suppress(Exception):  # `require` says it before anything is written
                self.require()


def _status(error: Exception) -> int:
    """The HTTP status of one of botocore's errors; 0 for any other."""
    return int(_reply(error).get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _is_missing(error: Exception) -> bool:
    """Whether the object is not there. A bucket that is not there is another error."""
    return _reply(error).get("Error", {}).get("Code") in ("NoSuchKey", "404")


def _reply(error: Exception) -> dict[str, Any]:
    reply = getattr(error, "response", None)
    return reply if isinstance(reply, dict) else {}


@contextlib.contextmanager
def hold_object(client: Any, bucket: str, key: str, own: Path, lease_s: float = LEASE_S) -> Iterator[Lease]:
    """Hold the output while the block lasts; `own` is a local file of this output that is held by `hold_file`.

    Raises OutputInUse, or botocore's errors where the store cannot be reached.
    """
    lease = Lease(client, bucket, key, own, lease_s)
    lease.take()
    try:
        yield lease
    finally:
        lease.release()
