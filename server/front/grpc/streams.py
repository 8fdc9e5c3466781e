"""The messages of a stream, answered in their order and side by side. Runs in the gRPC front."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from server.errors import Refused
from server.front.grpc.calls import Send
from server.front.inference_plane import HeldBytes

MOST_AHEAD = 16  #: messages of one stream that are answered at a time; the others wait in the client

Answer = Callable[[Any], Awaitable[bytes]]


async def answer_all(requests: AsyncIterator[Any], send: Send, held: HeldBytes, answer: Answer) -> None:
    """Send the answer to each message. INVARIANT: `answer` says in its bytes what went wrong, and raises nothing.

    Raises Refused where a message is none of the protocol.
    """
    answers = _Answers(held, answer)
    reading = asyncio.create_task(answers.read_on(requests))
    try:
        while (raw := await answers.take()) is not None:
            await send(raw)
        await reading
    finally:
        reading.cancel()
        answers.drop()


class _Answers:
    """The answers of one stream that are not sent yet, MOST_AHEAD at most. Their bytes count as held."""

    def __init__(self, held: HeldBytes, answer: Answer) -> None:
        self._held, self._answer = held, answer
        self._waiting = asyncio.Queue[asyncio.Task[bytes] | None](MOST_AHEAD)

    def __repr__(self) -> str:
        return f"<_Answers {self._waiting.qsize()} under way>"

    async def read_on(self, requests: AsyncIterator[Any]) -> None:
        """Begin to answer each message, as there is room. Raises Refused for one that is not of the protocol."""
        try:
            async for request in requests:
                answer = asyncio.create_task(self._hold_answer(request))
                try:
                    await self._waiting.put(answer)
                except asyncio.CancelledError:
                    self._drop_one(answer)
                    raise
        except Refused:
            await self._waiting.put(None)
            raise
        await self._waiting.put(None)

    async def take(self) -> bytes | None:
        """The next answer; None after the last."""
        answer = await self._waiting.get()
        if answer is None:
            return None
        raw = await answer
        self._held.size -= len(raw)
        return raw

    def drop(self) -> None:
        """Give up what is under way."""
        while not self._waiting.empty():
            answer = self._waiting.get_nowait()
            if answer is not None:
                self._drop_one(answer)

    async def _hold_answer(self, request: Any) -> bytes:
        raw = await self._answer(request)
        self._held.size += len(raw)
        return raw

    def _drop_one(self, answer: asyncio.Task[bytes]) -> None:
        if answer.done() and not answer.cancelled() and answer.exception() is None:
            self._held.size -= len(answer.result())
        answer.cancel()
