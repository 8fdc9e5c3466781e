"""MLServer's own client code, unmodified, asking one real server: its codecs by REST and gRPC, and `mlserver infer`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.e2e.clients import INSTALL_S, make_environment, run_script
from tests.e2e.models import (
    ABSOLUTE,
    FORECAST_TCN,
    RELATIVE,
    Model,
    Question,
    pack_forecaster,
    pack_identity,
    pack_onnx,
)
from tests.e2e.server import Server, run_server, upload
from tests.patience import PATIENCE_S
from tests.s3 import S3Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(INSTALL_S + PATIENCE_S)]

CLIENT = ("mlserver==1.7.1", "pandas<3", "requests")
TENSORS = pack_forecaster("au/NSW1.mar", 1)
FORECASTER = pack_forecaster("au/forecasts.mar", 3, config=FORECAST_TCN, forecast=True)
TYPES = {"INT64": TensorProto.INT64, "FP64": TensorProto.DOUBLE, "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8}

SCRIPT = """
import json, pathlib, subprocess, sys
import grpc, requests
import numpy as np
import pandas as pd
from mlserver.codecs import NumpyCodec, NumpyRequestCodec, PandasCodec, StringCodec, StringRequestCodec
from mlserver.grpc import dataplane_pb2 as pb
from mlserver.grpc.converters import (
    ModelInferRequestConverter, ModelInferResponseConverter, ModelMetadataResponseConverter)
from mlserver.grpc.dataplane_pb2_grpc import GRPCInferenceServiceStub
from mlserver.types import InferenceRequest, InferenceResponse, MetadataModelResponse, RequestOutput

url, address, folder, given = sys.argv[1:]
given, folder = json.loads(given), pathlib.Path(folder)
model, rows = given["tensors"], np.array(given["rows"], np.float32)
frame = pd.DataFrame({"load": [1.5, 2.5, -1.0], "hour": [1, 2, 3], "zone": ["a", "b", "c"]})
stub = GRPCInferenceServiceStub(grpc.insecure_channel(address))

def list_requests(use_bytes):
    x, output = NumpyCodec.encode_input("x", rows), RequestOutput(name="predictions")
    yield "tensor", model, InferenceRequest(id="seven", inputs=[x], outputs=[output])
    yield "whole tensor", model, NumpyRequestCodec.encode_request(rows)
    text = StringCodec.encode_input("request", [given["deepar"]], use_bytes=use_bytes)
    yield "text", given["forecaster"], InferenceRequest(inputs=[text])
    yield "whole text", given["forecaster"], StringRequestCodec.encode_request([given["deepar"]], use_bytes=use_bytes)
    yield "frame", "frame", PandasCodec.encode_request(frame, use_bytes=use_bytes)
    for datatype, kind in (("INT64", "i8"), ("FP64", "f8"), ("BOOL", "?"), ("UINT8", "u1")):
        values = np.array([[0, 1, 1]], kind)
        yield datatype, f"typed/{datatype}", InferenceRequest(inputs=[NumpyCodec.encode_input("x", values)])

def ask_by_rest(model, request):
    answer = requests.post(f"{url}/v2/models/{model}/infer", json=request.model_dump())
    assert answer.status_code == 200, answer.text
    return InferenceResponse.model_validate_json(answer.text)

def ask_by_grpc(model, request, use_raw):
    message = ModelInferRequestConverter.from_types(request, model_name=model, use_raw=use_raw)
    return ModelInferResponseConverter.to_types(stub.ModelInfer(message))

def read(name, answer):
    if "text" in name:
        return StringRequestCodec.decode_response(answer)
    if name == "frame":
        found = PandasCodec.decode_response(answer)
        return {column: found[column].tolist() for column in found}
    return [NumpyCodec.decode_output(each).tolist() for each in answer.outputs]

ways = {
    "rest": ask_by_rest,
    "grpc": lambda model, request: ask_by_grpc(model, request, False),
    "raw": lambda model, request: ask_by_grpc(model, request, True),
}
said = {"id": []}
for way, ask in ways.items():
    said[way] = {}
    for name, asked, request in list_requests(use_bytes=way != "rest"):
        answer = ask(asked, request)
        said[way][name] = read(name, answer)
        if name == "tensor":
            said["id"].append(answer.id)
described = MetadataModelResponse.model_validate_json(requests.get(f"{url}/v2/models/{model}").text)
also = ModelMetadataResponseConverter.to_types(stub.ModelMetadata(pb.ModelMetadataRequest(name=model)))
said["inputs"] = [[each.name, each.datatype, each.shape] for each in (*described.inputs, *also.inputs)]
ready = stub.ServerReady(pb.ServerReadyRequest()), stub.ModelReady(pb.ModelReadyRequest(name=model))
said["ready"] = [each.ready for each in ready]

