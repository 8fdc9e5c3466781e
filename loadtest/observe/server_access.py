"""The access to a server: the authority to trust, a client certificate and a token; sends requests with them."""

import os
import ssl
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import urllib3

TOKEN_VARIABLE = "FLEETCAST_TOKEN"  # noqa: S105 -- a variable's name
MAX_TOKEN_BYTES = 1024  #: longest token that a server reads
TIMEOUT_S = 30.0
NO_HEADERS: Mapping[str, str] = {}
ADVICE: Mapping[int, str] = {
    401: "the server wants a token that it knows: --token-file",
    403: "the token does not allow this: it needs the scope of the listener, and the models' names",
}


class CannotConnect(RuntimeError):
    """No response came; the message says why, and which flag may be missing."""


@dataclass(frozen=True, slots=True)
class ServerAccess:
    """The access to all listeners of one server. `client_key` is None if the file of the certificate has the key too.

    It can be pickled, so that driver processes make their own TLS contexts.
    """

    ca: Path | None = None
    client_cert: Path | None = None
    client_key: Path | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers that each request has."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

    def check_url(self, url: str) -> None:
        """Check the files. Raises ValueError for wrong ones, and for files of TLS if the address has no https."""
        if urlsplit(url).scheme == "https":
            self.tls_context()
        elif self.ca or self.client_cert or self.client_key:
            raise ValueError(f"--ca, --client-cert and --client-key are for addresses with https, not {url}")

    def tls_context(self) -> ssl.SSLContext:
        """Return the TLS context, made once in a process. Raises ValueError that names the flag and the file."""
        return _make_context(self.ca, self.client_cert, self.client_key)

    def request(
        self,
        method: str,
        url: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] = NO_HEADERS,
        accept: Collection[int] = (200,),
    ) -> Any:
        """Request a URL; returns the response. Redirects are not followed: the token is for this server alone.

        Raises CannotConnect if there is no response, RuntimeError for any status that is not in `accept`.
        """
        self.check_url(url)
        pool = _make_pool(self.tls_context() if urlsplit(url).scheme == "https" else None)
        try:
            reply = pool.request(
                method, url, body=body, headers={**headers, **self.headers}, timeout=TIMEOUT_S, retries=False
            )
        except urllib3.exceptions.HTTPError as error:
            raise CannotConnect(f"{method} {url}: {error}{_advise(url, error)}") from error
        if reply.status not in accept:
            advice = f" ({ADVICE[reply.status]})" if reply.status in ADVICE else ""
            raise RuntimeError(f"{method} {url} answered {reply.status}{advice}: {reply.data[:500]!r}")
        return reply


OPEN = ServerAccess()  #: access to a server without TLS and tokens


def open_access(ca: Path | None, client_cert: Path | None, client_key: Path | None, token: Path | None) -> ServerAccess:
    """Make the access of these files. Without a token file, the token is that of the variable FLEETCAST_TOKEN, if any.

    Raises ValueError that names the flag and the file that is wrong; the message never contains the token.
    """
    if client_key is not None and client_cert is None:
        raise ValueError("--client-key needs --client-cert: the certificate that the key belongs to")
    shown = os.environ.get(TOKEN_VARIABLE) or None if token is None else _read_token(token)
    return ServerAccess(ca, client_cert, client_key, shown)


def _read_token(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_TOKEN_BYTES + 2)
    except OSError as error:
        raise ValueError(f"--token-file {path}: {error.strerror}") from error
    found = raw.strip()
    if not found or len(found) > MAX_TOKEN_BYTES or any(not 0x21 <= byte <= 0x7E for byte in found):  # noqa: PLR2004
        what = f"must hold a token alone, one line of at most {MAX_TOKEN_BYTES} printable ASCII characters"
        raise ValueError(
            f"--token-file {path} {what}: as `fleetcast token` shows it, not the file of the server's tokens"
        )
    return found.decode()


@cache
def _make_context(ca: Path | None, client_cert: Path | None, client_key: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise ValueError(f"--ca {ca}: {error}; give a PEM file with the authority's certificate") from error
    if client_cert is not None:
        try:
            context.load_cert_chain(client_cert, client_key, password=_no_password)
        except OSError as error:
            key = f" with --client-key {client_key}" if client_key else " (or give --client-key)"
            raise ValueError(f"--client-cert {client_cert}{key}: {error}; both are PEM files") from error
    return context


def _no_password() -> str:
    """Make OpenSSL fail for an encrypted key; otherwise it would ask for the password on the terminal."""
    return ""


@cache
def _make_pool(context: ssl.SSLContext | None) -> urllib3.PoolManager:
    return urllib3.PoolManager(ssl_context=context)


def _advise(url: str, error: Exception) -> str:
    """Suggest what may help, by the text of the error. An error of a closed connection has no other information."""
    said, secure = str(error), urlsplit(url).scheme == "https"
    cut_off = any(word in said for word in ("Connection aborted", "RemoteDisconnected", "reset", "Broken pipe", "EOF"))
    if "CERTIFICATE_VERIFY_FAILED" in said:
        return "; name the authority of the server's certificate: --ca FILE"
    if "WRONG_VERSION_NUMBER" in said or "RECORD_LAYER_FAILURE" in said:
        return "; the server speaks no TLS there: give its address with http"
    if secure and (cut_off or "CERTIFICATE_REQUIRED" in said or "UNKNOWN_CA" in said):
        return "; a server with mutual TLS wants a client certificate of its authority: --client-cert FILE"
    return "; where the server speaks TLS, give its address with https" if cut_off else ""
