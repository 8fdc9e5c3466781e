"""Requests and answers of the Open Inference Protocol: what is read, what is refused, and where a message points."""

import json
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.base import Float32
from handlers.codecs.open_inference import (
    INFER,
    MOST_ROWS,
    Call,
    Signature,
    describe_tensors,
    read_request,
    write_answer,
)
from handlers.errors import RequestError, UnsupportedMedia

ONE = Signature({"x": (2, 3)}, {"y": (2,)})
OPEN = Signature({"x": (-1,), "scale": ()}, {"y": (-1,), "z": (2,)})
SIX = [1, 2.5, 3e0, 4, 5, -6]


def make_request(*inputs: dict[str, Any], signature: Signature = ONE, behind: bytes = b"", **more: Any) -> Call:
    """Read a request of these inputs, each FP32 where it says nothing."""
    document = json.dumps({"inputs": [{"datatype": "FP32", **each} for each in inputs], **more}).encode()
    return read_request(document + behind, f"{INFER};json={len(document)}", signature)


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        ([2, 3], SIX),
        ([2, 3], [SIX[:3], SIX[3:]]),
        ([1, 2, 3], SIX),
        ([1, 2, 3], [[SIX[:3], SIX[3:]]]),
    ],
)
def test_data_may_be_flat_or_nested(shape: list[int], data: list[Any]) -> None:
    """With the axis of rows or without it."""
    call = make_request({"name": "x", "shape": shape, "data": data}, id="a")
    assert call.feeds["x"].tolist() == [[[1, 2.5, 3], [4, 5, -6]]]
    assert (call.n, call.has_rows, call.id, list(call.outputs)) == (1, len(shape) == 3, "a", [("y", False)])


def test_binary_and_json_inputs_may_be_mixed() -> None:
    """Binary parts follow in the order of the inputs; an output may be asked either way."""
    numbers = np.arange(4, dtype="<f4")
    call = make_request(
        {"name": "scale", "shape": [1], "data": [2]},
        {"name": "x", "shape": [1, 4], "parameters": {"binary_data_size": 16}},
        signature=OPEN,
        behind=numbers.tobytes(),
        outputs=[{"name": "z"}, {"name": "y", "parameters": {"binary_data": False}}],
        parameters={"binary_data_output": True},
    )
    assert call.feeds["x"].tolist() == [[0, 1, 2, 3]]
    assert call.feeds["scale"].tolist() == [2]
    assert list(call.outputs) == [("z", True), ("y", False)]
    body, media = write_answer(call, "m", {"y": np.ones((1, 3), np.float32), "z": np.array([[5, 6]], np.float32)})
    size = int(media.partition(";json=")[2])
    outputs = json.loads(body[:size])["outputs"]
    assert [each["shape"] for each in outputs] == [[1, 2], [1, 3]]
    assert outputs[1]["data"] == [1, 1, 1]
    assert np.frombuffer(body[size:], "<f4").tolist() == [5, 6]


def test_a_model_describes_its_tensors() -> None:
    """With an axis of rows before their own."""
    assert json.loads(describe_tensors(ONE)) == {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2, 3]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
        "parameters": {},
    }


X = {"name": "x", "shape": [2, 3], "data": SIX}
BINARY = {"name": "x", "shape": [2, 3], "parameters": {"binary_data_size": 24}}


