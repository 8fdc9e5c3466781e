"""Requests from pages of other sites: DNS rebinding is found by Host, forgery by Origin and Sec-Fetch-Site."""

import pytest

from server.access.sites import Sites, WrongSite, is_loopback

SITES = Sites(["10.1.2.3", "fd00::1"], ["fleet.example"])


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8081", "127.9.9.9", "localhost", "LOCALHOST:1", "[::1]:8081", "10.1.2.3:8081", "[fd00::1]",
     "fleet.example:443", "Fleet.Example"],
)  # fmt: skip
def test_our_own_names(host: str) -> None:
    """Loopback, the bound address and what the operator allows; with a page of our own or none."""
    SITES.check({b"host": host.encode()})
    SITES.check({b"host": host.encode(), b"origin": f"http://{host}".encode(), b"sec-fetch-site": b"same-origin"})
    SITES.check({b"host": host.encode(), b"origin": f"https://{host}".encode(), b"sec-fetch-site": b"none"})


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.1.2.4", "evil.example:8081", "a b",
     "127.0.0.1@evil.example", "[::2]", "127.0.0.1:8081:1", "\xff", "127.0.0.1/x", "fleet.example."],
)  # fmt: skip
def test_other_names_are_refused(host: str) -> None:
    """A name that a page let point here is none of ours, whatever else the request says."""
    with pytest.raises(WrongSite, match="by which this server is not reached"):
        SITES.check({b"host": host.encode("latin-1"), b"sec-fetch-site": b"same-origin"})


def test_no_host_is_refused() -> None:
    """HTTP/1.0 may come without."""
    with pytest.raises(WrongSite):
        SITES.check({})


@pytest.mark.parametrize(
    "headers",
    [
        {b"origin": b"http://evil.example"},
        {b"origin": b"null"},
        {b"origin": b"http://127.0.0.1:9999"},
        {b"origin": b"http://127.0.0.1:8081.evil.example"},
        {b"origin": b"file://"},
        {b"sec-fetch-site": b"cross-site"},
        {b"sec-fetch-site": b"same-site"},
        {b"sec-fetch-site": b""},
    ],
)
def test_pages_of_others_are_refused(headers: dict[bytes, bytes]) -> None:
    """A form or script of another site, one of another port here, and one without an origin."""
    with pytest.raises(WrongSite, match="page"):
        SITES.check({b"host": b"127.0.0.1:8081", **headers})


def test_the_address_that_a_connection_reached_is_ours() -> None:
    """A listener on all addresses is called by any of its host's: as an address, also where it is written as IPv6."""
    everywhere = Sites(["0.0.0.0", "::"], [])
    everywhere.check({b"host": b"10.1.2.3:8081"}, "10.1.2.3")
    everywhere.check({b"host": b"10.1.2.3:8081"}, "::ffff:10.1.2.3")
    everywhere.check({b"host": b"[fd00::1]:8081"}, "fd00:0::1")
    for host, reached_at in ((b"10.1.2.4", "10.1.2.3"), (b"evil.example", "evil.example"), (b"10.1.2.3", "")):
        with pytest.raises(WrongSite):
            everywhere.check({b"host": host}, reached_at)


def test_loopback() -> None:
    """Addresses that only this host reaches."""
    assert [is_loopback(each) for each in ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost")] == [True] * 5
    assert [is_loopback(each) for each in ("0.0.0.0", "::", "10.0.0.1", "", "example.org")] == [False] * 5
