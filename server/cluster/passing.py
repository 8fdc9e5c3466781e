"""Passes requests that came through Ray's proxy on to the replica's own front, or another node's. Runs in a replica."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from typing import Any

import aiohttp
from yarl import URL

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

PART = 64 * 1024
#: Headers of one connection alone (RFC 9110, 7.6.1), and those that the client library writes itself.
_OWN = frozenset({b"connection", b"keep-alive", b"te", b"transfer-encoding", b"upgrade", b"content-length"})
_WRITTEN = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")  # not added where the client sent none
NO_NODE = b'{"message": "no node of the cluster answers here yet; try again"}'


class Passing:
    """Connections to fronts, which are kept."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return "<Passing>"

    async def pass_on(self, scope: Scope, receive: Receive, send: Send, fronts: Sequence[str]) -> None:
        """Answer a request by the first of the `fronts` that takes it."""
        body = await _read_body(receive)
        if self._session is None:
            # The front's own limits decide how much and how long.
            connector = aiohttp.TCPConnector(limit=0, ssl=False, keepalive_timeout=30)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False
            )
        for front in fronts:
            try:
                await self._ask(self._session, front, scope, body, send)
            except aiohttp.ClientConnectionError:  # it has ended, and nothing of an answer was sent
                continue
            return
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": NO_NODE})

    async def _ask(self, session: aiohttp.ClientSession, front: str, scope: Scope, body: bytes, send: Send) -> None:
        query = scope.get("query_string", b"").decode("latin-1")
        path = (scope.get("raw_path") or scope["path"].encode()).decode("latin-1")
        url = URL(front + path + (f"?{query}" if query else ""), encoded=True)
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in _keep(scope["headers"])]
        response = await session.request(
            scope["method"], url, data=body, headers=headers, skip_auto_headers=_WRITTEN, allow_redirects=False
        )
        async with response:
            kept = list(_keep(response.raw_headers))
            if "Content-Length" in response.headers:
                kept.append((b"content-length", response.headers["Content-Length"].encode()))
            await send({"type": "http.response.start", "status": response.status, "headers": kept})
            try:
                async for part in response.content.iter_chunked(PART):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            except aiohttp.ClientError as error:  # half of it has been sent
                raise asyncio.CancelledError from error
            await send({"type": "http.response.body", "body": b""})


async def _read_body(receive: Receive) -> bytes:
    """All of the body, which Ray's proxy has read already."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _keep(headers: Sequence[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    for name, value in headers:
        if name.lower() not in _OWN:
            yield name.lower(), value
