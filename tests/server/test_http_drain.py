"""The end of a listener: no request that a client has sent is lost, and the time is bounded."""

import asyncio
import itertools
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest
import trustme
import uvloop

from server.access.tls import Tls
from server.http_drain import LINGER_LOOKS, LOOK_S, _count_unread
from server.http_listener import Listener, make_listener
from tests.patience import PATIENCE_S

ASK = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
ROUNDS = 3
CLIENTS = 24


class App:
    """Answers each request once `open` is set; says 503 when it is cancelled. `asked`: requests that have begun."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.asked = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See above."""
        del scope
        self.asked += 1
        status, body = 200, b"done"
        try:
            while (await receive()).get("more_body"):
                pass
            await self.open.wait()
        except asyncio.CancelledError:
            status, body = 503, b"stop"
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": body})


class Client:
    """One client's connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def send(self, data: bytes) -> None:
        """Send without waiting."""
        self._writer.write(data)

    async def answer(self) -> bytes:
        """One answer: its head and body, or nothing where the server has closed."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
            return head + await self._reader.readexactly(4)
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            return getattr(error, "partial", b"")

    def close(self) -> None:
        """Close."""
        self._writer.close()


Connect = Callable[..., Awaitable[Client]]


async def wait_on_loop(predicate: Callable[[], bool]) -> None:
    """Wait for it, on the loop."""
    while not predicate():  # noqa: ASYNC110 -- what it waits for has no event
        await asyncio.sleep(0.005)


def run_draining(
    act: Callable[[App, Listener, Connect], Awaitable[None]],
    grace_s: float,
    tls: Tls | None = None,
    trusting: ssl.SSLContext | None = None,
) -> None:
    """A listener as ours; `act` gets its app, itself and a maker of clients. It must end by itself after `act`."""

    async def scenario() -> None:
        app, place = App(), socket.create_server(("127.0.0.1", 0), backlog=2048)
        address = place.getsockname()
        listener = make_listener(app, grace_s, PATIENCE_S, 75, tls)
        serving = asyncio.create_task(listener.serve(sockets=[place]))
        clients = []

        async def connect(sock: socket.socket | None = None) -> Client:
            to: dict[str, Any] = {"sock": sock} if sock else {"host": address[0], "port": address[1]}
            name = None if trusting is None else "127.0.0.1"
            clients.append(Client(*await asyncio.open_connection(**to, ssl=trusting, server_hostname=name)))
            return clients[-1]

        async with asyncio.timeout(PATIENCE_S):
            await wait_on_loop(lambda: listener.started)
            await act(app, listener, connect)
            await serving
        for client in clients:
            client.close()

    uvloop.run(scenario())


@pytest.mark.slow
def test_clients_that_go_on_asking_lose_nothing() -> None:
    """Kept-alive connections, and new ones all the time, through the end of the listener: whatever was sent is
    answered, the last answer of a connection says that it is, and only then connections are refused.
    """
    counted = {"answered": 0, "lost": 0}

    async def keep_asking(connect: Connect, listener: Listener, *, anew: bool) -> None:
        client = await connect()
        for i in itertools.count():
            client.send(ASK)
            answer = await client.answer()
            counted["answered" if answer.endswith(b"done") else "lost"] += 1
            if not anew and b"connection: close" not in answer:
                await asyncio.sleep(0.001 * (i % 7))
                continue
            client.close()
            try:
                client = await connect()
            except OSError:
                assert listener.should_exit
                return

    async def act(app: App, listener: Listener, connect: Connect) -> None:
        app.open.set()
        asking = [asyncio.create_task(keep_asking(connect, listener, anew=i % 3 == 0)) for i in range(CLIENTS)]
        await wait_on_loop(lambda: counted["answered"] >= 20 * CLIENTS)
        listener.stop()
        await asyncio.gather(*asking)

    for _ in range(ROUNDS):
        counted["answered"] = 0
        run_draining(act, PATIENCE_S)
        assert counted["lost"] == 0


@pytest.mark.slow
def test_what_comes_to_an_idle_connection_is_answered() -> None:
    """An idle connection stays open for a moment: a request that still comes is answered, with `Connection: close`."""

    async def act(app: App, listener: Listener, connect: Connect) -> None:
        app.open.set()
        client, idle = await connect(), await connect()
        for each in (client, idle):
            each.send(ASK)
            assert b"connection: close" not in await each.answer()
        listener.stop()
        await wait_on_loop(lambda: listener.server_state.draining)
        client.send(ASK)
        answer = await client.answer()
        assert answer.endswith(b"done")
        assert b"connection: close" in answer
        assert await idle.answer() == b"", "closed once it has been idle"

    run_draining(act, PATIENCE_S)


