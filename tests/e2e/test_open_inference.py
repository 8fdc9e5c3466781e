"""The Open Inference Protocol, asked by an unmodified tritonclient of a real server."""

import asyncio
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from onnx import TensorProto
from tritonclient.utils import InferenceServerException

from handlers.base import Float32
from tests.e2e.models import ABSOLUTE, FORECAST_TCN, RELATIVE, Model, onnx_model, pack_forecaster, pack_identity
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
#: What a client sends and gets back of each datatype.
VALUES: dict[str, tuple[int, list[Any], Any]] = {
    "BOOL": (TensorProto.BOOL, [True, False, True], np.bool_),
    **{f"INT{n}": (getattr(TensorProto, f"INT{n}"), [-(1 << n - 1), 0, 7], f"i{n // 8}") for n in (8, 16, 32, 64)},
    **{f"UINT{n}": (getattr(TensorProto, f"UINT{n}"), [(1 << n) - 1, 0, 7], f"u{n // 8}") for n in (8, 16, 32, 64)},
    "FP16": (TensorProto.FLOAT16, [1.5, -65504, 0], np.float16),
    "BF16": (TensorProto.BFLOAT16, [1.5, -2, 0], ml_dtypes.bfloat16),
    "FP32": (TensorProto.FLOAT, [1.5, 1e-30, 3e38], np.float32),
    "FP64": (TensorProto.DOUBLE, [0.1, -1e300, 0], np.float64),
    "BYTES": (TensorProto.STRING, ["a", "\u00e9", ""], object),
}
FORECASTER = pack_forecaster("forecasts.mar", 9, config=FORECAST_TCN, forecast=True)
OUTPUTS = {name: "y" if name.startswith("single") else "predictions" for name in MODELS}


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of these models."""
    bucket = s3.bucket()
    upload(s3, bucket, [*MODELS.values(), FORECASTER])
    for datatype, (kind, _, _) in VALUES.items():
        s3.put(bucket, f"typed/{datatype}.mar", pack_identity(kind))
    settings = {"model_cache_bytes": "64MiB", "repository_control": "on"}
    with run_server(s3, tmp_path_factory.mktemp("v2"), f"s3://{bucket}", **settings) as server:
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


def make_typed(datatype: str, *, binary: bool, module: Any = triton) -> tuple[Any, Any]:
    """An input [1, 3] of this datatype, and what it holds."""
    _, values, dtype = VALUES[datatype]
    array = np.array([values], dtype)
    tensor = module.InferInput("x", [1, 3], datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor, array


def list_forms() -> Iterator[tuple[str, bool]]:
    """Every datatype as binary and as JSON, but for those that the client itself never sends as JSON."""
    for datatype in VALUES:
        yield datatype, True
        if datatype not in ("FP16", "BF16"):
            yield datatype, False


def check_values(datatype: str, array: Any, found: Any) -> None:
    """Raises AssertionError unless the client has got what it sent."""
    texts = [each.decode() if isinstance(each, bytes) else each for each in found.reshape(-1)]
    assert texts == array.reshape(-1).tolist() if datatype == "BYTES" else (found == array).all()
    assert found.shape == (1, 3)


def test_every_datatype(client: Any) -> None:
    """As binary and as JSON, each way, to the last bit."""
    for datatype, binary in list_forms():
        tensor, array = make_typed(datatype, binary=binary)
        asked = [triton.InferRequestedOutput("y", binary_data=binary)]
        check_values(datatype, array, client.infer(f"typed/{datatype}.mar", [tensor], outputs=asked).as_numpy("y"))
        (described,) = client.get_model_metadata(f"typed/{datatype}.mar")["inputs"]
        assert described == {"name": "x", "datatype": datatype, "shape": [-1, -1]}


def test_half_precision_is_answered_as_json(house: Server) -> None:
    """Which this client does not ask for, and others may."""
    for datatype in ("FP16", "BF16"):
        values = VALUES[datatype][1]
        body = {"inputs": [{"name": "x", "shape": [3], "datatype": datatype, "data": values}]}
        answer = house.http.post(f"{house.url}/v2/models/typed/{datatype}.mar/infer", json=body).json()
        assert answer["outputs"][0]["data"] == values


@pytest.mark.parametrize(
    ("datatype", "sent", "said"),
    [
        ("INT32", ("x", [1, 3], "INT64", np.array([[1, 2, 3]], np.int64)), "takes INT32, not 'INT64'"),
        ("FP64", ("x", [1, 3], "FP32", np.zeros((1, 3), np.float32)), "takes FP64, not 'FP32'"),
        ("FP32", ("x", [1, 1, 3], "FP32", np.zeros((1, 1, 3), np.float32)), "has the shape ['any']"),
        ("FP32", ("z", [1, 3], "FP32", np.zeros((1, 3), np.float32)), "'z' is none of the model's, which takes x"),
        ("FP32", ("x", [1, 3], "FP32", np.array([[1, np.nan, 3]], np.float32)), "x[0][1]: the number is not finite"),
    ],
)
def test_wrong_tensors_are_explained(client: Any, datatype: str, sent: Any, said: str) -> None:
    """Datatype, shape, name and value: what was expected, what came, and where."""
    name, shape, sent_type, array = sent
    tensor = triton.InferInput(name, shape, sent_type)
    tensor.set_data_from_numpy(array)
    with pytest.raises(InferenceServerException, match=re.escape(said)) as caught:
        client.infer(f"typed/{datatype}.mar", [tensor])
    assert caught.value.status() == "400"


def make_question() -> tuple[Any, dict[str, Any]]:
    """A forecast as one element of BYTES, and the request that is in it."""
    request = json.loads(FORECASTER.question(3).body)
    tensor = triton.InferInput("request", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([json.dumps(request)], object))
    return tensor, request


def test_a_forecast_is_asked_as_its_metadata_say(client: Any) -> None:
    """The answer is the network's own; the metadata name the input and what a request needs."""
    said = client.get_model_metadata(FORECASTER.name)["parameters"]
    assert said["forecast_input"] == {"name": "request", "datatype": "BYTES", "shape": [1]}
    assert said["forecast"]["frequency"] == "1h"
    assert said["forecast"]["history_length"] == FORECASTER.shape[1]
    tensor, _ = make_question()
    (answer,) = client.infer(FORECASTER.name, [tensor]).as_numpy("response")
    FORECASTER.question(3).check(answer)
    x = make_rows(FORECASTER, 1)
    check_rows(FORECASTER, x, client.infer(FORECASTER.name, [make_input(x, binary=True)]).as_numpy("predictions"))


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compressed_answers(client: Any, coding: str) -> None:
    """As JSON and as binary, to a client that unpacks them itself."""
    for binary in (True, False):
        x = make_rows(MODELS["plain"], 3)
        asked = [triton.InferRequestedOutput("predictions", binary_data=binary)]
        answer = client.infer(
            "plain", [make_input(x, binary=True)], outputs=asked, response_compression_algorithm=coding
        )
        check_rows(MODELS["plain"], x, answer.as_numpy("predictions"))


