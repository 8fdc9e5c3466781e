"""The Open Inference Protocol over gRPC, asked by unmodified clients (tritonclient, grpcio) of a real server."""

import asyncio
import json
import os
import queue
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from google.protobuf.json_format import ParseDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException

from handlers.base import Float32
from handlers.kinds import ArchiveParts, pack_model
from model_store.archives.manifest import Kind
from server.front.grpc.messages import POOL, find_message
from tests.e2e.models import ABSOLUTE, RELATIVE, Model, onnx_model, pack_forecaster
from tests.e2e.server import Server, run_server, upload
from tests.patience import PATIENCE_S, wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

MODELS = {
    each.name: each
    for each in (
        *(pack_forecaster(f"au/{i}.mar", i) for i in range(4)),
        pack_forecaster("plain", 7),
        onnx_model("single/dense.mar", 8),
    )
}
OUTPUTS = {name: "y" if name.startswith("single") else "predictions" for name in MODELS}
#: How tritonclient takes each datatype: the values of one row.
VALUES: Mapping[str, npt.NDArray[Any]] = {
    "BOOL": np.array([[True, False]]),
    "INT8": np.array([[-128, 127]], np.int8),
    "INT16": np.array([[-(2**15), 2**15 - 1]], np.int16),
    "INT32": np.array([[-(2**31), 2**31 - 1]], np.int32),
    "INT64": np.array([[-(2**63), 2**63 - 1]], np.int64),
    "UINT8": np.array([[0, 255]], np.uint8),
    "UINT16": np.array([[0, 2**16 - 1]], np.uint16),
    "UINT32": np.array([[0, 2**32 - 1]], np.uint32),
    "UINT64": np.array([[0, 2**64 - 1]], np.uint64),
    "FP16": np.array([[-0.5, 65504]], np.float16),
    "BF16": np.array([[-0.5, 2.0**100]], ml_dtypes.bfloat16),
    "FP32": np.array([[-0.1, 3e38]], np.float32),
    "FP64": np.array([[-0.1, 1e308]], np.float64),
    "BYTES": np.array([[b"", "Zürich".encode()]], np.object_),
}
TYPED: Mapping[str, Sequence[str]] = {"types": [name for name in VALUES if name != "BF16"], "brain": ["BF16"]}
LIMIT = 256 * 1024  #: max_body_bytes of this server


