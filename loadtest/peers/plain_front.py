"""The plain path's front: a bare ASGI app that forwards the untouched body and returns the bytes.

`PLAIN_SOCKET=... uvicorn loadtest.peers.plain_front:app`.
"""

import asyncio
import os
import struct
from typing import Any, cast

from server.contract import HEADER_TARGET_MODEL, JSON, raw_header

_TARGET_MODEL = raw_header(HEADER_TARGET_MODEL)


class WorkerConnection(asyncio.Protocol):
    """The one connection to the worker."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._pending: dict[int, asyncio.Future[bytes]] = {}
        self._queue: list[bytes] = []
        self._next_id = 0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The worker has accepted."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Hand every complete answer to its waiting call."""
        self._buffer += data
        buffer, at = self._buffer, 0
        while len(buffer) - at >= 8:  # noqa: PLR2004 -- id and length
            ident, length = struct.unpack_from("<II", buffer, at)
            if len(buffer) - at < 8 + length:
                break
            self._pending.pop(ident).set_result(bytes(buffer[at + 8 : at + 8 + length]))
            at += 8 + length
        del buffer[:at]

    def call(self, name: bytes, body: bytes) -> asyncio.Future[bytes]:
        """Return the future answer; the requests of one pass of the event loop are sent in one write."""
        loop = asyncio.get_running_loop()
        self._next_id = (self._next_id + 1) & 0xFFFFFFFF
        future = self._pending[self._next_id] = loop.create_future()
        if not self._queue:
            loop.call_soon(self._flush)
        self._queue += [struct.pack("<III", self._next_id, len(name), len(body)), name, body]
        return future

    def _flush(self) -> None:
        self._transport.write(b"".join(self._queue))
        self._queue.clear()


_links: list[WorkerConnection] = []


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Handle a request; every POST is an invocation."""
    if scope["type"] != "http":
        return
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    if not _links:
        _, link = await asyncio.get_running_loop().create_unix_connection(WorkerConnection, os.environ["PLAIN_SOCKET"])
        _links.append(link)
    name = dict(scope["headers"])[_TARGET_MODEL]
    reply = await _links[0].call(name, body)
    headers = [(b"content-type", JSON.encode()), (b"content-length", b"%d" % len(reply))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": reply})
