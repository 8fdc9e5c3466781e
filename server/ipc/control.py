"""The control channel between the supervisor and a child: JSON lines over an inherited socket, asks and answers.

Runs in every process, on its event loop. A closed channel means the other side is gone: a child then ends itself, so a
killed supervisor leaves no orphans.
"""

import asyncio
import itertools
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from server.errors import Situation

LINE_LIMIT = 64 * 1024 * 1024
HELLO_S = 30.0


class Message(msgspec.Struct, omit_defaults=True):
    """An ask has `id` and `op`, a tell only `op`, an answer `id` and `result` or `error` (with its situation)."""

    id: int = 0
    op: str = ""
    args: dict[str, Any] = {}
    result: Any = None
    error: str = ""
    situation: int = 0


class ControlError(Exception):
    """The other side answered with an error; `situation` is a `server.errors.Situation` number."""

    def __init__(self, message: str, situation: int = 0) -> None:
        super().__init__(message)
        self.situation = situation


class ChannelClosed(Exception):
    """The other process is gone."""


Handler = Callable[[str, dict[str, Any]], Awaitable[Any]]


class Channel:
    """One end. `handler` gets what the other side asks or tells; `run` until the other side is gone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handler: Handler) -> None:
        self._reader = reader
        self._writer = writer
        self._handler = handler
        self._ids = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        """For example `<Channel 1 asked, 0 serving>`."""
        return f"<Channel {len(self._asked)} asked, {len(self._tasks)} serving>"

    @classmethod
    async def open(cls, sock: socket.socket, handler: Handler) -> "Channel":
        """A channel over a connected socket."""
        reader, writer = await asyncio.open_connection(sock=sock, limit=LINE_LIMIT)
        return cls(reader, writer, handler)

    async def run(self) -> None:
        """Serve until the other side closes."""
        try:
            while line := await self._reader.readline():
                self._receive(msgspec.json.decode(line, type=Message))
        except (ConnectionError, msgspec.MsgspecError, ValueError):
            pass  # half a line from a dying process is the same news as a closed socket
        finally:
            self.close()

    def close(self) -> None:
        """End the channel; whoever asked and waits gets ChannelClosed."""
        self._writer.close()
        for future in self._asked.values():
            if not future.done():
                future.set_exception(ChannelClosed("the process at the other end is gone"))
        self._asked.clear()

    def tell(self, op: str, **args: Any) -> None:
        """Say something that needs no answer."""
        self._send(Message(op=op, args=args))

    async def ask(self, op: str, timeout_s: float, **args: Any) -> Any:
        """Ask and wait. Raises ControlError, ChannelClosed, or TimeoutError."""
        if self._writer.is_closing():
            raise ChannelClosed("the process at the other end is gone")
        ident = next(self._ids)
        future = self._asked[ident] = asyncio.get_running_loop().create_future()
        self._send(Message(id=ident, op=op, args=args))
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        finally:
            self._asked.pop(ident, None)

    def _send(self, message: Message) -> None:
        if not self._writer.is_closing():
            self._writer.write(msgspec.json.encode(message) + b"\n")

    def _receive(self, message: Message) -> None:
        if message.op:
            task = asyncio.create_task(self._serve(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        future = self._asked.get(message.id)
        if future is None or future.done():
            return
        if message.error:
            future.set_exception(ControlError(message.error, message.situation))
        else:
            future.set_result(message.result)

    async def _serve(self, message: Message) -> None:
        answer = Message(id=message.id)
        try:
            answer.result = await self._handler(message.op, message.args)
        except Exception as error:
            answer.error = str(error) or type(error).__name__
            answer.situation = int(getattr(error, "situation", 0))
        if message.id:
            self._send(answer)


class Member:
    """A child's side of its channel: joins by asking who it is, and serves once it says it is ready."""

    def __init__(self) -> None:
        self._handler: Handler | None = None
        self.channel: Channel
        self.released: asyncio.Task[None]  #: done when the supervisor closes the channel, or is gone

    def __repr__(self) -> str:
        """For example `<Member ready>`."""
        return f"<Member {'joining' if self._handler is None else 'ready'}>"

    async def join(self, control_fd: int) -> dict[str, Any] | None:
        """What the supervisor says of us; None when it has told us to stop before we began."""
        self.channel = await Channel.open(socket.socket(fileno=control_fd), self._handle)
        self.released = asyncio.create_task(self.channel.run())
        try:
            hello: dict[str, Any] = await self.channel.ask("hello", timeout_s=HELLO_S)
        except ChannelClosed:
            return None
        return hello

    def ready(self, handler: Handler) -> None:
        """From now on `handler` answers."""
        self._handler = handler
        self.channel.tell("ready")

    async def _handle(self, op: str, args: dict[str, Any]) -> Any:
        if self._handler is None:
            raise ControlError("this process is still starting", Situation.NOT_READY)
        return await self._handler(op, args)
