"""KServe's own clients, unmodified, REST (V1 and V2) and gRPC, asking one real server."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.e2e.clients import INSTALL_S, make_environment, run_script
from tests.e2e.models import ABSOLUTE, FORECAST_TCN, RELATIVE, Model, Question, onnx_model, pack_forecaster
from tests.e2e.server import Server, run_server, upload
from tests.patience import PATIENCE_S
from tests.s3 import S3Server

pytestmark = pytest.mark.e2e

CLIENT = "kserve==0.16.0"
TENSORS = {
    "au/NSW1.mar": (pack_forecaster("au/NSW1.mar", 1), "predictions"),
    "dense": (onnx_model("dense", 2), "y"),
}
FORECASTER = pack_forecaster("au/forecasts.mar", 3, config=FORECAST_TCN, forecast=True)

SCRIPT = """
import asyncio, json, logging, sys
logging.disable(logging.CRITICAL)
import grpc, httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.grpc.grpc_predict_v2_pb2 import ModelMetadataRequest, ServerMetadataRequest
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

url, address, given = sys.argv[1:]
given = json.loads(given)
BAD = [[[0.0] * 9] * 9]

def make_request(model, name, values, datatype, binary):
    values = np.array(values, np.float32 if datatype == "FP32" else object)
    tensor = InferInput(name=name, shape=list(values.shape), datatype=datatype)
    tensor.set_data_from_numpy(values, binary_data=binary)
    return InferRequest(model_name=model, infer_inputs=[tensor], request_id="seven")

async def ask_all(infer):
    said = {"tensors": {}, "deepar": {}, "errors": {}}
    for binary in (False, True):
        for model, (values, output) in given["tensors"].items():
            answer = await infer(make_request(model, "x", values, "FP32", binary))
            found = answer.get_output_by_name(output)
            assert (answer.id, found.datatype, len(answer.outputs)) == ("seven", "FP32", 1)
            said["tensors"][f"{model} {binary}"] = found.as_numpy().tolist()
        answer = await infer(make_request(given["forecaster"], "request", [given["deepar"]], "BYTES", binary))
        (text,) = answer.outputs[0].as_numpy().tolist()
        said["deepar"][str(binary)] = text if isinstance(text, str) else text.decode()
    for what, model, values in (("unknown", "au/NSW2.mar", BAD), ("shape", "au/NSW1.mar", BAD)):
        try:
            await infer(make_request(model, "x", values, "FP32", True))
        except httpx.HTTPStatusError as error:
            said["errors"][what] = [error.response.status_code, str(error)]
        except grpc.RpcError as error:
            said["errors"][what] = [error.code().name, error.details()]
    return said

async def ask_by_rest():
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        said = await ask_all(lambda request: client.infer(url, request, model_name=request.model_name))
        said["live"], said["ready"] = await client.is_server_live(url), await client.is_server_ready(url)
        said["models"] = [await client.is_model_ready(url, each) for each in (given["forecaster"], "au/NSW2.mar")]
    return said

async def ask_by_grpc():
    async with InferenceGRPCClient(address) as client:
        said = await ask_all(client.infer)
        said["live"], said["ready"] = await client.is_server_live(), await client.is_server_ready()
        said["models"] = [await client.is_model_ready(each) for each in (given["forecaster"], "au/NSW2.mar")]
    async with grpc.aio.insecure_channel(address) as channel:  # the client has no call for metadata, its messages have
        stub = GRPCInferenceServiceStub(channel)
        described = await stub.ModelMetadata(ModelMetadataRequest(name="dense"))
        said["metadata"] = [(each.name, each.datatype, list(each.shape)) for each in described.inputs]
        said["server"] = (await stub.ServerMetadata(ServerMetadataRequest())).name
    return said

async def ask_by_v1():
    said = {}
    async with InferenceRESTClient(RESTConfig(protocol="v1")) as client:
        body = json.loads(given["deepar"])
        said["predicted"] = await client.infer(url, body, model_name=given["forecaster"])
        said["live"] = await client.is_server_live(url)
        said["ready"] = await client.is_model_ready(url, given["forecaster"])
        for what, model, data in (("unknown", "au/NSW2.mar", body), ("body", given["forecaster"], {"instances": 1})):
            try:
                await client.infer(url, data, model_name=model)
            except httpx.HTTPStatusError as error:
                said[what] = [error.response.status_code, str(error)]
        try:
            said["absent"] = await client.is_model_ready(url, "au/NSW2.mar")
        except httpx.HTTPStatusError as error:
            said["absent"] = [error.response.status_code, str(error)]
    return said

