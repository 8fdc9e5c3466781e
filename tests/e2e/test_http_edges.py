"""A real server as proxies and clients of other languages see it: upgrades, trailers, codings, names, signals."""

import gzip
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Serve
from tests.e2e.models import Model, pack_forecaster
from tests.e2e.server import Server, run_server, upload
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

MODEL = pack_forecaster("edges/a.mar", 1)
NAMED = pack_forecaster("價格/caf\u00e9 1.mar", 2)
INNER = b"GET /ready HTTP/1.1\r\nHost: inner\r\n\r\n"
TRAILER_BYTES = 24 << 20
FRONT_GROWTH = 16 << 20  #: bytes that reads of the moment may take; as headers the trailers would take a gigabyte


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two models, for tests that leave it as it is."""
    bucket = s3.bucket()
    upload(s3, bucket, [MODEL, NAMED])
    with run_server(s3, tmp_path_factory.mktemp("edges"), f"s3://{bucket}") as server:
        yield server


def exchange(server: Server, *parts: bytes) -> bytes:
    """What the inference listener says to these bytes until it closes the connection."""
    with socket.create_connection(server.address, timeout=PATIENCE_S) as sock:
        for part in parts:
            sock.sendall(part)
        said = b""
        while data := sock.recv(65536):
            said += data
    return said


def make_head(body: bytes, *lines: str, model: Model = MODEL) -> bytes:
    """An invocation's head; the connection ends with its answer."""
    target = f"X-Amzn-SageMaker-Target-Model: {model.name}"
    every = ["POST /invocations HTTP/1.1", "Host: fleet", target, *lines, f"Content-Length: {len(body)}"]
    return "\r\n".join([*every, "", ""]).encode()


# --- upgrades -------------------------------------------------------------------------------------------------------


def test_a_body_behind_an_upgrade_is_no_request(house: Server) -> None:
    """Bytes that a proxy takes for the body of one request are not answered as a second one."""
    last = b"GET /ping HTTP/1.1\r\nHost: fleet\r\nConnection: close\r\n\r\n"
    with socket.create_connection(house.address, timeout=PATIENCE_S) as sock:
        sock.sendall(make_head(INNER, "Connection: Upgrade", "Upgrade: h2c", "Expect: 100-continue"))
        assert sock.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(INNER + last)
        said = b""
        while data := sock.recv(65536):
            said += data
    assert said.count(b"HTTP/1.1 ") == 2
    assert b'"ready"' not in said


