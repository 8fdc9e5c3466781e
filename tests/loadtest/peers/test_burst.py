"""Many models asked at once: each answer whole, no more waiting than asked for, and failures said."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from loadtest.peers.burst import BurstFailed, ask_at_once, read_body
from loadtest.peers.distant_store import BUCKET, make_answer, serve_distant
from loadtest.peers.peer_server import exchange


class Counting(BaseHTTPRequestHandler):
    """Answers with the path; how many of its kind were asked at a time is counted."""

    running, most = 0, 0
    lock = threading.Lock()

    def do_GET(self) -> None:
        """See the class; what begins with /bad is refused."""
        with Counting.lock:
            Counting.running += 1
            Counting.most = max(Counting.most, Counting.running)
        body = self.path.encode() * 5000
        with Counting.lock:
            Counting.running -= 1
        self.send_response(500 if self.path.startswith("/bad") else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def run_server() -> Iterator[str]:
    """The counting server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Counting)
    with server, ThreadPoolExecutor(1) as pool:
        pool.submit(server.serve_forever)
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def make_request(path: str) -> bytes:
    """One whose connection ends with its answer."""
    return f"GET {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n".encode()


def test_each_model_is_answered_once_and_whole() -> None:
    """With fewer connections than models, of which no more are open at a time."""
    requests = {f"m{i}": make_request(f"/m{i}") for i in range(40)}
    Counting.most = 0
    with run_server() as url:
        answers, whole_s = ask_at_once(url, requests, 4)
    assert answers.keys() == requests.keys()
    assert all(read_body(answer.raw) == f"/{name}".encode() * 5000 for name, answer in answers.items())
    assert Counting.most <= 4
    assert 0 < max(answer.took_s for answer in answers.values()) <= whole_s


def test_a_refusal_and_half_an_answer_are_failures() -> None:
    """Their words are in the message."""
    with run_server() as url:
        answers, _ = ask_at_once(url, {"bad": make_request("/bad")}, 1)
    with pytest.raises(BurstFailed, match=r"500 b'/bad"):
        read_body(answers["bad"].raw)
    with pytest.raises(BurstFailed, match="ended after"):
        read_body(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
    with pytest.raises(BurstFailed, match="ended after"):
        read_body(b"")


def test_the_distant_store_serves_the_files_of_its_folder(tmp_path: Path) -> None:
    """Whole, with a tag that changes with the content; nothing outside of it."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "m0.mar").write_bytes(b"archive")
    (tmp_path / "secret").write_bytes(b"secret")
    with serve_distant(tmp_path / "store", 0.0) as url:
        status, headers, body = exchange("GET", f"{url}/{BUCKET}/m0.mar")
        assert (status, body) == (200, b"archive")
        assert exchange("HEAD", f"{url}/{BUCKET}/m0.mar")[1]["Content-Length"] == "7"
        assert exchange("GET", f"{url}/{BUCKET}/m1.mar")[0] == 404
        assert exchange("GET", f"{url}/{BUCKET}?list-type=2")[0] == 200
        (tmp_path / "store" / "m0.mar").write_bytes(b"another")
        assert exchange("GET", f"{url}/{BUCKET}/m0.mar")[1]["ETag"] != headers["ETag"]
    assert b"404" in make_answer(tmp_path / "store", "GET", f"/{BUCKET}/../secret")