def pack_graph(nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> bytes:
    """An ONNX archive."""
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return pack_model(Kind.ONNX, ArchiveParts(program=model.SerializeToString()), model_name="m")


def pack_types(datatypes: Sequence[str]) -> bytes:
    """An input of each of these, which comes back as the output of the same name in lower case."""
    onnx_names = {"FP16": "FLOAT16", "BF16": "BFLOAT16", "FP32": "FLOAT", "FP64": "DOUBLE", "BYTES": "STRING"}
    types = {name: getattr(TensorProto, onnx_names.get(name, name)) for name in datatypes}
    return pack_graph(
        [helper.make_node("Identity", [name], [name.lower()]) for name in types],
        [helper.make_tensor_value_info(name, kind, ["n", 2]) for name, kind in types.items()],
        [helper.make_tensor_value_info(name.lower(), kind, ["n", 2]) for name, kind in types.items()],
    )


def pack_mixed() -> bytes:
    """A BF16 and a BYTES go in, the first comes out as FP32."""
    make, tensor = helper.make_node, helper.make_tensor_value_info
    return pack_graph(
        [make("Cast", ["BF16"], ["fp32"], to=TensorProto.FLOAT), make("Identity", ["BYTES"], ["bytes"])],
        [tensor("BF16", TensorProto.BFLOAT16, ["n", 2]), tensor("BYTES", TensorProto.STRING, ["n", 2])],
        [tensor("fp32", TensorProto.FLOAT, ["n", 2]), tensor("bytes", TensorProto.STRING, ["n", 2])],
    )


def pack_recorded() -> bytes:
    """What answered the recording: `quantiles` are the first two of the three numbers of `context`."""
    make, tensor = helper.make_node, helper.make_tensor_value_info
    constants = [
        make("Constant", [], [name], value=helper.make_tensor(name, TensorProto.INT64, [1], [value]))
        for name, value in (("first", 0), ("end", 2), ("axis", 1))
    ]
    return pack_graph(
        [*constants, make("Slice", ["context", "first", "end", "axis"], ["quantiles"])],
        [tensor("context", TensorProto.FLOAT, ["n", 3])],
        [tensor("quantiles", TensorProto.FLOAT, ["n", 2])],
    )


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of these models with a gRPC listener."""
    bucket, folder = s3.bucket(), tmp_path_factory.mktemp("grpc")
    upload(s3, bucket, list(MODELS.values()))
    for name, datatypes in TYPED.items():
        s3.put(bucket, name, pack_types(datatypes))
    s3.put(bucket, "au/NSW1.mar", pack_recorded())
    s3.put(bucket, "mixed", pack_mixed())
    s3.put(bucket, "impossible", pack_types(["BF16", "BYTES"]))
    settings = {"grpc_port": 0, "max_body_bytes": LIMIT, "worker_timeout_s": 60, "repository_control": "on"}
    with run_server(s3, folder, f"s3://{bucket}", model_cache_bytes="64MiB", **settings) as server:
        yield server


@pytest.fixture
def client(house: Server) -> Iterator[Any]:
    """Triton's own client of it."""
    with triton.InferenceServerClient(house.grpc) as found:
        yield found


def make_rows(model: Model, count: int, seed: int = 0) -> Float32:
    """Seeded inputs [count, *shape]."""
    return np.random.default_rng(seed).normal(size=(count, *model.shape)).astype(np.float32)


def make_input(x: Float32) -> Any:
    """The one input of these models."""
    tensor = triton.InferInput("x", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    return tensor


def check_rows(model: Model, x: Float32, found: Float32) -> None:
    """Raises AssertionError unless each row's answer is the network's own."""
    expected = np.stack([model.run(row) for row in x])
    np.testing.assert_allclose(found, expected, rtol=RELATIVE, atol=ABSOLUTE)


@pytest.mark.parametrize("name", ["au/0.mar", "plain", "single/dense.mar"])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tensors_of_any_archive(client: Any, name: str, compression: str | None) -> None:
    """One row without the axis of rows, one with it, and several; compressed or not; the id comes back."""
    model = MODELS[name]
    outputs = [triton.InferRequestedOutput(OUTPUTS[name])]
    for x in (make_rows(model, 1), make_rows(model, 3), make_rows(model, 1)[0]):
        answer = client.infer(
            name, [make_input(x)], outputs=outputs, request_id="seven", compression_algorithm=compression
        )
        rows = x if x.ndim == 3 else x[None]
        found = answer.as_numpy(OUTPUTS[name])
        check_rows(model, rows, found if x.ndim == 3 else found[None])
        said = answer.get_response()
        assert (said.id, said.model_name, said.model_version) == ("seven", name, "1")


def test_server_and_models_describe_themselves(client: Any, house: Server) -> None:
    """Live, ready, metadata, configuration; a model that is not loaded is loaded for the question."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata().name == "fleetcast"
    assert client.is_model_ready("au/3.mar")
    assert client.is_model_ready("au/3.mar", "1")
    assert not client.is_model_ready("au/none.mar")
    metadata = client.get_model_metadata("single/dense.mar", as_json=True)
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "3", "12"]}]
    config = client.get_model_config("single/dense.mar", as_json=True)["config"]
    assert config["output"] == [{"name": "y", "data_type": "TYPE_FP32", "dims": ["4", "3"]}]
    front = [row for row in house.processes("front") if "grpc" in row]
    assert [row["grpc"] for row in front] == [{"grpc": house.grpc}]


@pytest.mark.parametrize("model", TYPED)
def test_every_datatype_comes_back(client: Any, model: str) -> None:
    """Of one archive, all in one message; the configuration and the metadata name them."""
    given, inputs = {name: VALUES[name] for name in TYPED[model]}, []
    for name, values in given.items():
        inputs.append(triton.InferInput(name, list(values.shape), name))
        inputs[-1].set_data_from_numpy(values)
    answer = client.infer(model, inputs)
    for name, values in given.items():
        found = answer.as_numpy(name.lower())
        np.testing.assert_array_equal(found, values)
        assert found.dtype == values.dtype
    assert [each.datatype for each in client.get_model_metadata(model).inputs] == list(given)
    config = client.get_model_config(model, as_json=True)["config"]
    kinds = ["TYPE_STRING" if name == "BYTES" else f"TYPE_{name}" for name in given]
    assert [each["data_type"] for each in config["input"]] == kinds


def test_brain_floats_and_texts_in_one_model(client: Any) -> None:
    """Both as inputs, with a text for a text; BF16 for a text is refused with what to do."""
    inputs = []
    for name in ("BF16", "BYTES"):
        inputs.append(triton.InferInput(name, [1, 2], name))
        inputs[-1].set_data_from_numpy(VALUES[name])
    answer = client.infer("mixed", inputs)
    np.testing.assert_array_equal(answer.as_numpy("bytes"), VALUES["BYTES"])
    np.testing.assert_array_equal(answer.as_numpy("fp32"), VALUES["BF16"].astype(np.float32))
    with pytest.raises(InferenceServerException, match="cast the model's BF16 outputs to FP32"):
        client.infer("impossible", inputs)


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"model_name": "none"}, "NOT_FOUND", "none"),
        ({"model_name": "plain", "headers": {"target-model": "other"}}, "NOT_FOUND", "other"),
        ({"model_version": "9"}, "NOT_FOUND", "no version '9'"),
        ({"outputs": [triton.InferRequestedOutput("z")]}, "INVALID_ARGUMENT", "outputs[0].name: the output 'z'"),
        ({"model_name": "../x"}, "INVALID_ARGUMENT", "segment '..'"),
        ({"timeout": -1}, "INVALID_ARGUMENT", "parameters.timeout: must be a whole number"),
        ({"inputs": [make_input(np.zeros((1, 9, 9), np.float32))]}, "INVALID_ARGUMENT", "inputs[0].shape"),
        ({"inputs": [make_input(np.zeros((1, LIMIT), np.float32))]}, "RESOURCE_EXHAUSTED", str(LIMIT)),
    ],
)
def test_mistakes_are_explained(client: Any, change: dict[str, Any], status: str, said: str) -> None:
    """The place and what to do, in the one message that this client shows."""
    asked: dict[str, Any] = {"model_name": "plain", "inputs": [make_input(make_rows(MODELS["plain"], 1))]}
    with pytest.raises(InferenceServerException) as caught:
        client.infer(**{**asked, **change})
    assert caught.value.status() == f"StatusCode.{status}"
    assert said in caught.value.message()


def test_an_unknown_model_is_answered_with_names_like_it(client: Any) -> None:
    """Of those that answered here before."""
    client.infer("plain", [make_input(make_rows(MODELS["plain"], 1))])

    def ask() -> bool:
        with pytest.raises(InferenceServerException) as caught:
            client.infer("plain.mar", [make_input(make_rows(MODELS["plain"], 1))])
        return "names that are like it: plain" in caught.value.message()

    wait_until(ask, "a look for names, which are not made for every request")


def test_a_hundred_at_once(house: Server, client: Any) -> None:
    """Each its own model's answer, on one connection, and all of them counted with those of HTTP."""
    names, labels = [f"au/{i % 4}.mar" for i in range(100)], {"protocol": "grpc", "code": "200"}
    before = house.total("fleetcast_inference_requests_total", **labels)

    def ask(seed: int) -> None:
        model, x = MODELS[names[seed]], make_rows(MODELS[names[seed]], 1, seed)
        check_rows(model, x, client.infer(names[seed], [make_input(x)]).as_numpy("predictions"))

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(ask, range(100)))
    assert house.total("fleetcast_inference_requests_total", **labels) == before + 100


def test_a_stream_answers_in_order(client: Any) -> None:
    """Each message its answer, an error among them, which ends nothing."""
    found: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: found.put((result, error)))
    rows = {str(i): make_rows(MODELS["plain"], 1, i) for i in range(30)}
    for ident, x in rows.items():
        client.async_stream_infer("none" if ident == "7" else "plain", [make_input(x)], request_id=ident)
    for ident, x in rows.items():
        result, error = found.get(timeout=PATIENCE_S)
        if ident == "7":
            assert result is None
            assert "none" in error.message()
            continue
        assert result.get_response().id == ident
        assert result.get_response().parameters["triton_final_response"].bool_param
        check_rows(MODELS["plain"], x, result.as_numpy("predictions"))
    client.stop_stream()


