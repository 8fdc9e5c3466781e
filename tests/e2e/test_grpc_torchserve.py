"""TorchServe's gRPC services, asked with the messages of its own wheel: predictions, and the life of a model."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from tests.e2e.models import FORECAST_TCN, pack_forecaster
from tests.e2e.server import Server, run_server
from tests.s3 import S3Server
from tests.server.worker.sandbox.code_archives import pack_code
from tests.torchserve_protos import TorchServeMessages

pytestmark = pytest.mark.e2e

PROBE = """
import json

def handle(data, context):
    if data is None:
        return None
    if "status" in data[0]:
        context.set_response_status(code=418, phrase="teapot")
        return ["tea"]
    if "fail" in data[0]:
        raise ValueError("boom")
    shown = {name: bytes(value).decode() for name, value in data[0].items()}
    return [json.dumps({"model": context.model_name, **shown})]
"""
PARTS = """
from ts.handler_utils.utils import send_intermediate_predict_response

def handle(data, context):
    if data is None:
        return None
    for word in ("one ", "two "):
        send_intermediate_predict_response([word], context.request_ids, "Prediction success", 200, context)
    if bytes(data[0]["data"]) == b"fail":
        raise ValueError("half way")
    return ["three"]
"""
FORECASTER = pack_forecaster("market.mar", 1, config=FORECAST_TCN, forecast=True)


@dataclass
class Client:
    """Both services as a client of the wheel's proto has them."""

    messages: TorchServeMessages
    inference: grpc.Channel
    management: grpc.Channel

    def predict(self, model: str, *, version: str = "", **inputs: bytes) -> bytes:
        """`Predictions`."""
        request = self.messages.get("inference.PredictionsRequest")(
            model_name=model, model_version=version, input=inputs
        )
        answer: bytes = self._call("inference", "Predictions", "PredictionResponse")(request).prediction
        return answer

    def manage(self, method: str, **fields: Any) -> str:
        """A method of the management service."""
        request = self.messages.get(f"management.{method}Request")(**fields)
        answer: str = self._call("management", method, "ManagementResponse")(request).msg
        return answer

    def stream(self, method: str, *requests: Any) -> list[Any]:
        """What a streaming method of the inference service answers."""
        path = f"/org.pytorch.serve.grpc.inference.InferenceAPIsService/{method}"
        reply = self.messages.get("inference.PredictionResponse")
        if method == "StreamPredictions":
            one = self.inference.unary_stream(path, _serialize, reply.FromString)
            return list(one(requests[0]))
        return list(self.inference.stream_stream(path, _serialize, reply.FromString)(iter(requests)))

    def _call(self, package: str, method: str, reply: str) -> Any:
        channel, service = (
            (self.inference, "InferenceAPIsService")
            if package == "inference"
            else (self.management, "ManagementAPIsService")
        )
        path = f"/org.pytorch.serve.grpc.{package}.{service}/{method}"
        return channel.unary_unary(path, _serialize, self.messages.get(f"{package}.{reply}").FromString)


def _serialize(message: Any) -> bytes:
    raw: bytes = message.SerializeToString()
    return raw


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with both gRPC ports, an archive of code and a forecaster."""
    folder = tmp_path_factory.mktemp("torchserve")
    store = folder / "store"
    store.mkdir()
    (store / "probe.mar").write_bytes(pack_code(PROBE))
    (store / "parts.mar").write_bytes(pack_code(PARTS))
    (store / "market.mar").write_bytes(FORECASTER.data)
    settings = {"allow_code": ["probe", "parts"], "grpc_port": 0, "grpc_management_port": 0}
    with run_server(s3, folder, str(store), **settings) as running:
        yield running


@pytest.fixture
def client(house: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A client of both ports."""
    messages = TorchServeMessages(tmp_path_factory.mktemp("protos"))
    management = house.addresses["grpc_management"].partition("://")[2]
    with grpc.insecure_channel(house.grpc) as inference, grpc.insecure_channel(management) as managing:
        yield Client(messages, inference, managing)