@pytest.mark.parametrize(
    ("inputs", "more", "said"),
    [
        ([], {}, "the inputs x are missing"),
        ([X, X], {}, "sent twice"),
        ([{**X, "name": "w"}], {}, "none of the model's, which takes x"),
        ([{**X, "datatype": "FP64"}], {}, "takes FP32, not 'FP64'"),
        ([{**X, "shape": [3, 2]}], {}, "has the shape"),
        ([{**X, "shape": [0, 2, 3], "data": []}], {}, "has the shape"),
        ([{**X, "shape": [-1, 2, 3]}], {}, "not an inference request"),
        ([{**X, "data": SIX[:5]}], {}, "expected a list of 6, not of 5"),
        ([{**X, "data": [[1, 2], [3, 4, 5, 6]]}], {}, "expected a list of 3, not of 2"),
        ([{**X, "data": [*SIX[:5], None]}], {}, "expected a number, not null"),
        ([{**X, "data": [*SIX[:5], 1e39]}], {}, "not finite in float32"),
        ([{**X, "data": "no"}], {}, "expected a list of 6"),
        ([{"name": "x", "shape": [2, 3]}], {}, "has no numbers"),
        ([{**BINARY, "data": SIX}], {"behind": bytes(24)}, "it has data too"),
        ([BINARY], {"behind": bytes(23)}, "23 are left"),
        ([BINARY], {"behind": bytes(25)}, "1 bytes of the body are no input's"),
        ([{**BINARY, "parameters": {"binary_data_size": 20}}], {"behind": bytes(20)}, "are 24 bytes, not 20"),
        ([{**BINARY, "parameters": {"binary_data_size": True}}], {"behind": bytes(24)}, "are 24 bytes, not True"),
        ([BINARY], {"behind": np.full(6, np.nan, "<f4").tobytes()}, "not finite"),
        ([X], {"outputs": [{"name": "w"}]}, "none of the model's: y"),
        ([X], {"outputs": [{"name": "y"}, {"name": "y"}]}, "asked twice"),
        ([X], {"outputs": [{"name": "y", "parameters": {"classification": 2}}]}, "classification is not served"),
        ([X], {"outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, "must be true or false"),
        ([X], {"id": "a" * 1025}, "not an inference request"),
    ],
)
def test_mistakes_are_named(inputs: list[dict[str, Any]], more: dict[str, Any], said: str) -> None:
    """What is wrong, and where it can be said, the place."""
    with pytest.raises(RequestError) as caught:
        make_request(*inputs, **more)
    assert said in f"{caught.value.field}: {caught.value.message}"


def test_inputs_have_equal_rows() -> None:
    """Of a model with several inputs."""
    with pytest.raises(RequestError, match="differ in their rows"):
        make_request(
            {"name": "x", "shape": [2, 1], "data": [1, 2]}, {"name": "scale", "shape": [1], "data": [1]}, signature=OPEN
        )


def test_rows_are_bounded() -> None:
    """Before their numbers are read."""
    for rows in (MOST_ROWS, MOST_ROWS + 1):
        shape, behind = [rows, 2, 3], bytes(rows * 24)
        sent = {"name": "x", "shape": shape, "parameters": {"binary_data_size": len(behind)}}
        if rows == MOST_ROWS:
            assert make_request(sent, behind=behind).n == rows
            assert read_request(behind, f"{INFER};json=0", ONE).n == rows
            continue
        with pytest.raises(RequestError, match=f"{rows} rows are more than {MOST_ROWS}"):
            make_request(sent, behind=behind)
        with pytest.raises(RequestError, match=f"{rows} rows are more than {MOST_ROWS}"):
            read_request(behind, f"{INFER};json=0", ONE)


@pytest.mark.parametrize("body", [b"", bytes(23), b"{"])
def test_raw_bodies_are_whole_rows(body: bytes) -> None:
    """A body without JSON that is something else says what it should be."""
    with pytest.raises(RequestError, match="are not rows of"):
        read_request(body, f"{INFER};json=0", ONE)
    with pytest.raises(RequestError, match="send JSON too"):
        read_request(bytes(24), f"{INFER};json=0", OPEN)


@pytest.mark.parametrize(
    "media", ["", ";json=", ";json=-1", ";json=3", ";json=x", f";json={'1' * 5000}", "x;json=2", ";json=²"]
)
def test_a_client_may_send_the_media_type_itself(media: str) -> None:
    """To `/invocations`, with any length: it is refused as any other type that is not served."""
    with pytest.raises(UnsupportedMedia, match="/v2/models/MODEL/infer"):
        read_request(b"{}", f"{INFER}{media}", ONE)


@given(st.binary(max_size=300), st.integers(0, 400))
def test_no_bytes_raise_anything_else(body: bytes, size: int) -> None:
    """A RequestError or a request, whatever comes."""
    for start in (b"", b'{"inputs":[{"name":"x","shape":[2,3],"datatype":"FP32",'):
        with suppress(RequestError):
            read_request(start + body, f"{INFER};json={size}", ONE)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=6, max_size=6), st.booleans())
def test_numbers_come_back_as_they_are(numbers: list[float], binary: bool) -> None:
    """In either form, to the last bit."""
    x: Float32 = np.array(numbers, np.float32).reshape(2, 3)
    sent: dict[str, Any] = {"name": "x", "shape": [2, 3]}
    sent |= {"parameters": {"binary_data_size": 24}} if binary else {"data": [float(each) for each in numbers]}
    call = make_request(sent, behind=x.tobytes() if binary else b"", parameters={"binary_data_output": binary})
    assert call.feeds["x"].tobytes() == x.tobytes() or (call.feeds["x"] == x).all()
    body, media = write_answer(call, "m", {"y": x[None]})
    size = int(media.partition(";json=")[2] or len(body))
    (output,) = json.loads(body[:size])["outputs"]
    found = np.frombuffer(body[size:], "<f4") if binary else np.array(output["data"], np.float32)
    assert (found == x.ravel()).all()