def test_the_asynchronous_client(house: Server) -> None:
    """The same over grpc.aio, one by one and as a stream."""

    async def ask() -> None:
        model, x = MODELS["plain"], make_rows(MODELS["plain"], 2)

        async def requests() -> Any:
            for i in range(5):
                yield {"model_name": "plain", "inputs": [make_input(x)], "request_id": str(i)}

        async with triton_aio.InferenceServerClient(house.grpc) as client:
            answers = await asyncio.gather(*(client.infer("plain", [make_input(x)]) for _ in range(10)))
            async for answer, error in client.stream_infer(requests()):
                assert error is None
                answers.append(answer)
        assert len(answers) == 15
        for answer in answers:
            check_rows(model, x, answer.as_numpy("predictions"))

    asyncio.run(ask())


def test_the_repository(client: Any) -> None:
    """Models are loaded, listed, counted and unloaded by name."""
    client.load_model("au/2.mar")
    before = client.get_inference_statistics("au/2.mar").model_stats[0].inference_count
    x = make_rows(MODELS["au/2.mar"], 1)
    for _ in range(3):
        client.infer("au/2.mar", [make_input(x)])
    (statistics,) = client.get_inference_statistics("au/2.mar").model_stats
    assert (statistics.name, statistics.version, statistics.inference_count) == ("au/2.mar", "1", before + 3)
    assert statistics.inference_stats.success.count == before + 3
    assert statistics.inference_stats.compute_infer.ns > 0
    assert "au/2.mar" in {each.name for each in client.get_inference_statistics().model_stats}
    states = {each.name: each.state for each in client.get_model_repository_index().models}
    assert states["au/2.mar"] == "READY"
    client.unload_model("au/2.mar")
    assert "au/2.mar" not in {each.name for each in client.get_model_repository_index().models}


