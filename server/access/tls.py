"""TLS of a listener: its certificate, and the authority whose clients may come (mutual TLS); read anew on change.

Also how a client is called that is known by its certificate.
"""

import re
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog

CLIENT_NAME = (
    "fleetcast.client_name"  #: of a request's ASGI scope: what `name_client` says, on a connection by mutual TLS
)
MAX_CLIENT_NAME = 100  #: characters
_UNSAFE = re.compile(r"[^\w.@:/+-]", re.ASCII)

log = structlog.get_logger()


class NewestContext(ssl.SSLContext):
    """A context for a listener, which takes one for its whole life: each connection is made by `newest`.

    A context in use can learn certificates and authorities, but forgets none. So what is read anew is a context of its
    own, and a client cannot resume a session by which an earlier one let it in.
    """

    newest: ssl.SSLContext

    def wrap_bio(self, *args: Any, **more: Any) -> ssl.SSLObject:
        """As any context does it; asyncio and uvloop call this once for each connection."""
        return self.newest.wrap_bio(*args, **more)


class Tls:
    """A server's context. Files that are replaced are taken for new connections; a bad one changes nothing."""

    def __init__(self, certificate: Path, key: Path | None, client_ca: Path | None) -> None:
        """PEM files; `key` may be in the certificate's. Raises ValueError that names the file and the setting."""
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self.context = NewestContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.newest = self._read()
        self._seen = self._identity()

    def __repr__(self) -> str:
        """For example `<Tls server.pem, clients of ca.pem>`."""
        clients = f", clients of {self._client_ca.name}" if self._client_ca else ""
        return f"<Tls {self._certificate.name}{clients}>"

    def reload_if_changed(self) -> None:
        """Look at the files' dates, and take what is new where it is sound."""
        try:
            seen = self._identity()
        except OSError as error:  # being replaced just now
            log.warning("certificate_missing", error=str(error))
            return
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self.context.newest = self._read()
        except ValueError as error:
            log.error("certificate_not_read", error=str(error))  # noqa: TRY400 -- the operator's file, not our bug
        else:
            log.info("certificate_read", file=str(self._certificate))

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self._certificate, self._key, password=_no_password)
        except (OSError, ssl.SSLError) as error:
            key = f" with the key {self._key} (tls_key)" if self._key else ""
            raise ValueError(f"the certificate {self._certificate} (tls_certificate){key}: {error}") from error
        if self._client_ca is None:
            return context
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(self._client_ca)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"the clients' authority {self._client_ca} (tls_client_ca): {error}") from error
        return context

    def _identity(self) -> tuple[tuple[int, ...], ...]:
        return tuple(_identify_file(path) for path in self._files())

    def _files(self) -> Iterator[Path]:
        yield from filter(None, (self._certificate, self._key, self._client_ca))


def open_tls(certificate: Path | None, key: Path | None, client_ca: Path | None) -> Tls | None:
    """The TLS that the settings of these names ask for. Raises ValueError that names the setting that is wrong."""
    if certificate is not None:
        return Tls(certificate, key, client_ca)
    for name, value in (("tls_key", key), ("tls_client_ca", client_ca)):
        if value is not None:
            raise ValueError(f"{name} needs tls_certificate: set the server's certificate as well")
    return None


def name_client(certificate: Mapping[str, Any] | None) -> str | None:
    """How the log calls the client that showed this certificate (as `ssl` describes it); None without one. Pure.

    The subject's common name, else the first alternative name, else the serial number, with its kind in front:
    `CN:desk-au`, `email:desk@example.org`, `serial:5B21`. Whoever signs certificates for clients chooses these, so all
    that could forge a part of a log line is escaped, and a long name is cut.
    """
    if not certificate:
        return None
    subject = [field for part in certificate.get("subject", ()) for field in part]
    names = [("CN", value) for kind, value in subject if kind == "commonName"]
    names += [*certificate.get("subjectAltName", ()), ("serial", certificate.get("serialNumber"))]
    kind, name = next(((kind, str(value)) for kind, value in names if value), ("serial", "unknown"))
    escaped = _UNSAFE.sub(lambda found: f"\\x{ord(found[0]):02x}", name[: MAX_CLIENT_NAME + 1])
    shown = escaped if len(escaped) <= MAX_CLIENT_NAME else f"{escaped[:MAX_CLIENT_NAME]}..."
    return f"{kind.replace(' ', '')}:{shown}"


def _no_password() -> str:
    """An encrypted key cannot be read: without this OpenSSL would ask for its password on the terminal."""
    return ""


def _identify_file(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
