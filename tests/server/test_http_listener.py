"""The listener: an answer is one segment, no byte is lost or out of order, and every request is read in one way."""

import asyncio
import gc
import inspect
import re
import socket
import struct
import weakref
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import pytest
import uvicorn
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.http_connection import LONGEST_KNOWN, MAX_HEAD, MAX_PIPELINED
from server.http_exchange import BODY_FOLLOWS, REASON, WHOLE_BODY, BodyEvent, Exchange
from server.http_listener import make_listener
from server.request_head import HEADERS_BY_NAME
from tests.patience import PATIENCE_S

DATA_SEGMENTS_IN = 152  #: where Linux's `struct tcp_info` has `tcpi_data_segs_in`, a u32
ASKED = 20
FLOOD = 64 << 20  #: bytes, far more than sockets hold
HELD = 16 << 20  #: bytes that the sockets and one read of the loop may hold between them

Message = MutableMapping[str, Any]


class RawClient:
    """A client's side of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def ask(self, request: bytes, ending: bytes) -> bytes:
        """Sends the request; what comes up to this ending."""
        self._writer.write(request)
        return await self._reader.readuntil(ending)

    async def send(self, *parts: bytes) -> None:
        """Sends the parts, each in a pass of the server's loop."""
        for part in parts:
            self._writer.write(part)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def exchange(self, *parts: bytes) -> bytes:
        """Sends the parts, each in a pass of the server's loop; all that comes until the server closes."""
        await self.send(*parts)
        return await self._reader.read()

    async def flood(self, start: bytes, part: bytes) -> int:
        """Sends `start` and then `part` again and again; the bytes that were taken until the server closed."""
        self._writer.write(start)
        sent = 0
        try:
            while not self._reader.at_eof() and sent < FLOOD:
                self._writer.write(part)
                sent += len(part)
                await self._writer.drain()
                await asyncio.sleep(0)
        except ConnectionError:
            pass
        return sent

    def segments(self) -> int:
        """How many segments with data have come."""
        option = self._writer.get_extra_info("socket").getsockopt
        info = option(socket.IPPROTO_TCP, socket.TCP_INFO, DATA_SEGMENTS_IN + 4)
        return int(struct.unpack_from("<I", info, DATA_SEGMENTS_IN)[0])


def serve_app(app: Any, act: Callable[[RawClient], Awaitable[None]], keep_alive_s: int = 5) -> None:
    """Uvicorn as ours with this app on loopback, and one client that acts."""

    async def scenario() -> None:
        place = socket.create_server(("127.0.0.1", 0))
        server = make_listener(app, 1.0, 5.0, keep_alive_s)
        task = asyncio.create_task(server.serve(sockets=[place]))
        reader, writer = await asyncio.open_connection(*place.getsockname())
        try:
            async with asyncio.timeout(PATIENCE_S):
                await act(RawClient(reader, writer))
        finally:
            writer.close()
            server.should_exit = True
            await task

    uvloop.run(scenario())


