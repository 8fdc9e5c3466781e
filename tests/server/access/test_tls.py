"""TLS with real certificates over real sockets: served, renewed while it serves, and clients that must show one."""

import asyncio
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from structlog.testing import capture_logs

from server.access.tls import MAX_CLIENT_NAME, Tls, name_client
from tests.patience import PATIENCE_S


@pytest.fixture
def ca() -> trustme.CA:
    """An authority."""
    return trustme.CA()


def write(ca: trustme.CA, folder: Path) -> tuple[Path, Path]:
    """A new certificate of 127.0.0.1 and its key."""
    made = ca.issue_cert("127.0.0.1")
    certificate, key = folder / "server.pem", folder / "server.key"
    certificate.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
    key.write_bytes(made.private_key_pem.bytes())
    return certificate, key


def shake_hands(tls: Tls, client: ssl.SSLContext, before: Callable[[], None] = lambda: None) -> bytes:
    """The certificate that a client is shown, in DER. Raises ssl.SSLError or ConnectionError."""

    async def run() -> bytes:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readline())
            writer.close()

        sock = socket.create_server(("127.0.0.1", 0))
        server = await asyncio.start_server(echo, sock=sock, ssl=tls.context)
        before()
        async with server:
            reader, writer = await asyncio.open_connection(*sock.getsockname(), ssl=client)
            writer.write(b"hello\n")
            if await reader.readline() != b"hello\n":  # with TLS 1.3 a refusal comes after the client's handshake
                raise ConnectionError("cut off")
            shown: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.close()
            return shown

    return asyncio.run(run())


def make_client(ca: trustme.CA) -> ssl.SSLContext:
    """A client that trusts the authority."""
    context = ssl.create_default_context()
    ca.configure_trust(context)
    return context


def test_a_renewed_certificate_is_shown_to_new_clients(ca: trustme.CA, tmp_path: Path) -> None:
    """Without a restart, from the next look on; looking without a change does nothing."""
    tls = Tls(*write(ca, tmp_path), None)
    first = shake_hands(tls, make_client(ca))
    tls.reload_if_changed()
    assert shake_hands(tls, make_client(ca)) == first

    def renew() -> None:
        write(ca, tmp_path)
        tls.reload_if_changed()

    second = shake_hands(tls, make_client(ca), renew)
    assert second != first


def test_a_renewal_that_is_half_done_changes_nothing(ca: trustme.CA, tmp_path: Path) -> None:
    """A certificate without its key, no PEM, no file: the old one serves on, and an error names the file."""
    certificate, key = write(ca, tmp_path)
    tls = Tls(certificate, key, None)
    first = shake_hands(tls, make_client(ca))
    other = tmp_path / "other"
    other.mkdir()
    halves: tuple[Callable[[], object], ...] = (
        lambda: certificate.write_bytes(write(ca, other)[0].read_bytes()),
        lambda: certificate.write_text("nonsense"),
        certificate.unlink,
    )
    for half in halves:
        half()
        with capture_logs() as logs:
            tls.reload_if_changed()
        assert logs[0]["event"] in ("certificate_not_read", "certificate_missing")
        assert "server.pem" in logs[0]["error"]
        assert shake_hands(tls, make_client(ca)) == first


def test_clients_must_show_a_certificate_of_the_authority(ca: trustme.CA, tmp_path: Path) -> None:
    """With `tls_client_ca` one without a certificate, or with one of another authority, is cut off."""
    authority = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(authority))
    tls = Tls(*write(ca, tmp_path), authority)
    assert repr(tls) == "<Tls server.pem, clients of ca.pem>"
    known, stranger = make_client(ca), make_client(ca)
    ca.issue_cert("desk@example.org").configure_cert(known)
    trustme.CA().issue_cert("desk@example.org").configure_cert(stranger)
    shake_hands(tls, known)
    for client in (stranger, make_client(ca)):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            shake_hands(tls, client)


Connected = tuple[ssl.SSLSession | None, bool]


