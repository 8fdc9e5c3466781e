"""A child that a worker has lent to a front: asked without the worker, as safe and as well counted as ever."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.server import Server, run_server
from tests.patience import wait_until
from tests.s3 import S3Server
from tests.server.worker.sandbox.code_archives import is_alive, pack_code

pytestmark = pytest.mark.e2e

MIB = 1024 * 1024
TIMEOUT_S = 6  #: one request of these tests takes so long; a stall of the machine should not make others
HANDLER = """
import os, signal, time
CALLS = []

def handle(data, context):
    if data is None:
        return None
    CALLS.append(1)
    if data[0]["body"]["mode"] == "parts":
        from ts.handler_utils.utils import send_intermediate_predict_response
        for i in range(data[0]["body"]["n"]):
            parts = [chr(ord("a") + i) * 100_000]
            send_intermediate_predict_response(parts, context.request_ids, "Prediction success", 200, context)
        if data[0]["body"]["ends"]:
            os._exit(1)
        return ["end"]
    return [answer(row["body"]) for row in data]

def answer(asked):
    mode = asked["mode"]
    if mode == "loop":
        while True: pass
    if mode == "stop and exit":
        os.kill(os.getpid(), signal.SIGSTOP)
    if mode in ("exit", "stop and exit"):
        os._exit(9)
    if mode == "sleep":
        time.sleep(asked["s"])
    if mode == "large":
        return "x" * asked["n"]
    if mode == "garbage":
        os.write(3, bytes([255]) * 64)
    return {"pid": os.getpid(), "calls": len(CALLS), "mark": MARK}

MARK = 1
"""
NAMES = (
    "counted",
    "loop",
    "exit",
    "garbage",
    "mixed",
    "moved",
    "late",
    "large",
    "parts",
    *(f"many{i}" for i in range(6)),
)


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> str:
    """Archives of one handler."""
    name = s3.bucket()
    for each in NAMES:
        s3.put(name, f"{each}.mar", pack_code(HANDLER))
    return name


@pytest.fixture(scope="module")
def house(s3: S3Server, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of one front and one worker, with room for a few children."""
    folder: Path = tmp_path_factory.mktemp("lends")
    settings: dict[str, Any] = {
        "allow_code": ["*"],
        "code_timeout_s": TIMEOUT_S,
        "fronts": 1,
        "model_cache_bytes": 160 * MIB,
    }
    with run_server(s3, folder, f"s3://{bucket}", **settings) as server:
        yield server


def ask(server: Server, model: str, mode: str = "pid", timeout_ms: int = 60_000, **more: object) -> httpx.Response:
    """One request."""
    body = json.dumps({"mode": mode, **more}).encode()
    headers = {"X-Request-Timeout-Ms": str(timeout_ms), "Content-Type": "application/json"}
    return server.post(f"{model}.mar", body, headers)


def read_row(server: Server, model: str) -> dict[str, Any]:
    """The model at its worker, as operators see it."""
    found: dict[str, Any] = server.models(prefix=f"{model}.mar")[f"{model}.mar"]["holders"][0]
    return found


def lend(server: Server, model: str) -> int:
    """Ask until the front has the model's child, on which the lend holds a lease: the child's pid."""

    def is_lent() -> bool:
        assert ask(server, model).status_code == 200
        return bool(read_row(server, model)["leases"] == 1)

    wait_until(is_lent, "its child is lent")
    pid: int = read_row(server, model)["pid"]
    return pid


def test_what_a_lent_child_answers_is_counted_at_once(house: Server) -> None:
    """Each request once, whoever asked the child; one that nobody asks comes back."""
    pid, before = lend(house, "counted"), house.total("fleetcast_model_cache_requests_total", result="hit")
    calls = ask(house, "counted").json()["calls"]
    for i in range(1, 8):
        reply = ask(house, "counted")
        assert reply.json() == {"pid": pid, "calls": calls + i, "mark": 1}
        assert reply.headers["X-Fleetcast-Cache"] == "hit"
        assert reply.headers["X-Fleetcast-Model-Version"] == read_row(house, "counted")["version"]
        assert read_row(house, "counted")["usage"]["answers"] == calls + i
    assert house.total("fleetcast_model_cache_requests_total", result="hit") == before + 8
    wait_until(lambda: read_row(house, "counted")["leases"] == 0, "it is returned")
    assert ask(house, "counted").json()["calls"] == calls + 8


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("loop", f"it took longer than {TIMEOUT_S} s for a batch (code_timeout_s)"),
        ("exit", "its process ended by itself"),
        ("garbage", "it sent a message of 4294967295 bytes"),
    ],
)
def test_a_lent_child_that_ends_or_lies_costs_its_request(house: Server, mode: str, why: str) -> None:
    """The answer says what the worker would have said, and the next request starts the archive again."""
    pid = lend(house, mode)
    reply = ask(house, mode, mode)
    assert (reply.status_code, reply.headers["X-Amzn-ErrorType"]) == (424, "ModelError")
    assert f"Worker died: {mode}.mar: {why}" in reply.json()["OriginalMessage"]
    assert ask(house, mode).json()["pid"] != pid
    wait_until(lambda: not is_alive(pid), "it is gone")


