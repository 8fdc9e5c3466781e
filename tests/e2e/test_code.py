"""Code archives on a real server: answered, refused where they are not allowed, and no danger to other models."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from server.worker.sandbox.memory_use import measure_memory
from tests.archives import make_mar_manifest, make_tar_gz, make_zip
from tests.e2e.models import pack_fleet
from tests.e2e.server import Load, Server, invoke, run_server, upload
from tests.patience import wait_until
from tests.s3 import S3Server
from tests.server.worker.sandbox.code_archives import is_alive, pack_code

pytestmark = pytest.mark.e2e

MIB = 1024 * 1024
#: For a handful of children. One that is alone counts all of the pages that it shares with its template, about 90 MiB
#: here and more with a torch for CUDA, and two count half as many each: every number below leaves room for that.
BUDGET, MOST_OF_ONE = 288 * MIB, 512 * MIB
SOUND = pack_fleet("sound", 4)
HANDLER = """
import ctypes, os, time
import torch

def handle(data, context):
    if data is None:
        return None
    context.set_response_content_type(0, "application/json")
    return [answer(row["body"], context, len(data)) for row in data]

def answer(asked, context, batch):
    mode = asked["mode"]
    if mode == "raise":
        raise ValueError("boom")
    if mode == "headers":
        context.set_response_status(code=201, phrase="Made here")
        context.set_response_header(0, "X-Said", context.get_request_header(0, "X-Asked"))
        context.set_response_header(0, "Content-Length", "3")
        context.set_response_header(0, "Transfer-Encoding", "chunked")
        return "said"
    if mode == "split":
        context.set_response_header(0, "X-Said", "a\\r\\nX-Evil: 1")
    if mode == "tea":
        context.set_response_status(code=418, phrase="teapot")
        return "tea"
    if mode == "loop":
        while True: pass
    if mode == "exit":
        os._exit(9)
    if mode == "crash":
        ctypes.string_at(0)
    if mode == "memory":
        return len(bytearray(1 << 30))
    if mode == "fork":
        while True:
            try:
                os.fork(); os.setsid()
            except OSError:
                pass
    if mode == "disk":
        for i in range(asked["x"][0]):
            with open(f"{os.environ['TMPDIR']}/{i}", "wb") as file:
                file.write(os.urandom(1 << 20))
        return "written"
    if mode == "spread":
        for _ in range(asked["x"][0]):
            if os.fork() == 0:
                kept = os.urandom(asked["x"][1] << 20)
                time.sleep(1000)
        return "spread"
    return {"pid": os.getpid(), "sum": float(torch.tensor(asked["x"]).sum()), "batch": batch}
"""
BALLAST = "KEPT = bytes(range(256)) * (128 * 1024)\n"  # 32 MiB
SCRIPT = """
import torch
def model_fn(model_dir):
    return torch.nn.Identity()
"""
CONFIG = b"batchSize: 4\nmaxBatchDelay: 3000\n"


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that runs the code of archives below `code/`; when it has ended no child is left."""
    bucket = s3.bucket()
    upload(s3, bucket, SOUND)
    manifest = {"model": {"modelName": "m", "handler": "handler.py", "configFile": "model-config.yaml"}}
    archives = {
        **dict.fromkeys(
            ("code/a.mar", "code/b.mar", "code/bad.mar", "code/greedy.mar", "code/large.mar", "other/a.mar"),
            pack_code(HANDLER),
        ),
        **{f"code/many/{i:02}.mar": pack_code(BALLAST + HANDLER) for i in range(8)},
        "code/script.tar.gz": make_tar_gz({"code/inference.py": SCRIPT.encode(), "weights": b"w"}),
        "code/broken.mar": pack_code("import nosuch"),
        "code/needs.mar": make_zip({**make_mar_manifest("handler.py"), "handler.py": b"", "requirements.txt": b"x"}),
        "code/batched.mar": make_zip(
            {
                "MAR-INF/MANIFEST.json": json.dumps(manifest).encode(),
                "handler.py": HANDLER.encode(),
                "model-config.yaml": CONFIG,
            }
        ),
    }
    for name, data in archives.items():
        s3.put(bucket, name, data)
    folder: Path = tmp_path_factory.mktemp("code")
    settings: dict[str, Any] = {"allow_code": ["code/"], "code_timeout_s": 6, "code_memory_bytes": MOST_OF_ONE}
    settings |= {"code_processes": 12, "code_disk_bytes": 16 * MIB}
    with run_server(s3, folder, f"s3://{bucket}", model_cache_bytes=BUDGET, **settings) as server:
        yield server
        pids = list_pids(server)
        assert pids
        server.terminate()
        wait_until(lambda: not any(map(is_alive, pids)), "no child outlives its server")


