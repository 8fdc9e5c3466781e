"""A real S3 server for tests, behind a proxy that counts requests and breaks them on demand.

The server is moto in a process of its own or, with FLEETCAST_TEST_S3=swift, OpenStack Swift (`swift.sh`). The proxy
runs in threads of the test process; each request of `S3Server.endpoint_url` passes it and is in `S3Server.requests`, or
`S3Server.probes`, as (method, path, status) before its answer leaves.
"""

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import boto3
from botocore.config import Config

from model_store.stores.store_health import PROBE
from tests.http_servers import serve_on_thread
from tests.patience import PATIENCE_S, wait_until
from tests.processes import list_descriptors

#: A moto server says which port the system gave it: one that is chosen for it could be another server's by then.
MOTO = """
from threading import Event
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
Event().wait()
"""
SWIFT_PORTS, SWIFT_TRIES = 5, 5
LISTENING = "0A"  #: how /proc/net/tcp calls the state of a socket that listens
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


@dataclass
class Fault:
    """What happens to the next `times` requests whose path contains `match`, instead of or after their answer.

    `status`: answered by the proxy itself. `delay_s`: held that long first. `cut_after`: the connection is cut after so
    many bytes of the true body; -1 cuts before the status line, so the client sees no answer at all.
    `held`: not answered before the event is set.
    """

    match: str = ""
    times: int = 1
    status: int | None = None
    delay_s: float = 0.0
    cut_after: int | None = None
    damaged: bool = False
    held: threading.Event | None = None