@pytest.mark.skipif(shutil.which("javac") is None, reason="needs a JDK (openjdk-17-jdk-headless)")
def test_the_jdks_own_client(house: Server, tmp_path: Path) -> None:
    """Its requests are answered rightly, one after the other on one connection."""
    question = MODEL.question(3)
    (tmp_path / "body").write_bytes(question.body)
    asked = [f"{house.url}/invocations", MODEL.name, str(tmp_path / "body"), "3"]
    command = ["java", "-XX:TieredStopAtLevel=1", str(Path(__file__).with_name("Ask.java")), *asked]
    done = subprocess.run(command, capture_output=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr.decode()
    answers = [line.split(b" ", 2) for line in done.stdout.splitlines()]
    assert [(version, status) for version, status, _ in answers] == [(b"HTTP_1_1", b"200")] * 3
    for _, _, body in answers:
        question.check(body)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_that_would_upgrade(house: Server, tmp_path: Path) -> None:
    """`curl --http2` offers h2c in clear text and takes HTTP/1.1."""
    question = MODEL.question(4)
    (tmp_path / "body").write_bytes(question.body)
    headers = ["-H", f"X-Amzn-SageMaker-Target-Model: {MODEL.name}", "-H", "Content-Type: application/json"]
    command = ["curl", "-sS", "--fail", "--http2", *headers, "--data-binary", f"@{tmp_path / 'body'}"]
    done = subprocess.run([*command, f"{house.url}/invocations"], capture_output=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr.decode()
    question.check(done.stdout)


NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
  upstream fleet {{ server {address}; keepalive 1; }}
  server {{
    listen unix:{folder}/socket;
    location / {{
      proxy_pass http://fleet; proxy_http_version 1.1; proxy_set_header Host $host;
      proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $connection_upgrade;
    }}
  }}
}}
"""


@contextmanager
def run_nginx(folder: Path, server: Server) -> Iterator[Path]:
    """Nginx before the server, with one kept connection and the usual snippet for websockets: its socket."""
    (folder / "conf").write_text(NGINX.format(folder=folder, address=f"{server.address[0]}:{server.address[1]}"))
    process = subprocess.Popen(
        ["nginx", "-p", str(folder), "-c", str(folder / "conf"), "-e", str(folder / "error.log")]
    )
    try:
        wait_until((folder / "socket").exists, "nginx listens")
        yield folder / "socket"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_nginx_with_the_websocket_snippet(house: Server, tmp_path: Path) -> None:
    """Requests with and without an upgrade share its one connection to the server, and each gets its own answer."""
    with run_nginx(tmp_path, house) as path:
        for i in range(6):
            question = MODEL.question(i)
            upgrade = ("Connection: Upgrade", "Upgrade: h2c") if i % 2 else ()
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(path))
                sock.sendall(make_head(question.body, "Content-Type: application/json", *upgrade) + question.body)
                said = b""
                while not said.partition(b"\r\n\r\n")[2].endswith(b"}"):
                    data = sock.recv(65536)
                    assert data, said
                    said += data
            assert said.startswith(b"HTTP/1.1 200 ")
            question.check(said.partition(b"\r\n\r\n")[2])


# --- heads and bodies -----------------------------------------------------------------------------------------------


def test_trailers_change_nothing_and_cost_nothing(house: Server) -> None:
    """A trailer does not name another model; 24 MB of them get the connection closed and leave the front small."""
    question = MODEL.question(5)
    chunked = make_head(b"", "Connection: close").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    body = b"%x\r\n%b\r\n0\r\n" % (len(question.body), question.body)
    said = exchange(house, chunked + body + b"X-Amzn-SageMaker-Target-Model: other.mar\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 200 ")
    question.check(said.partition(b"\r\n\r\n")[2])
    (front,) = house.processes("front")
    before = read_memory(front["pid"])
    with socket.create_connection(house.address, timeout=PATIENCE_S) as sock:
        sock.sendall(chunked + body)
        with pytest.raises(ConnectionError):
            sock.sendall(b"a:b\r\n" * (TRAILER_BYTES // 5))
    assert read_memory(front["pid"]) - before < FRONT_GROWTH
    house.ask(question)


def read_memory(pid: int) -> int:
    """Resident bytes."""
    status = Path(f"/proc/{pid}/status").read_text().split()
    return int(status[status.index("VmRSS:") + 1]) * 1024


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br"])
def test_codings_of_a_body(house: Server, coding: str) -> None:
    """A gzip body is served, deflate that is none is the client's fault, and another coding is refused by its name."""
    question = MODEL.question(6)
    headers = {"Content-Encoding": coding, "Content-Type": "application/json"}
    reply = house.post(MODEL.name, gzip.compress(question.body), headers)
    assert reply.status_code == {"gzip": 200, "deflate": 400, "br": 415}[coding]
    if coding == "gzip":
        question.check(reply.content)
    else:
        assert coding in reply.json()["message"]


def test_names_in_other_scripts(s3: S3Server, store: str, serve: Serve, house: Server) -> None:
    """boto3 signs and sends them as UTF-8: they are served, signed or not; a name in Latin-1 is told what is wanted."""
    house.ask(NAMED.question(1))
    upload(s3, store, [NAMED])
    with serve(access_keys={"AKIA": "secret"}, access_region="us-east-1") as server:
        server.ask(NAMED.question(1), server.client(key="AKIA", secret="secret"))
    latin = make_head(b"", "Connection: close").replace(MODEL.name.encode(), b"caf\xe9.mar")
    said = exchange(house, latin)
    assert said.startswith(b"HTTP/1.1 400 ")
    assert b"UTF-8" in said


# --- signals --------------------------------------------------------------------------------------------------------


def test_a_hangup_drops_nothing(s3: S3Server, store: str, serve: Serve) -> None:
    """SIGHUP to the supervisor and to each child: the same processes go on answering, and the log says what to do."""
    upload(s3, store, [MODEL])
    with serve() as server:
        server.ask(MODEL.question(0))
        before = {process["pid"] for kind in ("front", "worker") for process in server.processes(kind)}
        for pid in (server.process.pid, *before):
            os.kill(pid, signal.SIGHUP)
        wait_until(lambda: "hangup_ignored" in server.said(), "the log says that SIGHUP changes nothing")
        for i in range(5):
            assert server.ask(MODEL.question(i)).cache == "hit"
        assert {process["pid"] for kind in ("front", "worker") for process in server.processes(kind)} == before
