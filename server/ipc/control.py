"""The control channel between the supervisor and a child: operations and their answers over an inherited socket.

Runs in every process, on its event loop. A message is a u32 length (little-endian, at most `MAX_MESSAGE`) and msgpack.
A closed channel means that the other process is gone: a child then ends itself, so a killed supervisor leaves no
orphans.
"""

import asyncio
import gc
import itertools
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import cache
from typing import Any

import msgspec
import structlog

from server.errors import Situation
from server.ipc.operations import Operation, Ready, Reply, reply_type
from server.ipc.parent_death import send_on_parent_death
from server.settings import Settings

MAX_MESSAGE = 64 * 1024 * 1024  #: the largest has the rows of an access log: 8 million characters, 32 MB at most
JOIN_S = 30.0
_PREFIX_BYTES = 4

log = structlog.get_logger()


class Ask(msgspec.Struct, tag=True):
    """An operation; it is answered unless `id` is 0."""

    id: int
    operation: msgspec.Raw


class Answer(msgspec.Struct, tag=True):
    """The reply to the operation `id`."""

    id: int
    reply: msgspec.Raw


class Failure(msgspec.Struct, tag=True):
    """Why the operation `id` failed; `situation` is a `server.errors.Situation` number, 0 where there is none."""

    id: int
    message: str
    situation: int


Message = Ask | Answer | Failure


class ControlError(Exception):
    """The other side answered with an error; `situation` is a `server.errors.Situation` number."""

    def __init__(self, message: str, situation: int = 0) -> None:
        super().__init__(message)
        self.situation = situation


class ChannelClosed(Exception):
    """The other process is gone."""


# msgspec asks these two for types that it does not know; NotImplementedError is how its hooks refuse one.


def _to_plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.to_wire()
    raise NotImplementedError(f"a {type(value).__name__} does not travel between our processes")


def _from_plain(kind: type, value: Any) -> Any:
    if kind is Settings:
        return Settings.from_wire(value)
    raise NotImplementedError(f"a {kind.__name__} does not travel between our processes")


_encode = msgspec.msgpack.Encoder(enc_hook=_to_plain).encode
_decode_message = msgspec.msgpack.Decoder(Message).decode


@cache
def _make_decoder(kind: Any) -> "msgspec.msgpack.Decoder[Any]":
    return msgspec.msgpack.Decoder(kind, dec_hook=_from_plain)


class _Name(msgspec.Struct):
    operation: str


def _parse_operation(accepted: Any, payload: msgspec.Raw) -> Operation[Any]:
    """One of the accepted operations. Raises ControlError that says whether its name or its fields are wrong."""
    try:
        operation: Operation[Any] = _make_decoder(accepted).decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        name = "?"
        with suppress(msgspec.MsgspecError, UnicodeDecodeError):
            name = msgspec.msgpack.decode(payload, type=_Name).operation
        known = [each.__name__ for each in accepted.__args__]
        if name not in known:
            message = f"no operation {name!r} here, only {', '.join(known)}"
        else:
            message = f"the operation {name!r} is malformed: {error}"
        raise ControlError(message, Situation.INTERNAL) from error
    return operation


Handler = Callable[[Any], Awaitable[object]]


