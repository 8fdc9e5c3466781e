"""Requests that a browser sends on behalf of a page that is not ours. Pure.

A page anywhere can have its visitor's browser send requests to 127.0.0.1 (cross-site request forgery), and can let its
own name point there (DNS rebinding), so that the browser takes the answer for the page's own. So a listener that
manages looks at what a browser cannot forge: the name in `Host` must be one by which this server is reached, and
`Origin` and `Sec-Fetch-Site` must not tell of another site.
"""

import ipaddress
import re
from collections.abc import Iterable, Mapping

_HOST = re.compile(rb"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]{1,253})(?::[0-9]{1,5})?")
_ORIGIN = re.compile(rb"https?://(.+)", re.IGNORECASE)
_SAME = (b"same-origin", b"none")  #: of Sec-Fetch-Site: our own page, or the address was typed in


class WrongSite(Exception):
    """The request may come from a page that is not ours (HTTP 403)."""


class Sites:
    """The names by which a listener is reached: loopback's, the addresses it is bound to, and those allowed besides."""

    def __init__(self, bound: Iterable[str], allowed: Iterable[str]) -> None:
        self._names = {name.lower().strip("[]") for name in (*bound, *allowed)} | {"localhost"}

    def __repr__(self) -> str:
        """For example `<Sites 127.0.0.1, localhost>`."""
        return f"<Sites {', '.join(sorted(self._names))}>"

    def check(self, headers: Mapping[bytes, bytes], reached_at: str = "") -> None:
        """Raises WrongSite that says what was found and what to set.

        `reached_at`: this end's address of the connection, by which the server may always be named: a page at an
        address, unlike one at a name, is a page of the server there.
        """
        host = headers.get(b"host", b"")
        found = _HOST.fullmatch(host)
        if found is None or not self._is_ours(found[1].decode().lower().strip("[]"), reached_at):
            raise WrongSite(
                f"the header Host names {_format_header(host)}, by which this server is not reached (allowed_hosts)"
            )
        origin = headers.get(b"origin")
        if origin is not None:
            named = _ORIGIN.fullmatch(origin)
            if named is None or named[1].lower() != host.lower():
                raise WrongSite(
                    f"the request comes from a page of {_format_header(origin)}, not from this server's own"
                )
        site = headers.get(b"sec-fetch-site")
        if site is not None and site not in _SAME:
            raise WrongSite(f"the request comes from another site's page (Sec-Fetch-Site: {_format_header(site)})")

    def _is_ours(self, name: str, reached_at: str) -> bool:
        if name in self._names:
            return True
        address = _address(name)
        return address is not None and (address.is_loopback or address == _address(reached_at))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address; of an IPv4 one that a listener for both kinds writes as IPv6, the IPv4 one. None for a name."""
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _format_header(raw: bytes) -> str:
    """A header as text that is safe to show, cut short."""
    return repr(raw[:100].decode("latin-1"))


def is_loopback(address: str) -> bool:
    """Whether a listener at this address is reached from its own host alone."""
    if address.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return False
