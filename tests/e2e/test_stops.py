"""The end of a server: what clients have sent is answered, and it ends in time whatever is stuck."""

import contextlib
import os
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import Serve
from tests.e2e.models import pack_fleet
from tests.e2e.server import Server, request_bytes, upload
from tests.patience import PATIENCE_S, repeat_in_stalls, wait_until
from tests.s3 import S3Server
from tests.server.supervisor.test_signals import is_gone

pytestmark = pytest.mark.e2e

CLIENTS = 12
NEVER_S = 2 * PATIENCE_S  #: a wait that this test would not wait for


class KeptAlive(threading.Thread):
    """A client that keeps asking over one connection, and over a new one once it is told to close.

    `counted`: answers, and requests that were lost: sent before the server was seen to close, and not answered.
    """

    def __init__(self, server: Server, request: bytes, pause_s: float) -> None:
        super().__init__()
        self._address, self._request, self._pause_s = server.address, request, pause_s
        self.counted: Counter[str] = Counter()

    def run(self) -> None:
        """Until connections are refused."""
        while True:
            try:
                sock = socket.create_connection(self._address, timeout=PATIENCE_S)
            except ConnectionRefusedError:
                return
            with sock:
                while self._ask(sock):
                    time.sleep(self._pause_s)  # a client's own pace

    def _ask(self, sock: socket.socket) -> bool:
        """Send one request and read its answer; whether the connection may be used again."""
        sock.setblocking(False)
        try:
            if sock.recv(1) == b"":
                return False  # closed while it was idle, and seen to be
        except BlockingIOError:
            pass
        sock.settimeout(PATIENCE_S)
        answer = b""
        try:
            sock.sendall(self._request)
            while not is_whole(answer) and (part := sock.recv(65536)):
                answer += part
        except OSError:
            pass
        self.counted["answered" if is_whole(answer) else "lost"] += 1
        return is_whole(answer) and b"connection: close" not in answer.lower()


def is_whole(answer: bytes) -> bool:
    """Whether all of an answer is there."""
    head, ended, body = answer.lower().partition(b"\r\n\r\n")
    return bool(ended) and len(body) == int(head.partition(b"content-length: ")[2].split()[0])


def test_kept_alive_connections_lose_nothing(s3: S3Server, store: str, serve: Serve) -> None:
    """SIGTERM while clients ask over kept-alive connections, some often and some seldom: each request is answered."""
    (model,) = pack_fleet("kept", 1)
    upload(s3, store, [model])
    with serve(workers=1, fronts=2, drain_s=PATIENCE_S) as server:
        server.ask(model.question(0))
        request = request_bytes(model.question(0))
        clients = [KeptAlive(server, request, (i % 4) * 0.05) for i in range(CLIENTS)]
        for client in clients:
            client.start()
        while sum(client.counted["answered"] for client in clients) < 20 * CLIENTS:
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        for client in clients:
            client.join()
        assert sum(client.counted["lost"] for client in clients) == 0
        assert server.process.wait(PATIENCE_S) == 0


def test_whatever_is_stuck_the_end_comes_in_time(s3: S3Server, store: str, serve: Serve, tmp_path: Path) -> None:
    """A stopped front, a stopped worker and loads that do not end: requests are told that the server stops, and all of
    it is gone within `drain_s` and the stated four seconds. Else the exit code would be 1.
    """
    models = pack_fleet("stuck", 4)
    upload(s3, store, models)

    def end_stuck_server(trial: int) -> None:
        with (
            serve(workers=2, fronts=2, drain_s=1, disk_cache=tmp_path / f"trial{trial}") as server,
            s3.hold(f"{store}/", 4),
            ThreadPoolExecutor(1) as pool,
            contextlib.ExitStack() as stack,
        ):
            os.kill(server.processes("front")[0]["pid"], signal.SIGSTOP)
            asked = [
                stack.enter_context(socket.create_connection(server.address, timeout=PATIENCE_S)) for _ in range(8)
            ]
            for i, sock in enumerate(asked):
                sock.sendall(request_bytes(models[i % 4].question(i)))
            wait_until(lambda: server.total("fleetcast_model_cache_requests_total") >= 8, "all requests are waiting")
            managing = pool.submit(server.fleet, "load", models[0].name)
            os.kill(server.processes("worker")[0]["pid"], signal.SIGSTOP)
            server.process.send_signal(signal.SIGTERM)
            for sock in asked:
                answer = b"".join(iter(partial(sock.recv, 65536), b""))
                assert answer.startswith(b"HTTP/1.1 503")
                assert b"the server is stopping" in answer
            assert (managed := managing.result(PATIENCE_S)).status_code == 503
            assert managed.json()["error"]["code"] == "not_ready"
            assert server.process.wait(PATIENCE_S) == 0
            assert server.said().count("did not end in time") >= 2

    repeat_in_stalls(end_stuck_server)


def test_the_second_signal_ends_the_server_at_once(s3: S3Server, store: str, serve: Serve) -> None:
    """While it drains: children are killed, temporary files are gone, and the exit code says by what it was ended."""
    (model,) = pack_fleet("again", 1)
    upload(s3, store, [model])
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as temporary,
        ThreadPoolExecutor(1) as pool,
        s3.hold(model.name),
        serve(fronts=2, drain_s=NEVER_S, environment={"TMPDIR": temporary}) as server,
    ):
        server.exit_code = 128 + signal.SIGTERM
        assert len(list(Path(temporary).iterdir())) == 1
        asked = pool.submit(server.post, model.name, model.question(0).body)
        wait_until(lambda: server.total("fleetcast_model_cache_requests_total") == 1, "the request is waiting")
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "again to stop at once" in server.said(), "it says how to end it at once")
        wait_until(lambda: is_gone(server.process, signal.SIGTERM), "it ends")
        assert isinstance(asked.exception(PATIENCE_S), httpx.TransportError)
        assert list(Path(temporary).iterdir()) == []
        assert list(server.log.parent.glob("*.json")) == [], "the file of its addresses is gone"
