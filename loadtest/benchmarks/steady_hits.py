"""A client in a process of its own that asks one resident model at a steady pace, whatever else is asked meanwhile.

Its requests are few, so that they take next to nothing from the server, and it shares no loop and no interpreter with
the driver whose load it is beside.
"""

import asyncio
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection as Pipe
from typing import NamedTuple
from urllib.parse import urlsplit

import uvloop

from server.contract import HEADER_TARGET_MODEL, INVOCATIONS_PATH, NPY

OK = b"HTTP/1.1 200"
PACE_S = 0.005


class TimedHit(NamedTuple):
    """When a request was due (monotonic), and the seconds from then until its answer."""

    due: float
    seconds: float


class Connection:
    """One client's connection, kept alive."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def open(self) -> None:
        """Connect."""
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)

    async def ask(self, model: str, body: bytes) -> bytes:
        """Invoke a model; the answer with its head."""
        head = (
            f"POST {INVOCATIONS_PATH} HTTP/1.1\r\nHost: bench\r\nContent-Type: {NPY}\r\n"
            f"{HEADER_TARGET_MODEL}: {model}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        lines = answer.lower().split(b"\r\n")
        length = next(int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:"))
        return answer + await self._reader.readexactly(length)

    def close(self) -> None:
        """Disconnect."""
        self._writer.close()


class SteadyHits:
    """The caller's side of the process. `pid`: the process."""

    def __init__(self, pipe: Pipe, pid: int) -> None:
        self._pipe, self.pid = pipe, pid

    def take(self) -> list[TimedHit]:
        """The requests that were answered since the last call. Raises RuntimeError where one was no success."""
        self._pipe.send(None)
        found: list[TimedHit]
        found, problem = self._pipe.recv()
        if problem:
            raise RuntimeError(f"a request of the steady client failed: {problem}")
        return found


@contextmanager
def ask_steadily(address: str, model: str, body: bytes) -> Iterator[SteadyHits]:
    """Run the client beside the body of the `with`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_client, args=(theirs, address, model, body), daemon=True)
    process.start()
    theirs.close()
    try:
        assert process.pid is not None
        ours.recv()  # it has had its first answer
        yield SteadyHits(ours, process.pid)
    finally:
        process.kill()
        process.join()


def run_client(pipe: Pipe, address: str, model: str, body: bytes) -> None:
    """The process: ask at each multiple of `PACE_S`, and tell what it found when it is asked to."""
    uvloop.run(_ask_on_and_on(pipe, address, model, body))


async def _ask_on_and_on(pipe: Pipe, address: str, model: str, body: bytes) -> None:
    url = urlsplit(address)
    assert url.hostname is not None
    assert url.port is not None
    connection = Connection(url.hostname, url.port)
    await connection.open()
    await connection.ask(model, body)
    pipe.send(None)
    found, problem = list[TimedHit](), ""
    due = time.monotonic()
    while True:
        due += PACE_S
        if (wait := due - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        else:
            due = time.monotonic()  # the answer before came late: this request could not be sent earlier
        answer = await connection.ask(model, body)
        found.append(TimedHit(due, time.monotonic() - due))
        if not answer.startswith(OK):
            problem = answer[:200].decode(errors="replace")
        if pipe.poll():
            pipe.recv()
            pipe.send((found, problem))
            found = []