async def let_loop_run(condition: Callable[[], bool]) -> None:
    """Let the loop run until something is true."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 -- a listener has no events for its inner state
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("size", [1, 2000, 30_000])
def test_an_answer_is_one_segment(size: int) -> None:
    """Head and body leave together where the application says so: a client is woken once for each of its requests."""

    async def answer_request(scope: Message, receive: Any, send: Any) -> None:
        del scope
        await receive()
        headers = [(b"content-length", b"%d" % size)]
        await send({"type": "http.response.start", "status": 200, "headers": headers, BODY_FOLLOWS: True})
        await send({"type": "http.response.body", "body": b"x" * (size - 1) + b"!"})

    async def act(client: RawClient) -> None:
        for _ in range(ASKED):
            await client.ask(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}", b"!")
        assert client.segments() == ASKED

    serve_app(answer_request, act)


def test_a_reason_may_be_the_applications_own() -> None:
    """Also an empty one; what would end the status line is refused."""

    async def answer_request(scope: Message, receive: Any, send: Any) -> None:
        await receive()
        reason = {"/own": "teapot", "/none": ""}.get(scope["path"])
        start: Message = {"type": "http.response.start", "status": 418, "headers": [(b"content-length", b"1")]}
        start[BODY_FOLLOWS] = True
        if reason is not None:
            start[REASON] = reason
        if scope["path"] == "/own":
            with pytest.raises(RuntimeError, match="the reason"):
                await send({**start, REASON: "a\r\nx: y"})
        await send(start)
        await send({"type": "http.response.body", "body": b"!"})

    async def act(client: RawClient) -> None:
        for path, line in ((b"/own", b"418 teapot"), (b"/none", b"418 "), (b"/", b"418 I'm a Teapot")):
            await client.ask(b"GET " + path + b" HTTP/1.1\r\nhost: x\r\n\r\n", b"HTTP/1.1 " + line + b"\r\n")

    serve_app(answer_request, act)


def test_a_head_does_not_wait_for_a_late_body() -> None:
    """An application that does not say when its body comes has its head sent at once."""
    loose = asyncio.Event()

    async def answer_request(scope: Message, receive: Any, send: Any) -> None:
        del scope, receive
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await loose.wait()
        await send({"type": "http.response.body", "body": b"late"})

    async def act(client: RawClient) -> None:
        await client.ask(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"\r\n\r\n")
        assert client.segments() == 1
        loose.set()
        await client.ask(b"", b"late")

    serve_app(answer_request, act)


# --- one way to read a request ----------------------------------------------------------------------------------------

HEAD = b"POST /asked HTTP/1.1\r\nHost: x\r\n"
INNER = b"GET /inner HTTP/1.1\r\nHost: x\r\n\r\n"  #: a body that looks like a request
LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
FRAMED = {
    "length": b"Content-Length: %d\r\n\r\n%b" % (len(INNER), INNER),
    "chunked": b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(INNER), INNER),
    "empty": b"Content-Length: 0\r\n\r\n",
    "none": b"\r\n",
}
UPGRADES = {
    "h2c": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n",
    "websocket": b"Connection: upgrade\r\nUpgrade: websocket\r\n",
    "none": b"",
}


class EchoApp:
    """An application that remembers requests and answers `METHOD PATH BODY_BYTES;`."""

    def __init__(self) -> None:
        self.headers: list[dict[bytes, bytes]] = []
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        """One request."""
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.headers.append(dict(scope["headers"]))
        self.bodies.append(body)
        answer = f"{scope['method']} {scope['path']} {len(body)};".encode()
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(answer))]}
        )
        await send({"type": "http.response.body", "body": answer})


def exchange(*parts: bytes, keep_alive_s: int = 5) -> tuple[bytes, EchoApp]:
    """What a client that sends these parts gets until the server closes the connection, and what the app saw."""
    app, found = EchoApp(), []

    async def act(client: RawClient) -> None:
        found.append(await client.exchange(*parts))

    serve_app(app, act, keep_alive_s)
    return found[0], app


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("framing", FRAMED)
@pytest.mark.parametrize("upgrade", UPGRADES)
def test_upgrade_is_ignored_and_the_body_read(upgrade: str, framing: str, size: int) -> None:
    """However the bytes are cut, `Upgrade` changes nothing: the body is the body, and two requests get two answers."""
    sent = HEAD + UPGRADES[upgrade] + FRAMED[framing] + LAST
    said, app = exchange(*(sent[i : i + size] for i in range(0, len(sent), size)))
    body = INNER if framing in ("length", "chunked") else b""
    assert app.bodies == [body, b""]
    assert said.count(b"HTTP/1.1 200") == said.count(b"HTTP/1.1 ") == 2
    assert b"POST /asked %d;" % len(body) in said
    assert b"GET /last 0;" in said


def test_many_upgrades_on_one_connection() -> None:
    """A client that offers an upgrade with every request is served each time on the one connection."""
    asked = HEAD + UPGRADES["h2c"] + FRAMED["length"]
    said, app = exchange(*[asked] * 5, LAST)
    assert app.bodies == [INNER] * 5 + [b""]
    assert said.count(b"HTTP/1.1 200") == 6


def test_trailers_are_dropped() -> None:
    """A trailer field replaces no header of its request and becomes no header of the next one."""
    sent = (
        HEAD + b"X-Model: right\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n.\r\n0\r\nX-Model: wrong\r\nX-More: 1\r\n\r\n"
    )
    _, app = exchange(sent + LAST)
    assert app.headers[0][b"x-model"] == b"right"
    assert all(b"x-more" not in headers for headers in app.headers)
    assert b"x-model" not in app.headers[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "part"),
    [
        (b"1\r\n.\r\n0\r\n", b"a:b\r\n" * 1000),
        (b"1\r\n.\r\n0\r\na:", b"b" * 5000),
        (b"1;a=", b"b" * 5000),
    ],
    ids=["many trailers", "one trailer", "chunk extension"],
)
def test_what_is_no_body_is_bounded(start: bytes, part: bytes) -> None:
    """Trailers and chunk extensions that never end get the connection closed long before they are 64 MB."""

    async def act(client: RawClient) -> None:
        assert await client.flood(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + start, part) < HELD

    serve_app(EchoApp(), act)


def test_small_chunks_are_no_framing() -> None:
    """A large body in chunks of one byte each, each read apart, is longer than a head may be and is served."""
    chunks = MAX_HEAD // 5 + 1
    said, app = exchange(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\n.\r\n" * 100] * (chunks // 100 + 1), b"0\r\n\r\n", LAST
    )
    assert said.count(b"HTTP/1.1 200") == 2
    assert len(app.bodies[0]) >= chunks


REFUSED = {
    "no host": (b"GET / HTTP/1.1\r\n\r\n", b"Host is missing"),
    "two hosts": (HEAD + b"Host: y\r\n\r\n", b"host must be sent once"),
    "odd host": (b"GET / HTTP/1.1\r\nHost: [\r\n\r\n", b"host name or address"),
    "two targets": (
        HEAD + b"X-Amzn-SageMaker-Target-Model: a\r\nX-Amzn-Sagemaker-Target-Model: b\r\n\r\n",
        b"x-amzn-sagemaker-target-model must be sent once",
    ),
    "coded": (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", b"must be chunked alone"),
    "coded twice": (HEAD + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"chunked alone"),
    "coded in 1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"needs HTTP/1.1"),
    "length and coding": (
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"can't be present",
    ),
    "two lengths": (HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", b"Duplicate Content-Length"),
    "Latin-1 name": (HEAD + b"X-\xe9: 1\r\n\r\n", b"UTF-8"),
    "Latin-1 path": (b"GET /\xe9 HTTP/1.1\r\nHost: x\r\n\r\n", b"UTF-8"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_read_in_two_ways_is_refused(case: str) -> None:
    """400 with a reason, the connection closed, and neither that request nor what follows it reaches the app."""
    sent, reason = REFUSED[case]
    said, app = exchange(sent + LAST)
    assert said.startswith(b"HTTP/1.1 400 ")
    assert said.count(b"HTTP/1.1 4") == 1
    assert b"HTTP/1.1 2" not in said
    assert b"connection: close" in said.lower()
    assert reason in said
    assert app.bodies == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "bad", [b"RUBBISH\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"y" * 2 * MAX_HEAD]
)
def test_requests_before_a_faulty_one_are_answered_first(bad: bytes) -> None:
    """A pipelined request keeps its answer; what is refused behind it comes after it or only closes the connection."""
    said, app = exchange(b"GET /first HTTP/1.1\r\nHost: x\r\n\r\n" + bad, keep_alive_s=1)
    assert said.startswith(b"HTTP/1.1 200 ")
    assert b"GET /first 0;" in said
    assert app.bodies == [b""]


def test_pipelined_requests_are_bounded() -> None:
    """Of 2,000 requests in one write the first few are answered, then the connection is closed: no more are held."""
    said, app = exchange(b"GET /p HTTP/1.1\r\nHost: x\r\n\r\n" * 2000)
    assert said.count(b"GET /p 0;") == len(app.bodies) == MAX_PIPELINED + 1


def test_http_1_0_needs_no_host() -> None:
    """Load balancers' health checks in HTTP/1.0 are answered."""
    said, _ = exchange(b"GET /ping HTTP/1.0\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 200 ")


