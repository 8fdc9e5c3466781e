"""Object stores: one interface over `s3://`, `gs://`, `az://` and a local folder. Runs on loader threads.

Only obstore's synchronous calls are used (they release the GIL): after asynchronous use the interpreter may abort at
exit. A process that has used a source must not fork.
"""

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import (
    BaseError,
    NotModifiedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, S3Store, from_url

from model_store.errors import ArchiveInvalid, ArchiveTooLarge, LoadError, ModelNotFound, StoreDenied, StoreUnavailable
from model_store.names import InvalidModelName, ModelName, parse_model_name

if TYPE_CHECKING:
    from obstore import GetOptions  # exists in the stubs only

ONE_REQUEST_BYTES = 8 << 20  # the size of one GET; a larger archive takes several ranges of this size
PARALLEL_RANGES = 8
MAX_ARCHIVE_BYTES = 1 << 30
LIST_PAGE = 1000
S3_SCHEMES = ("s3", "s3a")
AZURE_HOST_SCHEMES = ("abfs", "abfss")  # container@account.dfs.core.windows.net: the user part is no secret
OTHER_SCHEMES = ("gs", "az", "azure", *AZURE_HOST_SCHEMES)
ACCEPTED = "s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///folder or a folder's path"
STAGED = re.compile(r"#\d+$")  # obstore's name of a file that is being written
# Codes that S3 sends with status 400 although they mean 401 or 403.
DENIED_CODES = {"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"}
# botocore renews credentials that expire within 10 to 15 minutes when it is asked, so ask at least this often.
CREDENTIALS_TTL = timedelta(minutes=10)


#: What is wrong, as `Where.explain` takes it.
ABSENT, LEAVES = "{name} is not in {where}: {cause}", "{name} leaves {where} by a symbolic link"


class InvalidStoreUrl(ValueError):
    """The URL is no store that can be opened; the message says what is accepted."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """An archive from the store. `version`: the ETag without quotes, or the store's object version."""

    data: bytes
    version: str


@dataclass(frozen=True, slots=True)
class Listed:
    """One archive of a listing; `bytes` is its size."""

    name: ModelName
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


class Source:
    """One store under one prefix: model name `au/NSW1.mar` is the key `{prefix}/au/NSW1.mar`. Thread-safe, stateless.

    INVARIANT: `url` identifies the store on this host: a folder's path is absolute, an S3 URL includes the endpoint.
    The disk tier uses it to keep the archives of different stores apart.

    Every method raises StoreUnavailable (time-outs, refused connections, 5xx after the retries) and StoreDenied (401,
    403); both name the store and the cause.
    """

    def __init__(self, url: str, store: Any, where: Where, max_archive_bytes: int, folder: Path | None = None) -> None:
        self.url = url
        self._store = store
        self._where = where
        self._max_archive_bytes = max_archive_bytes
        self._folder = folder

    def __repr__(self) -> str:
        return f"Source({self._where.full})"

    def get(self, name: ModelName, unless: str | None = None) -> Fetched | None:
        """The archive, or None if its version is still `unless`.

        An archive above ONE_REQUEST_BYTES takes further requests: parallel ranges of the same version.

        Raises:
            ModelNotFound: the store has no object under this key.
            ArchiveTooLarge: the size in the first reply exceeds the limit; the body was not read.
            ArchiveInvalid: the object is empty.
        """
        if self._folder:
            _real_file(self._folder, name, self._where)
        with self._explained(name):
            try:
                return self._get(name, unless)
            except NotModifiedError:
                return None
            except PreconditionError:  # the archive was replaced between two ranges: read the new one
                return self._get(name, None)

    def _get(self, name: ModelName, unless: str | None) -> Fetched:
        options: GetOptions = {"range": (0, ONE_REQUEST_BYTES)}
        if unless:
            options["if_none_match"] = f'"{unless}"'
        reply = obstore.get(self._store, name, options=options)
        size = reply.meta["size"]
        if size > self._max_archive_bytes:
            what = f"has {size} bytes, more than the limit of {self._max_archive_bytes}"
            raise self._where.explain(ArchiveTooLarge, f"{{name}} in {{where}} {what}", name)
        head = reply.bytes().to_bytes()
        if size > len(head):
            head += b"".join(self._ranges(name, len(head), size, reply.meta["e_tag"]))
        return Fetched(head, _get_version(reply.meta))

    def _ranges(self, name: ModelName, start: int, size: int, e_tag: str | None) -> Iterator[bytes]:
        def read(offset: int) -> bytes:
            options: GetOptions = {"range": (offset, min(offset + ONE_REQUEST_BYTES, size))}
            if e_tag:
                options["if_match"] = e_tag
            return obstore.get(self._store, name, options=options).bytes().to_bytes()

        with ThreadPoolExecutor(PARALLEL_RANGES, "archive-range") as pool:
            yield from pool.map(read, range(start, size, ONE_REQUEST_BYTES))

    def list(self, prefix: str = "") -> Iterator[Listed]:
        """The archives whose names start with `prefix`. Pages are requested as the caller iterates.

        Keys that are no model names are left out.

        Raises:
            InvalidModelName: the folder part of `prefix` breaks a rule for names.
        """
        folder = prefix.rpartition("/")[0]
        if folder:
            parse_model_name(folder)
        with self._explained(prefix):
            for entry in self._walk(folder) if self._folder else self._pages(folder):
                try:
                    name = parse_model_name(entry["path"])
                except InvalidModelName:
                    continue
                if name.startswith(prefix):
                    yield Listed(name, entry["size"], _get_version(entry))

    def _pages(self, folder: str) -> Iterator[Any]:
        for page in obstore.list(self._store, folder or None, chunk_size=LIST_PAGE):
            yield from page

    def _walk(self, folder: str) -> Iterator[Any]:
        """Like `_pages` for a local folder: obstore would follow links out of the folder, or forever."""
        assert self._folder is not None
        for parent, folders, files in os.walk(self._folder / folder):
            folders.sort()
            for file in sorted(files):
                if STAGED.search(file):
                    continue
                key = Path(parent, file).relative_to(self._folder).as_posix()
                try:
                    _real_file(self._folder, parse_model_name(key), self._where)
                    yield obstore.head(self._store, key)
                except (InvalidModelName, ModelNotFound, StoreDenied, FileNotFoundError):
                    continue

    def put(self, name: ModelName, data: bytes) -> str:
        """Store the archive atomically in place of any older one. Returns the new version."""
        if self._folder and not (self._folder / name).parent.resolve().is_relative_to(self._folder):
            raise self._where.explain(StoreDenied, LEAVES, name)
        with self._explained(name):
            result = obstore.put(self._store, name, data)
        return _get_version(result)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Translate obstore's exceptions into those of `model_store.errors`."""
        try:
            yield
        except (BaseError, OSError) as error:
            raise _translate_error(error, name, self._where) from error


def open_source(
    url: str,
    *,
    timeout_s: float = 10.0,
    retries: int = 3,
    profile: str | None = None,
    endpoint_url: str | None = None,
    region: str | None = None,
    max_archive_bytes: int = MAX_ARCHIVE_BYTES,
) -> Source:
    """Open the store at `url`: `s3://`, `gs://`, `az://`, `file://` or a folder's path. No request is sent.

    S3 takes credentials, region, profile and endpoint from boto3's chain; the arguments override it. `timeout_s` limits
    one attempt, and no retry starts after that time, so a call of one request ends within twice `timeout_s`. Retries
    (429, 5xx, cut or refused connections) back off with jitter.

    Raises:
        InvalidStoreUrl: an unknown scheme, a folder that does not exist, credentials in the URL.
        StoreDenied: boto3 finds no credentials.
    """
    if "://" not in url:
        return _open_folder(url, max_archive_bytes)
    parts = urlsplit(url)
    if parts.password or (parts.username and parts.scheme not in AZURE_HOST_SCHEMES) or parts.query or parts.fragment:
        raise InvalidStoreUrl(f"the {parts.scheme}:// URL of a store has no credentials, query or fragment: {ACCEPTED}")
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return _open_folder(unquote(parts.path), max_archive_bytes)
    if parts.scheme not in (*S3_SCHEMES, *OTHER_SCHEMES) or not parts.netloc:
        raise InvalidStoreUrl(f"{url!r} is not a store; accepted are {ACCEPTED}")
    options = _client_options(timeout_s, retries)
    if parts.scheme in S3_SCHEMES:
        session = {"profile_name": profile, "region_name": region}
        store, endpoint = _open_s3(parts.netloc, parts.path.strip("/"), session, endpoint_url, options)
        full = f"{url} at {endpoint}"
        return Source(full, store, Where(full, "the S3 store"), max_archive_bytes)
    if profile or endpoint_url or region:
        raise InvalidStoreUrl(f"profile, endpoint_url and region belong to s3:// stores, not to {url!r}")
    try:
        where = Where(url, f"the {parts.scheme} store")
        return Source(url, from_url(url, **options), where, max_archive_bytes)
    except (BaseError, ValueError) as error:
        raise InvalidStoreUrl(f"{url!r} cannot be opened: {_find_cause(error)}") from error


def _open_folder(path: str, max_archive_bytes: int) -> Source:
    folder = Path(path).expanduser().resolve()
    if not path or not folder.is_dir():
        raise InvalidStoreUrl(f"the model folder {str(folder)!r} does not exist; accepted are {ACCEPTED}")
    where = Where(str(folder), "the store's folder")
    return Source(folder.as_uri(), LocalStore(folder), where, max_archive_bytes, folder)


def _open_s3(
    bucket: str, prefix: str, session_args: dict[str, str | None], endpoint_url: str | None, options: dict[str, Any]
) -> tuple[S3Store, str]:
    """The store and its endpoint. obstore accepts boto3's credentials and region, but not a profile's endpoint."""
    import boto3  # noqa: PLC0415  a third of a second that only s3:// has to pay
    import botocore.exceptions  # noqa: PLC0415
    from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415

    try:
        session = boto3.Session(**session_args)
        meta = session.client("s3", endpoint_url=endpoint_url).meta
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise InvalidStoreUrl(f"s3://{bucket} cannot be opened: {error}") from error
    if "@" in urlsplit(meta.endpoint_url).netloc:
        raise InvalidStoreUrl(f"the endpoint of s3://{bucket} has credentials in its URL; give them by boto3's chain")
    try:
        credentials = Boto3CredentialProvider(session, ttl=CREDENTIALS_TTL)
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise StoreDenied(
            f"no credentials for s3://{bucket}: boto3's chain found none ({error}); set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, a profile, or a role"
        ) from error
    options["client_options"]["allow_http"] = meta.endpoint_url.startswith("http://")
    store = S3Store(
        bucket,
        prefix=prefix or None,
        endpoint=meta.endpoint_url,
        region=meta.region_name,
        credential_provider=credentials,
        **options,
    )
    return store, meta.endpoint_url


def _client_options(timeout_s: float, retries: int) -> dict[str, Any]:
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


def _real_file(folder: Path, name: ModelName, where: Where) -> None:
    """Check that the name is a regular file in the folder, with all links resolved; reading a pipe would block."""
    try:
        target = (folder / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise where.explain(ModelNotFound, ABSENT, name, str(getattr(error, "strerror", error))) from error
    if not target.is_relative_to(folder):
        raise where.explain(StoreDenied, LEAVES, name)
    if not target.is_file():
        raise where.explain(ModelNotFound, "{name} in {where} is not a file", name)


def _get_version(meta: Any) -> str:
    """The ETag without quotes and without the mark of a weak one, or else the object version."""
    return str(meta["e_tag"] or meta["version"] or "").removeprefix("W/").strip('"')


def _translate_error(error: Exception, name: str, where: Where) -> LoadError:
    """Our exception for one of obstore. Some situations are a GenericError that only its text distinguishes."""
    cause = _find_cause(error)
    status = re.search(r"status code: (\d{3})", str(error))
    code = re.search(r"<Code>(\w+)</Code>", str(error))
    denied = isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError)
    if denied or (status and status[1] in ("401", "403")) or (code and code[1] in DENIED_CODES):
        what = (
            "{where} refuses {name!r}: {cause}. Either the credentials are wrong or lack permission, or the key does "
            "not exist and they may not list the bucket (S3 then answers 403, not 404)"
        )
        return where.explain(StoreDenied, what, name, cause)
    if code and code[1] == "NoSuchBucket":  # not "model not found": that would forget good copies on disk
        return where.explain(StoreUnavailable, "{where} does not exist: {cause}", name, cause)
    if isinstance(error, FileNotFoundError) or (code and code[1] == "KeyTooLongError"):
        return where.explain(ModelNotFound, ABSENT, name, cause)
    if (status and status[1] == "416") or "InvalidRange" in str(error):
        return where.explain(ArchiveInvalid, "{name} in {where} is empty", name)
    return where.explain(StoreUnavailable, "{where} failed for {name!r}: {cause}", name, cause)


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
        return f"the connection was cut{tries}"
    return head.rpartition(" - ")[2][:300] + tries