class ControlChannel:
    """One end. `handler` gets the other side's operations, which are of the union `accepted`; `run` serves them."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, accepted: Any, handler: Handler
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._accepted = accepted
        self._handler = handler
        self._ids = itertools.count(1)
        self._asked: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        """For example `<ControlChannel 1 asked, 0 serving>`."""
        return f"<ControlChannel {len(self._asked)} asked, {len(self._tasks)} serving>"

    @classmethod
    async def open(cls, sock: socket.socket, accepted: Any, handler: Handler) -> "ControlChannel":
        """A channel over a connected socket."""
        reader, writer = await asyncio.open_connection(sock=sock)
        return cls(reader, writer, accepted, handler)

    async def run(self) -> None:
        """Serve until the other side closes, or sends what is no message."""
        try:
            while True:
                size = int.from_bytes(await self._reader.readexactly(_PREFIX_BYTES), "little")
                if size > MAX_MESSAGE:
                    log.error("bad_message", bytes=size, limit=MAX_MESSAGE)
                    break
                self._receive(_decode_message(await self._reader.readexactly(size)))
        except (ConnectionError, EOFError):
            pass  # half a message from a dying process says the same as a closed socket
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.error("bad_message", error=str(error))  # noqa: TRY400 -- the peer's fault has no traceback of ours
        finally:
            self.close()

    def close(self) -> None:
        """End the channel; every `ask` that waits raises ChannelClosed."""
        self._writer.close()
        for future in self._asked.values():
            if not future.done():
                future.set_exception(ChannelClosed("the process at the other end is gone"))
        self._asked.clear()

    def tell(self, operation: Operation[None]) -> None:
        """Ask for something that needs no answer."""
        self._send(Ask(0, msgspec.Raw(_encode(operation))))

    async def ask(self, operation: Operation[Reply], timeout_s: float) -> Reply:
        """Ask and wait. Raises ControlError, ChannelClosed, or TimeoutError."""
        if self._writer.is_closing():
            raise ChannelClosed("the process at the other end is gone")
        ident = next(self._ids)
        future = self._asked[ident] = asyncio.get_running_loop().create_future()
        try:
            self._send(Ask(ident, msgspec.Raw(_encode(operation))))
            async with asyncio.timeout(timeout_s):
                raw = await future
        finally:
            self._asked.pop(ident, None)
        try:
            reply: Reply = _make_decoder(reply_type(type(operation))).decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            message = f"the reply to {type(operation).__name__} is malformed: {error}"
            raise ControlError(message, Situation.INTERNAL) from error
        return reply

    def _send(self, message: Message) -> None:
        """Raises ControlError for a message above the limit."""
        packed = _encode(message)
        if len(packed) > MAX_MESSAGE:
            raise ControlError(f"a message has {len(packed)} bytes, the limit is {MAX_MESSAGE}", Situation.INTERNAL)
        if not self._writer.is_closing():
            self._writer.write(len(packed).to_bytes(_PREFIX_BYTES, "little") + packed)

    def _receive(self, message: Message) -> None:
        if isinstance(message, Ask):
            task = asyncio.create_task(self._serve(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        future = self._asked.get(message.id)
        if future is None or future.done():
            return
        if isinstance(message, Failure):
            future.set_exception(ControlError(message.message, message.situation))
        else:
            future.set_result(message.reply)

    async def _serve(self, message: Ask) -> None:
        try:
            reply = await self._handler(_parse_operation(self._accepted, message.operation))
            if message.id:
                self._send(Answer(message.id, msgspec.Raw(_encode(reply))))
        except Exception as error:
            text = str(error) or type(error).__name__
            if message.id:
                self._send(Failure(message.id, text, int(getattr(error, "situation", 0))))
            else:
                log.error("told_in_vain", error=text)  # noqa: TRY400 -- as an answer would say it


class ChildChannel:
    """A child's side of its channel: joins the supervisor, and serves `accepted` operations once it is ready."""

    def __init__(self, accepted: Any) -> None:
        self._accepted = accepted
        self._handler: Handler | None = None
        self.channel: ControlChannel
        self.released: asyncio.Task[None]  #: done when the supervisor closes the channel, or is gone

    def __repr__(self) -> str:
        """For example `<ChildChannel ready>`."""
        return f"<ChildChannel {'joining' if self._handler is None else 'ready'}>"

    async def join(
        self,
        control_fd: int,
        request: Operation[Reply],
        *,
        orphaned: signal.Signals = signal.SIGCONT,
        patience_s: float = JOIN_S,
    ) -> Reply | None:
        """The supervisor's assignment; None when it has told us to stop before we began.

        `orphaned`: what the kernel sends should the supervisor die. `patience_s`: how long the supervisor may take.
        """
        send_on_parent_death(orphaned)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # it is the supervisor's to act on, and drops no request here
        self.channel = await ControlChannel.open(socket.socket(fileno=control_fd), self._accepted, self._handle)
        self.released = asyncio.create_task(self.channel.run())
        try:
            return await self.channel.ask(request, timeout_s=patience_s)
        except ChannelClosed:
            return None

    def serve(self, handler: Handler) -> None:
        """From now on `handler` answers, and the supervisor knows it.

        What the process holds by now stays, so the garbage collector need not look at it: a full walk over the 200,000
        objects of torch and its imports would stop the event loop for a tenth of a second and longer.
        """
        gc.freeze()
        self._handler = handler
        self.channel.tell(Ready())

    async def _handle(self, operation: Operation[Any]) -> object:
        if self._handler is None:
            raise ControlError("this process is still starting", Situation.NOT_READY)
        return await self._handler(operation)
