"""The listener's connections: an answer is one segment, and no byte is lost, late or out of order."""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from server.http_listener import SMALL, OneWrite, listener
from tests.patience import PATIENCE_S

DATA_SEGMENTS_IN = 152  #: where Linux's `struct tcp_info` has `tcpi_data_segs_in`, a u32
ASKED = 20

Message = MutableMapping[str, Any]


class Client:
    """A connection as one who asks sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def ask(self, request: bytes, ending: bytes) -> bytes:
        """What comes up to this ending."""
        self._writer.write(request)
        return await self._reader.readuntil(ending)

    def segments(self) -> int:
        """How many segments with data have come."""
        option = self._writer.get_extra_info("socket").getsockopt
        info = option(socket.IPPROTO_TCP, socket.TCP_INFO, DATA_SEGMENTS_IN + 4)
        return int(struct.unpack_from("<I", info, DATA_SEGMENTS_IN)[0])


def serving(app: Any, act: Callable[[Client], Awaitable[None]]) -> None:
    """Uvicorn as ours with this app on loopback, and one client that acts."""

    async def scenario() -> None:
        place = socket.create_server(("127.0.0.1", 0))
        server = listener(app, 1.0, 5.0)
        task = asyncio.create_task(server.serve(sockets=[place]))
        reader, writer = await asyncio.open_connection(*place.getsockname())
        try:
            async with asyncio.timeout(PATIENCE_S):
                await act(Client(reader, writer))
        finally:
            writer.close()
            server.should_exit = True
            await task

    uvloop.run(scenario())


@pytest.mark.parametrize("size", [1, 2000, 30_000])
def test_an_answer_is_one_segment(size: int) -> None:
    """Head and body leave together: a client is woken once for each of its requests."""

    async def app(scope: Message, receive: Any, send: Any) -> None:
        del scope
        await receive()
        headers = [(b"content-length", b"%d" % size)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"x" * (size - 1) + b"!"})

    async def act(client: Client) -> None:
        for _ in range(ASKED):
            await client.ask(b"POST / HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}", b"!")
        assert client.segments() == ASKED

    serving(app, act)


def test_a_head_does_not_wait_for_a_late_body() -> None:
    """What is held leaves at the end of the loop's pass, whatever comes after."""
    loose = asyncio.Event()

    async def app(scope: Message, receive: Any, send: Any) -> None:
        del scope, receive
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await loose.wait()
        await send({"type": "http.response.body", "body": b"late"})

    async def act(client: Client) -> None:
        await client.ask(b"GET / HTTP/1.1\r\n\r\n", b"\r\n\r\n")
        assert client.segments() == 1
        loose.set()
        await client.ask(b"", b"late")

    serving(app, act)


Step = int | None  #: so many bytes are written; None lets the loop pass


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.one_of(st.none(), st.integers(0, 20), st.integers(SMALL - 2, 3 * SMALL)), max_size=12))
def test_no_byte_is_lost_or_out_of_order(steps: list[Step]) -> None:
    """Whatever is written, in whatever passes of the loop, arrives as it was written, the end after it."""
    parts = [None if size is None else bytes([i + 1]) * size for i, size in enumerate(steps)]
    written: asyncio.Queue[OneWrite] = asyncio.Queue()

    class Writer(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            written.put_nowait(OneWrite(transport))

    async def scenario() -> bytes:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Writer, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        transport = await written.get()
        for part in parts:
            if part is None:
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                assert transport.get_write_buffer_size() == 0
            else:
                transport.write(part)
        transport.close()
        found = await reader.read()
        writer.close()
        server.close()
        return found

    assert uvloop.run(scenario()) == b"".join(part for part in parts if part is not None)


def test_what_is_held_for_a_client_that_is_cut_off_is_let_go() -> None:
    """Cut off before the end of the pass: the connection is closed by then, and nothing fails in the loop."""
    wrong: list[Any] = []
    over: asyncio.Queue[None] = asyncio.Queue()

    class Writer(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            held = OneWrite(transport)
            held.abort()
            held.write(b"held")

        def connection_lost(self, exc: Exception | None) -> None:
            del exc
            over.put_nowait(None)

    async def scenario() -> bytes:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: wrong.append(context))
        server = await loop.create_server(Writer, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        await over.get()
        found = await reader.read()
        writer.close()
        server.close()
        return found

    assert uvloop.run(scenario()) == b""
    assert wrong == []
