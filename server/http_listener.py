"""Uvicorn as every listener of ours runs it, and its patience with slow clients. In fronts and in the supervisor."""

import asyncio
import contextlib
import fcntl
import socket
import termios
import time
from collections.abc import Hashable, Iterator
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 * 1024  #: bytes of a request's line and headers
TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
LOOKS = 10  #: how often within its patience a listener looks at its clients
SMALL = 4096  #: bytes that are worth copying to save a write


class OneWrite:
    """A client's transport that sends an answer's head and body in one write.

    Uvicorn writes them apart, and uvloop sends each at once: the client would be woken twice. A small first write waits
    for the second, at most to the end of the loop's pass. What is no write goes to the transport.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held = b""
        self._call_soon = asyncio.get_running_loop().call_soon
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        """The transport's own."""
        return getattr(self._transport, name)

    def __repr__(self) -> str:
        """For example `<OneWrite 0 bytes held, <TCPTransport ...>>`."""
        return f"<OneWrite {len(self._held)} bytes held, {self._transport!r}>"

    def write(self, data: bytes) -> None:
        """Send, or hold for what comes next."""
        if self._held:
            data, self._held = self._held + data, b""
            self._transport.write(data)
        elif len(data) > SMALL:
            self._transport.write(data)
        elif data:
            self._held = data
            self._call_soon(self._flush)

    def close(self) -> None:
        """Send what is held, and close."""
        self._flush()
        self._transport.close()

    def get_write_buffer_size(self) -> int:
        """Bytes that have not been sent."""
        return len(self._held) + self._transport.get_write_buffer_size()

    def _flush(self) -> None:
        data, self._held = self._held, b""
        if data and not self.is_closing():  # cut off meanwhile: there is nobody to tell
            self._transport.write(data)


class Connection(HttpToolsProtocol):
    """A client's connection. Uvicorn bounds neither a request's line nor its headers: here they end at `MAX_HEAD`."""

    _head: int | None = 0  #: bytes so far of a head that has not ended; None once it has, until the next begins

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
        super().connection_made(cast("asyncio.Transport", OneWrite(transport)))

    def data_received(self, data: bytes) -> None:
        """Bytes of one or many requests. What lies wholly within a head adds to it."""
        before = self._head
        self._ended = False
        super().data_received(data)
        if before is not None and not self._ended:
            self._head = before + len(data)
            if self._head > MAX_HEAD and not self.transport.is_closing():
                self.transport.write(TOO_LONG)
                self.transport.close()

    def on_headers_complete(self) -> None:
        """A head has ended."""
        self._ended, self._head = True, None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next head may begin."""
        super().on_message_complete()
        self._head = 0


class Listener(uvicorn.Server):
    """A uvicorn server that leaves signals alone, since the supervisor decides when to stop, and that cuts off clients.

    Uvicorn bounds only the pause between two requests. Here nothing may stand still for `patience_s` that is a client's
    turn: a request whose headers or body have begun, a connection that says nothing at all, an answer not taken.
    """

    def __init__(self, config: uvicorn.Config, patience_s: float) -> None:
        super().__init__(config)
        self._patience_s = patience_s
        self._stands: dict[Any, tuple[Hashable, float]] = {}  # connection -> what it waits for, and since when

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Until told to stop, and drained."""
        looking = asyncio.create_task(self._look())
        try:
            await super().serve(sockets)
        finally:
            looking.cancel()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(self._patience_s / LOOKS)
            self._cut_off(time.monotonic())

    def _cut_off(self, now: float) -> None:
        stands = {}
        for connection in list(self.server_state.connections):
            wait = _turn(connection)
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


def _turn(connection: Any) -> Hashable:
    """What a connection (uvicorn's HttpToolsProtocol) waits for from its client; None when it is our turn.

    It stays equal for as long as nothing is achieved: bytes of a request achieve nothing until the request is whole.
    """
    unsent = connection.transport.get_write_buffer_size()
    cycle = connection.cycle
    if unsent:
        return "taking", cycle, unsent, _unacknowledged(connection.transport)
    if connection.pipeline or connection.timeout_keep_alive_task is not None:
        return None  # the one before is being answered; or all is said, and uvicorn ends the pause
    if cycle is None or cycle.response_complete:
        return "asking", cycle
    return ("sending", cycle) if cycle.more_body else None


def _unacknowledged(transport: asyncio.Transport) -> bytes:
    """How many bytes the kernel holds for the client, an int as it lies in memory.

    They can be megabytes, and it asks us for more only when a third is gone: a slow reader may take long for that.
    """
    try:
        return fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return b""  # not to be had here


def listener(app: Any, grace_s: float, patience_s: float) -> Listener:
    """Uvicorn as we run it everywhere: uvloop, httptools, no access log, bounded farewell."""
    config = uvicorn.Config(
        app,
        loop="none",
        http=Connection,
        ws="none",
        lifespan="off",
        access_log=False,
        proxy_headers=False,
        log_level="warning",
        server_header=False,
        date_header=True,
        timeout_graceful_shutdown=max(1, int(grace_s)),
        backlog=2048,
    )
    return Listener(config, patience_s)