@pytest.mark.slow
def test_an_idle_connection_stays_as_long_as_the_setting_says() -> None:
    """Uvicorn gets the seconds of the setting, and closes the idle connection after them."""

    async def act(client: RawClient) -> None:
        await client.ask(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b";")
        assert await client.exchange() == b""

    serve_app(EchoApp(), act, keep_alive_s=1)
    assert make_listener(EchoApp(), 1.0, 5.0, 75).config.timeout_keep_alive == 75


@pytest.mark.slow
def test_a_connection_is_served_by_one_task_that_ends_with_it() -> None:
    """Requests one after the other, and some behind one another; between them nothing of a request is held."""
    tasks, held = list[Any](), weakref.WeakSet[Any]()

    async def answer_request(scope: Message, receive: Any, send: Any) -> None:
        tasks.append(asyncio.current_task())
        held.add(receive.__self__)
        await receive()
        await asyncio.sleep(0)
        headers = [(b"content-length", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers, BODY_FOLLOWS: True})
        await send({"type": "http.response.body", "body": b"!" if scope["path"] == "/" else b"?"})

    async def act(client: RawClient) -> None:
        for _ in range(3):
            await client.ask(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}", b"!")
        assert len(set(tasks)) == 1
        pipelined = b"GET /more HTTP/1.1\r\nhost: x\r\n\r\n" * 5
        await client.ask(pipelined + b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"!")
        assert len(tasks) == 9
        await let_loop_run(lambda: sum(not task.done() for task in set(tasks)) == 1)
        gc.collect()
        assert len(held) == 1  # the last one, which the connection knows
        end = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
        assert (await client.exchange(end)).endswith(b"!")
        await let_loop_run(lambda: all(task.done() for task in tasks))

    serve_app(answer_request, act)


