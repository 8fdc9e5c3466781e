"""One end of the socket between a front and a worker: writing, flow control and reading, the same on both sides.

Runs on the event loop of its process. Frames of one loop pass leave in one write.
"""

import asyncio
from abc import ABC, abstractmethod
from typing import cast

import msgspec
import structlog

from server.ipc.bodies import Outbox
from server.ipc.frames import (
    BODY_STARTS,
    CHUNK,
    Cancel,
    Credit,
    Data,
    Frame,
    FrameReader,
    Held,
    Partial,
    Request,
    Response,
    Stages,
    WireError,
    append_frame,
)

log = structlog.get_logger()


class FrameConnection(asyncio.Protocol, ABC):
    """See the module. A subclass says what a frame means (`handle_frame`) and what the end means (`handle_end`)."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader()
        self._outbox = Outbox()
        self._pending = bytearray()  # frames that the next flush writes
        self.is_paused = False  # while the peer reads slower than we write
        self._ended = False

    # --- for the subclass -------------------------------------------------------------------------------------------

    @abstractmethod
    def handle_frame(self, frame: Request | Data | Response | Cancel | Held | Partial | Stages) -> None:
        """A frame has arrived. A WireError from here ends the connection."""

    @abstractmethod
    def handle_end(self) -> None:
        """The connection has ended. Called once."""

    def send(self, frame: Request | Response | Cancel | Credit | Held | Partial | Stages) -> None:
        """Send a frame, soon; the part of a body above `CHUNK` follows as the peer gives credit.

        On a connection that has ended it does nothing: `handle_end` reports the end. Raises WireError for a frame that
        breaks the bounds.
        """
        if self._ended:
            return
        if isinstance(frame, BODY_STARTS) and len(frame.body) > CHUNK:
            self._write(msgspec.structs.replace(frame, body=frame.body[:CHUNK]))
            self._outbox.start(frame.id, frame.body)
            self._send_chunks()
        else:
            self._write(frame)

    @property
    def unsent_bytes(self) -> int:
        """Bytes of large bodies that wait here for the peer's credit."""
        return self._outbox.held_bytes

    def drop_body(self, ident: int) -> None:
        """Do not send the rest of this body."""
        self._outbox.drop(ident)

    def close(self) -> None:
        """End the connection; what has not been written is lost."""
        if self._transport is not None:
            self._transport.abort()

    # --- for the event loop -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Both ends are connected."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports do not inherit from it

    def connection_lost(self, exc: Exception | None) -> None:
        """The peer has closed or died, or we have closed."""
        del exc
        self._ended = True
        self._pending = bytearray()
        self.handle_end()

    def data_received(self, data: bytes) -> None:
        """Bytes of one or many frames."""
        try:
            for frame in self._reader.feed(data):
                if isinstance(frame, Credit):
                    self.add_credit(frame.id, frame.room)
                else:
                    self.handle_frame(frame)
        except WireError as error:
            log.error("bad_frame", connection=repr(self), error=str(error))  # noqa: TRY400 -- the peer's fault, not ours
            self.close()

    def add_credit(self, ident: int, room: int) -> None:
        """The peer has room for more of this body."""
        self._outbox.add_credit(ident, room)
        self._send_chunks()

    def pause_writing(self) -> None:
        """The peer reads slower than we write: large bodies wait, and what the subclass keeps back."""
        self.is_paused = True

    def resume_writing(self) -> None:
        """The peer has caught up."""
        self.is_paused = False
        self._send_chunks()

    def _write(self, frame: Frame) -> None:
        if not self._pending:
            self._loop.call_soon(self._flush)
        append_frame(self._pending, frame)
        if len(self._pending) > CHUNK:  # a chunk leaves at once, so that `pause_writing` stops the next
            self._flush()

    def _flush(self) -> None:
        """Hand the pending frames to the transport.

        The peer may die between a step's answer and this call: uvloop raises at a write to a transport that has closed.
        """
        pending, self._pending = self._pending, bytearray()
        if pending and self._transport is not None and not self._transport.is_closing():
            self._transport.write(pending)

    def _send_chunks(self) -> None:
        while not self.is_paused and (chunk := self._outbox.next_chunk()) is not None:
            self._write(chunk)
