"""Replies that leave part by part while they are made, by HTTP's chunked coding. Runs in a front.

A dialect that answers so writes an async generator of the body's parts, opens it, and puts it into its reply:

    async def answer(self, operation, request, plane):
        parts = self._make_parts(request, plane)  # yields bytes as they become ready; raises Refused
        chunks = await Chunks.open(parts, self._end, request.deadline, request.client_gone)
        return HttpReply(200, "application/jsonlines", b"", chunks=chunks)

    def _end(self, why: Refused) -> Ending:
        return Ending(status=424, body=b'{"error":...}')  # body=None: the protocol has no words for it

- `open` waits for the first part. What the generator raises before it is the plain refusal that any reply may be, so
  that a call which fails at once has the status code of its failure.
- The generator goes on when the client's connection has taken the part before: a slow client holds one part and what
  the generator itself prepares. INVARIANT: it prepares a bounded number of bytes, and counts them in `plane.held`.
- The client is watched here: a generator asks workers without a `client_gone` of its own. When the client leaves, or
  anything else ends the reply, the generator is closed, also in the middle of an `await`: what it has under way is
  given up in its `finally`.
- A part that is not ready at the deadline does not come any more. Then, or when the generator raises Refused, or the
  server stops and its `drain_s` is over, `end` gives the protocol's last words. Without any, the connection is cut, so
  that no client takes half of an answer for all of it.
- Where one call has many statuses (an item each), give the reply a list as `counted` and append to it with each part.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import structlog

from server.errors import Refused, Situation
from server.front.inference import ClientGone, ClientWatch
from server.front.inference_plane import HeldBytes

log = structlog.get_logger()

PIECE_BYTES = 256 * 1024  #: of a large part that are handed to the client's connection at a time
CLIENT_GONE = 499  # counted, never sent; the number is nginx's

Parts = AsyncGenerator[bytes, None]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Ending(NamedTuple):
    """How a reply ends that has begun and cannot be finished. `status` is counted; without a `body` it is cut off."""

    status: int
    body: bytes | None


class Chunks:
    """See the module. It has its first part already; `send` sends all."""

    def __init__(self, parts: Parts, end: Callable[[Refused], Ending], deadline: float, gone: ClientWatch) -> None:
        """Use `open`. `deadline` is on the monotonic clock (s)."""
        self._parts, self._end, self._deadline = parts, end, deadline
        self._gone = asyncio.ensure_future(gone())
        self._first: bytes | None = None

    def __repr__(self) -> str:
        """For example `<Chunks, 2.5 s left>`."""
        return f"<Chunks, {self._deadline - time.monotonic():.1f} s left>"

    @classmethod
    async def open(
        cls, parts: Parts, end: Callable[[Refused], Ending], deadline: float, client_gone: ClientWatch
    ) -> "Chunks":
        """The reply's chunks, once the first part is there. Raises Refused, ClientGone."""
        chunks = cls(parts, end, deadline, client_gone)
        try:
            chunks._first = await chunks._take()
        except BaseException:
            await chunks._close()
            raise
        return chunks

    async def send(self, start: MutableMapping[str, Any], send: Send, held: HeldBytes) -> int | None:
        """Send the head `start`, and the body as fast as the client takes it, to its end or to the last words.

        Returns the status to count of a reply that was not finished, else None.
        """
        try:
            await send(start)
            return await self._send_body(send, held)
        finally:
            await self._close()

    async def _send_body(self, send: Send, held: HeldBytes) -> int | None:
        part = self._first
        try:
            while part is not None:
                self._first = None
                await _send_part(send, part, held)
                part = None  # it is not held while the next is made
                part = await self._take()
        except ClientGone:
            return CLIENT_GONE
        except Refused as refused:
            why = refused
        except asyncio.CancelledError:  # the drain is over, and nobody else ends this task
            why = Refused(Situation.NOT_READY, "the server is stopping; ask again")
        except RuntimeError as error:
            if self._gone.done():  # uvloop says so that the listener has cut the client off
                return CLIENT_GONE
            why = _note_bug(error)
        except Exception as error:
            why = _note_bug(error)
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return None
        return await self._say(why, send)

    async def _say(self, why: Refused, send: Send) -> int:
        """Send the last words, if there are any. Returns the status that they have."""
        status, body = self._end(why)
        if body is not None:
            with suppress(RuntimeError):  # the client has been cut off meanwhile
                await send({"type": "http.response.body", "body": body, "more_body": False})
        return status

    async def _take(self) -> bytes | None:
        """The next part, None after the last. Raises Refused, ClientGone, and what the generator raises."""
        taking = asyncio.ensure_future(anext(self._parts, None))
        left_s = max(0.0, self._deadline - time.monotonic())
        try:
            await asyncio.wait((taking, self._gone), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if not taking.done():
                if self._gone.done():
                    raise ClientGone
                raise Refused(Situation.DEADLINE, "the deadline passed before the answer was complete")
            part = taking.result()
        finally:
            if not taking.done():
                taking.cancel()
                await asyncio.gather(taking, return_exceptions=True)
        if part is not None and time.monotonic() > self._deadline:
            raise Refused(Situation.DEADLINE, "the deadline passed before the answer was complete")
        return part

    async def _close(self) -> None:
        """End the generator, wherever it is, and the watch of the client."""
        self._gone.cancel()
        await asyncio.gather(self._gone, return_exceptions=True)
        try:
            await self._parts.aclose()
        except Exception as error:
            _note_bug(error)


async def _send_part(send: Send, part: bytes, held: HeldBytes) -> None:
    """Send one part. It counts as held meanwhile; whoever made it has checked that there is room."""
    held.size += len(part)
    try:
        for at in range(0, len(part), PIECE_BYTES):
            piece = part if len(part) <= PIECE_BYTES else part[at : at + PIECE_BYTES]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    finally:
        held.size -= len(part)


def _note_bug(error: Exception) -> Refused:
    """Log an error of ours. Returns what the client is told."""
    log.error("reply_broken", exc_info=error)
    return Refused(Situation.INTERNAL, "the server failed; its log says why")


def list_statuses(counted: Sequence[int] | None, status: int, broken: int | None) -> Sequence[int]:
    """The statuses to count for a reply of `status` that may have `broken` with another."""
    if counted is None:
        return (status if broken is None else broken,)
    return counted if broken is None else (*counted, broken)