def connect(tls: Tls, client: ssl.SSLContext, session: ssl.SSLSession | None = None) -> Connected:
    """The session of a connection, and whether it was resumed. Raises ssl.SSLError or ConnectionError."""

    async def run() -> Connected:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readline())
            await writer.drain()
            await reader.read()
            writer.close()

        place = socket.create_server(("127.0.0.1", 0))
        async with await asyncio.start_server(echo, sock=place, ssl=tls.context):
            return await asyncio.to_thread(ask, place.getsockname())

    def ask(address: tuple[str, int]) -> Connected:
        raw = socket.create_connection(address, PATIENCE_S)
        with client.wrap_socket(raw, server_hostname="127.0.0.1", session=session) as sock:
            sock.sendall(b"hello\n")
            if sock.recv(6) != b"hello\n":
                raise ConnectionError("cut off")
            return sock.session, bool(sock.session_reused)

    return asyncio.run(run())


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_withdrawn_authority_is_refused_and_its_sessions_are_not_resumed(
    ca: trustme.CA, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    """From the next look on. Until then its client's session is resumed, which proves that it can be; the client of the
    authority that stays is served throughout.
    """
    authority, other = tmp_path / "ca.pem", trustme.CA()
    authority.write_bytes(ca.cert_pem.bytes() + other.cert_pem.bytes())
    tls = Tls(*write(ca, tmp_path), authority)
    stays, goes = make_client(ca), make_client(ca)
    goes.maximum_version = version
    ca.issue_cert("stays@example.org").configure_cert(stays)
    other.issue_cert("goes@example.org").configure_cert(goes)
    connect(tls, stays)
    session, _ = connect(tls, goes)
    assert connect(tls, goes, session)[1]
    authority.write_bytes(ca.cert_pem.bytes())
    tls.reload_if_changed()
    connect(tls, stays)
    for shown in (None, session):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            connect(tls, goes, shown)


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_an_authority_that_turns_bad_changes_nothing(ca: trustme.CA, tmp_path: Path, content: bytes) -> None:
    """The last good one stays in force: known clients are served, others are not."""
    authority = tmp_path / "ca.pem"
    authority.write_bytes(ca.cert_pem.bytes())
    tls = Tls(*write(ca, tmp_path), authority)
    known = make_client(ca)
    ca.issue_cert("desk@example.org").configure_cert(known)
    authority.write_bytes(content)
    with capture_logs() as logs:
        tls.reload_if_changed()
    assert [line["event"] for line in logs] == ["certificate_not_read"]
    assert "ca.pem (tls_client_ca)" in logs[0]["error"]
    connect(tls, known)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        connect(tls, make_client(ca))


@pytest.mark.parametrize(
    ("certificate", "name"),
    [
        (None, None),
        ({}, None),
        ({"subject": ((("organizationName", "trustme"),), (("commonName", "desk-au"),))}, "CN:desk-au"),
        ({"subject": (), "subjectAltName": (("email", "desk@example.org"), ("DNS", "b"))}, "email:desk@example.org"),
        ({"subjectAltName": (("URI", "spiffe://fleet/desk"),)}, "URI:spiffe://fleet/desk"),
        ({"subjectAltName": (("IP Address", "10.0.0.1"),)}, "IPAddress:10.0.0.1"),
        ({"subject": ((("commonName", ""),),), "serialNumber": "5B21"}, "serial:5B21"),
        ({"subject": ((("commonName", "a status=200\n\u202e\\"),),)}, r"CN:a\x20status\x3d200\x0a\x202e\x5c"),
        ({"subject": ((("commonName", "a" * 100_000),),)}, f"CN:{'a' * MAX_CLIENT_NAME}..."),
        ({"subject": ((("commonName", "\n" * 100_000),),)}, f"CN:{(chr(92) + 'x0a') * (MAX_CLIENT_NAME // 4)}..."),
    ],
)
def test_clients_are_named_by_their_certificates(certificate: dict[str, Any] | None, name: str | None) -> None:
    """The common name, else the first alternative name, else the serial number; bounded, and nothing forges a line."""
    assert name_client(certificate) == name


def test_old_versions_are_refused(ca: trustme.CA, tmp_path: Path) -> None:
    """Nothing below TLS 1.2."""
    assert Tls(*write(ca, tmp_path), None).context.newest.minimum_version is ssl.TLSVersion.TLSv1_2


def test_files_that_are_wrong_are_named(ca: trustme.CA, tmp_path: Path) -> None:
    """With the setting that names them."""
    certificate, key = write(ca, tmp_path)
    for arguments, said in (
        ((tmp_path / "no.pem", None, None), "no.pem .tls_certificate"),
        ((certificate, tmp_path / "no.key", None), "no.key .tls_key"),
        ((certificate, key, tmp_path / "no-ca.pem"), "no-ca.pem .tls_client_ca"),
    ):
        with pytest.raises(ValueError, match=said):
            Tls(*arguments)


def test_an_encrypted_key_is_an_error_and_no_question(ca: trustme.CA, tmp_path: Path) -> None:
    """OpenSSL would ask for its password on the terminal, and the start would wait for it."""
    certificate, key = write(ca, tmp_path)
    plain = serialization.load_pem_private_key(key.read_bytes(), None)
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    key.write_bytes(plain.private_bytes(*pem, serialization.BestAvailableEncryption(b"password")))
    with pytest.raises(ValueError, match=r"server\.key .tls_key"):
        Tls(certificate, key, None)
