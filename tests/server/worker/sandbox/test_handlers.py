"""Handlers of TorchServe and Multi Model Server, and scripts of SageMaker's toolkits, as their servers call them."""

import asyncio
import importlib.util
import io
import json
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest
import torch

from model_store.archives.archive import Archive, open_archive
from model_store.errors import CodeFailed
from model_store.names import ModelName
from server.worker.sandbox.code_host import EVERY_KEY, CodeHost, CodePolicy
from tests.archives import make_mar_manifest, make_tar_gz, make_zip
from tests.server.worker.sandbox.code_archives import Asker, make_code_archive, start

pytestmark = pytest.mark.slow

MIB = 1024 * 1024

PROBE = """
import json

class NotIt(dict.__class__):
    pass

def handle(data, context):
    if data is None:
        assert context.system_properties["gpu_id"] is None
        return None
    mode = data[0]["body"] if isinstance(data[0]["body"], str) else ""
    if mode == "raise":
        raise ValueError("boom")
    if mode == "memory":
        raise MemoryError
    if mode == "badtype":
        return "notalist"
    if mode == "badlen":
        return [1, 2, 3]
    if mode == "unser":
        return [object()] * len(data)
    if mode == "bytes":
        return [b"\\x00\\x01"] * len(data)
    if mode == "int":
        return [5] * len(data)
    if mode == "status":
        context.set_response_status(code=418, phrase="teapot", idx=0)
        return ["tea"]
    if mode == "status 42":
        context.set_all_response_status(42)
        return ["x"]
    if mode == "headers":
        for i in range(101):
            context.set_response_header(0, f"X-{i}", "x")
        return ["x"]
    if mode == "header":
        context.set_response_content_type(0, "text/csv")
        context.set_response_header(0, "X-Foo", "bar")
        return ["a,b"]
    kinds = [type(row["body"]).__name__ for row in data]
    return [{"kinds": kinds, "type": context.get_request_header(0, "content-type"), "name": context.model_name,
             "ids": context.request_ids, "dir": context.system_properties["model_dir"]}] * len(data)
"""

CLASS = """
class Network:
    pass

class Service:
    def initialize(self, context):
        self.factor = int(open(context.system_properties["model_dir"] + "/factor.py").read())

    def handle(self, data, context):
        return [self.factor * row["body"]["x"] for row in data]
"""

SCRIPT = """
import torch
from helper import FACTOR

class Net(torch.nn.Module):
    def forward(self, x):
        return FACTOR * x

def model_fn(model_dir):
    assert open(model_dir + "/weights.bin", "rb").read() == b"w"
    return Net()
"""


def run(test: Coroutine[Any, Any, None]) -> None:
    """In a loop of its own."""
    asyncio.run(test)


def test_a_function_gets_batches_and_its_failures_have_the_anchors_words(host: CodeHost) -> None:
    """Statuses and texts are those that TorchServe 0.12 and Multi Model Server 1.1 answer, as recorded."""

    async def ask() -> None:
        child = Asker(start(host, make_code_archive(PROBE)))
        refused = {
            "raise": (503, "Prediction failed"),
            "memory": (507, "Out of resources"),
            "badtype": (503, "Invalid model predict output"),
            "badlen": (503, "number of batch response mismatched"),
            "unser": (503, "Unsupported model output data type."),
            "status 42": (503, "Unsupported model output data type."),
            "headers": (503, "Unsupported model output data type."),
        }
        for mode, (status, message) in refused.items():
            answer = await child.one(mode)
            assert (answer.status, answer.message) == (status, message), mode
        assert (await child.one("bytes")).body == b"\x00\x01"
        number = await child.one("int")
        assert (number.body, number.content_type, number.body_type) == (b"5", "", "application/json")
        tea = await child.one("status")
        assert (tea.status, tea.reason, tea.body, tea.failed) == (418, "teapot", b"tea", False)
        header = await child.one("header")
        assert (header.content_type, header.headers["X-Foo"], header.body) == ("text/csv", "bar", b"a,b")
        await child.close()

    run(ask())


def test_a_script_in_another_folder_is_found_by_its_path() -> None:
    """As SAGEMAKER_SUBMIT_DIRECTORY names it; it imports what lies beside it."""
    host = CodeHost(CodePolicy((EVERY_KEY,), 256 * MIB, 10.0, program="src/serve.py"))
    members = {"src/serve.py": SCRIPT, "src/helper.py": "FACTOR = 3", "weights.bin": "w"}
    archive = open_archive(make_tar_gz({name: text.encode() for name, text in members.items()}), "m.tar.gz")
    assert host.runs(ModelName("m.tar.gz"), archive)

    async def ask() -> None:
        child = Asker(start(host, archive))
        assert json.loads((await child.one("[2.0]", "application/json")).body) == [6.0]
        await child.close()

    try:
        run(ask())
    finally:
        host.close()


