"""The end of a server: what clients have sent is answered, and it ends in time whatever is stuck."""

import signal
import socket
import threading
import time
from collections import Counter

import pytest

from tests.e2e.conftest import Serve
from tests.e2e.models import fleet
from tests.e2e.server import Server, request_bytes, upload
from tests.patience import PATIENCE_S
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

CLIENTS = 12


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
    (model,) = fleet("kept", 1)
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