def test_a_client_that_leaves_ends_the_task_that_waits_for_its_next_request() -> None:
    """Also where it has just been answered, or leaves while its request runs."""
    tasks, loose = list[Any](), asyncio.Event()

    async def answer_request(scope: Message, receive: Any, send: Any) -> None:
        tasks.append(asyncio.current_task())
        if scope["path"] == "/slow":
            await loose.wait()
        headers = [(b"content-length", b"1")]
        await send({"type": "http.response.start", "status": 200, "headers": headers, BODY_FOLLOWS: True})
        await send({"type": "http.response.body", "body": b"!"})

    async def scenario(path: bytes) -> None:
        place = socket.create_server(("127.0.0.1", 0))
        server = make_listener(answer_request, 1.0, 5.0, 5)
        serving = asyncio.create_task(server.serve(sockets=[place]))
        reader, writer = await asyncio.open_connection(*place.getsockname())
        writer.write(b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n" % path)
        if path == b"/":
            await reader.readuntil(b"!")
        await let_loop_run(lambda: bool(tasks))
        writer.close()
        await let_loop_run(lambda: not server.server_state.connections)
        loose.set()
        await let_loop_run(lambda: all(task.done() for task in tasks))
        assert not server.server_state.tasks
        server.should_exit = True
        await serving

    for path in (b"/", b"/slow"):
        tasks.clear()
        loose.clear()
        uvloop.run(scenario(path))


def test_uvicorn_still_has_what_the_listener_uses() -> None:
    """Inner attributes of uvicorn (bounded from above in pyproject.toml) that our connections read and set.

    A version without one of them fails here, by name, before it serves.
    """

    async def scenario() -> None:
        config = uvicorn.Config(EchoApp(), loop="none", http=HttpToolsProtocol, lifespan="off")
        config.load()
        assert config.ssl is None, "set by Listener.startup"
        protocol = HttpToolsProtocol(config, uvicorn.server.ServerState(), {}, asyncio.get_running_loop())
        for name in (
            "app",
            "cycle",
            "flow",
            "parser",
            "pipeline",
            "headers",
            "logger",
            "access_logger",
            "timeout_keep_alive_task",
        ):
            assert hasattr(protocol, name) or name in HttpToolsProtocol.__annotations__, name
        assert callable(protocol._unset_keepalive_if_required)
        assert callable(protocol._start_asgi_task)
        ours = ("response_complete", "response_started", "more_body", "keep_alive", "expected_content_length")
        for name in (*ours, "chunked_encoding", "waiting_for_100_continue", "disconnected"):
            assert name in inspect.getsource(RequestResponseCycle.__init__), name
        theirs = set(re.findall(r"self\.(\w+)", inspect.getsource(RequestResponseCycle.__init__)))
        set_here = set(re.findall(r"self\.(\w+)", inspect.getsource(Exchange.__init__)))
        assert theirs <= set_here | set(vars(Exchange)), "an exchange has all that uvicorn's initialiser sets"
        assert {"asgi", "server", "client", "scheme", "root_path"} <= set(
            re.findall(r'"(\w+)":', inspect.getsource(HttpToolsProtocol.on_message_begin))
        )
        assert inspect.signature(uvicorn.Server.startup).parameters.keys() == {"self", "sockets"}
        assert "ssl=config.ssl" in inspect.getsource(uvicorn.Server.startup)
        assert isinstance(uvicorn.server.ServerState().connections, set)
        assert isinstance(uvicorn.server.ServerState().tasks, set)
        assert inspect.signature(uvicorn.Server.shutdown).parameters.keys() == {"self", "sockets"}
        for name in ("self.servers", "self.lifespan.state", "server_state=self.server_state"):
            assert name in inspect.getsource(uvicorn.Server.startup), name

    asyncio.run(scenario())


# --- bytes that are written -------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(st.integers(0, 70_000), min_size=1, max_size=6),
    version=st.sampled_from([b"1.0", b"1.1"]),
    method=st.sampled_from([b"GET", b"HEAD"]),
    follows=st.booleans(),
)
def test_no_byte_is_lost_or_out_of_order(parts: list[int], version: bytes, method: bytes, follows: bool) -> None:
    """In however many parts an application sends its answer, the client gets what uvicorn alone would send."""
    whole = [bytes([65 + i]) * size for i, size in enumerate(parts)]

    async def answer_request(scope: Message, receive: Any, send: Any) -> None:
        del scope
        await receive()
        headers = [(b"content-length", b"%d" % sum(parts)), (b"x-kept", b"a")]
        start: Message = {"type": "http.response.start", "status": 200, "headers": headers}
        await send({**start, BODY_FOLLOWS: True} if follows else start)
        for i, part in enumerate(whole):
            await send({"type": "http.response.body", "body": part, "more_body": i < len(whole) - 1})

    async def act(client: RawClient) -> None:
        request = b"%b / HTTP/%b\r\nHost: x\r\nConnection: close\r\n\r\n" % (method, version)
        head, _, body = (await client.exchange(request)).partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        assert lines[0] == b"http/1.1 200 ok"
        assert lines[1].startswith(b"date: ")
        assert lines[2:] == [b"content-length: %d" % sum(parts), b"x-kept: a", b"connection: close"]
        assert body == (b"" if method == b"HEAD" else b"".join(whole))

    serve_app(answer_request, act)


