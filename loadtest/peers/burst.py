"""Asks many models at once, each on a connection of its own, from one thread whose own work counts little.

A hundred threads that parse their answers would take longer than the server that is measured, on the same cores. Here
requests are made before the clock starts, and answers are read as they come and looked at when all are there.
"""

import http.client
import io
import selectors
import socket
import time
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

PATIENCE_S = 120.0
PART = 65536


class Asked(NamedTuple):
    """An answer, as it came, and the seconds from the beginning of its connection to its end."""

    raw: bytes
    took_s: float


class BurstFailed(RuntimeError):
    """A connection that ended without an answer, or none within PATIENCE_S."""


def ask_at_once(url: str, requests: Mapping[str, bytes], connections: int) -> tuple[dict[str, Asked], float]:
    """Send each request, of which so many wait for their answers at a time; the answers by name, and the whole seconds.

    A request has to have `Connection: close`. Raises BurstFailed, OSError.
    """
    at = urlsplit(url)
    address = (at.hostname or "", at.port or 80)
    answers: dict[str, Asked] = {}
    waiting = iter(requests.items())
    with selectors.DefaultSelector() as selector:
        begin = time.perf_counter()

        def send_next() -> None:
            if (following := next(waiting, None)) is not None:
                name, request = following
                started = time.perf_counter()
                connection = socket.create_connection(address, PATIENCE_S)
                connection.sendall(request)
                selector.register(connection, selectors.EVENT_READ, (name, started, bytearray()))

        try:
            for _ in range(connections):
                send_next()
            while selector.get_map():
                ready = selector.select(PATIENCE_S)
                if not ready:
                    raise BurstFailed(f"{len(selector.get_map())} requests have no answer after {PATIENCE_S:g} s")
                for key, _ in ready:
                    name, started, got = key.data
                    assert isinstance(key.fileobj, socket.socket), "only sockets are registered"
                    part = key.fileobj.recv(PART)
                    got += part
                    if not part:
                        answers[name] = Asked(bytes(got), time.perf_counter() - started)
                        selector.unregister(key.fileobj)
                        key.fileobj.close()
                        send_next()
        finally:
            for key in list(selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]  # only sockets are registered
        return answers, time.perf_counter() - begin


def read_body(raw: bytes) -> bytes:
    """The body of a whole answer. Raises BurstFailed for any status but 200."""
    reply = http.client.HTTPResponse(_Bytes(raw))  # type: ignore[arg-type]  # it asks for makefile alone
    try:
        reply.begin()
        body = reply.read()
    except http.client.HTTPException as error:
        raise BurstFailed(f"the connection ended after {raw[:200]!r}: {error}") from error
    if reply.status != http.client.OK:
        raise BurstFailed(f"{reply.status} {body[:200]!r}")
    return body


class _Bytes:
    """What `HTTPResponse` takes for a socket."""

    def __init__(self, raw: bytes) -> None:
        self._raw = raw

    def makefile(self, _: str) -> io.BytesIO:
        """The answer as a file."""
        return io.BytesIO(self._raw)
