"""What a model says of its tensors, and answers that are classes."""

import json
from typing import Any

import pytest

from handlers.codecs.open_inference import Signature, describe_tensors, write_answer
from tests.handlers.codecs.test_open_inference_requests import ONE, make_request


def test_a_model_describes_its_tensors() -> None:
    """With an axis of rows before their own."""
    assert json.loads(describe_tensors(ONE)) == {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2, 3]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
        "parameters": {},
    }


@pytest.mark.parametrize(
    ("datatype", "values", "expected"),
    [
        ("INT32", [[11, 22, 44, 33]], ["44:2", "33:3"]),
        ("FP32", [[1.5, 1.5, -1.0, 0.0]], ["1.500000:0", "1.500000:1"]),
        ("UINT64", [[0, 2**64 - 1, 1, 5]], [f"{2**64 - 1}:1", "5:3"]),
        ("BOOL", [[False, True, False, True]], ["1:1", "1:3"]),
    ],
)
def test_classification_gives_the_largest_values(datatype: str, values: Any, expected: list[str]) -> None:
    """Largest first, of equal ones the first, each with its place; with the axis of rows if the request has it."""
    signature = Signature({"x": (4,)}, {"y": (4,)}, {} if datatype == "FP32" else {"x": datatype, "y": datatype})
    for has_rows in (True, False):
        call = make_request(
            {"name": "x", "shape": [1, 4] if has_rows else [4], "datatype": datatype, "data": values[0]},
            signature=signature,
            outputs=[{"name": "y", "parameters": {"classification": 2}}],
        )
        (output,) = json.loads(write_answer(call, "m", {"y": call.feeds["x"]})[0])["outputs"]
        assert output == {
            "name": "y", "datatype": "BYTES", "shape": [1, 2] if has_rows else [2], "data": expected
        }  # fmt: skip
