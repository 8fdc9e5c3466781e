"""What a kind of store does for `Source`, its records, and the messages that all kinds share."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from model_store.errors import (
    ArchiveInvalid,
    ArchiveTooLarge,
    LoadError,
    ModelNotFound,
    StoreDenied,
    StoreUnavailable,
)
from model_store.names import ModelName

MAX_ARCHIVE_BYTES = 1 << 30
ACCEPTED = "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///folder or a folder's path"
READ_ATTEMPTS = 3  # of an archive that is replaced or damaged while it is read
# Codes that S3 sends with status 400 although they mean 401 or 403.
DENIED_CODES = {"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"}
#: What is wrong, as `Where.explain` takes it.
ABSENT, FAILED = "{name} is not in {where}: {cause}", "{where} failed for {name!r}: {cause}"
CHANGES = "it was replaced each time that it was read; load it again when its upload has ended"
CUT = "the connection was cut"


class InvalidStoreUrl(ValueError):
    """The URL is no store that can be opened; the message says what is accepted."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """An archive from the store. `version`: the ETag without quotes, the store's object version, or a digest."""

    data: bytes
    version: str

    def is_whole(self) -> bool:
        """Whether the bytes certainly are those of the store: many ETags are their MD5, but not all. Hashes them."""
        return self.version == hashlib.md5(self.data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object of a listing. `key` is relative to the store's prefix and may be no model name."""

    key: str
    bytes: int
    version: str


@dataclass(frozen=True, slots=True)
class Where:
    """A store in messages: `full` for logs (a path, or the URL and for S3 the endpoint), `kind` for clients."""

    full: str
    kind: str

    def explain(self, error: type[LoadError], text: str, name: str, cause: str = "") -> LoadError:
        """The error with both messages: `text` with `{name}`, `{where}` and `{cause}`.

        A cause with a slash may be or hold a path, and is for logs alone.
        """
        public = "the server's log says why" if "/" in cause else cause
        return error(
            text.format(name=name, where=self.full, cause=cause), text.format(name=name, where=self.kind, cause=public)
        )


class Backend(Protocol):
    """One kind of store under one prefix. Thread-safe. Every method raises LoadErrors that name store and cause."""

    def read(self, name: ModelName, unless: str | None) -> Fetched | None:
        """The whole object, of one version; None if its version is still `unless`. See `Source.get`."""

    def read_version(self, name: ModelName) -> str:
        """The object's version, by a request without a body. See `Source.read_version`."""

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """The objects whose relative keys start with `prefix`, lazily, in any order."""

    def write(self, name: ModelName, data: bytes) -> str:
        """Store the object atomically in place of any older one. Returns the new version."""


def check_size(size: int, limit: int, name: str, where: Where) -> None:
    """Raises ArchiveTooLarge and, for no bytes at all, ArchiveInvalid."""
    if size > limit:
        raise where.explain(
            ArchiveTooLarge, f"{{name}} in {{where}} has {size} bytes, more than the limit of {limit}", name
        )
    if size == 0:
        raise make_empty(name, where)


def make_empty(name: str, where: Where) -> LoadError:
    """The error for an object without bytes."""
    return where.explain(ArchiveInvalid, "{name} in {where} is empty", name)


def strip_tag(tag: str | None) -> str:
    """An ETag without quotes and without the mark of a weak one."""
    return (tag or "").removeprefix("W/").strip('"')


def digest_version(data: bytes) -> str:
    """The version of an object whose store gives it neither an ETag nor a version."""
    return f"sha256-{hashlib.sha256(data).hexdigest()[:32]}"


def explain_reply(status: str, code: str, cause: str, name: str, where: Where) -> LoadError:
    """The error for a store's answer: its HTTP status and, for S3, its code; each may be empty."""
    if status in ("401", "403") or code in DENIED_CODES:
        what = (
            "{where} refuses {name!r}: {cause}. Either the credentials are wrong or lack permission, or the key does "
            "not exist and they may not list the bucket (S3 then answers 403, not 404)"
        )
        return where.explain(StoreDenied, what, name, cause)
    if code == "NoSuchBucket":  # not "model not found": that would forget good copies on disk
        return where.explain(StoreUnavailable, "{where} does not exist: {cause}", name, cause)
    if status == "404" or code in ("NoSuchKey", "KeyTooLongError"):
        return where.explain(ModelNotFound, ABSENT, name, cause)
    if status == "416" or code == "InvalidRange":
        return make_empty(name, where)
    return where.explain(StoreUnavailable, FAILED, name, cause)
