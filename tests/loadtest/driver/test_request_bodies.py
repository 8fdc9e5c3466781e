"""Request bodies that are made from archives; a real server answers each of them."""

import json
from pathlib import Path

import grpc
import numpy as np
import orjson
import pytest
import urllib3
from onnx import TensorProto

from handlers.codecs.datatypes import DATATYPES, read_bytes, read_data
from loadtest.driver.dialects import DIALECTS, BodyKind, encode_npy, find_fault
from loadtest.driver.drawn_tensors import draw_tensor
from loadtest.driver.grpc_messages import DTYPES, read_infer
from loadtest.driver.request_bodies import RequestBody, join_requests, make_request_body, read_request_bodies
from loadtest.fleets.synthetic_archives import make_archive
from loadtest.observe.local_server import run_local_server
from model_store.archives.archive import open_archive
from model_store.archives.manifest import ForecastSpec, InputChannel, Scaler
from model_store.names import ModelName
from model_store.stores.object_store import open_source
from server.contract import NPY
from tests.archives import pack_tcn
from tests.e2e.models import onnx_model, pack_identity
from tests.patience import PATIENCE_S

NAMES = (
    "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64",
    "FLOAT16", "BFLOAT16", "FLOAT", "DOUBLE", "STRING",
)  # fmt: skip
KINDS = [getattr(TensorProto, name) for name in NAMES]
START = "2026-01-01 00:00:00"
SMALL = {"features": 4, "context_length": 20, "prediction_length": 6, "quantiles": 3, "channels": 4, "layers": 2}


def make_demanding() -> bytes:
    """A forecaster without a golden sample that wants covariates, categories and lags."""
    channels = (
        InputChannel(source="target"),
        InputChannel(source="target", lag=7),
        InputChannel(source="dynamic_feat", shift=6, index=1),
        InputChannel(source="static", index=1),
    )
    forecast = ForecastSpec(
        frequency="1h",
        context_length=20,
        prediction_length=6,
        quantile_levels=(0.1, 0.5, 0.9),
        inputs=channels,
        dynamic_feat=("wind", "load"),
        cat=("zone", "product"),
        scaler=Scaler(kind="asinh", center=50.0, scale=10.0),
    )
    return pack_tcn("d", SMALL, 3, forecast)


def make_several() -> bytes:
    """A forecaster of two products, which takes a history of each."""
    config = {**SMALL, "features": 2, "quantiles": 6}
    forecast = ForecastSpec(
        frequency="1h",
        context_length=20,
        prediction_length=6,
        quantile_levels=(0.1, 0.5, 0.9),
        products=("energy", "reserve"),
        inputs=(InputChannel(source="target"), InputChannel(source="target", product=1)),
    )
    return pack_tcn("s", config, 5, forecast)


def make_plain() -> bytes:
    """A forecaster that only answers tensors."""
    return pack_tcn("p", SMALL, 4)


@pytest.mark.e2e
def test_every_question_is_answered(tmp_path: Path) -> None:
    """Golden samples, covariates and categories, tensors, ONNX, npy: by default and by each kind that applies."""
    fleet = {
        "golden.mar": make_archive("tcn", "golden", 1),
        "demanding.mar": make_demanding(),
        "plain.mar": make_plain(),
        "several.mar": make_several(),
        "o.mar": onnx_model("o", 1).data,
        "broken.mar": make_plain()[:500],
    }
    for name, data in fleet.items():
        (tmp_path / name).write_bytes(data)
    source, names = open_source(str(tmp_path)), [ModelName(name) for name in fleet]
    steps: list[int] = []
    asked: list[tuple[str, RequestBody]] = []
    left_out: dict[BodyKind | None, set[str]] = {}
    for kind in (None, *BodyKind):
        found = read_request_bodies(source, names, kind, 0, lambda: steps.append(1))
        asked += [(str(name), each) for name, each in found.questions.items()]
        left_out[kind] = {str(name) for name in found.left_out}
    assert len(steps) == 30
    assert left_out[BodyKind.BINARY] == {str(name) for name in names}
    assert left_out[None] == left_out[BodyKind.TENSOR] == {"broken.mar"}
    assert left_out[BodyKind.DEEPAR] == {"broken.mar", "plain.mar", "o.mar"}
    with run_local_server(str(tmp_path), ["--workers", "1"]) as server:
        for name, each in asked:
            headers = {"X-Amzn-SageMaker-Target-Model": name, "Content-Type": each.content_type}
            reply = urllib3.request("POST", f"{server.inference}/invocations", body=each.body, headers=headers)
            assert (name, reply.status, find_fault(reply.data)) == (name, 200, None), reply.data[:300]
        for kind in (None, BodyKind.TENSOR, BodyKind.BINARY, BodyKind.DEEPAR):
            found = read_request_bodies(source, names, kind, 0, lambda: None, DIALECTS["v2"])
            assert {str(name) for name in found.left_out} == left_out[
                BodyKind.DEEPAR if kind is BodyKind.DEEPAR else None
            ]
            for name, each in found.questions.items():
                url = f"{server.inference}/v2/models/{name}/infer"
                reply = urllib3.request("POST", url, body=each.body, headers=dict(each.headers))
                assert (name, reply.status, find_fault(reply.data)) == (name, 200, None), reply.data[:300]


