"""Handlers that derive from the real `ts` wheel's, on each kind of file; and scikit-learn by a script."""

import asyncio
import importlib.util
import io
import json
import warnings
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from model_store.archives.archive import Archive, open_archive
from model_store.errors import CodeFailed
from server.code_messages import CodeAnswer, CodeRequest
from server.worker.sandbox.code_host import EVERY_KEY, CodeHost, CodePolicy
from tests.archives import make_tar_gz, make_zip
from tests.patience import PATIENCE_S
from tests.server.worker.sandbox.code_archives import NO_FIELDS, Asker, start

pytestmark = pytest.mark.slow

MIB = 1024 * 1024

pytest.importorskip("ts", reason="torchserve is not installed: pip install fleetcast[torchserve]")

MINE = """
import threading
import torch
from ts.torch_handler.base_handler import BaseHandler

class Mine(BaseHandler):
    def preprocess(self, data):
        return torch.tensor([row["body"]["x"] for row in data], dtype=torch.float32, device=self.device)

    def postprocess(self, output):
        return output.tolist()

    def get_insights(self, tensor, inputs, target):
        return [{"inputs": inputs, "target": target, "rows": len(tensor)}] * len(tensor)

    def describe_handle(self):
        return {"threads": torch.get_num_threads(), "config": self.model_yaml_config}
"""
ONNX_MINE = MINE.replace(
    "    def postprocess",
    "    def inference(self, data):\n"
    "        return self.model.run(None, {'x': data.numpy()})[0]\n\n    def postprocess",
)
EXPORTED = MINE.replace(
    "    def preprocess",
    "    def initialize(self, context):\n"
    "        self.device, self.model_yaml_config = torch.device('cpu'), context.model_yaml_config\n"
    "        path = context.system_properties['model_dir'] + '/' + context.manifest['model']['serializedFile']\n"
    "        self.model = torch.export.load(path).module()\n\n    def preprocess",
)
NET = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1, bias=False)

    def forward(self, x):
        return self.layer(x)
