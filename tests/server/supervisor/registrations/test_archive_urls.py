"""Which archive a URL means: nothing outside the store can be named."""

import pytest

from server.supervisor.registrations.archive_urls import MAX_URL, find_key, name_archive
from server.supervisor.registrations.refusals import NotInStore, UrlOutsideStore


@pytest.mark.parametrize(
    ("url", "store", "key"),
    [
        ("nsw1.mar", "s3://models/prices", "nsw1.mar"),
        ("au/nsw1.mar", "s3://models/prices", "au/nsw1.mar"),
        ("s3://models/prices/au/nsw1.mar", "s3://models/prices", "au/nsw1.mar"),
        ("s3://models/prices/nsw1.mar", "s3://models/prices/", "nsw1.mar"),
        ("file:///srv/models/au/nsw1.mar", "/srv/models", "au/nsw1.mar"),
        ("/srv/models/nsw%201.mar", "/srv/models", "nsw%201.mar"),
        ("file:///srv/models/nsw%201.mar", "/srv/models", "nsw 1.mar"),
        ("/srv/models/nsw1.mar", "file:///srv/models", "nsw1.mar"),
    ],
)
def test_url_below_store_is_a_key(url: str, store: str, key: str) -> None:
    """A key, or a URL that begins with the store's location."""
    assert find_key(url, store) == key


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:1/x.mar",
        "https://example.com/x.mar",
        "ftp://x/y.mar",
        "s3://models/pricesx/nsw1.mar",
        "s3://other/nsw1.mar",
        "file:///etc/passwd",
        "file://host/srv/models/x.mar",
        "file://[bad/x.mar",
        "/etc/passwd",
    ],
)
def test_url_elsewhere_is_refused(url: str) -> None:
    """INVARIANT: nothing outside the store can be named, whatever the scheme."""
    for store in ("s3://models/prices", "/srv/models"):
        with pytest.raises(UrlOutsideStore):
            find_key(url, store)


@pytest.mark.parametrize(
    "url", ["", "../x.mar", "a/../../x.mar", "a//b.mar", "a\\b.mar", "x" * (MAX_URL + 1), "x" * 1025]
)
def test_what_is_no_key_is_refused(url: str) -> None:
    """The rules of model names hold."""
    with pytest.raises(NotInStore):
        find_key(url, "s3://models/prices")


@pytest.mark.parametrize(
    ("key", "name"),
    [("au/nsw1.mar", "nsw1"), ("nsw1.tar.gz", "nsw1"), ("nsw1.tgz", "nsw1"), ("nsw1", "nsw1"), ("a/.mar", ".mar")],
)
def test_name_of_an_archive_is_its_file(key: str, name: str) -> None:
    """Where neither client nor archive say one."""
    assert name_archive(key) == name
