"""Heads that were read before: which are kept, and that a request says the same whether its head is known or not."""

import asyncio
import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from server import http_connection
from server.known_heads import KEPT_FIELDS, LONGEST_BODY, LONGEST_HEAD, MOST_HEADS, ONE_OF, KnownHead, KnownHeads
from server.request_head import HEADERS_BY_NAME
from tests.server.test_http_listener import RawClient, let_loop_run, serve_app

Fields = Sequence[tuple[bytes, bytes]]

LAST = b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def make_scope(fields: Fields) -> dict[str, Any]:
    """What a listener has read of a head."""
    return {"path": "/", "headers": fields, HEADERS_BY_NAME: dict(fields)}


def make_request(body: bytes, *more: tuple[bytes, bytes], line: bytes = b"POST / HTTP/1.1") -> tuple[bytes, Fields]:
    """A request as it is sent, and its fields."""
    fields = [(b"host", b"x"), (b"content-length", b"%d" % len(body)), *more]
    return line + b"\r\n" + b"".join(b"%b: %b\r\n" % each for each in fields) + b"\r\n" + body, fields


def is_kept(data: bytes, fields: Fields) -> bool:
    """Whether the head of this request is known after it was read."""
    heads = KnownHeads()
    heads.remember(data, make_scope(fields))
    return heads.recall(data) is not None


def test_a_head_is_recalled_with_all_of_its_body_and_nothing_else() -> None:
    """Other bodies of the same size have the same head; what is shorter or longer is the parser's to read."""
    heads = KnownHeads()
    data, fields = make_request(b"abc")
    assert heads.recall(data) is None
    heads.remember(data, scope := make_scope(fields))
    for body in (b"abc", b"\r\n\r"):
        found = heads.recall(data[:-3] + body)
        assert found is not None
        assert (found[0].scope, found[1]) == (scope, body)
    for other in (
        data[:-1],
        data + b"d",
        data + data,
        data[:-3],
        data[3:],
        b"",
        b"\r\n" + data,
        data.replace(b"x", b"y"),
    ):
        assert heads.recall(other) is None


def test_heads_that_are_not_kept() -> None:
    """Long ones, those with other fields than most have, of which some are credentials, and repeated ones."""
    assert is_kept(*make_request(b"abc", (b"accept", b"a")))
    assert is_kept(*make_request(b""))
    for name in (b"authorization", b"cookie", b"x-amz-security-token", b"x-request-id", b"expect", b"upgrade"):
        assert not is_kept(*make_request(b"abc", (name, b"a")))
    assert not is_kept(*make_request(b"abc", (b"accept", b"a"), (b"accept", b"b")))
    assert not is_kept(*make_request(b"abc", (b"accept", b"a" * LONGEST_HEAD)))
    assert is_kept(*make_request(b"a" * LONGEST_BODY))
    assert not is_kept(*make_request(b"a" * (LONGEST_BODY + 1)))
    assert LONGEST_BODY <= HIGH_WATER_LIMIT
    assert not {b"authorization", b"transfer-encoding", b"expect", b"upgrade"} & KEPT_FIELDS