asked = [InferenceRequest(inputs=[NumpyCodec.encode_input("x", each)]) for each in (*rows[:, None], rows[:1, :, :3])]
(folder / "asked.jsonl").write_text("".join(each.model_dump_json() + "\\n" for each in asked))
for way, flags in (("json", []), ("binary", ["-b"])):
    program = pathlib.Path(sys.executable).with_name("mlserver")
    files = ["-i", folder / "asked.jsonl", "-o", folder / f"{way}.jsonl"]
    places = ["-u", url.removeprefix("http://"), "-m", model]
    command = [sys.executable, program, "infer", *places, *files, "-s", "1", "-w", "2", "-r", "1", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = map(json.loads, (folder / f"{way}.jsonl").read_text().splitlines())
    answers = sorted(answers, key=lambda each: each["parameters"]["batch_index"])
    *good, wrong = answers
    said[f"infer {way}"] = [*(each["outputs"][0]["data"] for each in good), wrong["error"]["msg"]]
print(json.dumps(said, default=lambda content: content.decode()))
"""


def pack_frame() -> bytes:
    """An ONNX archive of a column a tensor: `sum` = load + hour, and `zone` as it is."""
    kinds = {"load": TensorProto.DOUBLE, "hour": TensorProto.INT64, "zone": TensorProto.STRING}
    inputs = [helper.make_tensor_value_info(name, kind, ["n", 1]) for name, kind in kinds.items()]
    made = {"sum": TensorProto.DOUBLE, "place": TensorProto.STRING}
    outputs = [helper.make_tensor_value_info(name, kind, ["n", 1]) for name, kind in made.items()]
    nodes = [
        helper.make_node("Cast", ["hour"], ["hours"], to=TensorProto.DOUBLE),
        helper.make_node("Add", ["load", "hours"], ["sum"]),
        helper.make_node("Identity", ["zone"], ["place"]),
    ]
    return pack_onnx(nodes, inputs, outputs)


def make_rows(model: Model) -> Any:
    """Two seeded inputs [2, *shape], with few digits so that JSON carries them exactly."""
    return np.random.default_rng(5).normal(size=(2, *model.shape)).round(3).astype(np.float32)


@pytest.fixture(scope="module")
def house(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a forecaster of tensors, one of series, a model of columns and one of each datatype."""
    bucket = s3.bucket()
    upload(s3, bucket, [TENSORS, FORECASTER])
    s3.put(bucket, "frame", pack_frame())
    for datatype, kind in TYPES.items():
        s3.put(bucket, f"typed/{datatype}", pack_identity(kind))
    settings = {"model_cache_bytes": "64MiB", "grpc_port": 0, "workers": 1}
    with run_server(s3, tmp_path_factory.mktemp("mlserver"), f"s3://{bucket}", **settings) as server:
        yield server


@pytest.fixture(scope="module")
def question() -> Question:
    """The forecast that the client asks for."""
    return FORECASTER.question(4)


@pytest.fixture(scope="module")
def said(house: Server, question: Question, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the client got."""
    given = {
        "rows": make_rows(TENSORS).tolist(),
        "tensors": TENSORS.name,
        "forecaster": FORECASTER.name,
        "deepar": question.body.decode(),
    }
    folder: Path = tmp_path_factory.mktemp("infer")
    arguments = (house.url, house.grpc, str(folder), json.dumps(given))
    found: dict[str, Any] = run_script(make_environment(*CLIENT), SCRIPT, *arguments)
    return found


@pytest.mark.parametrize("way", ["rest", "grpc", "raw"])
def test_codecs_are_understood_and_understand(said: dict[str, Any], question: Question, way: str) -> None:
    """Arrays, text and frames, as one input or as a whole request, whose input MLServer names itself."""
    found, expected = said[way], np.stack([TENSORS.run(row) for row in make_rows(TENSORS)])
    for name in ("tensor", "whole tensor"):
        np.testing.assert_allclose(found[name][0], expected, rtol=RELATIVE, atol=ABSOLUTE)
    for name in ("text", "whole text"):
        (text,) = found[name]
        question.check(text.encode())
    assert found["frame"] == {"sum": [2.5, 4.5, 2.0], "place": ["a", "b", "c"]}
    for datatype in TYPES:
        assert found[datatype] == [[[0, 1, 1]]], datatype


def test_what_is_around_a_call(said: dict[str, Any]) -> None:
    """The id comes back, metadata are in MLServer's types, and probes say yes."""
    assert said["id"] == ["seven"] * 3
    assert said["inputs"] == [["x", "FP32", [-1, 3, 12]]] * 2
    assert said["ready"] == [True, True]


@pytest.mark.parametrize("way", ["json", "binary"])
def test_a_file_of_requests(said: dict[str, Any], way: str) -> None:
    """`mlserver infer` answers a line each, and a line that is wrong gets the server's words."""
    *good, wrong = said[f"infer {way}"]
    expected = [TENSORS.run(row).ravel() for row in make_rows(TENSORS)]
    np.testing.assert_allclose(good, expected, rtol=RELATIVE, atol=ABSOLUTE)
    assert "inputs[0].shape: the input x has the shape [3, 12]" in wrong