"""


class Net(torch.nn.Module):
    """The same network, which adds two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.ones_(self.layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum."""
        result: torch.Tensor = self.layer(x)
        return result


def pack(handler: str, serialized: str, data: bytes, **more: str) -> Archive:
    """An archive as torch-model-archiver makes it."""
    model = {
        "modelName": "m",
        "handler": "mine.py",
        "serializedFile": serialized,
        **({"modelFile": "net.py"} if more else {}),
    }
    members = {
        "MAR-INF/MANIFEST.json": json.dumps({"runtime": "python", "model": model}).encode(),
        "mine.py": handler.encode(),
        serialized: data,
        **{f"{name}.py": text.encode() for name, text in more.items()},
    }
    return open_archive(make_zip(members), "m.mar")


def save_eager() -> bytes:
    """The weights."""
    file = io.BytesIO()
    torch.save(Net().state_dict(), file)
    return file.getvalue()


def save_script() -> bytes:
    """A TorchScript file: torch warns that these are of the past, and archives hold them."""
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(Net()), file)
    return file.getvalue()


def save_exported() -> bytes:
    """A `.pt2` file, of any number of rows."""
    file = io.BytesIO()
    rows = torch.export.Dim("rows")
    torch.export.save(torch.export.export(Net(), (torch.zeros(3, 2),), dynamic_shapes={"x": {0: rows}}), file)
    return file.getvalue()


def save_onnx() -> bytes:
    """An ONNX file: a product with ones."""
    from onnx import TensorProto, helper  # noqa: PLC0415 -- only this test needs it

    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2, 1], [1.0, 1.0])
    graph = helper.make_graph([node], "sum", [given], [made], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


@pytest.fixture(scope="module")
def host() -> Iterator[CodeHost]:
    """Children that may take long to import what they need."""
    host = CodeHost(CodePolicy((EVERY_KEY,), 1024 * MIB, PATIENCE_S))
    host.warm()
    yield host
    host.close()


def run(test: Coroutine[Any, Any, None]) -> None:
    """In a loop of its own."""
    asyncio.run(test)


async def ask(child: Asker, *asked: tuple[list[float], Mapping[str, str]]) -> list[Any]:
    """The JSON of the answers to one batch; each request has its numbers and its properties."""
    done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    requests = [
        CodeRequest(str(i), "application/json", "", json.dumps({"x": x}).encode(), NO_FIELDS, (), dict(properties))
        for i, (x, properties) in enumerate(asked)
    ]
    child.child.run(requests, done.set_result)
    outcome: list[CodeAnswer] = await asyncio.wait_for(done, 60)
    assert [answer.message for answer in outcome if answer.failed] == []
    return [json.loads(answer.body) for answer in outcome]


@pytest.mark.parametrize("kind", ["eager", "script", "exported", "onnx"])
def test_each_kind_of_file_is_loaded_by_the_wheel_itself(host: CodeHost, kind: str) -> None:
    """State dict, TorchScript, ONNX (by ONNX Runtime, in the child alone), and a `.pt2` by the handler's own line."""
    archives = {
        "eager": lambda: pack(MINE, "w.pt", save_eager(), net=NET),
        "script": lambda: pack(MINE, "script.pt", save_script()),
        "exported": lambda: pack(EXPORTED, "net.pt2", save_exported()),
        "onnx": lambda: pack(ONNX_MINE, "net.onnx", save_onnx()),
    }

    async def answer() -> None:
        child = Asker(start(host, archives[kind]()))
        assert await ask(child, ([1, 2], {}), ([3, 4], {})) == [[3.0], [7.0]]
        await child.close()

    run(answer())


def test_a_handler_is_asked_to_explain_and_to_describe(host: CodeHost) -> None:
    """By what the dialect adds to the headers; those that are asked for something else are another call."""
    explain, predict, describe = {"explain": "True"}, {"explain": "False"}, {"describe": "True"}

    async def answer() -> None:
        child = Asker(start(host, pack(MINE, "w.pt", save_eager(), net=NET)))
        found = await ask(child, ([1, 2], predict), ([3, 4], explain), ([5, 6], predict), ([7, 8], describe))
        assert found[::2] == [[3.0], [11.0]]
        assert found[1] == {"inputs": {"x": [3, 4]}, "target": 0, "rows": 1}
        assert found[3]["config"] == {}
        await child.close()

    run(answer())


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_handlers_of_images_say_that_they_need_torchvision(host: CodeHost) -> None:
    """TorchServe's own by its name, and one that derives from it; with the line of the archive, and what to install."""
    named = {"modelName": "m", "handler": "image_classifier", "serializedFile": "net.pt"}
    manifest = json.dumps({"runtime": "python", "model": named}).encode()
    own = open_archive(make_zip({"MAR-INF/MANIFEST.json": manifest, "net.pt": save_script()}), "m.mar")
    with pytest.raises(CodeFailed, match=r"image_classifier imports torchvision, .*: pip install torchvision"):
        start(host, own)
    text = "from ts.torch_handler.image_classifier import ImageClassifier\n\nclass Mine(ImageClassifier):\n    pass\n"
    where = r"\(mine.py, line 1, raised in \w+.py, line \d+\); pip install torchvision beside the server"
    with pytest.raises(CodeFailed, match=where):
        start(host, pack(text, "net.pt", save_script()))


def test_the_template_has_the_package_and_one_thread(host: CodeHost) -> None:
    """So that a handler that derives from it loads fast, and a fork is sound."""
    host.warm()

    async def answer() -> None:
        handler = "import sys\nHERE = 'ts.torch_handler.base_handler' in sys.modules\n"
        child = Asker(start(host, pack(handler + "def handle(d, c): return d and [HERE]", "w.pt", b"")))
        assert await ask(child, ([], {})) == [True]
        await child.close()

    run(answer())
    assert host._template is not None
    assert len(list(Path(f"/proc/{host._template._process.pid}/task").iterdir())) == 1


SKLEARN = """
import os, joblib

def model_fn(model_dir):
    return joblib.load(os.path.join(model_dir, "model.joblib"))
"""


def test_a_pipeline_of_scikit_learn_runs_by_a_sagemaker_script(host: CodeHost) -> None:
    """As its container runs it: only `model_fn` is given."""
    joblib = pytest.importorskip("joblib")
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LinearRegression  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415

    model = make_pipeline(StandardScaler(), LinearRegression()).fit([[0, 0], [1, 0], [0, 1], [5, 7]], [0, 1, 1, 12])
    file = io.BytesIO()
    joblib.dump(model, file)
    members = {"code/inference.py": SKLEARN.encode(), "model.joblib": file.getvalue()}
    archive = open_archive(make_tar_gz(members), "m.tar.gz")

    async def answer() -> None:
        child = Asker(start(host, archive))
        body, as_json = "[[1, 2], [3, 4]]", "application/json"
        assert json.loads((await child.one(body, as_json, as_json)).body) == pytest.approx([3.0, 7.0])
        assert (await child.one("1,2", "text/csv", "text/csv")).status == 500  # one row is no matrix to scikit-learn
        await child.close()

    run(answer())
