"""TorchServe's service envelopes and its micro-batches, by the classes of the real wheel."""

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import pytest

from model_store.archives.archive import Archive, open_archive
from model_store.errors import CodeFailed
from server.code_messages import CodeAnswer, CodeRequest
from server.worker.sandbox.code_host import EVERY_KEY, CodeHost, CodePolicy
from tests.archives import make_zip
from tests.patience import PATIENCE_S
from tests.server.worker.sandbox.code_archives import NO_FIELDS, Asker, start

pytestmark = pytest.mark.slow

pytest.importorskip("ts", reason="torchserve is not installed: pip install fleetcast[torchserve]")

MIB = 1024 * 1024
#: Says what it was given, a value for each item.
SHOW = """
def handle(data, context):
    return None if data is None else [{"got": item if not isinstance(item, bytes) else item.decode()} for item in data]
"""
MICRO = """
import threading
from ts.handler_utils.micro_batching import MicroBatching

class Doubling:
    def __init__(self):
        self.handle = MicroBatching(self)

    def initialize(self, context):
        self.context = context
        settings = context.model_yaml_config["micro_batching"]
        self.handle.parallelism = settings["parallelism"]
        self.handle.micro_batch_size = settings["micro_batch_size"]

    def _is_describe(self):
        return False

    def _is_explain(self):
        return False

    def preprocess(self, data):
        return [int(row["body"]) for row in data]

    def inference(self, numbers):
        return [(2 * number, len(numbers)) for number in numbers]

    def postprocess(self, pairs):
        return [{"twice": twice, "of": count, "threads": threading.active_count()} for twice, count in pairs]
"""


def pack(handler: str, config: str = "", **manifest: str) -> Archive:
    """An archive with a `model-config.yaml`."""
    model = {"modelName": "m", "handler": "handler.py", "configFile": "model-config.yaml", **manifest}
    members = {
        "MAR-INF/MANIFEST.json": json.dumps({"runtime": "python", "model": model}).encode(),
        "handler.py": handler.encode(),
        "model-config.yaml": config.encode(),
    }
    return open_archive(make_zip(members), "m.mar")


def run(test: Coroutine[Any, Any, None]) -> None:
    """In a loop of its own."""
    asyncio.run(test)


async def ask_bodies(host: CodeHost, archive: Archive, *bodies: object, explain: str = "False") -> list[Any]:
    """The answers to a batch of JSON bodies as TorchServe's front sends them, each as its value."""
    child = Asker(start(host, archive))
    done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    properties = {"explain": explain}
    requests = [
        CodeRequest(str(i), "application/json", "", json.dumps(body).encode(), NO_FIELDS, (), properties)
        for i, body in enumerate(bodies)
    ]
    child.child.run(requests, done.set_result)
    answers: list[CodeAnswer] = await asyncio.wait_for(done, PATIENCE_S)
    await child.close()
    return [answer.message if answer.failed else json.loads(answer.body) for answer in answers]


def test_each_envelope_takes_bodies_apart_and_wraps_answers(host: CodeHost) -> None:
    """As TorchServe's own classes do: whose archive says `service_envelope`, or whose manifest names one."""

    async def ask() -> None:
        body = pack(SHOW, "service_envelope: body")
        assert await ask_bodies(host, body, {"x": 1}, [2]) == [{"got": {"x": 1}}, {"got": [2]}]
        instances = pack(SHOW, "service_envelope: json")
        asked = {"instances": [1, {"b64": "aGk="}]}, {"instances": [3]}
        assert await ask_bodies(host, instances, *asked) == [
            {"predictions": [{"got": 1}, {"got": {"b64": "aGk="}}]},
            {"predictions": [{"got": 3}]},
        ]
        named = pack(SHOW, envelope="kserve")
        assert await ask_bodies(host, named, *asked, explain="True") == [
            {"explanations": [{"got": 1}, {"got": {"b64": "aGk="}}]},
            {"explanations": [{"got": 3}]},
        ]

    run(ask())


def test_kserve_envelopes_read_one_request_of_a_call(host: CodeHost) -> None:
    """They look at the first of a batch alone: here each request of the batch is a call, and no answer is missing."""

    async def ask() -> None:
        tensor = {"name": "x", "shape": [2], "datatype": "INT64", "data": [1, 2]}
        found = await ask_bodies(
            host,
            pack("def handle(data, context):\n    return None if data is None else [[7, len(data)]]",
                 "service_envelope: kservev2\nbatchSize: 4"),
            {"id": "a", "inputs": [tensor]},
            {"id": "b", "inputs": [tensor]},
        )  # fmt: skip
        assert [each["id"] for each in found] == ["a", "b"]
        assert [each["outputs"][0]["data"] for each in found] == [[7, 1], [7, 1]]

    run(ask())


def test_the_servers_envelope_is_for_archives_that_name_none() -> None:
    """`code_envelope`, as `service_envelope` of config.properties; an archive's own goes before it."""
    host = CodeHost(CodePolicy((EVERY_KEY,), 256 * MIB, 10.0, envelope="json"))

    async def ask() -> None:
        assert await ask_bodies(host, pack(SHOW), {"instances": [5]}) == [{"predictions": [{"got": 5}]}]
        own = pack(SHOW, "service_envelope: body")
        assert await ask_bodies(host, own, {"instances": [5]}) == [{"got": {"instances": [5]}}]

    try:
        run(ask())
    finally:
        host.close()


def test_an_envelope_that_there_is_not_is_named_with_those_there_are(host: CodeHost) -> None:
    """Also where its name is no module's: nothing outside the package is imported for it."""
    for name in ("kserv", "base", "../body", "os"):
        with pytest.raises(CodeFailed, match="TorchServe's are body, json, kserve, kservev2"):
            start(host, pack(SHOW, f"service_envelope: {name}"))


def test_micro_batches_run_in_threads_of_the_handler(host: CodeHost) -> None:
    """`MicroBatching` of the wheel, set as TorchServe's example does: sizes and threads as model-config.yaml says."""
    config = "batchSize: 5\nmicro_batching:\n  micro_batch_size: 2\n  parallelism:\n    inference: 2\n"

    async def ask() -> None:
        found = await ask_bodies(host, pack(MICRO, config), *"12345")
        assert [(each["twice"], each["of"]) for each in found] == [(2, 2), (4, 2), (6, 2), (8, 2), (10, 1)]
        assert found[0]["threads"] == 5  # its own, and 1 + 2 + 1 of the steps

    run(ask())