async def main():
    return {"v2": await ask_by_rest(), "grpc": await ask_by_grpc(), "v1": await ask_by_v1()}

print(json.dumps(asyncio.run(main())))
"""


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a forecaster of tensors, an ONNX model and a forecaster of series, with a gRPC listener."""
    bucket = s3.bucket()
    upload(s3, bucket, [*(model for model, _ in TENSORS.values()), FORECASTER])
    settings = {"model_cache_bytes": "64MiB", "grpc_port": 0, "workers": 1}
    with run_server(s3, tmp_path_factory.mktemp("kserve"), f"s3://{bucket}", **settings) as server:
        yield server


def make_rows(model: Model) -> Any:
    """Two seeded inputs [2, *shape], with few digits so that JSON carries them exactly."""
    return np.random.default_rng(5).normal(size=(2, *model.shape)).round(3).astype(np.float32)


@pytest.fixture(scope="module")
def question() -> Question:
    """The forecast that all clients ask for."""
    return FORECASTER.question(4)


@pytest.fixture(scope="module")
def said(house: Server, question: Question) -> dict[str, Any]:
    """What the clients got, by protocol."""
    given = {
        "tensors": {name: (make_rows(model).tolist(), output) for name, (model, output) in TENSORS.items()},
        "forecaster": FORECASTER.name,
        "deepar": question.body.decode(),
    }
    found: dict[str, Any] = run_script(make_environment(CLIENT), SCRIPT, house.url, house.grpc, json.dumps(given))
    return found


@pytest.mark.timeout(INSTALL_S + PATIENCE_S)
@pytest.mark.parametrize("protocol", ["v2", "grpc"])
def test_tensors_and_forecasts_are_right(said: dict[str, Any], question: Question, protocol: str) -> None:
    """FP32 of a forecaster and of an ONNX model, and DeepAR as BYTES: in the document and as bytes behind it."""
    for name, (model, _) in TENSORS.items():
        expected = np.stack([model.run(row) for row in make_rows(model)])
        for binary in (False, True):
            found = said[protocol]["tensors"][f"{name} {binary}"]
            np.testing.assert_allclose(found, expected, rtol=RELATIVE, atol=ABSOLUTE)
    for text in said[protocol]["deepar"].values():
        question.check(text.encode())
    assert len(said[protocol]["deepar"]) == 2


@pytest.mark.timeout(INSTALL_S + PATIENCE_S)
def test_probes_and_metadata(said: dict[str, Any]) -> None:
    """Live and ready; a model of the store is ready, since the question loads it, and one that is not there is not."""
    for protocol in ("v2", "grpc"):
        assert said[protocol]["live"] is True
        assert said[protocol]["ready"] is True
        assert said[protocol]["models"] == [True, False]
    assert said["grpc"]["metadata"] == [["x", "FP32", [-1, 3, 12]]]
    assert said["grpc"]["server"] == "fleetcast"


@pytest.mark.timeout(INSTALL_S + PATIENCE_S)
def test_errors_say_what_is_wrong(said: dict[str, Any]) -> None:
    """An unknown model and a wrong shape, in what the exception of each client shows."""
    for protocol, unknown, wrong in (("v2", 404, 400), ("grpc", "NOT_FOUND", "INVALID_ARGUMENT")):
        errors = said[protocol]["errors"]
        assert errors["unknown"][0] == unknown
        assert "au/NSW2.mar" in errors["unknown"][1]
        assert errors["shape"][0] == wrong
        assert "inputs[0].shape" in errors["shape"][1]


@pytest.mark.timeout(INSTALL_S + PATIENCE_S)
def test_the_first_protocol(said: dict[str, Any], question: Question) -> None:
    """`:predict` of a forecast, its errors, and what the client asks before."""
    found = said["v1"]
    question.check(json.dumps(found["predicted"]).encode())
    assert found["unknown"][0] == 404
    assert "au/NSW2.mar" in found["unknown"][1]
    assert found["body"][0] == 400
    assert "instances" in found["body"][1]
    assert found["live"] is True
    assert found["ready"] is True
    assert found["absent"][0] == 404
    assert "au/NSW2.mar" in found["absent"][1]