@pytest.mark.parametrize("fault", ["short", "long", "control"])
def test_a_faulty_answer_ends_the_connection(fault: str) -> None:
    """A body of another size than its head says, or a header that would be two, reaches no client as a whole answer."""
    size, value = {"short": (3, b"a"), "long": (1, b"a"), "control": (2, b"a\r\nx-forged: b")}[fault]

    async def answer_request(scope: Message, receive: Any, send: Any) -> None:
        del scope, receive
        headers = [(b"content-length", b"%d" % size), (b"x-kept", value)]
        await send({"type": "http.response.start", "status": 200, "headers": headers, BODY_FOLLOWS: True})
        await send({"type": "http.response.body", "body": b"ab"})

    async def act(client: RawClient) -> None:
        answer = await client.exchange(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b"x-forged" not in answer
        assert answer == b"" if fault != "control" else answer.startswith(b"HTTP/1.1 500 ")

    serve_app(answer_request, act)


@pytest.mark.slow
@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_whole_answer_is_one_message(method: bytes, version: bytes) -> None:
    """An application that has all of the body sends it with the head, where the scope says that it may."""

    async def answer_request(scope: Message, receive: Any, send: Any) -> None:
        del receive
        assert WHOLE_BODY in scope["extensions"]
        assert scope[HEADERS_BY_NAME][b"x-asked"] == b"b", "of a repeated header the last"
        headers = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers, WHOLE_BODY: b"ab"})

    async def act(client: RawClient) -> None:
        request = b"%b / HTTP/%b\r\nHost: x\r\nX-Asked: a\r\nX-Asked: b\r\nConnection: close\r\n\r\n"
        head, _, body = (await client.exchange(request % (method, version))).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"content-length: 2" in head
        assert body == (b"" if method == b"HEAD" else b"ab")

    serve_app(answer_request, act)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(pieces=st.lists(st.integers(1, 70_000), max_size=5))