def test_bodies_come_as_torchserve_gives_them(host: CodeHost) -> None:
    """JSON as its value, malformed JSON and unknown types as a bytearray, text as str; a batch in one call."""

    async def ask() -> None:
        child = Asker(start(host, make_code_archive(PROBE)))
        for content_type, body, kind in (
            ("application/json; charset=utf-8", '{"a": 1}', "dict"),
            ("application/json", "{bad", "bytearray"),
            ("text/csv", "a,b", "str"),
            ("", "raw", "bytearray"),
        ):
            found = json.loads((await child.one(body, content_type)).body)
            assert found["kinds"] == [kind], content_type
            assert found["type"] == (content_type or None)
            assert found["name"] == "m"
        outcome = await child.batch(b"1", b"2", b"3", content_type="")
        assert isinstance(outcome, list)
        assert len(outcome) == 3
        assert json.loads(outcome[0].body)["ids"] == {"0": "0", "1": "1", "2": "2"}
        await child.close()

    run(ask())


def test_a_class_is_initialised_once(host: CodeHost) -> None:
    """The module's only class, with the archive's folder in its context."""

    async def ask() -> None:
        child = Asker(start(host, make_code_archive(CLASS, {"factor.py": "3"})))
        assert (await child.one('{"x": 14}', "application/json")).body == b"42"
        await child.close()

    run(ask())


def test_a_config_says_how_requests_are_batched(host: CodeHost) -> None:
    """`model-config.yaml` is read in the child alone."""
    pytest.importorskip("yaml", reason="model-config.yaml needs pyyaml, which is no dependency")
    manifest = {"model": {"modelName": "m", "handler": "handler.py", "configFile": "model-config.yaml"}}
    members = {
        "MAR-INF/MANIFEST.json": json.dumps(manifest).encode(),
        "handler.py": b"def handle(data, context):\n    return data and [context.model_yaml_config['own']]",
        "model-config.yaml": b"batchSize: 8\nmaxBatchDelay: 50\nown: {a: 1}\n",
    }

    async def ask() -> None:
        child = Asker(start(host, open_archive(make_zip(members), "m.mar")))
        assert child.child.loaded.batch_size == 8
        assert child.child.loaded.max_batch_delay_s == 0.05
        assert json.loads((await child.one()).body) == {"a": 1}
        await child.close()

    run(ask())


def make_script(text: str, **members: bytes) -> Archive:
    """A SageMaker archive."""
    files = {"code/inference.py": text.encode(), "code/helper.py": b"FACTOR = 2.0", "weights.bin": b"w", **members}
    return open_archive(make_tar_gz(files), "m.tar.gz")


def test_a_script_is_called_function_by_function(host: CodeHost) -> None:
    """Only `model_fn` is given: arrays come and go as JSON, CSV and npy, through a torch module."""

    async def ask() -> None:
        child = Asker(start(host, make_script(SCRIPT)))
        answer = await child.one("[[1, 2], [3, 4]]", "application/json", "application/json")
        assert json.loads(answer.body) == [[2, 4], [6, 8]]
        answer = await child.one("1,2\n3,4", "text/csv", "text/csv")
        assert (answer.body, answer.content_type) == (b"2.0,4.0\n6.0,8.0\n", "text/csv")
        raw = io.BytesIO()
        np.save(raw, np.array([1.0, 2.0], np.float32))
        answer = await child.one(raw.getvalue(), "application/x-npy", "application/x-npy")
        np.testing.assert_array_equal(np.load(io.BytesIO(answer.body)), [2.0, 4.0])
        answer = await child.one("x", "image/png")
        assert answer.status == 500
        assert "image/png" in answer.message
        await child.close()

    run(ask())


def test_a_scripts_own_functions_are_used(host: CodeHost) -> None:
    """`transform_fn` alone, with a context where it takes one; or the three others, whose tuple names the type."""
    transform = "def model_fn(d): return 7\ndef transform_fn(m, body, t, a, context): return f'{m} {body} {t} {a}'"
    three = (
        "def model_fn(d, context): return 2\ndef input_fn(body, t): return float(body)\n"
        "def predict_fn(x, m): return x * m\ndef output_fn(p, a): return str(p), 'text/plain'"
    )

    async def ask() -> None:
        child = Asker(start(host, make_script(transform)))
        assert (await child.one("b", "text/csv", "text/csv")).body == b"7 b text/csv text/csv"
        await child.close()
        child = Asker(start(host, make_script(three)))
        answer = await child.one("21", "text/csv")
        assert (answer.body, answer.content_type) == (b"42.0", "text/plain")
        await child.close()

    run(ask())


