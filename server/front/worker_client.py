"""A front's connection to one worker: requests out, answers in, deadlines, and what happens when the worker dies.

Runs on the front's event loop. Requests of one loop pass leave in one write.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

from server.errors import Refused, Situation
from server.ipc import frames as wire

#: The worker answers a passed deadline itself, with more to say; only when it stays silent so long does the front.
GRACE_S = 0.25


class WorkerLost(Exception):
    """The worker's connection ended with this call under way."""


@dataclass(slots=True, eq=False)
class Call:
    """A request at the worker. `reply` resolves with the response's head and first part."""

    id: int
    reply: asyncio.Future[wire.Response]
    deadline: float
    missing: int = 0  #: bytes of the answer that have not come from the worker
    unread: int = 0  #: bytes of it that the client has not been given
    parts: asyncio.Queue[bytes | None] | None = None


class Link(asyncio.Protocol):
    """One front-worker socket. `on_lost` is called once when it ends."""

    def __init__(self, worker: int, on_lost: Callable[["Link"], None]) -> None:
        self.worker = worker
        self._on_lost = on_lost
        self._reader = wire.Reader()
        self._outbox = wire.Outbox()
        self._calls: dict[int, Call] = {}
        self._frames: list[bytes] = []
        self._next_id = 0
        self._paused = False
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None

    def __repr__(self) -> str:
        """For example `<Link to worker 0: 12 calls>`."""
        return f"<Link to worker {self.worker}: {len(self._calls)} calls>"

    # --- the front's side -------------------------------------------------------------------------------------------

    def call(self, model: str, content_type: str, accept: str, deadline: float, body: bytes) -> Call:
        """Send a request. Its `reply` raises WorkerLost, or Refused when the deadline (monotonic, s) passes."""
        self._next_id = ident = self._next_id + 1
        call = self._calls[ident] = Call(ident, self._loop.create_future(), deadline)
        first = self._outbox.start(ident, body)
        request = wire.Request(ident, int(deadline * 1e9), model, content_type, accept, len(body), first)
        self._write(wire.pack(request))
        if len(first) < len(body):
            self._send_chunks()
        return call

    def cancel(self, call: Call) -> None:
        """Nobody waits any more: the worker need not do it."""
        if self._calls.pop(call.id, None) is not None:
            self._outbox.drop(call.id)
            self._write(wire.pack(wire.Cancel(call.id)))

    async def rest(self, call: Call) -> AsyncIterator[bytes]:
        """The parts of a large answer after the first. Credit follows consumption: a slow client holds a window."""
        while call.parts is not None and call.unread:
            part = await call.parts.get()
            if part is None:
                raise WorkerLost(f"worker {self.worker} died while its answer was on the way")
            call.unread -= len(part)
            if call.missing:
                self._write(wire.pack(wire.Credit(call.id, len(part))))
            yield part

    def sweep(self, now: float) -> None:
        """Refuse the calls whose deadline has passed without a word from the worker."""
        late = [call for call in self._calls.values() if call.deadline + GRACE_S <= now and not call.reply.done()]
        for call in late:
            self.cancel(call)
            call.reply.set_exception(Refused(Situation.DEADLINE, "the worker did not answer before the deadline"))

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.abort()

    # --- the socket's side ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The worker has accepted."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports do not inherit from it

    def connection_lost(self, exc: Exception | None) -> None:
        """The worker is gone: every call learns it now."""
        del exc
        for call in self._calls.values():
            if call.parts is not None:
                call.parts.put_nowait(None)
            elif not call.reply.done():
                call.reply.set_exception(WorkerLost(f"worker {self.worker} died"))
        self._calls.clear()
        self._on_lost(self)

    def data_received(self, data: bytes) -> None:
        """Bytes of one or many frames."""
        try:
            for frame in self._reader.feed(data):
                if isinstance(frame, wire.Response):
                    self._answered(frame)
                elif isinstance(frame, wire.Data):
                    self._more(frame)
                elif isinstance(frame, wire.Credit):
                    self._outbox.credit(frame.id, frame.room)
                    self._send_chunks()
        except wire.WireError:
            self.close()

    def pause_writing(self) -> None:
        """The worker reads slower than we write: large bodies wait."""
        self._paused = True

    def resume_writing(self) -> None:
        """It has caught up."""
        self._paused = False
        self._send_chunks()

    def _answered(self, response: wire.Response) -> None:
        call = self._calls.get(response.id)
        if call is None:
            return
        self._outbox.drop(response.id)  # an early refusal ends the upload
        call.missing = call.unread = response.body_bytes - len(response.body)
        if call.missing:
            call.parts = asyncio.Queue()
        else:
            del self._calls[response.id]
        if not call.reply.done():
            call.reply.set_result(response)

    def _more(self, data: wire.Data) -> None:
        call = self._calls.get(data.id)
        if call is None or call.parts is None:
            return
        call.parts.put_nowait(data.body)
        call.missing -= len(data.body)
        if call.missing <= 0:
            del self._calls[data.id]

    def _write(self, frame: bytes) -> None:
        if not self._frames:
            self._loop.call_soon(self._flush)
        self._frames.append(frame)

    def _flush(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(self._frames))
        self._frames.clear()

    def _send_chunks(self) -> None:
        while not self._paused and (chunk := self._outbox.chunk()) is not None:
            self._write(chunk)


async def connect(path: str, worker: int, on_lost: Callable[[Link], None]) -> Link:
    """A link to the worker that listens at `path`. Raises OSError when nobody does."""
    loop = asyncio.get_running_loop()
    make: Awaitable[tuple[Any, Link]] = loop.create_unix_connection(lambda: Link(worker, on_lost), path)
    _, link = await make
    return link