@dataclass
class S3Server:
    """A running store. `endpoint_url` is the proxy's address, `env` what a child process needs to reach it."""

    endpoint_url: str
    env: dict[str, str]
    requests: list[tuple[str, str, int]] = field(default_factory=list)
    probes: list[tuple[str, str, int]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def client(self) -> Any:
        """A boto3 S3 client of this store."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name=self.env["AWS_DEFAULT_REGION"],
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
            config=Config(
                request_checksum_calculation="when_required",
                s3={"addressing_style": "path"},
                retries={"total_max_attempts": 8, "mode": "standard"},  # a busy machine's Swift answers 503 at times
            ),
        )

    def bucket(self, name: str | None = None) -> str:
        """Create a bucket, by default under a fresh name. Its name."""
        name = name or f"fleet-{uuid.uuid4().hex[:12]}"
        with closing(self.client()) as client:
            client.create_bucket(Bucket=name)
        return name

    def put(self, bucket: str, key: str, data: bytes) -> str:
        """Store an object as another program would. Its ETag without quotes."""
        with closing(self.client()) as client:
            return str(client.put_object(Bucket=bucket, Key=key, Body=data)["ETag"]).strip('"')

    def delete(self, bucket: str, key: str) -> None:
        """Delete an object as another program would."""
        with closing(self.client()) as client:
            client.delete_object(Bucket=bucket, Key=key)

    def seen(self, method: str, part: str) -> list[int]:
        """Status codes of the requests so far with this method and `part` in the unquoted path, in order."""
        with self._lock:
            return [status for m, path, status in self.requests if m == method and part in unquote(path)]

    def inject(self, fault: Fault) -> None:
        """Break requests to come; faults are used in the order they were injected."""
        with self._lock:
            self.faults.append(fault)

    @contextmanager
    def outage(self, match: str = "") -> Iterator[None]:
        """Within the block, requests whose path contains `match` get no answer: their connections are cut."""
        fault = Fault(match=match, times=sys.maxsize, cut_after=-1)
        self.inject(fault)
        try:
            yield
        finally:
            self.faults.remove(fault)

    @contextmanager
    def hold(self, match: str, times: int = 1) -> Iterator[threading.Event]:
        """The next `times` requests whose path contains `match` are held until the event is set or the block ends."""
        released = threading.Event()
        fault = Fault(match=match, times=times, held=released)
        self.inject(fault)
        try:
            yield released
        finally:
            released.set()
            with self._lock:
                fault.times = 0

    def take_fault(self, path: str) -> Fault | None:
        """The proxy's side of `inject`: the fault this request meets, counted down.

        A probe, which a server makes by the clock, meets it too, but leaves it to as many other requests.
        """
        with self._lock:
            for fault in self.faults:
                if fault.match in unquote(path) and fault.times > 0:
                    fault.times -= not path.endswith(f"/{PROBE}")
                    return fault
        return None

    def record(self, method: str, path: str, status: int) -> None:
        """The proxy's log. Probes, which a server makes by the clock, are counted apart."""
        with self._lock:
            (self.probes if path.endswith(f"/{PROBE}") else self.requests).append((method, path, status))


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start the server chosen by FLEETCAST_TEST_S3 (`moto`, the default, or `swift`) and the proxy before it."""
    kind = os.environ.get("FLEETCAST_TEST_S3", "moto")
    start, access, secret = {"moto": (_run_moto, "test", "testing"), "swift": (_run_swift, "test:tester", "testing")}[
        kind
    ]
    with start() as upstream, _run_proxy(upstream) as server:
        server.env.update(
            AWS_ACCESS_KEY_ID=access,
            AWS_SECRET_ACCESS_KEY=secret,
            AWS_DEFAULT_REGION="us-east-1",
            AWS_ENDPOINT_URL=server.endpoint_url,
            AWS_EC2_METADATA_DISABLED="true",
        )
        yield server


@contextmanager
def _run_moto() -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, "-c", MOTO], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            assert port, f"the S3 server ended with {process.wait()} before it listened"
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


@contextmanager
def _run_swift() -> Iterator[str]:
    """Its ports are free when they are chosen. Where another program takes one before it does, it gets others."""
    for _ in range(SWIFT_TRIES):
        port = _free_ports(SWIFT_PORTS)
        folder = Path(tempfile.mkdtemp(prefix="swift-"))
        try:
            if _start_swift(folder, port):
                yield f"http://127.0.0.1:{port}"
                return
        finally:
            for pid in _list_swift(folder):
                try:
                    os.kill(pid, signal.SIGTERM)
                except ProcessLookupError:
                    pass
            shutil.rmtree(folder, ignore_errors=True)
    raise RuntimeError(f"swift has not started at any of {SWIFT_TRIES} places: it says why above")


def _start_swift(folder: Path, port: int) -> bool:
    """Whether all of swift's servers listen, at this port and those behind it; False where one has ended."""
    command = [str(Path(__file__).with_name("swift.sh")), str(folder), str(port)]
    if subprocess.run(command, check=False, timeout=PATIENCE_S).returncode:
        return False
    ports = range(port, port + SWIFT_PORTS)
    return wait_until(lambda: _judge_swift(_list_swift(folder), ports), "swift's servers listen or end") == "listens"


def _judge_swift(pids: Sequence[int], ports: Iterable[int]) -> str:
    """Whether these processes themselves listen at the ports, or one of them has ended; empty as long as neither is."""
    sockets = [{target for _, target in list_descriptors(pid)} for pid in pids]
    if not all(sockets):
        return "ended"
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {int(row[1].rpartition(":")[2], 16): f"socket:[{row[9]}]" for row in rows if row[3] == LISTENING}
    own = set[str]().union(*sockets)
    return "listens" if all(listening.get(port) in own for port in ports) else ""


def _list_swift(folder: Path) -> list[int]:
    """The processes that the script has started."""
    pids = folder / "pids"
    return [int(pid) for pid in pids.read_text().split()] if pids.exists() else []


def _free_ports(count: int) -> int:
    """The first of `count` consecutive ports that were free a moment ago."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
        try:
            for p in range(port, port + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", p))
        except OSError:
            continue
        return port


@contextmanager
def _run_proxy(upstream: str) -> Iterator[S3Server]:
    server = S3Server(endpoint_url="", env={})
    handler = type("Handler", (_Handler,), {"upstream": urlsplit(upstream), "server_state": server})
    with serve_on_thread(_ProxyServer(("127.0.0.1", 0), handler)) as place:
        server.endpoint_url = f"http://{place}"
        yield server


class _ProxyServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is the test's business."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together; unbuffered, Nagle would hold the body back
    disable_nagle_algorithm = True
    upstream: Any
    server_state: S3Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class names it so
        """Silent: `S3Server.requests` is the log."""

    def handle_expect_100(self) -> bool:
        """boto3 waits a second for this line before it sends a body."""
        done = super().handle_expect_100()
        self.wfile.flush()
        return done

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server_state.take_fault(self.path) or Fault()
        time.sleep(fault.delay_s)
        if fault.held is not None:
            fault.held.wait(PATIENCE_S)
        if fault.cut_after == -1:
            self.server_state.record(self.command, self.path, 0)
            self.close_connection = True
            return
        if fault.status is not None:
            reply, status, headers = b"", fault.status, [("Content-Length", "0")]
        else:
            reply, status, headers = self._ask_upstream(body)
        if fault.damaged and reply:
            middle = len(reply) // 2
            reply = reply[:middle] + bytes([reply[middle] ^ 1]) + reply[middle + 1 :]
        self.server_state.record(self.command, self.path, status)
        self.send_response_only(status)
        for key, value in headers:
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(reply if fault.cut_after is None else reply[: fault.cut_after])
        self.close_connection = fault.cut_after is not None

    def _ask_upstream(self, body: bytes) -> tuple[bytes, int, list[tuple[str, str]]]:
        with closing(
            http.client.HTTPConnection(self.upstream.hostname, self.upstream.port, timeout=PATIENCE_S)
        ) as connection:
            # The path and the Host header go through as they came: the client has signed them.
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for key, value in self.headers.items():
                if key.lower() not in HOP_BY_HOP:
                    connection.putheader(key, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            reply = connection.getresponse()
            data = reply.read()
            headers = [(k, v) for k, v in reply.getheaders() if k.lower() not in HOP_BY_HOP]
            length = reply.headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
            if reply.status not in (204, 304):
                headers.append(("Content-Length", length))
            return data, reply.status, headers

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward  # noqa: N815  the base class looks them up so