@pytest.mark.e2e
def test_every_datatype_is_asked(tmp_path: Path) -> None:
    """ONNX archives of each datatype have no refusal and no fault, by V2 and gRPC, as JSON and as binary tensors."""
    for kind in KINDS:
        (tmp_path / f"{TensorProto.DataType.Name(kind)}.mar").write_bytes(pack_identity(kind))
    source, names = open_source(str(tmp_path)), [ModelName(each.name) for each in sorted(tmp_path.iterdir())]
    with run_local_server(str(tmp_path), ["--workers", "1", "--grpc-port", "0"]) as server:
        with grpc.insecure_channel(server.grpc.removeprefix("grpc://")) as channel:
            call = channel.unary_unary(DIALECTS["grpc"].path, None, None)
            for kind in (BodyKind.TENSOR, BodyKind.BINARY):
                found = read_request_bodies(source, names, kind, 1, lambda: None, DIALECTS["v2"])
                assert (len(found.questions), found.left_out) == (len(KINDS), {})
                for name, each in found.questions.items():
                    url = f"{server.inference}/v2/models/{name}/infer"
                    by_http = urllib3.request("POST", url, body=each.body, headers=dict(each.headers))
                    message = DIALECTS["grpc"].request("", name, each.body, headers=each.headers)
                    by_grpc = read_infer(call(message, timeout=PATIENCE_S))
                    for answer in (by_http.data, by_grpc):
                        assert (name, find_fault(answer)) == (name, None), answer[:300]
                    one, other = (orjson.loads(answer)["outputs"][0]["data"] for answer in (by_http.data, by_grpc))
                    numbers = not isinstance(one[0], str)
                    assert one == (pytest.approx(other) if numbers else other), name
        found = read_request_bodies(source, names, BodyKind.TENSOR, 1, lambda: None)
        for name, each in found.questions.items():
            headers = {"X-Amzn-SageMaker-Target-Model": name}
            reply = urllib3.request("POST", f"{server.inference}/invocations", body=each.body, headers=headers)
            assert (name, reply.status) == (name, 200), reply.data[:300]


@pytest.mark.parametrize("datatype", [*DTYPES, "BF16", "BYTES"])
def test_drawn_values_are_the_same_as_json_and_as_bytes(datatype: str) -> None:
    """A seed draws the same values again, and both forms hold them."""
    drawn = draw_tensor(datatype, (2, 3), 5)
    assert draw_tensor(datatype, (2, 3), 5).list_values() == drawn.list_values()
    assert np.array(drawn.nest(), object).shape == (2, 3)
    packed = read_bytes(memoryview(drawn.pack()), DATATYPES[datatype], (6,), "x")
    told = read_data(orjson.dumps(drawn.list_values()), DATATYPES[datatype], (6,), "x")
    if datatype == "BF16":
        assert np.abs(packed.astype(np.int64) - told).max() <= 1, "JSON has some digits only"
    elif datatype.startswith("FP"):
        np.testing.assert_allclose(packed, told, atol=1e-3)
    else:
        assert packed.tolist() == told.tolist()


def test_the_same_seed_asks_the_same() -> None:
    """A load can be repeated to the last byte; another seed asks something else."""
    archive = open_archive(make_demanding(), "d.mar")
    assert (
        make_request_body(archive, None, 1)
        == make_request_body(archive, None, 1)
        != make_request_body(archive, None, 2)
    )
    body = json.loads(make_request_body(archive, None, 1).body)
    assert len(body["instances"][0]["target"]) == 27


def test_what_cannot_be_asked() -> None:
    """The reason names the archive and what to ask for instead."""
    with pytest.raises(ValueError, match=r"p\.mar carries no `forecast` .* ask for tensors"):
        make_request_body(open_archive(make_plain(), "p.mar"), BodyKind.DEEPAR, 0)


def test_one_call_asks_all() -> None:
    """Every model with its own series, in order, under the configuration that all share; else what is wrong is said."""
    one, other = (
        RequestBody(json.dumps({"instances": [{"start": START, "target": [i]}], "configuration": {"seed": 3}}).encode())
        for i in range(2)
    )
    plain = RequestBody(json.dumps({"instances": [{"start": START, "target": [1]}]}).encode())
    a, b = ModelName("a.mar"), ModelName("b.mar")
    body = json.loads(join_requests({a: one, b: other}).body)
    assert body["requests"] == [{"target_model": n, "start": START, "target": [i]} for i, n in enumerate((a, b))]
    assert body["configuration"] == {"seed": 3}
    with pytest.raises(ValueError, match="different configurations"):
        join_requests({a: one, b: plain})
    for tensors in (RequestBody(b'{"x": [1]}'), RequestBody(encode_npy(np.ones(2, np.float32)), NPY)):
        with pytest.raises(ValueError, match=r"b\.mar is not asked for one forecast, .*--body deepar"):
            join_requests({a: one, b: tensors})
