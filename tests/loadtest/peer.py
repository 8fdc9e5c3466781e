"""A small real HTTP server that can be slow, silent or wrong, for the tests of the driver."""

import asyncio
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.patience import PATIENCE_S

SOUND = b'{"predictions": [{"start": "2026-01-01", "mean": [1.5, 2]}]}'


@dataclass
class Peer:
    """A server whose answers are what the model's name says: `hit`, `503`, `nan`, `hangup`, `bye` or `silence`."""

    delay_s: float = 0.0
    stall_at: int = -1  #: this request and all that arrive within the next `stall_s` wait until that is over
    stall_s: float = 0.0
    port: int = 0
    asked: int = 0
    connections: int = 0
    tls: ssl.SSLContext | None = None
    shown: set[str | None] = field(default_factory=set)  #: values of the header Authorization
    stalled_until: float = 0.0
    tasks: set["asyncio.Task[None] | None"] = field(default_factory=set)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.connections += 1
        self.tasks.add(asyncio.current_task())
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                fields = dict(line.split(": ", 1) for line in head.decode().splitlines()[1:-1])
                await reader.readexactly(int(fields["Content-Length"]))
                self.shown.add(fields.get("Authorization"))
                await self._wait()
                if not self._write(writer, fields["X-Amzn-SageMaker-Target-Model"]):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _wait(self) -> None:
        now = time.monotonic()
        if self.asked == self.stall_at:
            self.stalled_until = now + self.stall_s
        self.asked += 1
        await asyncio.sleep(max(self.delay_s, self.stalled_until - now))

    def _write(self, writer: asyncio.StreamWriter, model: str) -> bool:
        """Whether the connection stays."""
        if model == "hangup":
            return False
        if model == "silence":
            return True
        body = b'{"predictions": [NaN]}' if model == "nan" else SOUND
        status = model if model.isdigit() else "200"
        extra = "Connection: close\r\n" if model == "bye" else ""
        head = f"HTTP/1.1 {status} X\r\nx-fleetcast-cache: {model}\r\n{extra}Content-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        return model != "bye"


@contextmanager
def run_peer(peer: Peer) -> Iterator[Peer]:
    """Serve in a thread until the end of the block."""
    started, ended = threading.Event(), asyncio.Event()

    async def main() -> None:
        server = await asyncio.start_server(peer.answer, "127.0.0.1", 0, ssl=peer.tls)
        peer.port = server.sockets[0].getsockname()[1]
        loops.append(asyncio.get_running_loop())
        started.set()
        await ended.wait()
        server.close()
        for task in peer.tasks:
            if task is not None:
                task.cancel()
        await asyncio.gather(*(task for task in peer.tasks if task is not None), return_exceptions=True)

    loops: list[asyncio.AbstractEventLoop] = []
    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert started.wait(PATIENCE_S)
    try:
        yield peer
    finally:
        loops[0].call_soon_threadsafe(ended.set)
        thread.join(PATIENCE_S)
