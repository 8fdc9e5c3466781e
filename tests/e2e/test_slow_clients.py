"""Slow clients are disconnected after `client_timeout_s`, hold little memory, and do not delay others."""

import asyncio
import socket
import time
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.e2e.conftest import Serve
from tests.e2e.models import Model, Question, pack_fleet, pack_forecaster
from tests.e2e.server import Server, never_reading, open_files, peak_memory, run_server, upload
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

EACH = 50
KEPT_OPEN = 5  #: connections of earlier requests that may end while the slow ones are counted
CUT_OFF_S = 6.0  #: `client_timeout_s`, long enough for `EACH` clients to be connected at the same time
LARGE = {"features": 1, "context_length": 4, "prediction_length": 10_000, "quantiles": 20, "hidden": 2}
LARGE_BYTES = 2_000_000  #: about, of its answer
PART = 64 * 1024
FRONT_GROWTH = 48 << 20  #: 50 such answers are 75 MB or more, 50 windows and socket buffers a fraction
MEANWHILE = 10  #: requests of another client that must be answered while all the slow ones are there


@pytest.fixture(scope="module")
def impatient(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Model]]:
    """A server that bears slow clients for `CUT_OFF_S`, and its model."""
    (model,) = pack_fleet("normal", 1)
    bucket = s3.bucket()
    upload(s3, bucket, [model])
    folder = tmp_path_factory.mktemp("impatient")
    with run_server(s3, folder, f"s3://{bucket}", client_timeout_s=CUT_OFF_S) as server:
        yield server, model


@pytest.mark.parametrize("kind", ["body", "headers", "silent"])
def test_who_never_finishes_a_request_is_cut_off(impatient: tuple[Server, Model], kind: str) -> None:
    """50 clients that send their body, or their headers, a byte at a time, or nothing at all: others are answered
    meanwhile, and all 50 are cut off once their time is over, not before.
    """
    server, model = impatient
    start = {
        "body": b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n",
        "headers": b"POST /invocations HTTP/1.1\r\nX-Slow: ",
        "silent": b"",
    }[kind]
    server.ask(model.question(0))
    asyncio.run(_ask_among(server, model.question(1), _dawdle(server, start, trickle=kind != "silent")))


async def _ask_among(server: Server, question: Question, dawdling: Coroutine[Any, Any, list[float]]) -> None:
    """Normal requests while others dawdle; both are judged."""
    (front,) = server.processes("front")
    crowded = open_files(front["pid"]) + EACH - KEPT_OPEN
    slow = asyncio.create_task(dawdling)
    assert await asyncio.to_thread(_answers_meanwhile, server, question, front["pid"], crowded) >= MEANWHILE
    for held in await slow:
        assert held > CUT_OFF_S * 0.9


def _answers_meanwhile(server: Server, question: Question, pid: int, crowded: int) -> int:
    """How many requests in turn are answered while the process has so many files open, once it has."""
    wait_until(lambda: open_files(pid) >= crowded, f"all {EACH} are connected")
    answered = 0
    while open_files(pid) >= crowded:
        server.ask(question)
        answered += 1
    return answered


async def _dawdle(server: Server, start: bytes, *, trickle: bool) -> list[float]:
    """Until they are cut off: how long each of 50 clients was borne."""

    async def run_client() -> float:
        began = time.monotonic()
        reader, writer = await asyncio.open_connection(*server.address)
        writer.write(start)
        reading = asyncio.create_task(_until_closed(reader))
        while not reading.done():
            if trickle:
                writer.write(b"x")
            await asyncio.wait({reading}, timeout=0.05)
        writer.close()
        return time.monotonic() - began

    return list(await asyncio.gather(*(run_client() for _ in range(EACH))))


async def _until_closed(reader: asyncio.StreamReader) -> None:
    try:
        while await reader.read(65536):
            pass
    except ConnectionError:
        pass


