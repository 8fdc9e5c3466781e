"""Between messages and the body that a worker reads: the numbers are the same bytes, whatever field they came in."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from server.errors import Refused, Situation
from server.front.grpc.messages import find_message
from server.front.grpc.tensors import MOST_TENSORS, read_answer, write_body

Request, Response = find_message("inference.ModelInferRequest"), find_message("inference.ModelInferResponse")

CONTENTS: Sequence[tuple[str, str, Sequence[Any], bytes]] = [
    ("BOOL", "bool_contents", [True, False], b"\1\0"),
    ("INT8", "int_contents", [-1, 5], np.array([-1, 5], "<i1").tobytes()),
    ("INT16", "int_contents", [-300, 5], np.array([-300, 5], "<i2").tobytes()),
    ("INT32", "int_contents", [-70000, 5], np.array([-70000, 5], "<i4").tobytes()),
    ("INT64", "int64_contents", [-(2**40), 5], np.array([-(2**40), 5], "<i8").tobytes()),
    ("UINT8", "uint_contents", [255, 5], np.array([255, 5], "<u1").tobytes()),
    ("UINT16", "uint_contents", [65535, 5], np.array([65535, 5], "<u2").tobytes()),
    ("UINT32", "uint_contents", [2**32 - 1, 5], np.array([2**32 - 1, 5], "<u4").tobytes()),
    ("UINT64", "uint64_contents", [2**64 - 1, 5], np.array([2**64 - 1, 5], "<u8").tobytes()),
    ("FP32", "fp32_contents", [1.5, -2], np.array([1.5, -2], "<f4").tobytes()),
    ("FP64", "fp64_contents", [0.1, -2], np.array([0.1, -2], "<f8").tobytes()),
    ("BYTES", "bytes_contents", [b"ab", b""], b"\2\0\0\0ab\0\0\0\0"),
]


def make_request(datatype: str = "FP32", contents: dict[str, Any] | None = None) -> Any:
    """A request with one input of two elements."""
    tensor = {"name": "x", "datatype": datatype, "shape": [2], **({"contents": contents} if contents else {})}
    return Request(model_name="m", id="seven", inputs=[tensor])


def split_body(request: Any) -> tuple[Any, bytes]:
    """The document and what is behind it."""
    written = write_body(request)
    return json.loads(written.body[: written.json_bytes]), written.body[written.json_bytes :]


@pytest.mark.parametrize(("datatype", "field", "elements", "expected"), CONTENTS, ids=[each[0] for each in CONTENTS])
def test_typed_contents_and_raw_bytes_are_the_same(
    datatype: str, field: str, elements: Sequence[Any], expected: bytes
) -> None:
    """Both become the bytes that the codec reads; its own parameters cannot be set by a client."""
    typed, raw = make_request(datatype, {field: elements}), make_request(datatype)
    raw.raw_input_contents.append(expected)
    for request in (typed, raw):
        request.parameters["binary_data_output"].bool_param = False
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        request.parameters["priority"].uint64_param = 3
        document, behind = split_body(request)
        assert behind == expected
        assert document == {
            "id": "seven",
            "parameters": {"priority": 3, "binary_data_output": True},
            "inputs": [
                {
                    "name": "x",
                    "datatype": datatype,
                    "shape": [2],
                    "parameters": {"binary_data_size": len(expected)},
                }
            ],
        }


def test_outputs_are_chosen() -> None:
    """With their parameters."""
    request = make_request("FP32", {"fp32_contents": [1, 2]})
    request.outputs.add(name="y").parameters["classification"].int64_param = 3
    assert split_body(request)[0]["outputs"] == [{"name": "y", "parameters": {"classification": 3}}]


def test_empty_contents_beside_parts_are_none() -> None:
    """MLServer's client sends both."""
    request = make_request("FP32", {"fp32_contents": []})
    request.raw_input_contents.append(bytes(8))
    assert request.inputs[0].HasField("contents")
    assert split_body(request)[1] == bytes(8)


@pytest.mark.parametrize(
    ("contents", "raw", "datatype", "said"),
    [
        ({"fp64_contents": [1, 2]}, 0, "FP32", "contents.fp64_contents: elements of FP32 are sent in fp32_contents"),
        ({"int_contents": [300, 1]}, 0, "INT8", "inputs[0].contents.int_contents: an element is no INT8"),
        ({"fp32_contents": [1]}, 0, "FP16", "inputs[0].datatype: elements of 'FP16' have no field"),
        ({"fp32_contents": [1]}, 1, "FP32", "inputs[0].contents: there are raw_input_contents too"),
        (None, 2, "FP32", "raw_input_contents: 2 parts for 1 inputs"),
    ],
)
def test_what_cannot_be_is_refused(contents: dict[str, Any] | None, raw: int, datatype: str, said: str) -> None:
    """With the place in the message."""
    request = make_request(datatype, contents)
    request.raw_input_contents.extend([b"abcd"] * raw)
    with pytest.raises(Refused) as caught:
        write_body(request)
    assert caught.value.situation is Situation.BAD_REQUEST
    assert said in f"{caught.value.detail.field}: {caught.value.detail.message}"


def test_a_message_of_many_tensors_is_refused() -> None:
    """Before anything is made of them."""
    request = Request(inputs=[{"name": str(i)} for i in range(MOST_TENSORS + 1)])
    with pytest.raises(Refused, match="256 tensors at most"):
        write_body(request)


def test_an_answer_is_a_message() -> None:
    """The parts behind the document are the outputs' bytes; other parameters are kept."""
    document = {
        "id": "seven",
        "model_name": "m",
        "model_version": "1",
        "parameters": {"more": 1.5},
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}},
            {"name": "z", "datatype": "BYTES", "shape": [0], "parameters": {"binary_data_size": 0, "kept": True}},
        ],
    }
    text, numbers = json.dumps(document).encode(), np.array([1.5, 2], "<f4").tobytes()
    found = read_answer(text + numbers, f"application/octet-stream;json={len(text)}")
    assert list(found.raw_output_contents) == [numbers, b""]
    expected = Response(model_name="m", model_version="1", id="seven", raw_output_contents=[numbers, b""])
    expected.parameters["more"].double_param = 1.5
    expected.outputs.add(name="y", datatype="FP32", shape=[2])
    expected.outputs.add(name="z", datatype="BYTES", shape=[0]).parameters["kept"].bool_param = True
    assert found == expected
