"""The hand-written messages of a load over gRPC, held to the protocol's own classes."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from loadtest.driver.dialects import DIALECTS, HEADER_JSON_BYTES, find_fault
from loadtest.driver.grpc_messages import DTYPES, encode_infer, read_infer


def make_answer(datatype: str, content: bytes, shape: Sequence[int] = (-1, 2**33)) -> bytes:
    """A server's answer of one output."""
    answer = service_pb2.ModelInferResponse(model_name="m", model_version="1", id="seven")
    answer.parameters["more"].int64_param = 2**40
    answer.outputs.add(name="y", datatype=datatype, shape=shape)
    answer.raw_output_contents.append(content)
    return bytes(answer.SerializeToString())


@pytest.mark.parametrize("datatype", [*DTYPES, "BF16", "BYTES"])
def test_documents_become_messages(datatype: str) -> None:
    """The classes of the protocol read the model, the tensors and the bytes of each datatype."""
    data = ["é", ""] if datatype == "BYTES" else [1, 0]
    document = {"inputs": [{"name": "x", "shape": [2, 200], "datatype": datatype, "data": data}]}
    raw = encode_infer("au/é.mar", "1", json.dumps(document).encode(), len(json.dumps(document)))
    found = service_pb2.ModelInferRequest.FromString(raw)
    assert (found.model_name, found.model_version) == ("au/é.mar", "1")
    assert [(each.name, each.datatype, list(each.shape)) for each in found.inputs] == [("x", datatype, [2, 200])]
    others = {"BYTES": b"\2\0\0\0\xc3\xa9\0\0\0\0", "BF16": b"\x80\x3f\0\0"}
    expected = others.get(datatype) or np.array(data, DTYPES[datatype]).tobytes()
    assert list(found.raw_input_contents) == [expected]


def test_binary_tensors_stay_as_they_are() -> None:
    """Cut by their sizes, in their order, beside one of the document."""
    inputs = [
        {"name": "a", "shape": [2], "datatype": "INT8", "parameters": {"binary_data_size": 2}},
        {"name": "b", "shape": [1], "datatype": "INT8", "data": [3]},
        {"name": "c", "shape": [1], "datatype": "INT16", "parameters": {"binary_data_size": 2}},
    ]
    head = json.dumps({"inputs": inputs}).encode()
    raw = DIALECTS["grpc"].request("", "m", head + b"\1\2\4\0", headers={HEADER_JSON_BYTES: str(len(head))})
    found = service_pb2.ModelInferRequest.FromString(raw)
    assert list(found.raw_input_contents) == [b"\1\2", b"\3", b"\4\0"]
    assert found.model_version == ""


@pytest.mark.parametrize("body", [b"[]", b'{"instances": []}', b'{"inputs": [{"name": "x"}]}', b"no json"])
def test_other_bodies_are_no_requests(body: bytes) -> None:
    """With what is expected, before the load."""
    with pytest.raises(ValueError, match=r"request by gRPC is .*(inputs|JSON)"):
        encode_infer("m", "", body, len(body))


def test_a_datatype_that_cannot_be_written_is_named() -> None:
    """One that the protocol does not have."""
    body = b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP8", "data": [1]}]}'
    with pytest.raises(ValueError, match="x is FP8"):
        encode_infer("m", "", body, len(body))


def test_answers_are_checked_as_over_http() -> None:
    """Numbers, forecasts in BYTES; what is not finite, no number or cut off is a fault."""
    forecast = b'{"predictions": [1.5]}'
    assert find_fault(read_infer(make_answer("FP32", np.array([1, 2], "<f4").tobytes()))) is None
    assert find_fault(read_infer(make_answer("FP16", np.array([1], "<f2").tobytes()))) is None
    assert find_fault(read_infer(make_answer("BYTES", len(forecast).to_bytes(4, "little") + forecast))) is None
    assert find_fault(read_infer(make_answer("FP32", np.array([1, np.nan], "<f4").tobytes()))) is not None
    assert find_fault(read_infer(make_answer("FP32", b""))) is not None
    assert find_fault(read_infer(make_answer("BF16", b"\x80\x3f"))) is None
    assert find_fault(read_infer(make_answer("BF16", b"\x80\x7f"))) is not None
    assert find_fault(read_infer(make_answer("BOOL", b"\1"))) is None
    assert find_fault(read_infer(make_answer("BYTES", b"\1\0\0\0a"))) is not None, "the shape says many"
    assert find_fault(read_infer(make_answer("BYTES", b"\1\0\0\0a", [1, 1]))) is None
    whole = make_answer("FP32", np.array([1, 2], "<f4").tobytes())
    for broken in (whole[:-3], b"\xff", make_answer("FP64", b"abc"), make_answer("odd", b"")):
        with pytest.raises(ValueError, match=r"."):
            read_infer(broken)
