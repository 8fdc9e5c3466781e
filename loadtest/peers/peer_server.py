"""A running server of the comparison: how it is asked, loaded and described. Every exchange is on a new connection."""

import http.client
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import numpy.typing as npt

from loadtest.driver.dialects import HEADER_JSON_BYTES, ClientDialect
from loadtest.driver.request_bodies import RequestBody
from loadtest.peers.answers import decode_answer
from loadtest.peers.environments import PeerUnavailable
from loadtest.peers.process_tree import ProcessTree, read_log_end

START_S = 120.0
LOAD_S = 120.0
#: beginnings of the variables that are chosen for a peer, and shown as its settings
CHOSEN = ("OMP_", "MKL_", "RAY_", "PEER_")
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_ENABLE_TELEMETRY": "0", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True, slots=True)
class PeerServer:
    """A running server. `register` loads a model; if it is None, the first request loads it.

    A `fixed` server has all its models from the start, each with the weights of m0. `settings`: what was chosen for it.
    """

    name: str
    url: str
    dialect: ClientDialect
    suffix: str
    tree: ProcessTree
    prepare: Callable[[str], object] = lambda _: None
    register: Callable[[str], None] | None = None
    fixed: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<PeerServer {self.name} at {self.url}, {self.tree}>"

    def ask(self, model: str, request: RequestBody | bytes) -> npt.NDArray[np.float64]:
        """Request a model and return the numbers of its response, flat. Plain bytes are JSON.

        Raises RuntimeError for any status but 200, OSError without a response.
        """
        sent = RequestBody(request) if isinstance(request, bytes) else request
        path = self.dialect.path.format(model=quote(model + self.suffix))
        headers = {key: value.format(model=model + self.suffix) for key, value in self.dialect.headers.items()}
        headers |= {"Content-Type": sent.content_type, **sent.headers}
        status, found, data = exchange("POST", self.url + path, sent.body, headers)
        if status != http.HTTPStatus.OK:
            raise RuntimeError(f"{self.name} answered {status} for {model}: {data[:200].decode(errors='replace')}")
        return decode_answer(data, found.get(HEADER_JSON_BYTES))

    def load(self, model: str, body: RequestBody | bytes) -> float:
        """Measure the seconds from registering a model to its first answer, without packing it."""
        self.prepare(model)
        begin = time.perf_counter()
        if self.register is not None:
            self.register(model)
        self.ask(model, body)
        return time.perf_counter() - begin


def exchange(
    method: str, url: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Send one request on a new connection; return status, headers and body of the response."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=LOAD_S)
    try:
        connection.request(method, parts.path + (f"?{parts.query}" if parts.query else ""), body, dict(headers or {}))
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()
    finally:
        connection.close()


def send_request(
    method: str, url: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    """Send one request on a new connection; return status and body of the response."""
    status, _, data = exchange(method, url, body, headers)
    return status, data


def describe_settings(
    folder: Path, line: Sequence[str], environment: Mapping[str, str], **files: str
) -> dict[str, Any]:
    """Describe how a peer was started: its command, the variables set for it, and its files of configuration.

    Paths of this machine are left out: `folder` is the peer's own, which is made for the run.
    """
    command = " ".join([Path(line[0]).name, *line[1:]])
    texts = {"command": command, **files}
    told = {name: text.replace(str(folder), "FOLDER").strip() for name, text in texts.items()}
    chosen = {key: value for key, value in environment.items() if key.startswith(CHOSEN) and key not in QUIET}
    return {**told, "environment": {key: value.replace(str(folder), "FOLDER") for key, value in chosen.items()}}


def post_accepted(name: str, url: str) -> None:
    """POST without a body. Raises RuntimeError with the response if it is refused."""
    status, data = send_request("POST", url)
    if status != http.HTTPStatus.OK:
        raise RuntimeError(
            f"{name} refused a model with {status}: {' '.join(data.decode(errors='replace').split())[:200]}"
        )


def make_process_environment(binaries: Path, folder: Path) -> dict[str, str]:
    """Make the environment of a peer's processes: its own PATH and temporary folder, one thread, no telemetry."""
    kept = {key: value for key, value in os.environ.items() if key in ("HOME", "LANG", "JAVA_HOME")}
    paths = {"PATH": f"{binaries}:{os.environ['PATH']}", "TMPDIR": str(folder), "TEMP": str(folder)}
    return {**kept, **QUIET, **paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def wait_for_server(name: str, url: str, tree: ProcessTree, log: Path, word: str = "") -> None:
    """Wait until the URL answers 200 (and the log has the word). Raises PeerUnavailable with the end of its output."""
    begin = time.monotonic()
    while time.monotonic() - begin < START_S and tree.pids():
        try:
            if send_request("GET", url)[0] == http.HTTPStatus.OK and word in log.read_text(errors="replace"):
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.1)
    waited = time.monotonic() - begin
    how = f"was not ready within {waited:.0f} s" if tree.pids() else f"ended after {waited:.0f} s before it was ready"
    raise PeerUnavailable(f"{name} {how}: {read_log_end(log)}")
