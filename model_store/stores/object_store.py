"""Object stores: one interface over `s3://`, `gs://`, `az://` and a local folder. Runs on loader threads."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from obstore.exceptions import BaseError
from obstore.store import from_url

from model_store.lazy_log import log
from model_store.names import InvalidModelName, ModelName, is_left_by_desktop, parse_model_name
from model_store.stores.backend import ACCEPTED, MAX_ARCHIVE_BYTES, Backend, Fetched, InvalidStoreUrl, Where
from model_store.stores.cloud_store import CloudStore, make_client_options
from model_store.stores.folder_store import FolderStore, open_folder
from model_store.stores.unpacked_folders import UnpackedStore

__all__ = ["Fetched", "InvalidStoreUrl", "Listed", "Source", "open_source", "open_unpacked_source"]

S3_SCHEMES = ("s3", "s3a")
AZURE_HOST_SCHEMES = ("abfs", "abfss")  # container@account.dfs.core.windows.net: the user part is no secret
OTHER_SCHEMES = ("gs", "az", "azure", *AZURE_HOST_SCHEMES)
_SHOWN = 100  # characters of a key in a warning
_LOST = "\ufffd"  # stands for bytes that are no UTF-8, so the true key is not known


@dataclass(frozen=True, slots=True)
class Listed:
    """One archive of a listing; `bytes` is its size."""

    name: ModelName
    bytes: int
    version: str


class Source:
    """One store under one prefix: model name `au/NSW1.mar` is the key `{prefix}/au/NSW1.mar`. Thread-safe.

    INVARIANT: `url` identifies the store on this host: a folder's path is absolute, an S3 URL includes the endpoint.
    The disk tier uses it to keep the archives of different stores apart.

    Every method raises StoreUnavailable (time-outs, refused connections, 5xx after the retries) and StoreDenied (401,
    403); both name the store and the cause.
    """

    def __init__(self, url: str, backend: Backend, where: Where) -> None:
        self.url = url
        self._backend = backend
        self._where = where
        self._said = ""  # the last warning about keys that are left out

    def __repr__(self) -> str:
        return f"Source({self._where.full})"

    def get(self, name: ModelName, unless: str | None = None) -> Fetched | None:
        """The archive, or None if its version is still `unless`. Large ones may take several requests.

        Raises:
            ModelNotFound: the store has no object under this key.
            ArchiveTooLarge: the size in the first reply exceeds the limit; the body was not read.
            ArchiveInvalid: the object is empty.
        """
        return self._backend.read(name, unless)

    def read_version(self, name: ModelName) -> str:
        """The version that `get` would give, without the archive; empty where the store names none.

        Raises:
            ModelNotFound: the store has no object under this key.
        """
        return self._backend.read_version(name)

    def list(self, prefix: str = "") -> Iterator[Listed]:
        """The archives whose names start with `prefix`. Pages are requested as the caller iterates.

        Keys that are no model names are left out; a warning says how many, and not again while they are the same. Files
        that desktops leave in folders, such as `.DS_Store`, are left out without one.

        Raises:
            InvalidModelName: the folder part of `prefix` breaks a rule for names.
        """
        folder = prefix.rpartition("/")[0]
        if folder:
            parse_model_name(folder)
        odd, first = 0, ""
        try:
            for entry in self._backend.list(prefix):
                name = _read_key(entry.key)
                if is_left_by_desktop(entry.key):
                    continue
                if name is None:
                    odd, first = odd + bool(entry.key), first or entry.key  # the empty key marks the store's folder
                elif name.startswith(prefix):
                    yield Listed(name, entry.bytes, entry.version)
        finally:
            self._warn(odd, first)

    def _warn(self, odd: int, first: str) -> None:
        said = f"{odd} {first}"
        if odd and said != self._said:
            log.warning("store_keys_left_out", store=self._where.full, keys=odd, first=repr(first[:_SHOWN]))
        self._said = said if odd else ""

    def put(self, name: ModelName, data: bytes) -> str:
        """Store the archive atomically in place of any older one. Returns the new version."""
        return self._backend.write(name, data)


def _read_key(key: str) -> ModelName | None:
    """The model name that a key is, or None."""
    try:
        return parse_model_name(key) if _LOST not in key else None
    except InvalidModelName:
        return None


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

    S3 takes credentials, region, profile, endpoint, addressing style and CAs from boto3's chain; the arguments override
    it. `timeout_s` limits one attempt, and no retry starts after that time, so a call of one request ends within twice
    `timeout_s`. Retries (429, 5xx, cut or refused connections) back off with jitter.

    Raises:
        InvalidStoreUrl: an unknown scheme, a folder that does not exist, credentials in the URL, a bad file of CAs.
        StoreDenied: boto3 finds no credentials.
    """
    if "://" not in url:
        return _make_folder_source(open_folder(url, max_archive_bytes))
    parts = urlsplit(url)
    if parts.password or (parts.username and parts.scheme not in AZURE_HOST_SCHEMES) or parts.query or parts.fragment:
        raise InvalidStoreUrl(f"the {parts.scheme}:// URL of a store has no credentials, query or fragment: {ACCEPTED}")
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return _make_folder_source(open_folder(unquote(parts.path), max_archive_bytes))
    if parts.scheme not in (*S3_SCHEMES, *OTHER_SCHEMES) or not parts.netloc:
        raise InvalidStoreUrl(f"{url!r} is not a store; accepted are {ACCEPTED}")
    if parts.scheme in S3_SCHEMES:
        from model_store.stores import s3_store  # noqa: PLC0415  a third of a second that only s3:// has to pay

        options = s3_store.S3Options(timeout_s, retries, profile, endpoint_url, region)
        store = s3_store.open_s3(url, max_archive_bytes, options)
        return Source(store.where.full, store, store.where)
    if profile or endpoint_url or region:
        raise InvalidStoreUrl(f"profile, endpoint_url and region belong to s3:// stores, not to {url!r}")
    return _open_other(url, parts.scheme, max_archive_bytes, timeout_s, retries)


def open_unpacked_source(
    path: str, *, alone: ModelName | None = None, max_archive_bytes: int = MAX_ARCHIVE_BYTES
) -> Source:
    """Open a folder whose folders are archives too, as SageMaker unpacks them. It may be made later.

    `alone`: the folder itself is the only archive, under this name. Raises InvalidStoreUrl.
    """
    if "://" in path or not path:
        raise InvalidStoreUrl(f"{path!r} is not a folder's path: unpacked archives lie on this host")
    files = FolderStore(Path(path).expanduser().absolute(), max_archive_bytes)
    return Source(f"{files.path.as_uri()}/", UnpackedStore(files, max_archive_bytes, alone), files.where)


def _make_folder_source(store: FolderStore) -> Source:
    return Source(store.path.as_uri(), store, store.where)


def _open_other(url: str, scheme: str, max_archive_bytes: int, timeout_s: float, retries: int) -> Source:
    where = Where(url, f"the {scheme} store")
    try:
        store = from_url(url, **make_client_options(timeout_s, retries))
    except (BaseError, ValueError) as error:
        raise InvalidStoreUrl(f"{url!r} cannot be opened: {str(error)[:300]}") from error
    return Source(
        url, CloudStore(store, where, max_archive_bytes, "the system's CAs, or those in SSL_CERT_FILE"), where
    )
