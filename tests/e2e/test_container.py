"""The server as a SageMaker container, driven as SageMaker drives one: one port, folders that were unpacked before."""

import json
import os
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from loadtest.observe.processes import find_free_port
from tests.archives import read_members
from tests.e2e.models import Model, onnx_model, pack_fleet
from tests.e2e.server import Server, run_server
from tests.e2e.test_graph import make_graph_model
from tests.handlers.nets import Dilated
from tests.patience import wait_until
from tests.s3 import S3Server
from tests.server.worker.sandbox.code_archives import is_alive, pack_code

pytestmark = pytest.mark.e2e

MIB = 1024 * 1024
BUDGET = 320 * MIB
SCRIPT = """
import json, os
def model_fn(model_dir):
    with open(os.path.join(model_dir, "weights.json")) as file:
        return json.load(file)
def input_fn(body, content_type):
    return json.loads(body)["x"]
def predict_fn(x, model):
    return {"product": x * model["factor"], "pid": os.getpid()}
def output_fn(prediction, accept):
    return json.dumps(prediction), "application/json"
"""
#: It is not loaded before a file `go` lies beside it.
SLOW = """
import os, time
while not os.path.exists(os.path.join(os.path.dirname(__file__), "go")):
    time.sleep(0.01)
def handle(data, context):
    return None if data is None else ["slow"] * len(data)
"""
HUGE = "KEPT = b'\\1' * (400 * 1024 * 1024)\ndef handle(data, context):\n    return None\n"
TARGET = "X-Amzn-SageMaker-Target-Model"


@cache  # seconds of torch, which nobody else waits for when files are collected
def make_plain() -> list[Model]:
    """A model of each kind that runs no code."""
    return [*pack_fleet("plain", 1), onnx_model("onnx.mar", 3), make_graph_model("graph.mar", 4, Dilated)]


def unpack(folder: Path, members: Mapping[str, bytes]) -> None:
    """The archive's files, as SageMaker unpacks them."""
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def make_script(factor: int) -> dict[str, bytes]:
    """What a user of SageMaker's toolkits packs."""
    return {"code/inference.py": SCRIPT.encode(), "weights.json": json.dumps({"factor": factor}).encode()}


class Platform:
    """What SageMaker asks of a container, over its one port."""

    def __init__(self, server: Server, store: Path, temporary: Path) -> None:
        self.server, self.store, self.temporary = server, store, temporary
        self.http, self.url = server.http, server.url

    def load(self, name: str, folder: str | None = None) -> httpx.Response:
        """Tell it of a model that lies unpacked in a folder of this name."""
        url = str(self.store / (folder or name) / "model")
        return self.http.post(f"{self.url}/models", json={"model_name": name, "url": url})

    def invoke(self, name: str, body: bytes, **headers: str) -> httpx.Response:
        """One request of a client, which has named the archive that SageMaker calls `name`."""
        sent = {"Content-Type": "application/json", TARGET: "eu/archive.tar.gz", **headers}
        return self.http.post(f"{self.url}/models/{quote(name, safe='')}/invoke", content=body, headers=sent)

    def unload(self, name: str) -> httpx.Response:
        """Have it unloaded."""
        return self.http.delete(f"{self.url}/models/{quote(name, safe='')}")

    def multiply(self, name: str, x: int) -> Any:
        """The answer of a model that was made by `make_script`."""
        reply = self.invoke(name, json.dumps({"x": x}).encode())
        assert reply.is_success, reply.text
        return reply.json()

    def list_names(self) -> list[str]:
        """The loaded models, from pages of two."""
        names, query = list[str](), {"limit": "2"}
        while True:
            page = self.http.get(f"{self.url}/models", params=query).json()
            names += [row["modelName"] for row in page["models"]]
            assert len(page["models"]) <= 2
            if "nextPageToken" not in page:
                return names
            query["next_page_token"] = page["nextPageToken"]


def find_slow(platform: Platform) -> Path | None:
    """The folder in which the slow model's process waits."""
    return next((each.parent for each in platform.temporary.glob("fleetcast-code-*/*/model/slow.txt")), None)