def test_what_is_not_one_whole_request_is_not_kept() -> None:
    """The first empty line has to be that of the head, and the rest its body."""
    data, fields = make_request(b"abc")
    for other in (data + b"d", data[:-1], b"\r\n\r\n" + data, data + data):
        assert not is_kept(other, fields)
    assert not is_kept(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", [(b"host", b"x")])


def test_the_oldest_head_makes_place() -> None:
    """Clients can make up any number of heads."""
    heads = KnownHeads()
    requests = [make_request(b"abc", line=b"POST /%d HTTP/1.1" % i) for i in range(MOST_HEADS + 2 * ONE_OF)]
    for data, fields in requests:
        heads.remember(data, make_scope(fields))
    assert len(heads) == MOST_HEADS
    known = [heads.recall(data) is not None for data, _ in requests]
    assert known == [False] * 2 + [True] * (MOST_HEADS - 2) + ([False] * (ONE_OF - 1) + [True]) * 2


def test_of_more_heads_in_turn_than_have_place_many_are_known() -> None:
    """The models of a fleet are asked one after the other, again and again."""
    heads = KnownHeads()
    requests = [make_request(b"abc", line=b"POST /%d HTTP/1.1" % i) for i in range(2 * MOST_HEADS)]
    found = 0
    for _ in range(3):
        found = 0
        for data, fields in requests:
            if heads.recall(data) is None:
                heads.remember(data, make_scope(fields))
            else:
                found += 1
    assert found > MOST_HEADS / 2


# --- in a listener ----------------------------------------------------------------------------------------------------


class ScopeApp:
    """An application that keeps what it was told of each request, and answers with the body and a `;`."""

    def __init__(self) -> None:
        self.told: list[tuple[dict[str, Any], bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.told.append(({name: value for name, value in scope.items() if name != "client"}, body))
        headers = [(b"content-length", b"%d" % (len(body) + 1))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body + b";"})


class CountedHeads(KnownHeads):
    """Counts the requests whose head was known. `forgets`: none is."""

    def __init__(self, *, forgets: bool = False) -> None:
        super().__init__()
        self.recalled, self._forgets = 0, forgets

    def recall(self, data: bytes) -> tuple[KnownHead, bytes] | None:
        """See KnownHeads."""
        found = None if self._forgets else super().recall(data)
        self.recalled += found is not None
        return found


def send_requests(heads: KnownHeads, asked: Sequence[bytes], pieces: Sequence[bytes] = ()) -> tuple[bytes, ScopeApp]:
    """What a client gets on one connection, and what the application was told.

    It sends `asked` one by one, each when the one before is answered, then `pieces` as they are, then `LAST`.
    """
    app, said = ScopeApp(), list[bytes]()

    async def act(client: RawClient) -> None:
        for each in asked:
            said.append(await client.ask(each, b";"))
        said.append(await client.exchange(*pieces, LAST))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_connection, "KNOWN_HEADS", heads)
        serve_app(app, act, keep_alive_s=60)
    return re.sub(rb"date: [^\r]+", b"", b"".join(said)), app


@pytest.mark.parametrize("body", [b"", b"abc", b"\r\n\r\n"])
def test_a_request_says_the_same_when_its_head_is_known(body: bytes) -> None:
    """On the same connection and on another: the application is told the same, and what it reads is the new body."""
    head = b"POST /a%%20b?c=d HTTP/1.1\r\nHost: x\r\nContent-Type: a/b\r\nContent-Length: %d\r\n\r\n" % len(body)
    heads, scopes = CountedHeads(), list[dict[str, Any]]()
    for recalled in (2, 5):
        said, app = send_requests(heads, [head + body, head + body[::-1], head + body])
        assert (len(heads), heads.recalled) == (1, recalled)
        assert [each for _, each in app.told] == [body, body[::-1], body, b""]
        assert said.count(b"HTTP/1.1 200 OK\r\n") == 4
        scopes += [{**scope, "server": None} for scope, _ in app.told[:-1]]
    assert scopes == scopes[:1] * 6
    assert scopes[0]["path"] == "/a b"
    assert scopes[0][HEADERS_BY_NAME][b"content-type"] == b"a/b"


def test_a_known_head_in_pieces_or_with_others_is_read_as_ever() -> None:
    """Only a request that comes alone and whole is not given to the parser, which then stands where it stood."""
    one, heads = make_request(b"abc")[0], CountedHeads()
    said, app = send_requests(heads, [one, one], [one[:5], one[5:] + one + one, one + one[:7], one[7:]])
    assert heads.recalled == 1
    assert [body for _, body in app.told] == [b"abc"] * 7 + [b""]
    assert said.count(b"HTTP/1.1 200") == 8


def test_a_known_head_behind_a_request_that_is_not_answered_waits() -> None:
    """Answers come in the order of requests."""
    going, order = asyncio.Event(), list[bytes]()

    async def answer_request(scope: Any, receive: Any, send: Any) -> None:
        del scope
        body = (await receive())["body"]
        order.append(body)
        if body == b"slo":
            await going.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": body + b";"})

    async def act(client: RawClient) -> None:
        one = make_request(b"abc")[0]
        await client.ask(one, b";")
        await client.send(one[:-3] + b"slo")
        await let_loop_run(lambda: order == [b"abc", b"slo"])
        await client.send(one)
        await asyncio.sleep(0.01)  # a request that began now would be in `order` too early
        assert order == [b"abc", b"slo"]
        going.set()
        assert (await client.ask(b"", b";")).endswith(b"slo;")
        assert (await client.ask(b"", b";")).endswith(b"abc;")

    serve_app(answer_request, act)


def test_bytes_of_a_known_head_within_another_request_are_its_own() -> None:
    """In the middle of a head they are fields of it, and behind it they are its body, answered already or not."""
    one, heads = make_request(b"abc")[0], CountedHeads()
    begun = b"POST / HTTP/1.1\r\nX-More: "
    framed = b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(one)
    said, app = send_requests(heads, [one, one, one + begun], [one, framed, one, begun, one])
    assert [body for _, body in app.told] == [b"abc"] * 4 + [one, b"abc", b""]
    found = [scope[HEADERS_BY_NAME].get(b"x-more") for scope, _ in app.told[3:6]]
    assert found == [b"POST / HTTP/1.1", None, b"POST / HTTP/1.1"]
    assert (heads.recalled, said.count(b"HTTP/1.1 200")) == (1, 7)


def test_a_body_that_nobody_reads_is_no_request() -> None:
    """The answer is complete before the body comes, which looks like a request whose head is known."""
    one, begun = make_request(b"abc")[0], list[bytes]()

    async def answer_request(scope: Any, receive: Any, send: Any) -> None:
        del receive
        begun.append(scope["raw_path"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        await send({"type": "http.response.body", "body": b";"})

    async def act(client: RawClient) -> None:
        await client.ask(one, b";")
        await client.ask(b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(one), b";")
        await client.send(one)
        await client.exchange(LAST)
        assert begun == [b"/", b"/early", b"/last"]

    serve_app(answer_request, act)


def test_a_head_is_not_kept_as_that_of_another() -> None:
    """A head whose Content-Length is the size of itself, behind one without a body, would be known by the other's."""
    heads = CountedHeads()
    second = b"POST /b HTTP/1.1\r\nHost: x\r\nContent-Length: %03d\r\n\r\n"
    first, second = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n", second % len(second % 0)
    _, app = send_requests(heads, [], [first + second, second])
    assert [(scope["path"], body) for scope, body in app.told] == [("/a", b""), ("/b", second), ("/last", b"")]
    assert len(heads) == 0


@pytest.mark.parametrize(
    ("field", "version", "status"),
    [(b"Connection: close", b"1.1", 200), (b"Host: [", b"1.1", 400), (b"Accept: a", b"1.0", 200)],
)
def test_heads_that_end_their_connection_are_not_kept(field: bytes, version: bytes, status: int) -> None:
    """The client says that it sends no more, or what it has sent is refused."""
    heads, host = CountedHeads(), b"" if field.startswith(b"Host") else b"Host: x\r\n"
    asked = b"POST / HTTP/%b\r\n%b%b\r\nContent-Length: 1\r\n\r\na" % (version, host, field)

    async def act(client: RawClient) -> None:
        assert (await client.exchange(asked)).startswith(b"HTTP/1.1 %d " % status)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_connection, "KNOWN_HEADS", heads)
        serve_app(ScopeApp(), act, keep_alive_s=60)
    assert len(heads) == 0


HEADS = (
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b",
    b"POST / HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\nContent-Length: %d\r\n\r\n%b",
    b"PUT /a HTTP/1.1\r\nhost: x\r\nX-Request-Id: 1\r\nContent-Length: %d\r\n\r\n%b",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n%b",
    b"POST / HTTP/1.1\r\nHost: x\r\nAccept: a\r\nAccept: b\r\nContent-Length: %d\r\n\r\n%b",
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(st.tuples(st.sampled_from(HEADS), st.sampled_from([b"a", b"bc", b"d" * 3000])), max_size=8),
    cuts=st.lists(st.integers(1, 4000), max_size=3),
)
def test_known_heads_change_nothing(asked: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    """However requests follow each other and are cut, clients get and applications are told what a parser reads."""
    requests = [head % (len(body), body) for head, body in asked]
    whole, places = b"".join(requests), sorted({0, *accumulate(cuts)})
    pieces = [whole[start:end] for start, end in zip(places, [*places[1:], len(whole)], strict=True)]
    known, parsed = (send_requests(CountedHeads(forgets=forgets), requests * 2, pieces) for forgets in (False, True))
    assert known[0] == parsed[0]
    assert [_without_port(each) for each in known[1].told] == [_without_port(each) for each in parsed[1].told]


def _without_port(told: tuple[dict[str, Any], bytes]) -> tuple[dict[str, Any], bytes]:
    return {**told[0], "server": None}, told[1]
