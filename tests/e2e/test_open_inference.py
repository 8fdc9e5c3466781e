"""The Open Inference Protocol, asked by an unmodified tritonclient of a real server."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from handlers.base import Float32
from tests.e2e.models import ABSOLUTE, RELATIVE, Model, onnx_model, pack_forecaster
from tests.e2e.server import Server, run_server, upload
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

MODELS = {
    each.name: each
    for each in (
        *(pack_forecaster(f"au/{i}.mar", i) for i in range(6)),
        pack_forecaster("plain", 7),
        onnx_model("single/dense.mar", 8),
    )
}
OUTPUTS = {name: "y" if name.startswith("single") else "predictions" for name in MODELS}


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of these models."""
    bucket = s3.bucket()
    upload(s3, bucket, list(MODELS.values()))
    with run_server(s3, tmp_path_factory.mktemp("v2"), f"s3://{bucket}", model_cache_bytes="64MiB") as server:
        yield server


@pytest.fixture
def client(house: Server) -> Iterator[Any]:
    """Triton's own client of it."""
    with triton.InferenceServerClient("{}:{}".format(*house.address)) as found:
        yield found


def make_rows(model: Model, count: int, seed: int = 0) -> Float32:
    """Seeded inputs [count, *shape]."""
    return np.random.default_rng(seed).normal(size=(count, *model.shape)).astype(np.float32)


def make_input(x: Float32, *, binary: bool, module: Any = triton) -> Any:
    """The one input of these models."""
    tensor = module.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary)
    return tensor


def check_rows(model: Model, x: Float32, found: Float32) -> None:
    """Raises AssertionError unless each row's answer is the network's own."""
    expected = np.stack([model.run(row) for row in x])
    np.testing.assert_allclose(found, expected, rtol=RELATIVE, atol=ABSOLUTE)


@pytest.mark.parametrize("name", ["au/0.mar", "plain", "single/dense.mar"])
@pytest.mark.parametrize("sent", [True, False], ids=["binary in", "json in"])
@pytest.mark.parametrize("asked", [True, False, None], ids=["binary out", "json out", "not said"])
def test_tensors_of_any_archive(client: Any, name: str, sent: bool, asked: bool | None) -> None:
    """One row without the axis of rows, one with it, and several; as JSON, as bytes and mixed; the id comes back."""
    model = MODELS[name]
    outputs = None if asked is None else [triton.InferRequestedOutput(OUTPUTS[name], binary_data=asked)]
    for count in (1, 3):
        x = make_rows(model, count)
        answer = client.infer(name, [make_input(x, binary=sent)], outputs=outputs, request_id="seven")
        check_rows(model, x, answer.as_numpy(OUTPUTS[name]))
        described = answer.get_response()
        assert (described["id"], described["model_name"], described["model_version"]) == ("seven", name, "1")
    x = make_rows(model, 1)
    found = client.infer(name, [make_input(x[0], binary=sent)], outputs=outputs).as_numpy(OUTPUTS[name])
    check_rows(model, x, found[None])


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compressed_requests(client: Any, coding: str) -> None:
    """The header counts the JSON before it was compressed."""
    x = make_rows(MODELS["plain"], 2)
    answer = client.infer("plain", [make_input(x, binary=True)], request_compression_algorithm=coding)
    check_rows(MODELS["plain"], x, answer.as_numpy("predictions"))


def test_a_body_without_json_is_the_input(house: Server) -> None:
    """Triton's raw request: the header says 0, and the answer is binary."""
    x = make_rows(MODELS["plain"], 2)
    url, headers = f"{house.url}/v2/models/plain/infer", {"Inference-Header-Content-Length": "0"}
    answer = httpx.post(url, content=x.tobytes(), headers=headers)
    assert answer.status_code == 200, answer.text
    start = int(answer.headers["inference-header-content-length"])
    (output,) = json.loads(answer.content[:start])["outputs"]
    assert output["parameters"] == {"binary_data_size": len(answer.content) - start}
    check_rows(MODELS["plain"], x, np.frombuffer(answer.content[start:], "<f4").reshape(output["shape"]))


def test_server_and_models_describe_themselves(client: Any) -> None:
    """Live, ready, metadata; a model that is not loaded is loaded for the question."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert {"binary_tensor_data", "classification"} <= set(client.get_server_metadata()["extensions"])
    assert client.is_model_ready("au/5.mar")
    assert client.is_model_ready("au/5.mar", "1")
    assert not client.is_model_ready("au/none.mar")
    assert client.get_model_metadata("single/dense.mar") == {
        "name": "single/dense.mar",
        "versions": ["1"],
        "platform": "fleetcast",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3, 12]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 4, 3]}],
    }
    shape = MODELS["plain"].shape
    assert client.get_model_metadata("plain")["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, *shape]}]


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"model_name": "none"}, "404", "none"),
        ({"model_version": "9"}, "404", "no version '9'"),
        (
            {"outputs": [triton.InferRequestedOutput("z")]},
            "400",
            "outputs[0].name: the output 'z' is none of",
        ),
        ({"model_name": "../x"}, "400", "segment '..'"),
    ],
)
def test_mistakes_are_explained(client: Any, change: dict[str, Any], status: str, said: str) -> None:
    """The place and what to do, in the one message that this client shows."""
    asked: dict[str, Any] = {"model_name": "plain", "inputs": [make_input(make_rows(MODELS["plain"], 1), binary=True)]}
    with pytest.raises(InferenceServerException) as caught:
        client.infer(**{**asked, **change})
    assert caught.value.status() == status
    assert said in caught.value.message()


def test_a_hundred_at_once(house: Server) -> None:
    """Each its own model's answer: requests of this protocol share forwards as others do."""
    names = [f"au/{i % 6}.mar" for i in range(100)]
    address = "{}:{}".format(*house.address)

    def ask(seed: int) -> None:
        model, x = MODELS[names[seed]], make_rows(MODELS[names[seed]], 1, seed)
        with triton.InferenceServerClient(address) as each:
            check_rows(model, x, each.infer(names[seed], [make_input(x, binary=True)]).as_numpy("predictions"))

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(ask, range(100)))


def test_the_asynchronous_client(house: Server) -> None:
    """The same over aiohttp."""

    async def ask() -> None:
        async with triton_aio.InferenceServerClient("{}:{}".format(*house.address)) as client:
            x = make_rows(MODELS["plain"], 2)
            answers = await asyncio.gather(
                *(client.infer("plain", [make_input(x, binary=True, module=triton_aio)]) for _ in range(10))
            )
            for answer in answers:
                check_rows(MODELS["plain"], x, answer.as_numpy("predictions"))

    asyncio.run(ask())
