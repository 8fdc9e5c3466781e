"""The gRPC listener: grpcio's server with our limits, TLS whose files are read anew, and a drain. Runs in its front."""

import asyncio
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import structlog

from server.access.tls import open_tls
from server.front.grpc.calls import Calls
from server.settings import Settings

MOST_CALLS = 8192  #: under way at a time, streams among them; grpcio refuses more before it reads their messages
MOST_CALLS_EACH = 1024  #: of one connection
MAX_METADATA = 64 * 1024  #: bytes, as the head of a request over HTTP
TOLD_S = 0.5  #: of the drain, for what is left to be told that the server stops

log = structlog.get_logger()


class GrpcListeners:
    """All listeners of a front, which stop together."""

    def __init__(self, listeners: Sequence["GrpcListener"]) -> None:
        self._listeners = listeners

    def __repr__(self) -> str:
        """For example `<GrpcListeners [<GrpcListener ...>]>`."""
        return f"<GrpcListeners {list(self._listeners)}>"

    async def start(self) -> None:
        """Serve from now on."""
        for each in self._listeners:
            await each.start()

    async def wait(self) -> None:
        """Return when all were told to stop and are drained."""
        for each in self._listeners:
            await each.wait()

    def stop(self, grace_s: float | None = None) -> None:
        """As `GrpcListener.stop`."""
        for each in self._listeners:
            each.stop(grace_s)


class GrpcListener:
    """One server at an address, `host:port`."""

    def __init__(self, settings: Settings, calls: Calls, address: str) -> None:
        """Raises ValueError that names a setting of certificates, RuntimeError where an address is taken."""
        self._settings, self._calls = settings, calls
        self._ended = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None
        self._server = grpc.aio.server(
            handlers=[calls], options=_list_options(settings), maximum_concurrent_rpcs=MOST_CALLS
        )
        credentials = _open_credentials(settings)
        if credentials is None:
            self._server.add_insecure_port(address)
        else:
            self._server.add_secure_port(address, credentials)

    def __repr__(self) -> str:
        """For example `<GrpcListener of <Calls ...>>`."""
        return f"<GrpcListener of {self._calls!r}>"

    async def start(self) -> None:
        """Serve from now on."""
        await self._server.start()

    async def wait(self) -> None:
        """Return when it was told to stop and is drained."""
        await self._ended.wait()

    def stop(self, grace_s: float | None = None) -> None:
        """Take no new calls, and answer or refuse what runs within `grace_s`, or `drain_s`. May be said again."""
        grace_s = self._settings.drain_s if grace_s is None else min(grace_s, self._settings.drain_s)
        before, self._stopping = self._stopping, asyncio.create_task(self._end(grace_s))
        if before is not None:
            before.cancel()

    async def _end(self, grace_s: float) -> None:
        """Grpcio sends GOAWAY at once: a client's next call goes elsewhere, or is told that nobody listens."""
        self._calls.drain()
        refusing = asyncio.get_running_loop().call_later(max(0.0, grace_s - TOLD_S), self._calls.refuse_all)
        try:
            await self._server.stop(grace_s)
        finally:
            refusing.cancel()
        self._ended.set()


def _list_options(settings: Settings) -> list[tuple[str, Any]]:
    return [
        ("grpc.so_reuseport", 1),  # the supervisor holds the port, see server.supervisor.grpc_port
        ("grpc.max_receive_message_length", int(settings.max_body_bytes)),  # also of a message that was compressed
        ("grpc.max_send_message_length", -1),  # an answer's size follows from its request's, which was checked
        ("grpc.max_concurrent_streams", MOST_CALLS_EACH),
        ("grpc.max_metadata_size", MAX_METADATA),
        ("grpc.absolute_max_metadata_size", MAX_METADATA),
        ("grpc.max_connection_idle_ms", settings.keep_alive_s * 1000),
        ("grpc.keepalive_time_ms", settings.keep_alive_s * 1000),
        ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ]


def _open_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """TLS as the settings have it; None without. Raises ValueError that names the setting that is wrong."""
    tls = open_tls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    if tls is None or settings.tls_certificate is None:
        return None
    certificates = _Certificates(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    return grpc.dynamic_ssl_server_credentials(
        certificates.read(),
        certificates.read_if_changed,  # type: ignore[arg-type]  # None is not in the stubs
        settings.tls_client_ca is not None,
    )


class _Certificates:
    """The files of certificates, for each handshake as they are then. Grpcio asks on a thread of its own."""

    def __init__(self, certificate: Path, key: Path | None, client_ca: Path | None) -> None:
        self._files = certificate, key, client_ca
        self._seen: object = None

    def __repr__(self) -> str:
        return f"<_Certificates {self._files[0].name}>"

    def read(self) -> grpc.ServerCertificateConfiguration:
        """Raises OSError."""
        certificate, key, client_ca = self._files
        self._seen = self._identify()
        chain = certificate.read_bytes()
        pair = (chain if key is None else key.read_bytes(), chain)
        return grpc.ssl_server_certificate_configuration([pair], client_ca.read_bytes() if client_ca else None)

    def read_if_changed(self) -> grpc.ServerCertificateConfiguration | None:
        """None where what was read before holds: also where the new files cannot be used."""
        try:
            if self._identify() == self._seen:
                return None
            open_tls(*self._files)  # which proves them: grpcio would take anything, and fail with each handshake
            found = self.read()
        except (OSError, ValueError, ssl.SSLError) as error:
            log.error("certificate_not_read", error=str(error))  # noqa: TRY400 -- the operator's file, not our bug
            return None
        log.info("certificate_read", file=str(self._files[0]))
        return found

    def _identify(self) -> list[tuple[int, int, int]]:
        stats = [path.stat() for path in self._files if path is not None]
        return [(found.st_ino, found.st_size, found.st_mtime_ns) for found in stats]
