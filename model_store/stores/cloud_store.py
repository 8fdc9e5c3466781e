"""Object stores read and written by obstore: all of GCS and Azure, and what S3 has in common with them.

Only obstore's synchronous calls are used (they release the GIL): after asynchronous use the interpreter may abort at
exit. A process that has used a store must not fork. Runs on loader threads.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import (
    BaseError,
    NotModifiedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from model_store.errors import LoadError, ModelNotFound, StoreUnavailable
from model_store.names import ModelName
from model_store.stores.backend import (
    ABSENT,
    CHANGES,
    CUT,
    FAILED,
    READ_ATTEMPTS,
    Fetched,
    StoredObject,
    Where,
    check_size,
    digest_version,
    explain_reply,
    strip_tag,
)

if TYPE_CHECKING:
    from obstore import GetOptions  # exists in the stubs only

ONE_REQUEST_BYTES = 8 << 20  # the size of one GET; a larger archive takes several ranges of this size
PARALLEL_RANGES = 8
LIST_PAGE = 1000
# What obstore says of answers that HTTP allows, but that it does not read.
_UNREAD_REPLIES = (
    "non-partial response",
    "Content-Range header not present",
    "Content-Length Header missing",
    "Invalid last modified",
)
_HANDSHAKE = re.compile(r"kind: InvalidData,\s+error: (?:InvalidCertificate\(\s*)?(\w+)")  # by rustls' names


class UnreadReply(StoreUnavailable):
    """The server's answer is allowed by HTTP, such as one without Content-Length, but obstore does not read it."""


class CloudStore:
    """See Backend. `store` is one of obstore's, under the prefix; `trusted` names the certificates, for messages."""

    def __init__(self, store: Any, where: Where, max_archive_bytes: int, trusted: str) -> None:
        self.where = where
        self._store = store
        self._max_archive_bytes = max_archive_bytes
        self.trusted = trusted

    def __repr__(self) -> str:
        return f"<CloudStore {self.where.full}>"

    def read(self, name: ModelName, unless: str | None) -> Fetched | None:
        """See Backend. Raises UnreadReply, too."""
        with self._explained(name):
            for _ in range(READ_ATTEMPTS):
                try:
                    found = self._read_once(name, unless)
                except NotModifiedError:
                    return None
                except (PreconditionError, _Replaced):  # replaced between two ranges: read the new one
                    unless = None
                else:
                    return None if unless and found.version == unless else found
            raise self.where.explain(StoreUnavailable, FAILED, name, CHANGES)

    def _read_once(self, name: ModelName, unless: str | None) -> Fetched:
        options: GetOptions = {"range": (0, ONE_REQUEST_BYTES)}
        if unless:
            options["if_none_match"] = f'"{unless}"'
        reply = obstore.get(self._store, name, options=options)
        size = reply.meta["size"]
        check_size(size, self._max_archive_bytes, name, self.where)
        head = reply.bytes().to_bytes()
        if size > len(head):
            head += b"".join(self._read_ranges(name, len(head), reply.meta))
        return Fetched(head, _get_version(reply.meta) or digest_version(head))

    def _read_ranges(self, name: ModelName, start: int, first: Any) -> Iterator[bytes]:
        """The rest of the object whose first reply's meta is `first`.

        INVARIANT: all ranges are of one version. The server compares a strong ETag (If-Match never matches a weak one,
        RFC 9110 13.1.1); for a weak one, or none, we compare what each reply says of the object.
        """
        size = first["size"]

        def read(offset: int) -> bytes:
            options: GetOptions = {"range": (offset, min(offset + ONE_REQUEST_BYTES, size))}
            if first["e_tag"] and not first["e_tag"].startswith("W/"):
                options["if_match"] = first["e_tag"]
            reply = obstore.get(self._store, name, options=options)
            if _identify(reply.meta) != _identify(first):
                raise _Replaced
            return reply.bytes().to_bytes()

        with ThreadPoolExecutor(PARALLEL_RANGES, "archive-range") as pool:
            yield from pool.map(read, range(start, size, ONE_REQUEST_BYTES))

    def read_version(self, name: ModelName) -> str:
        """See Backend."""
        with self._explained(name):
            return _get_version(obstore.head(self._store, name))

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """See Backend. obstore ends a listing at a key that its own paths cannot have, such as one with `//`."""
        with self._explained(prefix):
            for page in obstore.list(self._store, prefix.rpartition("/")[0] or None, chunk_size=LIST_PAGE):
                for entry in page:
                    yield StoredObject(entry["path"], entry["size"], _get_version(entry))

    def write(self, name: ModelName, data: bytes) -> str:
        """See Backend."""
        with self._explained(name):
            return _get_version(obstore.put(self._store, name, data)) or digest_version(data)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Translate obstore's exceptions into those of `model_store.errors`."""
        try:
            yield
        except (BaseError, OSError) as error:
            raise self._translate(error, name) from error

    def _translate(self, error: Exception, name: str) -> LoadError:
        """Our exception for one of obstore. Some situations are a GenericError that only its text distinguishes."""
        text = str(error)
        if any(said in text for said in _UNREAD_REPLIES):
            return self.where.explain(UnreadReply, FAILED, name, _find_cause(error))
        if handshake := _HANDSHAKE.search(text):
            return explain_tls(handshake[1], self.trusted, name, self.where)
        denied = isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError)
        status = re.search(r"status code: (\d{3})", text)
        code = re.search(r"<Code>(\w+)</Code>", text)
        found = code[1] if code else ""
        if isinstance(error, FileNotFoundError) and found != "NoSuchBucket":
            return self.where.explain(ModelNotFound, ABSENT, name, _find_cause(error))
        if "InvalidRange" in text:
            found = "InvalidRange"
        number = "403" if denied else status[1] if status else ""
        return explain_reply(number, found, _find_cause(error), name, self.where)


class _Replaced(Exception):
    """Two ranges are of different versions."""


def explain_tls(cause: str, trusted: str, name: str, where: Where) -> LoadError:
    """The error for a TLS handshake that failed. `trusted` says which certificates are trusted."""
    advice = "to trust a private CA set AWS_CA_BUNDLE, the profile's `ca_bundle` or SSL_CERT_FILE to its PEM file"
    return where.explain(
        StoreUnavailable, FAILED, name, f"the TLS handshake failed ({cause}); trusted are {trusted}; {advice}"
    )


def make_client_options(timeout_s: float, retries: int) -> dict[str, Any]:
    """Options of obstore's client. Connecting may take a quarter of the time, so that a retry can follow."""
    return {
        "client_options": {
            "timeout": timedelta(seconds=timeout_s),
            "connect_timeout": timedelta(seconds=timeout_s / 4),
        },
        "retry_config": {
            "max_retries": retries,
            "retry_timeout": timedelta(seconds=timeout_s),
            "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=2), "base": 2},
        },
    }


def _get_version(meta: Any) -> str:
    return strip_tag(meta["e_tag"]) or str(meta["version"] or "")


def _identify(meta: Any) -> tuple[object, ...]:
    """What tells two versions of an object apart."""
    return _get_version(meta), meta["size"], meta["last_modified"]


def _find_cause(error: Exception) -> str:
    """The cause in obstore's message, which also contains the whole reply and a debug print of many lines."""
    text = str(error)
    head, _, debug = text.partition("\n\nDebug source:")
    retries = re.search(r"after (\d+) retries", head)
    tries = f" after {retries[1]} retries" if retries else ""
    code = re.search(r"<Code>(\w+)</Code>", head)
    if status := re.search(r"status code: (\d{3}[\w ]*)", head):
        return f"{status[1].strip()}{f' ({code[1]})' if code else ''}{tries}"
    if system := re.search(r'message: "([^"]+)"', debug):
        return system[1] + tries
    if "TimedOut" in debug:
        return f"timed out{tries}"
    if "IncompleteMessage" in debug or "IncompleteBody" in debug:
        return f"{CUT}{tries}"
    return head.rpartition(" - ")[2][:300] + tries
