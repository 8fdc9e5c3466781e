"""Nodes prove to each other that they know the cluster's secret, over plain TCP and over TLS."""

import asyncio
import hashlib
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import trustme

from server.access.tls import open_tls
from server.front.nodes.handshake import (
    HELLO,
    MAGIC,
    MOST_UNPROVEN,
    NONCE,
    ConnectingHandshake,
    ListeningHandshake,
    NotProven,
    compute_proof,
    fingerprint_of_file,
    read_secret,
)
from server.front.nodes.node_link import make_client_context
from tests.patience import PATIENCE_S

SECRET, OTHER = b"the secret of a cluster", b"the secret of another one"


class Speaker(asyncio.Protocol):
    """What has the connection after the proofs: it says hello, and keeps what it hears."""

    everyone: ClassVar[list[asyncio.Transport]] = []  #: to be closed when the test ends

    def __init__(self) -> None:
        self.heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say hello."""
        speaking = cast("asyncio.Transport", transport)
        speaking.write(b"hello")
        self.everyone.append(speaking)

    def data_received(self, data: bytes) -> None:
        """Keep it."""
        if not self.heard.done():
            self.heard.set_result(data)


def write_certificate(folder: Path, name: str) -> Path:
    """A certificate with its key, of an authority that nobody knows."""
    file = folder / name
    certificate = trustme.CA().issue_cert("127.0.0.1")
    file.write_bytes(
        certificate.private_key_pem.bytes() + b"".join(part.bytes() for part in certificate.cert_chain_pems)
    )
    return file


async def listen(secret: bytes, certificate: Path | None, made: list[Speaker]) -> tuple[asyncio.Server, int]:
    """A listener that hands over to speakers."""
    unproven: set[object] = set()

    def make_speaker() -> Speaker:
        made.append(Speaker())
        return made[-1]

    tls = open_tls(certificate, None, None)
    server = await asyncio.get_running_loop().create_server(
        lambda: ListeningHandshake(secret, make_speaker, certificate, unproven),
        "127.0.0.1",
        0,
        ssl=None if tls is None else tls.context,
    )
    return server, server.sockets[0].getsockname()[1]


async def connect(port: int, secret: bytes, certificate: Path | None = None) -> Speaker:
    """Connect and prove. Raises NotProven."""
    _, handshake = await asyncio.get_running_loop().create_connection(
        lambda: ConnectingHandshake(secret, Speaker), "127.0.0.1", port, ssl=make_client_context(certificate)
    )
    speaker: Speaker = await asyncio.wait_for(handshake.done, PATIENCE_S)
    return speaker


def close_speakers() -> None:
    """End all connections that have been proven."""
    while Speaker.everyone:
        Speaker.everyone.pop().abort()


@asynccontextmanager
async def keep_serving(server: asyncio.Server) -> AsyncIterator[None]:
    """Listen meanwhile. From Python 3.12 on a server's end waits for its connections, which are closed before."""
    async with server:
        try:
            yield
        finally:
            close_speakers()


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine function within the test's patience."""

    async def work_and_close() -> None:
        try:
            await asyncio.wait_for(work(), PATIENCE_S)
        finally:
            close_speakers()
            await asyncio.sleep(0.05)  # transports close in later passes of the loop

    asyncio.run(work_and_close())


@pytest.mark.parametrize("has_tls", [False, True])
def test_nodes_that_know_the_secret_speak(tmp_path: Path, has_tls: bool) -> None:
    """What either says right behind its proof arrives; a certificate needs no authority."""
    certificate = write_certificate(tmp_path, "node.pem") if has_tls else None

    async def work() -> None:
        made: list[Speaker] = []
        server, port = await listen(SECRET, certificate, made)
        async with keep_serving(server):
            speaker = await connect(port, SECRET, certificate)
            assert await speaker.heard == b"hello"
            assert await made[0].heard == b"hello"

    run(work)