def fail(ask: Any) -> grpc.RpcError:
    """The error that the call ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        ask()
    return caught.value


def test_a_models_life(client: Client, house: Server) -> None:
    """Registered, listed, described, asked, scaled, made the default, unregistered; what is said is TorchServe's."""
    said = client.manage("RegisterModel", url="probe.mar", model_name="mine", initial_workers=1, synchronous=True)
    assert said == 'Model "mine" Version: 1.0 registered with 1 initial workers'
    assert json.loads(client.manage("ListModels")) == {"models": [{"modelName": "mine", "modelUrl": "probe.mar"}]}
    (described,) = json.loads(client.manage("DescribeModel", model_name="mine"))
    assert (described["modelName"], described["minWorkers"]) == ("mine", 1)
    for version in ("", "1.0"):
        assert json.loads(client.predict("mine", version=version, data=b"7"))["data"] == "7"
    assert client.manage("ScaleWorker", model_name="mine", min_worker=2, synchronous=True).startswith("Workers scaled")
    assert "1.0" in client.manage("SetDefault", model_name="mine", model_version="1.0")
    assert client.manage("UnregisterModel", model_name="mine") == 'Model "mine" unregistered'
    gone = fail(lambda: client.predict("mine", data=b"7"))
    assert gone.code() is grpc.StatusCode.NOT_FOUND
    refused = fail(lambda: client.manage("DescribeModel", model_name="mine"))
    assert (refused.code(), refused.details()) == (
        grpc.StatusCode.NOT_FOUND,
        "Model not found: mine\nModelNotFoundException",
    )
    counted = {"protocol": "torchserve_grpc", "code": "200"}
    assert house.total("fleetcast_inference_requests_total", **counted) >= 2


def test_predictions(client: Client) -> None:
    """Inputs by their names; the status that a handler chose, and its failure; a forecaster answers as well."""
    assert json.loads(client.predict("probe", data=b"1", more=b"2\xc3\xbc")) == {
        "model": json.loads(client.predict("probe", data=b"1"))["model"],
        "data": "1",
        "more": "2ü",
    }
    assert json.loads(client.predict("probe", body=b"1"))["body"] == "1"
    chosen = fail(lambda: client.predict("probe", status=b"1"))
    assert (chosen.code(), chosen.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "tea")
    assert fail(lambda: client.predict("probe", fail=b"1")).code() is grpc.StatusCode.INTERNAL
    assert fail(lambda: client.predict("")).code() is grpc.StatusCode.INVALID_ARGUMENT
    assert fail(lambda: client.predict("x" * 2000)).code() is grpc.StatusCode.INVALID_ARGUMENT
    question = FORECASTER.question(0)
    question.check(client.predict("market", data=question.body))
    question.check(client.predict("market.mar", body=question.body))


def test_streams(client: Client) -> None:
    """One request has its answer; each of a sequence has its own, errors in their status."""
    request = client.messages.get("inference.PredictionsRequest")
    (only,) = client.stream("StreamPredictions", request(model_name="probe", input={"data": b"1"}))
    assert json.loads(only.prediction)["data"] == "1"
    answers = client.stream(
        "StreamPredictions2",
        request(model_name="probe", input={"data": b"1"}, sequence_id="s"),
        request(model_name="none", input={"data": b"1"}, sequence_id="s"),
        request(model_name="probe", input={"data": b"2"}),
        request(model_name="probe", input={"data": b"3"}, sequence_id="s"),
    )
    assert [each.status.code for each in answers] == [0, 5, 3, 0]
    assert [each.sequence_id for each in answers] == ["s", "s", "", "s"]
    assert [json.loads(each.prediction)["data"] for each in (answers[0], answers[3])] == ["1", "3"]


def test_an_answer_in_parts_is_a_message_a_part(client: Client) -> None:
    """`StreamPredictions` has each part as it is made, and a failure behind them; `Predictions` has the whole."""
    request = client.messages.get("inference.PredictionsRequest")
    answers = client.stream("StreamPredictions", request(model_name="parts", input={"data": b"1"}))
    assert [each.prediction for each in answers] == [b"one ", b"two ", b"three"]
    assert client.predict("parts", data=b"1") == b"one two three"
    failed = fail(lambda: client.stream("StreamPredictions", request(model_name="parts", input={"data": b"fail"})))
    assert (failed.code(), "Prediction failed" in str(failed.details())) == (grpc.StatusCode.INTERNAL, True)


def test_each_port_has_its_services(client: Client, house: Server) -> None:
    """Models cannot be managed where they are asked, nor asked where they are managed; the ping is TorchServe's."""
    swapped = Client(client.messages, client.management, client.inference)
    assert fail(lambda: swapped.manage("ListModels")).code() is grpc.StatusCode.UNIMPLEMENTED
    assert fail(lambda: swapped.predict("probe", data=b"1")).code() is grpc.StatusCode.UNIMPLEMENTED
    path = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/Ping"
    reply = client.messages.get("inference.TorchServeHealthResponse")
    assert json.loads(client.inference.unary_unary(path, None, reply.FromString)(b"").health) == {"status": "Healthy"}
    (front,) = [row for row in house.processes("front") if "grpc" in row]
    assert set(front["grpc"]) == {"grpc", "grpc_management"}