def test_the_largest_values(client: Any) -> None:
    """The classification extension, as this client asks for it and reads it."""
    tensor, _ = make_typed("INT32", binary=True)
    asked = [triton.InferRequestedOutput("y", class_count=2)]
    found = client.infer("typed/INT32.mar", [tensor], outputs=asked).as_numpy("y")
    assert found.tolist() == [[b"7:2", b"0:1"]]


def test_a_timeout_is_a_deadline(client: Any) -> None:
    """One microsecond is too short for any answer; its own time is never longer than the server's."""
    x = make_rows(MODELS["plain"], 1)
    with pytest.raises(InferenceServerException) as caught:
        client.infer("plain", [make_input(x, binary=True)], timeout=1)
    assert caught.value.status() in ("503", "504"), caught.value
    assert client.infer("plain", [make_input(x, binary=True)], timeout=60_000_000, priority=3) is not None


def test_names_in_any_spelling(house: Server) -> None:
    """Slashes as they are or percent-encoded, with a version, or in a header in place of the path's."""
    for path in ("au/1.mar", "au%2F1.mar", "au%2f1.mar/versions/1", "au/1.mar/versions/1"):
        assert house.http.get(f"{house.url}/v2/models/{path}").json()["name"] == "au/1.mar"
    found = house.http.get(f"{house.url}/v2/models/any", headers={"Target-Model": "au/1.mar"}).json()
    assert found["name"] == "au/1.mar"


