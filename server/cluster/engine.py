"""The server of a replica as its replica sees it: a child process, its addresses, its health, its end."""

import contextlib
import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

import server
from server.contract import READY_PATH
from server.settings import Settings

START_S = 600.0  #: a start may load torch from a cold disk, and pinned models from a slow store
END_S = 6.0  #: beyond `drain_s`, after which a server has ended by itself
_LOOK_S = 0.05
KEPT_LOG = 4000  #: bytes of the log's end that an error shows


class EngineFailed(Exception):
    """The server has ended, does not start, or does not answer; the message says why."""


class Engine:
    """A running server. `addresses` are those of its listeners, by name."""

    def __init__(self, settings: Settings, folder: Path, lock: int, gpus: Sequence[str] = ()) -> None:
        """Start it and wait until it is ready. Raises EngineFailed.

        `lock`: a descriptor that it inherits, so that its place is free once all of it is gone. `gpus`: those that it
        sees, where it is to have any.
        """
        self._settings, self._log = settings, folder / "server.log"
        announce = folder / "addresses.json"
        announce.unlink(missing_ok=True)
        wire = {**settings.to_wire(), "announce": str(announce)}
        root = str(Path(server.__file__).parent.parent)
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "server.cluster.engine_main"],
                stdin=subprocess.PIPE, stdout=out, stderr=out, cwd=folder, pass_fds=(lock,), start_new_session=True,
                env={**os.environ, "PYTHONPATH": paths, **({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})},
            )  # fmt: skip
        assert self._process.stdin is not None, "it has a pipe"
        try:
            self._process.stdin.write(msgspec.json.encode(wire) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineFailed(self._describe_end()) from None
        self.addresses: Mapping[str, str] = self._await(announce)

    def __repr__(self) -> str:
        """For example `<Engine 4711 at http://127.0.0.1:8080>`."""
        return f"<Engine {self._process.pid} at {self.addresses.get('inference')}>"

    @property
    def pid(self) -> int:
        """Of the server's first process."""
        return self._process.pid

    def check(self, patience_s: float) -> None:
        """Raises EngineFailed where the server has ended, or does not say that it takes requests.

        A worker that has died is the server's own affair, as long as another takes its requests.
        """
        if self._process.poll() is not None:
            raise EngineFailed(self._describe_end())
        try:
            status = self._ask_ready(patience_s)
        except OSError as error:
            raise EngineFailed(f"the server at {self.addresses['inference']} does not answer: {error}") from error
        if status != http.HTTPStatus.OK:
            raise EngineFailed(f"the server says {status} on {READY_PATH}: no worker takes requests")

    def stop(self) -> None:
        """Drain and end it; what is still there after its own time limit is killed."""
        self._let_go()
        try:
            self._process.wait(self._settings.drain_s + END_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _let_go(self) -> None:
        """Close the pipe, by whose end the server knows that it is to end."""
        assert self._process.stdin is not None, "it has a pipe"
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _ask_ready(self, patience_s: float) -> int:
        at = urlsplit(self.addresses["inference"])
        assert at.hostname is not None, "an address has a host"
        host = at.hostname.replace("0.0.0.0", "127.0.0.1")  # noqa: S104 -- not bound here
        connection: http.client.HTTPConnection
        if at.scheme == "https":
            context = ssl._create_unverified_context()  # noqa: S323, SLF001 -- it is our own child, on this host
            connection = http.client.HTTPSConnection(host, at.port, timeout=patience_s, context=context)
        else:
            connection = http.client.HTTPConnection(host, at.port, timeout=patience_s)
        with contextlib.closing(connection):
            connection.request("GET", READY_PATH)
            return connection.getresponse().status

    def _await(self, announce: Path) -> Mapping[str, str]:
        until = time.monotonic() + START_S
        while not announce.exists():
            if self._process.poll() is not None:
                raise EngineFailed(self._describe_end())
            if time.monotonic() > until:
                self.stop()
                raise EngineFailed(f"the server was not ready within {START_S:g} s; its log is {self._log}")
            time.sleep(_LOOK_S)
        addresses: dict[str, str] = json.loads(announce.read_text())
        return addresses

    def _describe_end(self) -> str:
        self._let_go()
        code = self._process.wait()
        said = self._log.read_bytes()[-KEPT_LOG:].decode(errors="replace").strip()
        return f"the server ended with {code}; its log ends with: {said}"
