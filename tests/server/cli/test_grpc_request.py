"""One request by gRPC: what a body becomes, and what an answer does."""

import json

import numpy as np
import pytest

from server.cli.grpc_request import RESPONSE, read_message, write_message
from server.front.grpc.messages import find_message


def test_tensors_become_contents_of_their_datatype() -> None:
    """Flat or nested; texts as bytes; the id and the version go along."""
    inputs = [
        {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [[1.5, 2]]},
        {"name": "n", "shape": [2], "datatype": "INT64", "data": [1, -2]},
        {"name": "t", "shape": [1], "datatype": "BYTES", "data": ["é"]},
    ]
    message = write_message("au/m", json.dumps({"inputs": inputs, "id": "7"}).encode(), "1")
    assert (message.model_name, message.model_version, message.id) == ("au/m", "1", "7")
    x, n, t = message.inputs
    assert (x.name, list(x.shape), list(x.contents.fp32_contents)) == ("x", [1, 2], [1.5, 2.0])
    assert list(n.contents.int64_contents) == [1, -2]
    assert list(t.contents.bytes_contents) == ["é".encode()]


def test_a_forecasts_body_is_one_element_of_bytes() -> None:
    """So that the same file asks in every protocol."""
    body = b'{"instances": [{"target": [1]}]}'
    (given,) = write_message("m", body, "").inputs
    assert (given.name, given.datatype, list(given.contents.bytes_contents)) == ("request", "BYTES", [body])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not JSON"),
        (b'{"inputs": [{"name": "x"}]}', r"inputs\[0\] is no tensor"),
        (b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP99", "data": [1]}]}', "FP99"),
        (b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": ["a"]}]}', r"inputs\[0\]"),
    ],
)
def test_other_bodies_are_refused_by_their_place(body: bytes, said: str) -> None:
    """Before anything is sent."""
    with pytest.raises(ValueError, match=said):
        write_message("m", body, "")


def test_an_answer_is_the_protocols_json() -> None:
    """Numbers from little-endian bytes, texts from behind their lengths."""
    message = find_message(RESPONSE)(model_name="m", model_version="1")
    for name, datatype, shape in (("y", "FP32", [2]), ("t", "BYTES", [2])):
        message.outputs.add(name=name, datatype=datatype, shape=shape)
    message.raw_output_contents.append(np.array([1.5, -2], "<f4").tobytes())
    message.raw_output_contents.append(b"\1\0\0\0a\0\0\0\0")
    assert json.loads(read_message(message)) == {
        "model_name": "m",
        "model_version": "1",
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [2], "data": [1.5, -2.0]},
            {"name": "t", "datatype": "BYTES", "shape": [2], "data": ["a", ""]},
        ],
    }
