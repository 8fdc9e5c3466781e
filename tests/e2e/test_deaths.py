"""Processes that die or are ended: the errors of their clients, the restarts, and that no process is left over."""

import fcntl
import os
import signal
import socket
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from tests.e2e.conftest import Serve
from tests.e2e.models import pack_fleet, pack_forecaster
from tests.e2e.server import Load, Server, never_reading, upload
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

NEVER_S = 2 * PATIENCE_S  #: a wait that this test would not wait for
LARGE = {"features": 1, "context_length": 4, "prediction_length": 10_000, "quantiles": 100, "hidden": 2}


def is_up(server: Server, kind: str, index: int, incarnation: int) -> bool:
    """Whether the child's n-th incarnation is ready."""
    rows = {row["index"]: row for row in server.processes(kind)}
    return bool(rows[index]["up"]) and rows[index]["incarnation"] == incarnation


def test_a_killed_worker_costs_no_request_and_comes_back(s3: S3Server, store: str, serve: Serve) -> None:
    """SIGKILL under load: every request is answered right or refused by a typed 503, and none waits until the worker is
    back; no counter falls; the worker is up again, counted as restarted, and its pinned models are back on it.
    """
    models = pack_fleet("markets", 24)
    upload(s3, store, models)
    questions = [model.question(1) for model in models]
    with serve(workers=3, fronts=2) as server:
        for question in questions:
            server.ask(question)
        victim, *_ = server.processes("worker")
        pinned = [name for name, row in server.models().items() if row["holders"][0]["worker"] == victim["index"]][:3]
        assert pinned, "24 models over three workers"
        for name in pinned:
            assert server.fleet("pin", name).json()["pinned"]
        with Load(server, questions) as load:
            load.more(60)
            before = server.series()
            os.kill(victim["pid"], signal.SIGKILL)
            load.more(30)  # more than there are clients, and a new worker has torch to import
            assert not is_up(server, "worker", victim["index"], 2)
            assert find_falls(before, during := server.series()) == {}
            wait_until(partial(is_up, server, "worker", victim["index"], 2), "the worker is back")
            load.more(60)
        assert {o.problem for o in load.outcomes} <= {"", "503 ServiceUnavailable"}
        assert find_falls(during, server.series()) == {}
        assert server.total("fleetcast_worker_up", worker=str(victim["index"])) == 1
        assert server.total("fleetcast_worker_restarts_total", worker=str(victim["index"])) == 1
        wait_until(lambda: all(is_held(server, name, victim["index"]) for name in pinned), "pinned models are back")


def find_falls(before: dict[Any, float], after: dict[Any, float]) -> dict[Any, tuple[float, float | None]]:
    """The series that are smaller than they were, or gone."""
    return {series: (value, after.get(series)) for series, value in before.items() if after.get(series, -1.0) < value}


def is_held(server: Server, model: str, worker: int) -> bool:
    """Whether the worker holds the model, pinned."""
    holders = server.models()[model]["holders"]
    return any(row["worker"] == worker and row["state"] == "ready" and row["pinned"] for row in holders)


def test_a_worker_that_dies_with_requests_waiting_loses_none(s3: S3Server, store: str, serve: Serve) -> None:
    """Killed while requests wait for a slow load: another worker loads it once, and all of them are answered right."""
    (model,) = pack_fleet("slow", 1)
    upload(s3, store, [model])
    with serve(workers=2, disk_cache_bytes=0) as server, ThreadPoolExecutor(8) as pool, s3.hold(model.name):
        asked = [pool.submit(server.ask, model.question(i)) for i in range(8)]
        wait_until(lambda: server.total("fleetcast_model_cache_requests_total") >= 8, "all requests are waiting")
        (holder,) = server.models()[model.name]["holders"]
        victim = server.processes("worker")[holder["worker"]]
        os.kill(victim["pid"], signal.SIGKILL)
        answers = [future.result(PATIENCE_S) for future in asked]
        assert [answer.cache for answer in answers].count("miss") == 1
        wait_until(partial(is_up, server, "worker", holder["worker"], 2), "the worker is back")


def test_a_worker_that_dies_half_way_through_an_answer_cuts_it(s3: S3Server, store: str, serve: Serve) -> None:
    """Half of a large answer cannot be taken back: the client sees the connection end, nothing that looks whole; the
    front goes on and the model is answered by the next worker.
    """
    model = pack_forecaster("large.mar", 1, "mlp", LARGE)
    upload(s3, store, [model])
    with serve(workers=2, slab_bytes=16 << 20) as server:
        server.ask(model.question(0))
        with never_reading(server, model.question(0)) as sock:
            wait_until(lambda: count_unread(sock) > 0, "the answer has begun")
            (holder,) = server.models()[model.name]["holders"]
            os.kill(server.processes("worker")[holder["worker"]]["pid"], signal.SIGKILL)
            head, _, body = read_all(sock).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert len(body) < int(head.lower().partition(b"content-length: ")[2].split()[0])
        server.ask(model.question(1))


