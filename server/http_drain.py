"""The end of a listener: it answers what its clients have sent, and closes connections on which nothing is on its way.

Runs on the listener's event loop. A client may send a request in the moment in which a server closes its idle
connection, and HTTP/1.1 has no way to forbid it. So connections stay open for a while: a request that still comes is
answered, with `Connection: close`, after which a client sends no more; only one that has been idle since is closed.
"""

import asyncio
import contextlib
import fcntl
import socket
import ssl
import struct
import sys
import termios
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from uvicorn.server import ServerState

LOOK_S = 0.02  #: between two looks at the connections
HANDSHAKE_LOOKS = 2  #: for handshakes that had begun before the listener was told to stop
LINGER_LOOKS = 25  #: for how many looks a connection must have been idle to be closed: half a second, or more if busy
CUT_S = 0.5  #: for what is cut to be told so
_SO_ATTACH_FILTER = 26
#: Classic BPF over a TCP header: drop a segment that has the flag SYN, take any other.
_DROP_SYN = struct.pack("=HBBIHBBIHBBIHBBI", 0x30, 0, 0, 13, 0x45, 0, 1, 0x02, 0x06, 0, 0, 0, 0x06, 0, 0, 0xFFFFFFFF)


class DrainState(ServerState):
    """What a listener's connections share, and whether they are drained."""

    draining = False

    def ours(self) -> "list[DrainedConnection]":
        """The open connections, which uvicorn knows by its own types."""
        return cast("list[DrainedConnection]", list(self.connections))


class DrainedConnection(Protocol):
    """What a drain needs of a connection (`server.http_connection.ClientConnection`)."""

    transport: asyncio.Transport

    @property
    def is_idle(self) -> bool:
        """Whether no request has begun that is not answered."""

    def start_drain(self) -> None:
        """From now on say `Connection: close`."""


class PendingConnections:
    """Connections that clients have opened before the drain and that no process has accepted yet.

    Closing a listening socket resets them. So this holds duplicates of the sockets, on which no new handshakes begin
    (their clients try again a second later, and are refused), and accepts until none is left. Other processes that
    listen on the same sockets may do the same.
    """

    def __init__(
        self, sockets: Sequence[socket.socket], make: Callable[[], asyncio.Protocol], tls: ssl.SSLContext | None
    ) -> None:
        self._sockets = [sock.dup() for sock in sockets]
        self._make, self._tls = make, tls
        self._handshakes: set[asyncio.Task[Any]] = set()
        for sock in self._sockets:
            sock.setblocking(False)
            _refuse_handshakes(sock)

    def __repr__(self) -> str:
        """For example `<PendingConnections of 1 sockets, 0 handshakes>`."""
        return f"<PendingConnections of {len(self._sockets)} sockets, {len(self._handshakes)} handshakes>"

    def __bool__(self) -> bool:
        """Whether a connection may still come of it."""
        return bool(self._sockets or self._handshakes)

    def accept(self) -> None:
        """Serve the connections that wait now."""
        for sock in self._sockets:
            with contextlib.suppress(OSError):  # there are no more, or no descriptors for them
                while True:
                    accepted, _ = sock.accept()
                    accepted.setblocking(False)
                    serving = asyncio.create_task(self._serve(accepted))
                    self._handshakes.add(serving)
                    serving.add_done_callback(self._handshakes.discard)

    async def _serve(self, accepted: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the client is gone, or speaks no TLS
            await asyncio.get_running_loop().connect_accepted_socket(self._make, accepted, ssl=self._tls)

    def close(self) -> None:
        """Accept a last time, and let new connections be refused."""
        self.accept()
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()


async def end_connections(
    state: DrainState, pending: PendingConnections, until: Callable[[], float], *, linger: bool = False
) -> None:
    """Answer and close as the module says; at `until`, which may become earlier meanwhile, cut what is left.

    `linger`: stay for LINGER_LOOKS also without a connection: some may be in a handshake of TLS, which is not seen.
    """
    loop = asyncio.get_running_loop()
    state.draining = True
    for connection in state.ours():
        connection.start_drain()
    looks, idle = 0, dict[DrainedConnection, int]()
    while loop.time() < until():
        if looks < HANDSHAKE_LOOKS:
            pending.accept()
        else:
            pending.close()
        idle = _close_idle(state, idle)
        looks += 1
        waits = linger and looks < LINGER_LOOKS
        if not (state.connections or state.tasks or pending or waits):
            return
        await asyncio.sleep(LOOK_S)
    pending.close()
    await _cut(state, loop)


def _close_idle(state: DrainState, idle: dict[DrainedConnection, int]) -> dict[DrainedConnection, int]:
    """Close connections that were idle at LINGER_LOOKS looks in a row; returns at how many the others were."""
    still: dict[DrainedConnection, int] = {}
    for connection in state.ours():
        if connection.is_idle and not _count_unread(connection.transport):
            still[connection] = idle.get(connection, 0) + 1
            if still[connection] >= LINGER_LOOKS:
                connection.transport.close()
    return still


def _count_unread(transport: asyncio.Transport) -> int:
    """Bytes that the kernel has received from the client and the loop has not read."""
    sock = transport.get_extra_info("socket")
    if sock is None:  # over TLS: lost, which the connection itself learns in the loop's next turn
        return 0
    try:
        unread = fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4))
    except OSError:
        return 0  # closed meanwhile
    return int.from_bytes(unread, sys.byteorder)


async def _cut(state: DrainState, loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what still runs, which the application answers by a refusal, and what waits behind it; then abort."""
    until, cancelled = loop.time() + CUT_S, set[Any]()
    while loop.time() < until and (state.connections or state.tasks):
        await asyncio.sleep(0)  # a task that is cancelled before it has run answers nothing
        for task in state.tasks - cancelled:  # a second time would cancel the refusal
            task.cancel()
            cancelled.add(task)
        await asyncio.sleep(LOOK_S)
        for connection in state.ours():
            if connection.is_idle and not connection.transport.get_write_buffer_size():
                connection.transport.close()
    for connection in state.ours():
        connection.transport.abort()


def _refuse_handshakes(sock: socket.socket) -> None:
    """Let the kernel drop what would begin a new connection; handshakes that have begun go on."""
    import ctypes  # noqa: PLC0415 -- needed once, in the end

    program = ctypes.create_string_buffer(_DROP_SYN, len(_DROP_SYN))
    with contextlib.suppress(OSError):  # a sandbox may not know it: then a connection of this moment may be reset
        sock.setsockopt(
            socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(_DROP_SYN) // 8, ctypes.addressof(program))
        )