@pytest.fixture(scope="module")
def platform(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A container of many models, whose operator lets their code run."""
    folder = tmp_path_factory.mktemp("container")
    store = folder / "models"
    for i in range(6):
        unpack(store / f"script{i}" / "model", make_script(i))
    for i, model in enumerate(make_plain()):
        unpack(store / f"plain{i}" / "model", read_members(model.data))
    (store / "packed" / "model").mkdir(parents=True)
    (store / "packed" / "model" / "archive.mar").write_bytes(make_plain()[0].data)
    for name, code in (("slow", SLOW), ("huge", HUGE), ("broken", "import nosuch")):
        unpack(store / name / "model", read_members(pack_code(code, {f"{name}.txt": ""})))
    temporary = tmp_path_factory.mktemp("t")
    settings = {"container": "multi-model", "allow_code": ["*"], "model_cache_bytes": BUDGET, "fronts": 2}
    with run_server(s3, folder, str(store), **settings, environment={"TMPDIR": str(temporary)}) as running:
        yield Platform(running, store, temporary)


def test_models_are_loaded_invoked_and_unloaded(platform: Platform) -> None:
    """All kinds alike, by names that SageMaker makes; twice is 409, and what is not loaded is 404."""
    strange = "7f3a/b:c d"
    assert platform.load(strange, "script3").is_success
    assert platform.multiply(strange, 5)["product"] == 15
    assert platform.load(strange, "script3").status_code == 409
    for i, model in enumerate(make_plain()):
        assert platform.load(f"kind{i}", f"plain{i}").is_success
        question = model.question(1)
        reply = platform.invoke(f"kind{i}", question.body)
        question.check(reply.content)
        assert reply.headers["pragma"] == "no-cache"
    assert platform.load("tarball-of-a-mar", "packed").is_success
    question = make_plain()[0].question(2)
    question.check(platform.invoke("tarball-of-a-mar", question.body).content)
    described = platform.http.get(f"{platform.url}/models/kind0").json()
    assert described["modelUrl"] == str(platform.store / "plain0" / "model")
    assert described["workers"][0]["status"] == "READY"
    pid = platform.multiply(strange, 1)["pid"]
    assert is_alive(pid)
    assert platform.unload(strange).is_success
    assert not is_alive(pid), "its memory is free when the reply leaves"
    for reply in (platform.unload(strange), platform.invoke(strange, b"{}")):
        assert (reply.status_code, reply.json()["type"]) == (404, "ModelNotFoundException")
    assert platform.http.get(f"{platform.url}/models/{quote(strange, safe='')}").status_code == 404
    for name in ("kind0", "kind1", "kind2", "tarball-of-a-mar"):
        assert platform.unload(name).is_success
    assert platform.list_names() == []
    assert not platform.server.resident()


def test_a_name_may_come_back_with_another_model(platform: Platform) -> None:
    """What lies in its folder by then is loaded."""
    folder = platform.store / "again" / "model"
    for factor in (2, 3):
        unpack(folder, make_script(factor))
        assert platform.load("again").is_success
        assert platform.multiply("again", 10)["product"] == 10 * factor
        assert platform.unload("again").is_success


def test_pages_list_every_model_once(platform: Platform) -> None:
    """Models take turns where there is no room for all: each of them answers."""
    names = [f"script{i}" for i in range(6)]
    assert all(platform.load(name).is_success for name in names)
    assert platform.list_names() == names
    for _ in range(2):
        assert [platform.multiply(name, 2)["product"] for name in names] == [0, 2, 4, 6, 8, 10]
    listed = platform.http.get(f"{platform.url}/models", params={"model_name_pattern": "script[0-3]"}).json()
    assert listed["models"] == [], "a pattern is text with `*`, and no regular expression"
    listed = platform.http.get(f"{platform.url}/models", params={"model_name_pattern": ".*5"}).json()
    assert [row["modelName"] for row in listed["models"]] == ["script5"]
    for name in names:
        assert platform.unload(name).is_success
    assert platform.list_names() == []


def test_the_port_answers_while_a_model_loads(platform: Platform) -> None:
    """`/ping` and other models. The load's own answer comes when it is done."""
    assert platform.load("script1").is_success
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(platform.load, "slow")
        place = wait_until(lambda: find_slow(platform), "the load has begun")
        for _ in range(20):
            assert platform.http.get(f"{platform.url}/ping").json() == {"status": "Healthy"}
        assert platform.multiply("script1", 4)["product"] == 4
        assert not loading.done()
        assert place is not None
        (place / "go").touch()
        assert loading.result().status_code == 200
    assert platform.invoke("slow", b"{}").text == "slow"
    assert platform.unload("slow").is_success
    assert platform.unload("script1").is_success


def test_what_cannot_be_loaded_is_said_and_not_registered(platform: Platform) -> None:
    """No room is 507, and costs the others nothing but their place; wrong code is 500; nothing outside is read."""
    assert platform.load("script2").is_success
    reply = platform.load("huge")
    assert reply.status_code == 507, reply.text
    assert platform.multiply("script2", 3)["product"] == 6
    assert platform.load("broken").status_code == 500
    for url in ("/etc", "../x", "nosuch/model", "file:///etc/passwd", str(platform.store / ".." / "models")):
        reply = platform.http.post(f"{platform.url}/models", json={"model_name": "m", "url": url})
        assert (reply.status_code, reply.json()["type"]) == (404, "ModelNotFoundException"), url
    for url in ("http://127.0.0.1:1/m", "s3://bucket/m"):
        reply = platform.http.post(f"{platform.url}/models", json={"model_name": "m", "url": url})
        assert reply.status_code == 400, url
    for body in (b"{", b"[]", b"{}", b'{"url": 5}', b'{"url": "a", "model_name": ""}' + b" " * 70_000, b"\xff"):
        reply = platform.http.post(f"{platform.url}/models", content=body)
        assert reply.status_code in (400, 413, 404), (body[:20], reply.text)
    assert platform.list_names() == ["script2"]
    assert platform.unload("script2").is_success


def test_a_load_waits_for_workers_that_are_not_up(platform: Platform) -> None:
    """SageMaker loads models as soon as `/ping` answers. What was loaded when a worker died answers on."""
    assert platform.load("script4").is_success
    (before,) = platform.server.processes("worker")
    os.kill(before["pid"], signal.SIGKILL)
    wait_until(lambda: is_down_or_new(platform, before["incarnation"]), "the worker's end is known")
    assert platform.load("script5").is_success
    assert [platform.multiply(name, 2)["product"] for name in ("script4", "script5")] == [8, 10]
    for name in ("script4", "script5"):
        assert platform.unload(name).is_success


def is_down_or_new(platform: Platform, incarnation: int) -> bool:
    """Whether the worker is not up, or already another one."""
    (row,) = platform.server.processes("worker")
    return not row["up"] or row["incarnation"] != incarnation


def test_pages_of_browsers_manage_nothing(platform: Platform) -> None:
    """A container's port is open by SageMaker's contract; a site that a user visits cannot use it."""
    reply = platform.http.post(f"{platform.url}/models", json={"url": "x"}, headers={"Origin": "http://evil.test"})
    assert reply.status_code == 403


def test_a_batch_transform_is_told_how_to_send(platform: Platform) -> None:
    """`/execution-parameters`, as algorithms of SageMaker's own answer it."""
    found = platform.http.get(f"{platform.url}/execution-parameters").json()
    assert found == {"MaxConcurrentTransforms": 21, "BatchStrategy": "MULTI_RECORD", "MaxPayloadInMB": 6}


def test_one_model_is_loaded_at_the_start(s3: S3Server, tmp_path: Path) -> None:
    """SageMaker's variables and folder alone say what to do; `/invocations` is the path, whatever a header says."""
    unpack(tmp_path / "model", make_script(7))
    port = find_free_port()
    environment = {
        "SAGEMAKER_BASE_DIR": str(tmp_path),
        "SAGEMAKER_BIND_TO_PORT": str(port),
        "SAGEMAKER_MAX_PAYLOAD_IN_MB": "1",
        "FLEETCAST_ALLOW_CODE": '["*"]',
    }
    unset = dict.fromkeys(("inference_port", "management_port", "metrics_port", "disk_cache"))
    with run_server(s3, tmp_path, None, **unset, environment=environment) as server:
        assert server.url.endswith(f":{port}")
        wait_until(lambda: "model" in server.resident(), "it is loaded before it is asked")
        for headers in ({}, {TARGET: "other"}):
            reply = server.http.post(f"{server.url}/invocations", content=b'{"x": 6}', headers=headers)
            assert reply.json()["product"] == 42
        reply = server.http.post(f"{server.url}/invocations", content=b"{")
        assert (reply.status_code, reply.json()["code"]) == (500, 500)
        assert server.http.get(f"{server.url}/models").status_code == 404, "nothing is managed there"
        assert server.http.get(f"{server.url}/execution-parameters").is_success
        assert server.http.post(f"{server.url}/invocations", content=bytes(2 * MIB)).status_code == 413
