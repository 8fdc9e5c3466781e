"""What a server asks of its clients, at real listeners: it is trusted or shown, and explained where it is missing."""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from loadtest.observe.processes import find_free_port
from loadtest.observe.server_access import CannotConnect, ServerAccess, open_access
from tests.http_servers import serve_on_thread

TOKEN = "desk-secret"


class Answer(BaseHTTPRequestHandler):
    """200 for the token, 401 without one, 403 for any other; a redirect at /elsewhere."""

    def do_GET(self) -> None:
        """Answer without a body."""
        shown = self.headers.get("Authorization")
        status = 401 if shown is None else 200 if shown == f"Bearer {TOKEN}" else 403
        self.send_response(302 if self.path == "/elsewhere" else status)
        self.send_header("Location", "/ping")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class QuietServer(ThreadingHTTPServer):
    """Clients that go away in the midst of a handshake are what is tested."""

    def handle_error(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serve_connections(tls: ssl.SSLContext | None) -> Iterator[str]:
    """A listener, with TLS where there is a context; its host and port."""
    server = QuietServer(("127.0.0.1", 0), Answer)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    with serve_on_thread(server) as place:
        yield place


@pytest.fixture
def ca(tmp_path: Path) -> trustme.CA:
    """An authority, whose certificate is in ca.pem; in desk.pem is a client's with its key, in own.* apart."""
    made = trustme.CA()
    made.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    desk = made.issue_cert("desk@example.org")
    desk.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "desk.pem"))
    desk.cert_chain_pems[0].write_to_path(str(tmp_path / "own.pem"))
    desk.private_key_pem.write_to_path(str(tmp_path / "own.key"))
    return made


def make_context(ca: trustme.CA, *, mutual: bool = False) -> ssl.SSLContext:
    """A server's context; `mutual`: clients must show a certificate of the authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    if mutual:
        context.verify_mode = ssl.CERT_REQUIRED
        ca.configure_trust(context)
    return context


def test_a_server_that_asks_for_all_is_answered(ca: trustme.CA, tmp_path: Path) -> None:
    """Its authority is trusted, the certificate is shown from one file or two, and so is the token."""
    token = tmp_path / "token"
    token.write_text(f"{TOKEN}\n")
    with serve_connections(make_context(ca, mutual=True)) as place:
        for cert, key in ((tmp_path / "desk.pem", None), (tmp_path / "own.pem", tmp_path / "own.key")):
            access = open_access(tmp_path / "ca.pem", cert, key, token)
            assert access.request("GET", f"https://{place}/ping").status == 200
            assert TOKEN not in repr(access)


def test_the_variable_has_the_token_where_no_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the other commands; a file wins."""
    monkeypatch.setenv("FLEETCAST_TOKEN", "of-variable")
    assert open_access(None, None, None, None).token == "of-variable"
    (tmp_path / "token").write_text("of-file")
    assert open_access(None, None, None, tmp_path / "token").token == "of-file"
    monkeypatch.setenv("FLEETCAST_TOKEN", "")
    assert open_access(None, None, None, None).headers == {}


def test_what_is_missing_is_named(ca: trustme.CA, tmp_path: Path) -> None:
    """The flag that may help: for the authority, the certificate, the token, and for TLS where there is none."""
    known = ServerAccess(ca=tmp_path / "ca.pem")
    with serve_connections(make_context(ca)) as place:
        with pytest.raises(CannotConnect, match="--ca FILE"):
            ServerAccess().request("GET", f"https://{place}/ping")
        with pytest.raises(RuntimeError, match=r"answered 401 .*--token-file"):
            known.request("GET", f"https://{place}/ping")
        with pytest.raises(RuntimeError, match=r"answered 403 .*the scope of the listener") as refused:
            ServerAccess(known.ca, token="other-secret").request("GET", f"https://{place}/ping")
        assert "other-secret" not in str(refused.value)
        with pytest.raises(CannotConnect, match="address with https"):
            ServerAccess().request("GET", f"http://{place}/ping")
    with (
        serve_connections(make_context(ca, mutual=True)) as place,
        pytest.raises(CannotConnect, match="--client-cert FILE"),
    ):
        known.request("GET", f"https://{place}/ping")
    with serve_connections(None) as place, pytest.raises(CannotConnect, match="speaks no TLS there"):
        known.request("GET", f"https://{place}/ping")
    with pytest.raises(CannotConnect, match="refused"):
        known.request("GET", f"https://127.0.0.1:{find_free_port()}/ping")


def test_a_certificate_of_another_name_is_refused(ca: trustme.CA, tmp_path: Path) -> None:
    """The authority alone does not make a server the one that was named."""
    with serve_connections(make_context(ca)) as place, pytest.raises(CannotConnect, match="CERTIFICATE_VERIFY_FAILED"):
        ServerAccess(ca=tmp_path / "ca.pem").request("GET", f"https://localhost:{place.partition(':')[2]}/ping")


def test_a_redirect_is_not_followed(ca: trustme.CA, tmp_path: Path) -> None:
    """The token goes to the server that was named and to no other."""
    access = ServerAccess(ca=tmp_path / "ca.pem", token=TOKEN)
    with serve_connections(make_context(ca)) as place, pytest.raises(RuntimeError, match="answered 302"):
        access.request("GET", f"https://{place}/elsewhere")


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"two words", b'[[tokens]]\nname = "desk"\n', "gehéim".encode(), b"a" * 1025, b"a\r\nX-Evil: 1"],
)
def test_files_that_hold_no_token(content: bytes, tmp_path: Path) -> None:
    """The message says what the file must hold and repeats nothing of it; no line end gets into a header."""
    path = tmp_path / "desk.token"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"--token-file .*desk\.token must hold a token alone") as refused:
        open_access(None, None, None, path)
    assert (
        not content.strip() or content.strip()[:3].decode(errors="replace") not in str(refused.value).split("must")[0]
    )


def test_files_of_tls_that_are_wrong_are_named(ca: trustme.CA, tmp_path: Path) -> None:
    """With their flag; an encrypted key is an error and no question on the terminal."""
    (tmp_path / "nonsense").write_text("nonsense")
    plain = serialization.load_pem_private_key((tmp_path / "own.key").read_bytes(), None)
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (tmp_path / "locked.key").write_bytes(plain.private_bytes(*pem, serialization.BestAvailableEncryption(b"word")))
    url = "https://127.0.0.1:1"
    for access, said in (
        (ServerAccess(ca=tmp_path / "nonsense"), r"--ca .*nonsense: .*PEM file with the authority"),
        (ServerAccess(client_cert=tmp_path / "ca.pem"), r"--client-cert .*ca\.pem \(or give --client-key\)"),
        (
            ServerAccess(client_cert=tmp_path / "own.pem", client_key=tmp_path / "locked.key"),
            r"--client-key .*locked\.key",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            access.check_url(url)
    with pytest.raises(ValueError, match="are for addresses with https"):
        ServerAccess(ca=tmp_path / "ca.pem").check_url("http://127.0.0.1:1")
    with pytest.raises(ValueError, match="--client-key needs --client-cert"):
        open_access(None, None, tmp_path / "own.key", None)