@pytest.mark.slow
def test_a_request_that_has_begun_is_answered_however_long_it_takes_to_come() -> None:
    """Half a head, half a body, and requests behind one that runs: all are whole in the end and answered in order."""

    async def act(app: App, listener: Listener, connect: Connect) -> None:
        head, body, behind = await connect(), await connect(), await connect()
        head.send(ASK[:20])
        body.send(ASK[:-1])
        behind.send(ASK)
        await wait_on_loop(lambda: app.asked == 2)
        listener.stop()
        await wait_on_loop(lambda: listener.server_state.draining)
        behind.send(ASK)
        await asyncio.sleep(2 * LINGER_LOOKS * LOOK_S)  # idle connections would be gone by now
        head.send(ASK[20:])
        body.send(ASK[-1:])
        app.open.set()
        for client in (head, body):
            assert b"connection: close" in await client.answer()
        answers = [await behind.answer(), await behind.answer()]
        assert [answer[-4:] for answer in answers] == [b"done", b"done"]
        assert [b"connection: close" in answer for answer in answers] == [False, True]

    run_draining(act, PATIENCE_S)


def make_tls(folder: Path) -> tuple[Tls, ssl.SSLContext]:
    """A server's certificate, and a client that trusts it."""
    ca, trusting = trustme.CA(), ssl.create_default_context()
    ca.configure_trust(trusting)
    ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    return Tls(folder / "server.pem", None, None), trusting


def test_a_connection_that_is_just_being_lost_has_nothing_unread(tmp_path: Path) -> None:
    """Over TLS a lost connection has no socket any more, for a moment before it learns that it is lost."""
    tls, trusting = make_tls(tmp_path)
    made: asyncio.Queue[asyncio.Transport] = asyncio.Queue()
    lost = asyncio.Event()

    class Server(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            made.put_nowait(cast("asyncio.Transport", transport))

        def connection_lost(self, exc: Exception | None) -> None:
            del exc
            lost.set()

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Server, "127.0.0.1", 0, ssl=tls.context)
        _, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), ssl=trusting)
        transport = await made.get()
        writer.transport.abort()
        try:
            while not lost.is_set():
                assert _count_unread(transport) == 0
                await asyncio.sleep(0)
        finally:
            server.close()

    uvloop.run(scenario())


@pytest.mark.slow
@pytest.mark.parametrize("with_tls", [False, True])
def test_connections_nobody_has_accepted_are_served(tmp_path: Path, *, with_tls: bool) -> None:
    """Opened while the loop did something else and was told to stop: each is answered."""
    tls, trusting = make_tls(tmp_path) if with_tls else (None, None)

    async def act(app: App, listener: Listener, connect: Connect) -> None:
        app.open.set()
        address = listener.servers[0].sockets[0].getsockname()
        listener.stop()
        waiting = [socket.create_connection(address) for _ in range(50)]
        time.sleep(0.2)  # noqa: ASYNC251 -- by now uvicorn's look at `should_exit` comes before the loop accepts
        clients = await asyncio.gather(*map(connect, waiting))
        for client in clients:
            client.send(ASK)
        assert [(await client.answer())[-4:] for client in clients] == [b"done"] * 50

    run_draining(act, PATIENCE_S, tls, trusting)


@pytest.mark.slow
def test_what_is_cut_is_told_so_in_time() -> None:
    """A request that nothing answers, one whose body does not come, and one behind another: 503 once the time is over,
    which may become shorter meanwhile; a client that only began a head is closed.
    """

    async def act(app: App, listener: Listener, connect: Connect) -> None:
        running, body, behind, head = [await connect() for _ in range(4)]
        running.send(ASK)
        body.send(ASK[:-1])
        behind.send(ASK + ASK)
        head.send(ASK[:20])
        await wait_on_loop(lambda: app.asked == 3)
        listener.stop()
        await wait_on_loop(lambda: listener.server_state.draining)
        listener.stop(0.2)
        for client in (running, body, behind, behind):
            assert (await client.answer()).endswith(b"stop")
        assert await head.answer() == b""

    run_draining(act, PATIENCE_S)