def test_a_body_comes_as_it_was_sent_in_any_pieces(pieces: list[int]) -> None:
    """One piece is handed on without a copy, several are put together; what was read is not there twice."""
    sent = b"".join(bytes([65 + i]) * size for i, size in enumerate(pieces))

    async def act(client: RawClient) -> None:
        head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(sent)
        answer = await client.exchange(head, *(sent[sum(pieces[:i]) :][:size] for i, size in enumerate(pieces)))
        assert answer.endswith(b"\r\n\r\n" + sent)

    async def send_back(scope: Message, receive: Any, send: Any) -> None:
        del scope
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers, WHOLE_BODY: body})

    serve_app(send_back, act)


@pytest.mark.parametrize("target", [b"/a%20b?c=d", b"/a%20b?c=" + b"d" * LONGEST_KNOWN])
def test_targets_are_split_alike_whether_known_or_not(target: bytes) -> None:
    """A target that was seen before, and one that is too long to be remembered, say the same of themselves."""
    found = []

    async def answer_request(scope: Message, receive: Any, send: Any) -> None:
        del receive
        found.append((scope["path"], scope["raw_path"], scope["query_string"]))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def act(client: RawClient) -> None:
        again = b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % target
        await client.exchange(again + again.replace(b"Host", b"Connection: close\r\nHost"))

    serve_app(answer_request, act)
    raw_path, _, query = target.partition(b"?")
    assert found == [("/a b", raw_path, query)] * 2


def test_an_event_of_a_body_is_made_when_it_is_waited_for() -> None:
    """Set, cleared and waited for in any order, it does what an `asyncio.Event` does."""

    async def scenario() -> None:
        event = BodyEvent()
        event.set()
        await event.wait()
        event.clear()
        waiting = asyncio.create_task(event.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        event.set()
        await waiting
        event.clear()
        waiting = asyncio.create_task(event.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()

    asyncio.run(scenario())