def refuse(client: Any, method: str, *arguments: Any, **more: Any) -> str:
    """The status that a client's method is refused with."""
    with pytest.raises(InferenceServerException) as caught:
        getattr(client, method)(*arguments, **more)
    status: str = caught.value.status()
    return status.removeprefix("StatusCode.")


def test_what_the_repository_refuses(client: Any) -> None:
    """A model that is not there, and a configuration that an archive cannot follow."""
    assert refuse(client, "load_model", "au/none.mar") == "NOT_FOUND"
    assert refuse(client, "get_inference_statistics", "au/none.mar") == "NOT_FOUND"
    assert refuse(client, "load_model", "au/2.mar", config="{}") == "INVALID_ARGUMENT"


def is_serving(health: Any, name: str) -> bool:
    """Whether the service is there. A worker that another test has killed may be starting still."""
    found = health.Check(health_pb2.HealthCheckRequest(service=name)).status
    return bool(found == health_pb2.HealthCheckResponse.SERVING)


def test_health_and_reflection(house: Server) -> None:
    """What balancers and tools ask: the server and its service are SERVING, others unknown; services are described."""
    with grpc.insecure_channel(house.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "inference.GRPCInferenceService"):
            wait_until(partial(is_serving, health, name), f"{name or 'the server'} is serving")
        with pytest.raises(grpc.RpcError, match="no such service"):
            health.Check(health_pb2.HealthCheckRequest(service="other"))
        watch = health.Watch(health_pb2.HealthCheckRequest(service="other"))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()
        asked = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService"),
        ]
        listed, described = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(asked))
        names = {each.name for each in listed.list_services_response.service}
        newer_name = "grpc.reflection.v1.ServerReflection"
        assert {"inference.GRPCInferenceService", "grpc.health.v1.Health", newer_name} <= names
        newer = channel.stream_stream(
            f"/{newer_name}/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        assert list(newer(iter(asked))) == [listed, described]
        assert b"ModelStreamInfer" in described.file_descriptor_response.file_descriptor_proto[0]


def test_deadlines_and_cancelled_calls(house: Server, client: Any) -> None:
    """The client's own time-out and the parameter `timeout` hold while a worker stands still; a cancelled call is gone.

    The worker then goes on, and nothing of them is left at it.
    """
    wait_until(lambda: house.total("fleetcast_requests_under_way") == 0, "calls of earlier tests are counted")
    x, before = make_rows(MODELS["plain"], 1), count_unanswered(house)
    (worker,) = house.processes("worker")
    os.kill(worker["pid"], signal.SIGSTOP)
    try:
        cancelled = threading.Event()
        call = client.async_infer("plain", [make_input(x)], lambda result, error: cancelled.set())
        for limit in ({"client_timeout": 2.0}, {"timeout": 400_000}):
            with pytest.raises(InferenceServerException) as caught:
                client.infer("plain", [make_input(x)], **limit)
            assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        call.cancel()
        assert cancelled.wait(PATIENCE_S)
    finally:
        os.kill(worker["pid"], signal.SIGCONT)
    check_rows(MODELS["plain"], x, client.infer("plain", [make_input(x)]).as_numpy("predictions"))
    # A client whose own time-out has passed may be gone before the server's clock says the same.
    wait_until(lambda: sum(count_unanswered(house)) == sum(before) + 3, "all three are counted")
    left, late = count_unanswered(house)
    assert left >= before[0] + 1, "the cancelled call is counted as one whose client has left"
    assert late >= before[1] + 1, "the parameter `timeout` is the server's own"
    wait_until(lambda: house.total("fleetcast_requests_under_way") == 0, "none of them is under way")


def count_unanswered(house: Server) -> tuple[float, float]:
    """Calls whose client has left, and those whose deadline has passed."""
    name = "fleetcast_inference_requests_total"
    return house.total(name, protocol="grpc", code="499"), house.total(name, protocol="grpc", code="504")


def test_a_worker_that_dies_costs_no_call(house: Server, client: Any) -> None:
    """Calls that were at it, and those that come meanwhile, are answered by the next one."""
    (worker,) = house.processes("worker")
    x = make_rows(MODELS["plain"], 1)
    stop, found = threading.Event(), list[Float32]()

    def ask() -> None:
        while not stop.is_set():
            found.append(client.infer("plain", [make_input(x)]).as_numpy("predictions"))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        wait_until(lambda: len(found) > 20, "answers before")
        os.kill(worker["pid"], signal.SIGKILL)
        wait_until(lambda: house.processes("worker")[0]["incarnation"] == 2, "the next worker is started")
        seen = len(found)
        wait_until(lambda: len(found) > seen + 20, "answers after")
        stop.set()
        for each in asking:
            each.result()
    check_rows(MODELS["plain"], np.concatenate([x] * len(found)), np.concatenate(found))


def test_a_front_that_dies_is_started_again(house: Server, client: Any) -> None:
    """At the same port, which the supervisor holds meanwhile; the client connects again by itself."""
    x, labels = make_rows(MODELS["plain"], 1), {"protocol": "grpc", "code": "200"}
    client.infer("plain", [make_input(x)])
    before = house.total("fleetcast_inference_requests_total", **labels)
    (front,) = [row for row in house.processes("front") if "grpc" in row]
    os.kill(front["pid"], signal.SIGKILL)

    def is_answered() -> bool:
        try:
            check_rows(MODELS["plain"], x, client.infer("plain", [make_input(x)]).as_numpy("predictions"))
        except InferenceServerException as error:
            if error.status() != "StatusCode.UNAVAILABLE":
                raise
            return False
        return True

    wait_until(is_answered, "the next front answers")
    counted = partial(house.total, "fleetcast_inference_requests_total", **labels)
    wait_until(lambda: counted() > before, "the answer is counted")
    assert counted() == before + 1


RECORDING = Path(__file__).parent.parent / "golden" / "triton_grpc.jsonl"
WHY = "the recorded server was told to refuse; the statuses are proved by tests of the front"
#: What is answered otherwise than recorded: the status here, or None where only the texts differ; and why.
DIFFERENT: Mapping[str, tuple[str | None, str]] = {
    "is_model_ready(version='2')": ("NOT_FOUND", "every model has the version 1"),
    "get_server_metadata": (None, "the recorded server said only some of its extensions, and another version"),
    "get_model_metadata": (None, "the recorded server knew no tensors"),
    "get_model_config": (None, "the recorded server knew none"),
    "get_inference_statistics": (None, "the recorded server counted nothing"),
    "get_model_repository_index": (None, "the recorded server knew one model"),
    "infer BYTES": ("INVALID_ARGUMENT", "this archive has no input `body`; the recorded server read none"),
    "infer, status NOT_FOUND": (None, WHY),
    "infer, status UNAVAILABLE": (None, WHY),
    "infer, status RESOURCE_EXHAUSTED": (None, WHY),
    "infer, status INVALID_ARGUMENT": (None, WHY),
}


def read_recording() -> list[dict[str, Any]]:
    """What tritonclient 2.73 sent, in its order."""
    return [json.loads(line) for line in RECORDING.read_text().splitlines()]


def send_again(channel: grpc.Channel, recorded: Mapping[str, Any]) -> tuple[str, Any]:
    """The status and the answer to a recorded message."""
    name = recorded["method"].rpartition("/")[2]
    request = ParseDict(recorded["request"], find_message(f"inference.{name}Request")(), descriptor_pool=POOL)
    call = channel.unary_unary(recorded["method"], _serialize, find_message(f"inference.{name}Response").FromString)
    try:
        return "OK", call(request, metadata=tuple(recorded["metadata"].items()))
    except grpc.RpcError as error:
        return error.code().name, None


def _serialize(message: Any) -> bytes:
    raw: bytes = message.SerializeToString()
    return raw


def say_as_recorded(answer: Any) -> str:
    """What the client made of such an answer."""
    fields = answer.DESCRIPTOR.fields_by_name
    if "raw_output_contents" in fields:
        (raw,), (output,) = answer.raw_output_contents, answer.outputs
        return str(np.frombuffer(raw, "<f4").reshape(output.shape))
    said = [getattr(answer, name) for name in ("live", "ready") if name in fields]
    return str(said[0]) if said else str(None) if not fields else str(answer)


def test_the_recording(house: Server) -> None:
    """Each message of the recording is answered as recorded, or as the table says; it names nothing else."""
    with grpc.insecure_channel(house.grpc) as channel:
        found = {each["call"]: (each, *send_again(channel, each)) for each in read_recording()}
    assert set(DIFFERENT) <= set(found)
    for name, (recorded, status, answer) in found.items():
        wanted, _ = DIFFERENT.get(name, (None, ""))
        assert status == (wanted or "OK"), name
        is_alike = answer is not None and say_as_recorded(answer) == recorded["client_result"]
        assert is_alike == (name not in DIFFERENT), name