def list_pids(server: Server) -> list[int]:
    """The processes of code archives, as the server lists them."""
    return [holder["pid"] for row in server.models().values() for holder in row["holders"] if "pid" in holder]


def ask(server: Server, model: str, mode: str = "sum") -> Any:
    """The handler's JSON. Raises ClientError."""
    body = json.dumps({"mode": mode, "x": [1, 2, 3]}).encode()
    return json.loads(invoke(server.client(), model, body).body)


def refused(server: Server, model: str, mode: str = "sum") -> tuple[int, str]:
    """The original status and message of a ModelError."""
    with pytest.raises(ClientError) as caught:
        ask(server, model, mode)
    assert type(caught.value).__name__ == "ModelError"
    response = caught.value.response
    return response["OriginalStatusCode"], response["OriginalMessage"]


def test_code_answers_through_an_unmodified_client(house: Server) -> None:
    """A handler and a script; the second request is a hit of the same process, which the list names."""
    found = ask(house, "code/a.mar")
    assert found["sum"] == 6.0
    assert ask(house, "code/a.mar")["pid"] == found["pid"]
    (holder,) = house.models()["code/a.mar"]["holders"]
    assert holder["pid"] == found["pid"]
    assert holder["bytes"] > MIB
    again = invoke(house.client(), "code/a.mar", b'{"mode": "sum", "x": [1]}')
    assert (again.cache, again.headers["content-type"]) == ("hit", "application/json")
    answer = invoke(house.client(), "code/script.tar.gz", b"[[1, 2]]")
    assert json.loads(answer.body) == [[1.0, 2.0]]


def test_code_is_refused_where_it_is_not_allowed(house: Server) -> None:
    """By its key; also for what a server does not do, or what cannot be loaded, with the reason."""
    assert (
        "'handler.py'): it runs only in a child process of a server that was started with --allow-code"
        in (refused(house, "other/a.mar")[1])
    )
    assert "requirements.txt' names packages" in refused(house, "code/needs.mar")[1]
    assert "No module named 'nosuch' (handler.py, line 1)" in refused(house, "code/broken.mar")[1]


def test_failures_have_the_status_that_the_handler_gave(house: Server) -> None:
    """As the container would have answered the platform."""
    assert refused(house, "code/a.mar", "raise") == (503, "Prediction failed")
    assert refused(house, "code/a.mar", "tea") == (418, "tea")


def test_headers_come_and_go(house: Server) -> None:
    """A handler reads those of the request and sets those of its answer, but none that frame it or end its line."""
    asked = {"x-amzn-sagemaker-target-model": "code/a.mar", "X-Asked": "kept", "Content-Type": "application/json"}
    answer = house.http.post(f"{house.url}/invocations", content=b'{"mode": "headers"}', headers=asked)
    assert (answer.status_code, answer.text, answer.headers["x-said"]) == (200, "said", "kept")
    assert (answer.headers["content-length"], "transfer-encoding" in answer.headers) == ("4", False)
    status, message = refused(house, "code/a.mar", "split")
    assert (status, message[:30]) == (500, "the handler's header 'X-Said':")


def test_requests_that_come_together_are_one_batch(house: Server) -> None:
    """As many as the archive's config says, without waiting for longer than they take to come."""
    client, body = house.client(), b'{"mode": "sum", "x": [1]}'  # to make a client for each could take the whole delay
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: json.loads(invoke(client, "code/batched.mar", body).body)["batch"], range(4))
        assert list(found) == [4] * 4


def test_hostile_code_costs_only_its_own_model(house: Server) -> None:
    """Rows and another archive's code are answered all the time; the model itself is started again when asked."""
    pid, incarnation = ask(house, "code/b.mar")["pid"], house.processes("worker")[0]["incarnation"]
    with Load(house, [model.question(1) for model in SOUND], clients=2) as load:
        for mode, status, why in (
            ("loop", 500, "Worker died: code/bad.mar: it took longer than 6 s"),
            ("exit", 500, "Worker died: code/bad.mar: its process ended by itself"),
            ("memory", 507, "Out of resources"),
        ):
            assert refused(house, "code/bad.mar", mode)[0] == status
            assert ask(house, "code/bad.mar")["sum"] == 6.0, why
            assert ask(house, "code/b.mar")["pid"] == pid
        assert refused(house, "code/bad.mar", "fork")[0] == 500
        load.more(20)
    assert [outcome.problem for outcome in load.outcomes if outcome.problem] == []
    assert "has ended 3 times within 60 s" in refused(house, "code/bad.mar")[1]
    assert house.processes("worker")[0]["incarnation"] == incarnation


