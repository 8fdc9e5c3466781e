"""Which archive of the store a URL means. Pure.

Clients of TorchServe name an archive by its file in the model store, or by a URL. INVARIANT: no URL leads out of the
store, so that whoever may register models can have nothing fetched from elsewhere.
"""

from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from model_store.names import InvalidModelName, ModelName, parse_model_name
from server.supervisor.registrations.refusals import NotInStore, UrlOutsideStore, shorten_name

MAX_URL = 4096
ARCHIVE_SUFFIXES = (".mar", ".tar.gz", ".tgz", ".zip")


def find_key(url: str, store: str) -> ModelName:
    """The key that `url` means in the store of this location. Raises NotInStore, UrlOutsideStore."""
    if not url:
        raise NotInStore(url, "empty url")
    if len(url) > MAX_URL:
        raise NotInStore(url[:MAX_URL], f"a url has {MAX_URL} characters at most")
    if ".." in url:
        raise NotInStore(url, f"Relative path is not allowed in url: {shorten_name(url)}")
    below = _cut_store(url, store)
    if below is None:
        raise UrlOutsideStore(
            url,
            f"only archives of the store are served, and {shorten_name(url)} is not below it: put the archive there, "
            "and register it by its key, such as team/model.mar",
        )
    try:
        return parse_model_name(below)
    except InvalidModelName as error:
        raise NotInStore(url, f"{error}; a url is the archive's key in the store") from error


def name_archive(key: str) -> str:
    """The name of a model whose archive and client say none: the file's, without what says that it is an archive."""
    file = PurePosixPath(key).name
    for suffix in ARCHIVE_SUFFIXES:
        if file.endswith(suffix) and file != suffix:
            return file.removesuffix(suffix)
    return file


def _cut_store(url: str, store: str) -> str | None:
    """The part of `url` below the store: all of it where it is a key already; None where it is elsewhere."""
    if "://" not in url and not url.startswith("/"):
        return url
    root = store.rstrip("/") + "/"
    if url.startswith(root):
        return url[len(root) :]
    folder = _find_folder(store)
    path = _find_folder(url)
    if folder is None or path is None:
        return None
    inside = folder.rstrip("/") + "/"
    return path[len(inside) :] if path.startswith(inside) else None


def _find_folder(url: str) -> str | None:
    """The absolute path that a file URL or a path has; None for all others."""
    if "://" not in url:
        return url if url.startswith("/") else None
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    return unquote(parts.path) if parts.scheme == "file" and parts.netloc in ("", "localhost") else None
