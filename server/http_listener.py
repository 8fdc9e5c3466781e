"""The HTTP listener: uvicorn, with stricter reading of requests and a time limit for slow clients.

Runs in the event loop of fronts and of the supervisor.
"""

import asyncio
import contextlib
import fcntl
import math
import socket
import termios
import time
from collections.abc import Hashable, Iterator
from typing import Any

import uvicorn

from server.access.tls import Tls
from server.http_connection import ClientConnection
from server.http_drain import DrainState, PendingConnections, end_connections

TLS_LOOK_S = 1.0  #: how often certificates' files are looked at
LOOKS = 10  #: checks of all clients within `patience_s`


class Listener(uvicorn.Server):
    """A uvicorn server that closes connections of clients that stand still, and that handles no signals.

    Uvicorn bounds only the pause between two requests. This one also bounds by `patience_s` seconds how long a client
    may take to send its first request, to finish a request it has begun, and to read any part of an answer. The
    supervisor decides when the server stops: what has arrived then is answered within `grace_s` seconds, or told that
    the server stops (`server.http_drain`). With `tls` it speaks TLS, and renewed certificates are used at once.
    """

    def __init__(self, config: uvicorn.Config, grace_s: float, patience_s: float, tls: Tls | None = None) -> None:
        super().__init__(config)
        self.server_state: DrainState = DrainState()
        self._grace_s, self._patience_s, self._tls = grace_s, patience_s, tls
        self._until = math.inf
        self._stands: dict[Any, tuple[Hashable, float]] = {}  # connection -> state, and since when

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers."""
        yield

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop and drained."""
        looking = [asyncio.create_task(self._look())]
        if self._tls is not None:
            looking.append(asyncio.create_task(self._renew(self._tls)))
        try:
            await super().serve(sockets)
        finally:
            for task in looking:
                task.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, with TLS where it is configured: uvicorn itself takes files, which it would read only once."""
        if self._tls is not None:
            self.config.ssl = self._tls.context
        await super().startup(sockets)

    def stop(self, grace_s: float = math.inf) -> None:
        """Stop, within `grace_s` seconds where that is less than the listener's own. May be said again, with less."""
        self._until = min(self._until, asyncio.get_running_loop().time() + min(grace_s, self._grace_s))
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new connections; answer and close those that are there. Uvicorn would close idle ones at once."""
        self.stop()
        pending = PendingConnections(
            sockets or [], self._make_connection, None if self._tls is None else self._tls.context
        )
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        await end_connections(self.server_state, pending, lambda: self._until, linger=self._tls is not None)

    def _make_connection(self) -> asyncio.Protocol:
        return ClientConnection(self.config, self.server_state, self.lifespan.state, asyncio.get_running_loop())

    async def _renew(self, tls: Tls) -> None:
        while True:
            await asyncio.sleep(TLS_LOOK_S)
            tls.reload_if_changed()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self._patience_s / LOOKS)
            self._cut_off(time.monotonic())

    def _cut_off(self, now: float) -> None:
        stands = {}
        for connection in list(self.server_state.connections):
            wait = _waits_for(connection)
            if wait is None:
                continue
            before, since = self._stands.get(connection, (None, now))
            if wait != before:
                stands[connection] = (wait, now)
            elif now - since < self._patience_s:
                stands[connection] = (wait, since)
            else:
                connection.transport.abort()  # closing would wait until the client has read
        self._stands = stands


def _waits_for(connection: Any) -> Hashable:
    """What a connection (uvicorn's HttpToolsProtocol) waits for from its client; None when it is the server's turn.

    The value changes only when something is achieved. Bytes of a request achieve nothing until the request is whole.
    """
    unsent = connection.transport.get_write_buffer_size()
    cycle = connection.cycle
    if unsent:
        return "taking", cycle, unsent, _count_unacknowledged(connection.transport)
    if connection.pipeline or connection.is_kept_alive:
        return None  # an earlier request is being answered, or the idle connection is timed by itself
    if cycle is None or cycle.response_complete:
        return "asking", cycle
    return ("sending", cycle) if cycle.more_body else None


def _count_unacknowledged(transport: asyncio.Transport) -> bytes:
    """The number of bytes that the kernel holds for the client, as the raw memory of an int.

    The kernel may hold megabytes and asks for more only when a third is gone, which a slow reader delays for long.
    """
    sock = transport.get_extra_info("socket")
    if sock is None:  # over TLS: lost, which the connection itself learns in the loop's next turn
        return b""
    try:
        return fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return b""  # the platform has no such call


def make_listener(app: Any, grace_s: float, patience_s: float, keep_alive_s: int, tls: Tls | None = None) -> Listener:
    """Uvicorn as every listener is run: httptools, no access log, no signal handlers.

    `grace_s`: seconds in which requests are answered once the server is told to stop. `patience_s`: seconds that a
    client may let pass where it is its turn. `keep_alive_s`: seconds that a connection stays open between two requests.
    """
    config = uvicorn.Config(
        app,
        loop="none",
        http=ClientConnection,
        ws="none",
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        log_level="warning",
        server_header=False,
        date_header=True,
        timeout_keep_alive=keep_alive_s,
        backlog=2048,
    )
    return Listener(config, grace_s, patience_s, tls)