def test_processes_that_take_too_much_together_are_ended(house: Server) -> None:
    """None of them exceeds a limit of its own: their memory is measured now and again.

    The archive is pinned: a measurement while they still grow may find more than the cache has, and less than the
    limit.
    """
    assert house.fleet("pin", "code/greedy.mar").is_success
    before = ask(house, "code/greedy.mar")["pid"]
    assert spread(house, 3, 200)
    wait_until(lambda: "(code_memory_bytes)" in house.said(), "they are measured and ended")
    wait_until(lambda: not is_alive(before), "they are gone")
    assert ask(house, "code/greedy.mar")["sum"] == 6.0
    assert house.fleet("unpin", "code/greedy.mar").is_success


def test_an_archive_that_fills_the_disk_is_ended(house: Server) -> None:
    """None of its files exceeds a limit of its own. Up to the bound it is left alone."""
    before = ask(house, "code/large.mar")["pid"]
    assert invoke(house.client(), "code/large.mar", b'{"mode": "disk", "x": [15]}').body == b"written"
    with suppress(ClientError):  # its folder may be measured while it still writes
        assert invoke(house.client(), "code/large.mar", b'{"mode": "disk", "x": [20]}').body == b"written"
    wait_until(lambda: "(code_disk_bytes)" in house.said(), "its folder is measured")
    wait_until(lambda: not is_alive(before), "its process is gone")
    assert ask(house, "code/large.mar")["pid"] != before


def test_an_archive_that_outgrows_the_cache_is_evicted(house: Server) -> None:
    """Its processes may have so much memory, but it is more than the cache has: the next request starts it again."""
    before, evicted = ask(house, "code/large.mar")["pid"], house.total("fleetcast_model_evictions_total")
    assert spread(house, 1, 320, model="code/large.mar")  # the rest is its share of torch
    wait_until(lambda: not is_alive(before), "its processes are gone")
    assert house.total("fleetcast_model_evictions_total") > evicted
    assert ask(house, "code/large.mar")["pid"] != before


def spread(server: Server, processes: int, mib: int, model: str = "code/greedy.mar") -> bool:
    """Have an archive start processes that each take so much memory."""
    body = json.dumps({"mode": "spread", "x": [processes, mib]}).encode()
    return invoke(server.client(), model, body).body == b"spread"


def test_an_unloaded_model_has_no_process_when_the_reply_leaves(house: Server) -> None:
    """And more archives than there is room for take turns: the processes stay within the budget, and none fails."""
    pid = ask(house, "code/a.mar")["pid"]
    assert house.fleet("unload", "code/a.mar").is_success
    assert not is_alive(pid)
    evicted = house.total("fleetcast_model_evictions_total")
    names = [f"code/many/{i:02}.mar" for i in range(8)]
    for name in names * 2:
        assert ask(house, name)["sum"] == 6.0
    assert house.total("fleetcast_model_evictions_total") > evicted
    # A process's share of common pages grows when others end; the worker notices when it measures it anew.
    wait_until(lambda: sum(map(measure_memory, list_pids(house))) <= BUDGET, "the processes are within the budget")
    wait_until(lambda: sum_bytes(house) <= BUDGET, "and so is what the server says of them")


def sum_bytes(server: Server) -> int:
    """What the processes of code archives take, as the server says."""
    holders = [holder for row in server.models().values() for holder in row["holders"]]
    return sum(holder["bytes"] for holder in holders if "pid" in holder)


def test_the_children_of_a_worker_that_is_killed_are_gone(house: Server) -> None:
    """Its successor starts new ones."""
    pid = ask(house, "code/b.mar")["pid"]
    worker = house.processes("worker")[0]["pid"]
    signal_process(worker)
    wait_until(lambda: not is_alive(pid), "the child has ended")
    wait_until(lambda: is_answered(house), "the next worker answers")


def signal_process(pid: int) -> None:
    """End the process at once."""
    os.kill(pid, signal.SIGKILL)


def is_answered(server: Server) -> bool:
    """Whether code is run by now."""
    try:
        ask(server, "code/b.mar")
    except ClientError:
        time.sleep(0.1)
        return False
    return True