def count_unread(sock: socket.socket) -> int:
    """Bytes that have arrived and are not read."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)), sys.byteorder)


def read_all(sock: socket.socket) -> bytes:
    """Until the other side closes, or cuts."""
    sock.settimeout(PATIENCE_S)
    parts = []
    try:
        while part := sock.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def test_a_killed_front_leaves_the_other_serving_and_comes_back(s3: S3Server, store: str, serve: Serve) -> None:
    """SIGKILL of one of two fronts: boto3's own retry finds the other one, nobody sees an error, a new one comes up."""
    models = pack_fleet("front", 4)
    upload(s3, store, models)
    with serve(fronts=2) as server:
        client = server.client(attempts=None)
        for model in models:
            server.ask(model.question(0), client)
        before = server.series()
        victim, other = server.processes("front")
        os.kill(victim["pid"], signal.SIGKILL)
        for seed in range(60):
            server.ask(models[seed % 4].question(seed), client)
        wait_until(partial(is_up, server, "front", victim["index"], 2), "the front is back")
        assert server.processes("front")[other["index"]]["pid"] == other["pid"]
        for seed in range(20):
            server.ask(models[seed % 4].question(seed), client)
        assert find_falls(before, server.series()) == {}


def test_a_killed_supervisor_takes_its_children_along(s3: S3Server, store: str, serve: Serve) -> None:
    """SIGKILL of the supervisor: no process of the server is left, though a load is under way that does not end, and a
    worker and a front are stopped and see nothing. The request that waits is told so.
    """
    (model,) = pack_fleet("orphan", 1)
    upload(s3, store, [model])
    with serve(workers=2, fronts=2) as server, ThreadPoolExecutor(1) as pool:
        server.exit_code = -signal.SIGKILL
        with s3.hold(model.name):
            asked = pool.submit(server.post, model.name, model.question(0).body)
            wait_until(lambda: server.total("fleetcast_model_cache_requests_total") >= 1, "the load is under way")
            assert len(server.survivors()) == 5
            for kind in ("worker", "front"):
                os.kill(server.processes(kind)[0]["pid"], signal.SIGSTOP)
            server.process.kill()
            wait_until(lambda: not server.survivors(), "all children have ended")
        assert asked.result(PATIENCE_S).status_code == 503


def test_sigterm_answers_what_runs_and_refuses_what_is_new(s3: S3Server, store: str, serve: Serve) -> None:
    """SIGTERM with requests under way: all are answered right, new connections are refused meanwhile, idle kept-alive
    ones are closed, exit code 0 within `drain_s`.
    """
    models = pack_fleet("drain", 4)
    upload(s3, store, models)
    with (
        serve(workers=2, fronts=2, drain_s=PATIENCE_S) as server,
        ThreadPoolExecutor(16) as pool,
        s3.hold(f"{store}/", 4) as loading,
    ):
        asked = [pool.submit(server.ask, models[i % 4].question(i)) for i in range(16)]
        wait_until(lambda: server.total("fleetcast_model_cache_requests_total") == 16, "all requests are waiting")
        with socket.create_connection(server.address, timeout=PATIENCE_S) as idle:
            idle.sendall(b"GET /ping HTTP/1.1\r\nHost: fleet\r\n\r\n")
            assert read_answer(idle).startswith(b"HTTP/1.1 200")
            server.process.send_signal(signal.SIGTERM)
            assert idle.recv(4096) == b""
        wait_until(partial(is_refused, server.address), "new connections are refused")
        assert not any(future.done() for future in asked), "the requests outlive the listener"
        loading.set()
        for future in asked:
            future.result(PATIENCE_S)
        assert server.process.wait(PATIENCE_S) == 0


def is_refused(address: tuple[str, int]) -> bool:
    """Whether nobody listens there."""
    try:
        socket.create_connection(address, timeout=1).close()
    except ConnectionRefusedError:
        return True
    except TimeoutError:
        pass  # it came in the very moment: asked again it is refused
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_idle_ends_the_server_at_once(serve: Serve, number: signal.Signals) -> None:
    """Nothing to drain: exit code 0 before `drain_s` is over."""
    with serve(drain_s=NEVER_S) as server:
        server.process.send_signal(number)
        assert server.process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("kind", ["worker", "front"])
def test_sigterm_while_a_child_restarts_is_a_clean_end(serve: Serve, kind: str) -> None:
    """Told to stop with a child just dead and its successor on the way: exit code 0 at once, nobody is left behind."""
    with serve(**{"workers": 1, "fronts": 1, f"{kind}s": 2}, drain_s=NEVER_S) as server:
        victim, *_ = server.processes(kind)
        os.kill(victim["pid"], signal.SIGKILL)
        wait_until(lambda: server.processes(kind)[victim["index"]]["incarnation"] == 2, "a successor is started")
        assert server.terminate() == 0, "and it does not wait for a child that never heard of the end"


def read_answer(client: socket.socket) -> bytes:
    """One answer to `/ping`, whose head and body may come apart."""
    answer = b""
    while not answer.endswith(b"}\n"):
        part = client.recv(4096)
        assert part, f"the connection ended after {answer!r}"
        answer += part
    return answer
