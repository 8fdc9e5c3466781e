"""An S3 server of one folder on loopback that takes its time, and counts what it is asked; in a process of its own.

`python -m loadtest.observe.slow_store FOLDER LATENCY_S PORT` answers `GET /BUCKET/KEY` with the file KEY below the
folder, after the latency, whatever the bucket and the signature are. `GET /counts` has the counts so far as JSON.
"""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import urllib3
import uvloop

from loadtest.observe.processes import end_processes, find_free_port, is_reachable, wait_until

COUNTS = "/counts"
LAST_MODIFIED = "Mon, 30 Nov 2026 00:00:00 GMT"


@dataclass(frozen=True, slots=True)
class StoreCounts:
    """`gets` by key, the most requests that were under way at a time, and the server's process."""

    gets: dict[str, int]
    most_at_a_time: int
    pid: int


class SlowStore:
    """The server's side: connections are kept alive, and each request waits for itself."""

    def __init__(self, folder: Path, latency_s: float) -> None:
        self._folder, self._latency_s = folder, latency_s
        self._gets: Counter[str] = Counter()
        self._under_way = self._most = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection until it ends."""
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                target = urlsplit(head.split(b" ", 2)[1].decode()).path
                writer.write(await self._answer(target, has_range=b"\nrange:" in head.lower()))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _answer(self, target: str, *, has_range: bool) -> bytes:
        if target == COUNTS:
            return _make_reply(
                HTTPStatus.OK, json.dumps({"gets": self._gets, "most": self._most, "pid": os.getpid()}).encode()
            )
        key = unquote(target).lstrip("/").partition("/")[2]
        self._gets[key] += 1
        self._under_way += 1
        self._most = max(self._most, self._under_way)
        await asyncio.sleep(self._latency_s)
        self._under_way -= 1
        file = self._folder / key
        if not file.is_file():
            return _make_reply(HTTPStatus.NOT_FOUND)
        status = HTTPStatus.PARTIAL_CONTENT if has_range else HTTPStatus.OK
        return _make_reply(status, file.read_bytes(), f"{file}{file.stat().st_mtime_ns}")


def _make_reply(status: HTTPStatus, body: bytes = b"", version: str = "") -> bytes:
    """The whole reply; a part is the whole file, which is smaller than what is asked for at a time."""
    etag = hashlib.sha256(version.encode()).hexdigest()[:16]  # none of the body: that would cost more than the answer
    part = (f"Content-Range: bytes 0-{len(body) - 1}/{len(body)}",) if status is HTTPStatus.PARTIAL_CONTENT else ()
    lines = (
        f"HTTP/1.1 {status.value} {status.phrase}",
        *part,
        f"Content-Length: {len(body)}",
        f'ETag: "{etag}"',
        f"Last-Modified: {LAST_MODIFIED}",
        "Accept-Ranges: bytes",
    )
    return "\r\n".join((*lines, "", "")).encode() + body


@contextmanager
def serve_slow_store(folder: Path, latency_s: float) -> Iterator[str]:
    """Run the server; yields its endpoint."""
    port = find_free_port()
    command = [sys.executable, "-P", "-m", "loadtest.observe.slow_store", str(folder), str(latency_s), str(port)]
    with end_processes([subprocess.Popen(command)]):
        wait_until(lambda: is_reachable(port))
        yield f"http://127.0.0.1:{port}"


def read_counts(endpoint: str) -> StoreCounts:
    """Ask the server what it was asked."""
    found: dict[str, Any] = urllib3.request("GET", endpoint + COUNTS).json()
    return StoreCounts(found["gets"], found["most"], found["pid"])


async def main(folder: Path, latency_s: float, port: int) -> None:
    """Serve until the process is ended."""
    store = SlowStore(folder, latency_s)
    server = await asyncio.start_server(store.serve, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