@pytest.mark.parametrize(
    ("archive", "why"),
    [
        (
            make_code_archive("x = 1"),
            "handler.py has neither a function 'handle' nor exactly one class with `handle`, but no class",
        ),
        (make_code_archive("class A: pass\nclass B: pass"), "but A, B"),
        (make_code_archive("class A: pass"), "the class A of handler has no method `handle`"),
        (
            make_code_archive("import nosuch"),
            r"ModuleNotFoundError: No module named 'nosuch' \(handler.py, line 1\); pip install nosuch beside",
        ),
        (
            make_code_archive("import json\n\nimport sub.deep", {"sub/deep.py": "import json\njson.loads('{')"}),
            r"JSONDecodeError: .* \(sub/deep.py, line 2, raised in decoder.py, line \d+\)",
        ),
        (make_code_archive("def handle(d, c):\n    raise KeyError('k')"), r"KeyError: 'k' \(handler.py, line 2\)"),
        (make_code_archive("import sys\nsys.exit(3)"), r"SystemExit: 3 \(handler.py, line 2\)"),
        (make_script("x = 1"), "inference.py has no function `model_fn"),
        (make_script("def model_fn(d): 1\ndef transform_fn(): 1\ninput_fn = 1"), "transform_fn beside input_fn"),
        (make_script("def model_fn(d): return open(d + '/gone')"), "FileNotFoundError"),
        (
            open_archive(make_zip({**make_mar_manifest("nosuch_handler", "m.pt"), "m.pt": b""}), "m.mar"),
            "names the handler 'nosuch_handler'",
        ),
    ],
)
def test_what_cannot_be_loaded_says_why_and_where(host: CodeHost, archive: Archive, why: str) -> None:
    """An author sees the error and its line without the server's log."""
    with pytest.raises(Exception, match=why) as raised:
        start(host, archive)
    assert raised.type is CodeFailed or "nosuch_handler" in why


needs_ts = pytest.mark.skipif(
    importlib.util.find_spec("ts") is None, reason="torchserve is not installed: pip install fleetcast[torchserve]"
)

BASE = """
import torch
from ts.torch_handler.base_handler import BaseHandler
from ts.utils.util import PredictionException

class Mine(BaseHandler):
    def preprocess(self, data):
        rows = [row["body"]["x"] for row in data]
        if rows == [[]]:
            raise PredictionException("nothing to add", 513)
        return torch.tensor(rows, dtype=torch.float32, device=self.device)

    def postprocess(self, output):
        return output.tolist()
"""
NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1, bias=False)

    def forward(self, x):
        return self.layer(x)
"""


@needs_ts
def test_a_base_handler_of_the_wheel_runs_unchanged(host: CodeHost) -> None:
    """An eager model, as torch-model-archiver packs it; the package's own exception says status and message."""
    weights = io.BytesIO()
    torch.save({"layer.weight": torch.ones(1, 2)}, weights)
    model = {"modelName": "m", "handler": "mine.py", "modelFile": "net.py", "serializedFile": "w.pt"}
    members = {
        "MAR-INF/MANIFEST.json": json.dumps({"runtime": "python", "model": model}).encode(),
        "mine.py": BASE.encode(),
        "net.py": NET.encode(),
        "w.pt": weights.getvalue(),
    }

    async def ask() -> None:
        child = Asker(start(host, open_archive(make_zip(members), "m.mar")))
        outcome = await child.batch('{"x": [1, 2]}', '{"x": [3, 4]}', content_type="application/json")
        assert isinstance(outcome, list)
        assert [json.loads(answer.body) for answer in outcome] == [[3.0], [7.0]]
        answer = await child.one('{"x": []}', "application/json")
        assert (answer.status, answer.message) == (513, "nothing to add")
        await child.close()

    run(ask())


@pytest.mark.skipif(importlib.util.find_spec("ts") is not None, reason="torchserve is installed")
def test_a_handler_whose_package_is_missing_says_what_to_install(host: CodeHost) -> None:
    """By the name that pip knows."""
    with pytest.raises(CodeFailed, match=r"imports ts, which is not installed beside .*: pip install torchserve"):
        start(host, make_code_archive(BASE))