def test_the_repository(client: Any) -> None:
    """Load, index, statistics, configuration and unload, as an operator's script asks for them."""
    name, row = "au/3.mar", make_input(make_rows(MODELS["au/3.mar"], 2), binary=True)
    client.load_model(name)
    assert {"name": name, "version": "1", "state": "READY"} in client.get_model_repository_index()
    before = read_counts(client, name)
    for _ in range(3):
        client.infer(name, [row])
    with pytest.raises(InferenceServerException):
        client.infer(name, [row], outputs=[triton.InferRequestedOutput("z")])
    after = read_counts(client, name)
    assert [a - b for a, b in zip(after, before, strict=True)] == [3, 1]
    (stats,) = client.get_inference_statistics(name)["model_stats"]
    assert stats["last_inference"] > 1_700_000_000_000
    assert 1 <= stats["execution_count"] <= stats["inference_count"]
    assert stats["inference_stats"]["success"]["ns"] >= stats["inference_stats"]["compute_infer"]["ns"] > 0
    assert name in [each["name"] for each in client.get_inference_statistics()["model_stats"]]
    config = client.get_model_config(name)
    assert config["input"][0]["dims"] == list(MODELS[name].shape)
    client.unload_model(name)
    assert name not in [each["name"] for each in client.get_model_repository_index()]
    assert client.is_model_ready(name), "it is in the store"
    with pytest.raises(InferenceServerException, match="is no parameter of load"):
        client.load_model(name, config="{}")
    with pytest.raises(InferenceServerException, match=r"names that are like it: au/3\.mar") as caught:
        client.load_model("au/3.tar.gz")
    assert caught.value.status() == "404"


def read_counts(client: Any, name: str) -> list[int]:
    """How many requests a model has answered, and how many it has refused."""
    (found,) = client.get_inference_statistics(name)["model_stats"]
    return [found["inference_stats"][each]["count"] for each in ("success", "fail")]


def test_what_is_not_served_says_so(client: Any) -> None:
    """Traces, logs and shared memory: a message that names what there is, and no failure."""
    unserved = (
        client.get_trace_settings,
        client.get_log_settings,
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
    )
    for verb in unserved:
        with pytest.raises(InferenceServerException, match="no such path") as caught:
            verb()
        assert caught.value.status() == "404"


def test_every_verb_of_the_asynchronous_client(house: Server) -> None:
    """Datatypes and verbs as above, and a hundred requests at a time."""

    async def ask() -> None:
        async with triton_aio.InferenceServerClient("{}:{}".format(*house.address)) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("plain")
            assert (await client.get_server_metadata())["name"] == "fleetcast"
            await client.load_model("plain")
            assert "plain" in [each["name"] for each in await client.get_model_repository_index()]
            assert (await client.get_model_config("plain"))["name"] == "plain"
            assert (await client.get_inference_statistics("plain"))["model_stats"]
            for datatype, binary in list_forms():
                tensor, array = make_typed(datatype, binary=binary, module=triton_aio)
                asked = [triton_aio.InferRequestedOutput("y", binary_data=binary)]
                answer = await client.infer(f"typed/{datatype}.mar", [tensor], outputs=asked)
                check_values(datatype, array, answer.as_numpy("y"))
            x = make_rows(MODELS["au/1.mar"], 1)
            sent = [make_input(x, binary=True, module=triton_aio)]
            for found in await asyncio.gather(*(client.infer("au/1.mar", sent) for _ in range(100))):
                check_rows(MODELS["au/1.mar"], x, found.as_numpy("predictions"))
            with pytest.raises(InferenceServerException, match="no version '9'"):
                await client.infer("plain", sent, model_version="9")
            await client.unload_model("plain")

    asyncio.run(ask())