def test_another_secret_is_refused_by_both(tmp_path: Path) -> None:
    """Who connects sees by the first proof that this is not its cluster, and who listens hands nothing over."""

    async def work() -> None:
        made: list[Speaker] = []
        server, port = await listen(SECRET, None, made)
        async with keep_serving(server):
            with pytest.raises(NotProven, match="does not know this cluster's secret"):
                await connect(port, OTHER)
        assert not made

    run(work)


def test_a_wrong_proof_and_other_protocols_end_the_connection(tmp_path: Path) -> None:
    """A client that answers with a made-up proof, one that reflects ours, and one of HTTP get nothing."""

    async def ask(port: int, hello: bytes, make_proof: Callable[[bytes], bytes]) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(hello)
        try:
            said = await reader.read(1000)
            if said:
                writer.write(make_proof(said))
                said = await reader.read(1000)
        except ConnectionResetError:
            said = b""
        writer.close()
        with suppress(ConnectionResetError):
            await writer.wait_closed()
        return said

    async def work() -> None:
        made: list[Speaker] = []
        server, port = await listen(SECRET, None, made)
        hello = MAGIC + bytes(NONCE)
        async with keep_serving(server):
            for make_proof in (lambda said: bytes(32), lambda said: said[NONCE:]):
                assert await ask(port, hello, make_proof) == b""
            assert await ask(port, b"GET / HTTP/1.1\r\nhost: me\r\nx: yyyyyyyyyyyyy\r\n\r\n"[:HELLO], bytes) == b""
        assert not made

    run(work)


def test_a_node_in_between_cannot_pass_proofs_on(tmp_path: Path) -> None:
    """A proof holds for one certificate: one that was made for another listener's is worth nothing."""
    here, there = (fingerprint_of_file(write_certificate(tmp_path, name)) for name in ("a.pem", "b.pem"))
    nonces = bytes(2 * NONCE)
    assert here != there
    assert compute_proof(SECRET, b"connects", nonces, here) != compute_proof(SECRET, b"connects", nonces, there)
    assert compute_proof(SECRET, b"connects", nonces, here) != compute_proof(SECRET, b"listens", nonces, here)


def test_connections_without_proof_are_few(tmp_path: Path) -> None:
    """Further ones are closed while so many wait; a node gets in again once they are gone."""

    async def work() -> None:
        made: list[Speaker] = []
        server, port = await listen(SECRET, None, made)
        async with keep_serving(server):
            idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(MOST_UNPROVEN)]
            with pytest.raises((NotProven, ConnectionResetError)):
                await connect(port, SECRET)
            for _, writer in idle:
                writer.close()
                await writer.wait_closed()
            while not made:
                try:
                    await connect(port, SECRET)
                except (NotProven, ConnectionResetError):
                    await asyncio.sleep(0.01)

    run(work)


def test_secrets_are_long_and_safe(tmp_path: Path) -> None:
    """A short secret, and a file that others can write to, are refused with the setting's name."""
    file = tmp_path / "secret"
    file.write_bytes(b"short\n")
    with pytest.raises(ValueError, match=r"fewer than 16 bytes.*node_key_file"):
        read_secret(file)
    file.write_bytes(SECRET + b"\n")
    assert read_secret(file) == SECRET
    file.chmod(0o666)
    with pytest.raises(ValueError, match=r"written by others.*node_key_file"):
        read_secret(file)


def test_a_fingerprint_is_that_of_the_certificate_shown(tmp_path: Path) -> None:
    """It is the SHA-256 of what a client of TLS is shown; without a certificate it is empty."""
    certificate = write_certificate(tmp_path, "node.pem")
    assert fingerprint_of_file(None) == b""
    text = certificate.read_text()
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    first = f"{begin}{text.split(begin)[1].split(end)[0]}{end}\n"
    assert fingerprint_of_file(certificate) == hashlib.sha256(ssl.PEM_cert_to_DER_cert(first)).digest()