def test_who_never_reads_its_answer_is_cut_off(s3: S3Server, store: str, serve: Serve) -> None:
    """50 clients that ask for 2 MB four times (sockets buffer some MB) and read nothing: the front holds a fraction of
    that, others are answered meanwhile, and all 50 connections are gone once their time is over.
    """
    model, large = pack_fleet("normal", 1)[0], pack_forecaster("large.mar", 1, "mlp", LARGE)
    upload(s3, store, [model, large])
    with serve(client_timeout_s=CUT_OFF_S) as server, ExitStack() as stack:
        assert len(server.ask(large.question(0)).body) > 0.8 * LARGE_BYTES
        server.ask(model.question(0))
        (front,) = server.processes("front")
        files, memory = open_files(front["pid"]), peak_memory(front["pid"])
        for _ in range(EACH):
            stack.enter_context(never_reading(server, large.question(0), 4))
        assert _answers_meanwhile(server, model.question(1), front["pid"], files + EACH) >= MEANWHILE
        wait_until(lambda: open_files(front["pid"]) <= files + 1, "all 50 are cut off")
        assert peak_memory(front["pid"]) - memory < FRONT_GROWTH
        server.ask(large.question(1))


def test_who_pipelines_and_never_reads_is_cut_off(s3: S3Server, store: str, serve: Serve) -> None:
    """Answers that each fit into the socket's buffers, but are never read: the connection is gone as well."""
    config = {**LARGE, "prediction_length": 1000, "quantiles": 4}
    model = pack_forecaster("middle.mar", 1, "mlp", config)
    upload(s3, store, [model])
    with serve(client_timeout_s=CUT_OFF_S, keep_alive_s=2) as server, ExitStack() as stack:
        server.ask(model.question(0))
        (front,) = server.processes("front")
        files = open_files(front["pid"])
        for count in (1, 100):
            stack.enter_context(never_reading(server, model.question(0), count))
        wait_until(lambda: open_files(front["pid"]) >= files + 2, "both are connected")
        wait_until(lambda: open_files(front["pid"]) <= files, "both are cut off")


def test_a_client_that_reads_slowly_but_steadily_gets_it_all(s3: S3Server, store: str, serve: Serve) -> None:
    """Taking three answers of 2 MB lasts four times `client_timeout_s`, but never pauses: they arrive whole. (Sockets
    buffer so much that the server itself sees the client read only every few seconds.)
    """
    large = pack_forecaster("large.mar", 1, "mlp", LARGE)
    upload(s3, store, [large])
    question = large.question(0)
    with serve(client_timeout_s=3.0) as server:
        server.ask(question)
        with never_reading(server, question, 3) as sock:
            for body in asyncio.run(_read_slowly(sock, 3, 12.0)):
                question.check(body)


async def _read_slowly(sock: socket.socket, answers: int, seconds: float) -> list[bytes]:
    """The bodies of the answers, read in equal parts over `seconds`."""
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    pause = seconds / (answers * LARGE_BYTES / PART)
    bodies: list[bytes] = []
    data, budget = b"", 0
    while len(bodies) < answers:
        got = await loop.sock_recv(sock, PART)
        assert got, f"cut off after {len(bodies)} answers and {len(data)} bytes"
        data += got
        budget += len(got)
        if budget >= PART:
            budget -= PART
            await asyncio.sleep(pause)
        head, end, body = data.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
        size = int(fields.get(b"content-length", b"0"))
        if end and len(body) >= size:
            bodies.append(body[:size])
            data = body[size:]
    return bodies


def test_bodies_on_their_way_count_against_the_bound(s3: S3Server, store: str, serve: Serve) -> None:
    """Unfinished bodies are memory too: above `max_inflight_bytes` the next one is 503, and the front says why."""
    (model,) = pack_fleet("normal", 1)
    upload(s3, store, [model])
    size = 1 << 20
    head = b"POST /invocations HTTP/1.1\r\nHost: x\r\nX-Amzn-SageMaker-Target-Model: x\r\n"
    head += b"Content-Length: %d\r\n\r\n" % size
    with serve(max_inflight_bytes=4 * size + 65536, client_timeout_s=PATIENCE_S) as server, ExitStack() as stack:
        for _ in range(6):
            sock = stack.enter_context(socket.create_connection(server.address, timeout=PATIENCE_S))
            sock.sendall(head + bytes(size - 1))
        wait_until(lambda: server.total("fleetcast_inference_requests_total", code="503") >= 1, "one is refused")
        server.ask(model.question(0))  # what fits is answered as ever