def test_requests_behind_one_that_ends_the_child_are_answered(house: Server) -> None:
    """They had not begun: the worker has them answered by the next child."""
    with ThreadPoolExecutor(7) as pool:
        pid, fatal = wait_until(lambda: stop_lent(house, "mixed", pool), "it is lent when the request comes")
        others = [pool.submit(ask, house, "mixed") for _ in range(6)]
        wait_until(
            lambda: house.total("fleetcast_requests_under_way") == 7 or fatal.done(), "all of them are behind it"
        )
        resume_process(pid)
    assert fatal.result().status_code == 424
    assert [each.result().status_code for each in others] == [200] * 6


def stop_lent(house: Server, model: str, pool: Executor) -> tuple[int, "Future[httpx.Response]"] | None:
    """Have a lent child stop in a request that ends it: its pid, and the request.

    None where it was not lent any more: a front returns a child that nobody asks for a second.
    """
    pid, hits = lend(house, model), house.total("fleetcast_model_cache_requests_total", result="hit")
    fatal = pool.submit(ask, house, model, "stop and exit")
    wait_until(lambda: is_stopped(pid), "the request has begun")
    if house.total("fleetcast_model_cache_requests_total", result="hit") == hits:
        return pid, fatal
    resume_process(pid)  # the worker counts a request of its own when it comes
    assert fatal.result().status_code == 424
    return None


def is_stopped(pid: int) -> bool:
    """Whether the process is stopped, or gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in {"T", "Z"}
    except OSError:
        return True


def resume_process(pid: int) -> None:
    """SIGCONT, unless it is gone: it is killed where it was stopped for longer than `code_timeout_s`."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def test_a_lent_child_is_replaced_and_unloaded(house: Server, s3: S3Server, bucket: str) -> None:
    """The request after a reload finds the new version, and an unloaded model has no process."""
    old = lend(house, "moved")
    s3.put(bucket, "moved.mar", pack_code(HANDLER.replace("MARK = 1", "MARK = 2")))
    assert house.fleet("reload", "moved.mar").is_success
    assert ask(house, "moved").json()["mark"] == 2
    wait_until(lambda: not is_alive(old), "the old version's process is gone")
    new = lend(house, "moved")
    assert house.fleet("unload", "moved.mar").is_success
    assert not is_alive(new)


def test_a_late_request_is_refused_while_the_child_goes_on(house: Server) -> None:
    """And what comes then is answered by the same child."""
    pid = lend(house, "late")
    reply = ask(house, "late", "sleep", timeout_ms=300, s=1.0)
    assert (reply.status_code, reply.json()["OriginalStatusCode"]) == (424, 504)
    assert ask(house, "late").json()["pid"] == pid


def test_large_bodies_go_both_ways(house: Server) -> None:
    """Larger than what a socket holds, so that they come in pieces."""
    pid = lend(house, "large")
    found = ask(house, "large", "large", n=3_000_000, filling="y" * 3_000_000)
    assert found.content == b"x" * 3_000_000
    assert ask(house, "large").json()["pid"] == pid


def test_a_lent_child_answers_part_by_part(house: Server) -> None:
    """More than a client may leave unread, in order; an answer whose process ends is cut."""

    def ask_lent() -> int:
        """The child's pid where it is still lent afterwards: it is returned when nobody asks it for a second."""
        pid = lend(house, "parts")
        whole = ask_parts(house, n=20, ends=False)
        assert whole == b"".join(bytes([ord("a") + i]) * 100_000 for i in range(20)) + b"end"
        return pid if read_row(house, "parts")["leases"] == 1 else 0

    pid = wait_until(ask_lent, "it is lent before and after")
    with pytest.raises(httpx.RemoteProtocolError):
        ask_parts(house, n=2, ends=True)
    assert ask(house, "parts").json()["pid"] != pid


def ask_parts(server: Server, *, n: int, ends: bool) -> bytes:
    """What comes of an answer that is sent while it is made, by TorchServe's path."""
    body = {"mode": "parts", "n": n, "ends": ends}
    return server.http.post(f"{server.url}/predictions/parts", json=body).content


def test_memory_for_others_is_found_while_children_are_lent(house: Server) -> None:
    """What is lent is not evicted, so it is called back where room is wanted: no load fails of it."""
    names = [f"many{i}" for i in range(6)]
    for name in names * 2:
        for _ in range(6):  # the last ones are lent
            assert ask(house, name).status_code == 200


def test_a_model_that_two_fronts_ask_is_answered_by_both(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    """Its child goes to and fro; every request is answered and counted once."""
    settings: dict[str, Any] = {"allow_code": ["*"], "fronts": 2}
    with run_server(s3, tmp_path, f"s3://{bucket}", **settings) as server:

        def ask_often(_: int) -> list[int]:
            with httpx.Client(timeout=60) as client:
                head = {"X-Amzn-SageMaker-Target-Model": "counted.mar", "Content-Type": "application/json"}
                url = f"{server.url}/invocations"
                return [client.post(url, content=b'{"mode": "pid"}', headers=head).json()["calls"] for _ in range(100)]

        with ThreadPoolExecutor(6) as pool:
            calls = [each for found in pool.map(ask_often, range(6)) for each in found]
        assert sorted(calls) == list(range(1, 601))
        assert read_row(server, "counted")["usage"]["answers"] == 600
