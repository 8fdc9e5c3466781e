"""Telling a server of a new archive: what a management listener answers, and what is said when none is there."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from model_store.names import ModelName
from server.sdk.client import reload_model
from server.sdk.errors import ModelFailed, Unreachable


class Management(BaseHTTPRequestHandler):
    """Holds `au/held.mar` and `au/bad.mar`, and cannot load the second."""

    asked: list[str]

    def do_GET(self) -> None:
        """Describe."""
        self._answer(404 if "away" in self.path else 200, b'{"model": "m"}')

    def do_POST(self) -> None:
        """Reload."""
        if "bad" in self.path:
            self._answer(422, b'{"error": {"code": "archive_invalid", "message": "it is rubbish"}}')
        else:
            self._answer(200, b"{}")

    def _answer(self, status: int, body: bytes) -> None:
        self.asked.append(f"{self.command} {self.path}")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class's name
        """Silent."""


@pytest.fixture
def listener() -> Iterator[str]:
    """The address of one."""
    Management.asked = []
    with HTTPServer(("127.0.0.1", 0), Management) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_only_what_a_server_holds_is_reloaded(listener: str) -> None:
    """A model that it does not have is not loaded for this; one that it has is, slashes and blanks in its name kept."""
    reload_model(listener, ModelName("au/away.mar"))
    reload_model(listener, ModelName("au/held it.mar"))
    get, post = "GET /fleet/models/au/", "POST /fleet/reload/au/"
    assert Management.asked == [f"{get}away.mar", f"{get}held%20it.mar", f"{post}held%20it.mar"]


def test_why_a_server_has_not_taken_it_is_said(listener: str) -> None:
    """Its own words, a port where nobody listens, and a URL that is none."""
    with pytest.raises(ModelFailed, match=r"did not take au/bad\.mar: it is rubbish"):
        reload_model(listener, ModelName("au/bad.mar"))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(Unreachable, match="is `fleetcast serve` running there"):
            reload_model(f"http://127.0.0.1:{closed.getsockname()[1]}", ModelName("m"))
    with pytest.raises(ValueError, match="give one such as http"):
        reload_model("localhost:8081", ModelName("m"))
