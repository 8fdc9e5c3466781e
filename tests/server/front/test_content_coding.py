"""Compressed bodies: served as if they had come as they are, unpacked under the same limit, others refused by name."""

import asyncio
import datetime as dt
import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
import zstandard
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import Refused
from server.front.app import App
from server.front.content_coding import PACKED_HERE, PIECE_BYTES, choose_coding, find_coding, pack, unpack
from server.metrics import FrontMetrics
from server.settings import Settings
from tests.server.front.answering import Answered, Worker, ask, attach

LIMIT = 1 << 20
TARGET = {"X-Amzn-SageMaker-Target-Model": "m.mar"}


def bare_deflate(data: bytes) -> bytes:
    """A deflate stream without zlib's header, as some clients send it."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


PACK: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("X-GZip", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "bare deflate": ("deflate", bare_deflate),
    "zstd": ("zstd", zstandard.compress),
}


def ask_echo(body: bytes, coding: str, **chosen: object) -> tuple[Answered, Worker, App]:
    """One request in this coding, to an echo behind the app."""
    app = App(Settings.model_validate({"store": "s", "max_body_bytes": LIMIT, **chosen}), FrontMetrics())
    worker = Worker(lambda request: request.body)
    attach(app.plane, worker)
    headers = {**TARGET, "Content-Encoding": coding, "Content-Length": str(len(body))}
    return asyncio.run(ask(app, "POST", "/invocations", body, headers)), worker, app


@pytest.mark.slow
@pytest.mark.parametrize("kind", PACK)
@settings(max_examples=20)
@given(data=st.one_of(st.binary(max_size=200), st.integers(0, 3 * PIECE_BYTES).map(bytes)))
def test_a_packed_body_is_the_body(kind: str, data: bytes) -> None:
    """Whatever the bytes, the worker gets what was packed."""
    coding, pack = PACK[kind]
    reply, worker, app = ask_echo(pack(data), coding)
    assert reply.status == 200
    assert worker.asked[0].body == data
    assert app.plane.held.size == 0


@pytest.mark.parametrize("coding", ["", "identity", " Identity "])
def test_no_coding_is_no_coding(coding: str) -> None:
    """A body that says it is sent as it is, is."""
    assert ask_echo(b"plain", coding)[1].asked[0].body == b"plain"


@pytest.mark.parametrize("kind", ["gzip", "deflate", "zstd"])
def test_the_body_limit_is_that_of_what_comes_out(kind: str) -> None:
    """At `max_body_bytes` it is served, one byte more is 413 and never reaches a worker."""
    coding, pack = PACK[kind]
    assert ask_echo(pack(bytes(LIMIT)), coding)[0].status == 200
    reply, worker, app = ask_echo(pack(bytes(LIMIT + 1)), coding)
    assert (reply.status, worker.asked, app.plane.held.size) == (413, [], 0)
    assert "max_body_bytes" in json.loads(reply.body)["message"]


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_bomb_is_unpacked_no_further_than_the_limit(kind: str) -> None:
    """32 MB of zeros in 32 KB, or in 1 KB, take a few MB: pieces are counted while they come."""
    bomb = PACK[kind][1](bytes(32 << 20))
    tracemalloc.start()
    try:
        reply = ask_echo(bomb, kind)[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert reply.status == 413
    assert peak < 8 * LIMIT


def test_what_comes_out_is_held_in_flight() -> None:
    """Unpacking stops with 503 where the front would hold more than `max_inflight_bytes`."""
    reply, worker, app = ask_echo(gzip.compress(bytes(LIMIT)), "gzip", max_inflight_bytes=LIMIT // 2)
    assert (reply.status, worker.asked, app.plane.held.size) == (503, [], 0)


@pytest.mark.parametrize("coding", ["br", "lz4", "gzip, gzip", "compress", "\xe9"])
def test_other_codings_are_415_by_name(coding: str) -> None:
    """The message names what was sent and what is served."""
    with pytest.raises(Refused) as refused:
        find_coding({b"content-encoding": coding.encode("latin-1")})
    message = str(refused.value)
    assert repr(coding) in message
    assert "gzip or deflate or zstd" in message
    if coding.isascii():
        assert ask_echo(b"{}", coding)[0].status == 415


PACKED = gzip.compress(b'{"x": [1, 2, 3]}')
BROKEN = {
    "empty": b"",
    "not gzip": b'{"x": [1]}',
    "cut off": PACKED[:-9],
    "no checksum": PACKED[:-8],
    "wrong checksum": PACKED[:-8] + bytes(8),
    "bytes behind": PACKED + b"{}",
    "two members": PACKED + PACKED,
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_body_is_400(case: str) -> None:
    """It says what is wrong with the packed body, and holds nothing."""
    reply, worker, app = ask_echo(BROKEN[case], "gzip")
    assert (reply.status, worker.asked, app.plane.held.size) == (400, [], 0)
    assert "gzip" in json.loads(reply.body)["message"]


ZSTD_PACKED = zstandard.compress(b'{"x": [1, 2, 3]}')
WIDE = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=25)).compressobj()
BROKEN_ZSTD = {
    "empty": b"",
    "not zstd": b'{"x": [1]}',
    "cut off": ZSTD_PACKED[:-3],
    "bytes behind": ZSTD_PACKED + b"{}",
    "two frames": ZSTD_PACKED + ZSTD_PACKED,
    "a wide window": WIDE.compress(b"1" * 1000) + WIDE.flush(),
}


@pytest.mark.parametrize("case", BROKEN_ZSTD)
def test_a_broken_zstd_body_is_400(case: str) -> None:
    """As with gzip; so is a frame whose window would take 32 MiB before anything is unpacked."""
    reply, worker, app = ask_echo(BROKEN_ZSTD[case], "zstd")
    assert (reply.status, worker.asked, app.plane.held.size) == (400, [], 0)
    assert "zstd" in json.loads(reply.body)["message"]


@pytest.mark.parametrize("coding", ["deflate", "zstd"])
@given(data=st.binary(max_size=300))
def test_any_bytes_are_unpacked_or_refused(coding: str, data: bytes) -> None:
    """Nothing but Refused is raised, and unpacking ends."""

    async def all_pieces() -> None:
        next_piece = unpack(data, coding)
        while (await next_piece())["more_body"]:
            pass

    try:
        asyncio.run(all_pieces())
    except Refused:
        pass


def test_a_signature_is_of_the_bytes_that_were_sent() -> None:
    """A signed request is checked before its body is unpacked."""
    app = App(Settings.model_validate({"store": "s", "access_keys": {"key": "secret"}}), FrontMetrics())
    worker = Worker(lambda request: request.body)
    attach(app.plane, worker)
    signed = AWSRequest("POST", "http://host/invocations", headers={**TARGET, "Content-Encoding": "gzip"}, data=PACKED)
    signed.context["timestamp"] = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%SZ")
    SigV4Auth(Credentials("key", "secret"), "sagemaker", "us-east-1").add_auth(signed)
    headers = {**dict(signed.headers.items()), "Host": "host"}
    assert asyncio.run(ask(app, "POST", "/invocations", PACKED, headers)).status == 200
    assert asyncio.run(ask(app, "POST", "/invocations", gzip.decompress(PACKED), headers)).status == 403
    assert [request.body for request in worker.asked] == [gzip.decompress(PACKED)]


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("br, X-GZip", "gzip"),
        ("gzip;q=0.1, deflate;q=0.5", "deflate"),
        ("gzip;q=0", ""),
        ("gzip; q=x", ""),
        ("identity", ""),
        ("*", ""),
        ("", ""),
        ("," * 2000 + "gzip", ""),
    ],
)
def test_the_coding_of_an_answer_is_the_clients_choice(accepted: str, coding: str) -> None:
    """The one with the highest weight that is served; none where none is named."""
    assert choose_coding({b"accept-encoding": accepted.encode()}) == coding


@pytest.mark.parametrize("size", [0, 100, PACKED_HERE + 1])
def test_answers_are_packed_as_any_client_unpacks_them(size: int) -> None:
    """Short ones at once, long ones in a thread."""
    body = b"0.25," * (size // 5)
    for coding, unpacker in (("gzip", gzip.decompress), ("deflate", zlib.decompress)):
        assert unpacker(asyncio.run(pack(body, coding))) == body
