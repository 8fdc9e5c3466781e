"""TLS of a listener: its certificate, and the authority whose clients may come (mutual TLS); read anew on change."""

import ssl
from collections.abc import Iterator
from pathlib import Path

import structlog

log = structlog.get_logger()


class Tls:
    """A server's context. Certificates that are replaced are taken for new connections; a bad one changes nothing."""

    def __init__(self, certificate: Path, key: Path | None, client_ca: Path | None) -> None:
        """PEM files; `key` may be in the certificate's. Raises ValueError that names the file and the setting."""
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self.context = self._read()
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
            self._read()  # first apart: a certificate without its key must not reach the context that serves
            self._load(self.context)
        except ValueError as error:
            log.error("certificate_not_read", error=str(error))  # noqa: TRY400 -- the operator's file, not our bug
        else:
            log.info("certificate_read", file=str(self._certificate))

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self._client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
        self._load(context)
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            context.load_cert_chain(self._certificate, self._key, password=_no_password)
        except (OSError, ssl.SSLError) as error:
            key = f" with the key {self._key} (tls_key)" if self._key else ""
            raise ValueError(f"the certificate {self._certificate} (tls_certificate){key}: {error}") from error
        if self._client_ca is None:
            return
        try:
            context.load_verify_locations(self._client_ca)
        except (OSError, ssl.SSLError) as error:
            raise ValueError(f"the clients' authority {self._client_ca} (tls_client_ca): {error}") from error

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


def _no_password() -> str:
    """An encrypted key cannot be read: without this OpenSSL would ask for its password on the terminal."""
    return ""


def _identify_file(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns
