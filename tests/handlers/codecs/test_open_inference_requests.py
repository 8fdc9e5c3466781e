"""Requests of the Open Inference Protocol: what is read, what is refused, and where a message points."""

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.base import Float32
from handlers.codecs import tensors
from handlers.codecs.datatypes import MOST_STRINGS
from handlers.codecs.open_inference import INFER, AskedOutput, Call, Signature, write_answer
from handlers.codecs.open_inference_requests import MOST_ROWS, read_request
from handlers.errors import RequestError, UnsupportedMedia

ONE = Signature({"x": (2, 3)}, {"y": (2,)})
OPEN = Signature({"x": (-1,), "scale": ()}, {"y": (-1,), "z": (2,)})
SIX = [1, 2.5, 3e0, 4, 5, -6]
X = {"name": "x", "shape": [2, 3], "data": SIX}
BINARY = {"name": "x", "shape": [2, 3], "parameters": {"binary_data_size": 24}}


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
    assert (call.n, call.has_rows, call.id, list(call.outputs)) == (
        1,
        len(shape) == 3,
        "a",
        [AskedOutput("y", binary=False)],
    )


@pytest.mark.parametrize("data", [SIX, [SIX[:3], SIX[3:]]])
def test_usual_data_are_not_walked_in_python(data: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """They go from the JSON parser to numpy; the careful path, 15 times as slow, is for what is unusual."""
    monkeypatch.delattr(tensors, "_read_carefully")
    assert make_request({"name": "x", "shape": [2, 3], "data": data}).feeds["x"].sum() == sum(SIX)


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
    assert list(call.outputs) == [AskedOutput("y", binary=False), AskedOutput("z", binary=True)], "in the model's order"
    body, media = write_answer(call, "m", {"y": np.ones((1, 3), np.float32), "z": np.array([[5, 6]], np.float32)})
    size = int(media.partition(";json=")[2])
    outputs = json.loads(body[:size])["outputs"]
    assert [each["shape"] for each in outputs] == [[1, 3], [1, 2]]
    assert outputs[0]["data"] == [1, 1, 1]
    assert np.frombuffer(body[size:], "<f4").tolist() == [5, 6]


@pytest.mark.parametrize(
    ("inputs", "more", "said"),
    [
        ([], {}, "the inputs x are missing"),
        ([X, X], {}, "sent twice"),
        ([{**X, "name": "w"}], {}, "none of the model's, which takes x"),
        ([{**X, "datatype": "FP64"}], {}, "takes FP32, not 'FP64'"),
        ([{**X, "shape": [3, 2]}], {}, "has the shape"),
        ([{**X, "shape": [0, 2, 3], "data": []}], {}, "has the shape"),
        ([{**X, "shape": [-1, 2, 3]}], {}, "expected a whole number of at least 0"),
        ([{**X, "shape": ["2", 3]}], {}, "inputs[0].shape[0]: expected a whole number, not text"),
        ([{**X, "name": 7}], {}, "inputs[0].name: expected text, not a whole number"),
        ([X], {"parameters": {"timeout": -1}}, "parameters.timeout: timeout must be a whole number"),
        ([X], {"parameters": {"priority": "high"}}, "parameters.priority: priority must be a whole number"),
        ([X], {"parameters": [1]}, "parameters: expected an object, not a list"),
        ([X], {"outputs": [{"name": "y", "parameters": {"classification": 0.5}}]}, "classification must be"),
        ([X], {"outputs": [{"name": "y", "parameters": {"classification": 1001}}]}, "classification must be"),
        ([{**X, "data": SIX[:5]}], {}, "expected a list of 6, not of 5"),
        ([{**X, "data": [[1, 2], [3, 4, 5, 6]]}], {}, "expected a list of 3, not of 2"),
        ([{**X, "data": [*SIX[:5], None]}], {}, "expected a number, not null"),
        ([{**X, "data": [*SIX[:5], 1e39]}], {}, "not finite in float32"),
        ([{**X, "data": "no"}], {}, "expected a list of 6"),
        ([{"name": "x", "shape": [2, 3]}], {}, "has no values"),
        ([{**BINARY, "data": SIX}], {"behind": bytes(24)}, "it has data too"),
        ([BINARY], {"behind": bytes(23)}, "23 are left"),
        ([BINARY], {"behind": bytes(25)}, "1 bytes of the body are no input's"),
        ([{**BINARY, "parameters": {"binary_data_size": 20}}], {"behind": bytes(20)}, "are 24 bytes, not 20"),
        ([{**BINARY, "parameters": {"binary_data_size": True}}], {"behind": bytes(24)}, "are 24 bytes, not True"),
        ([BINARY], {"behind": np.full(6, np.nan, "<f4").tobytes()}, "not finite"),
        ([X], {"outputs": [{"name": "w"}]}, "none of the model's: y"),
        ([X], {"outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, "must be true or false"),
        ([X], {"output": [{"name": "y"}]}, "output: there is no such key; did you mean outputs?"),
        ([X], {"parameter": {}}, "parameter: there is no such key; did you mean parameters?"),
        ([X], {"id": "a" * 1025}, "id: expected text of at most 1024 characters"),
    ],
)
def test_mistakes_are_named(inputs: list[dict[str, Any]], more: dict[str, Any], said: str) -> None:
    """What is wrong, and where it can be said, the place."""
    with pytest.raises(RequestError) as caught:
        make_request(*inputs, **more)
    assert said in f"{caught.value.field}: {caught.value.message}"


def test_the_only_input_may_have_the_name_that_mlserver_gives_it() -> None:
    """Where the request says that a codec made it, and the model has one input."""
    unnamed = {"name": "input-1", "shape": [2, 3], "data": SIX}
    assert list(make_request(unnamed, parameters={"content_type": "np"}).feeds) == ["x"]
    with pytest.raises(RequestError, match="none of the model's, which takes x"):
        make_request(unnamed)
    with pytest.raises(RequestError, match="none of the model's, which takes x, scale"):
        make_request(unnamed, parameters={"content_type": "np"}, signature=OPEN)


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


@pytest.mark.parametrize("body", [bytes(23), b"{"])
def test_raw_bodies_are_whole_rows(body: bytes) -> None:
    """A body without JSON that is something else says what it should be."""
    with pytest.raises(RequestError, match="are not rows of"):
        read_request(body, f"{INFER};json=0", ONE)
    with pytest.raises(RequestError, match="send JSON too"):
        read_request(bytes(24), f"{INFER};json=0", OPEN)
    with pytest.raises(RequestError, match="the body is empty"):
        read_request(b"", f"{INFER};json=0", ONE)


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


TYPED = Signature({"x": (2,)}, {"y": (2,)})
#: Values of every datatype as JSON has them, the first and the last that it holds, and their bytes.
VALUES: dict[str, tuple[list[Any], bytes]] = {
    "BOOL": ([True, False], b"\1\0"),
    **{f"INT{n}": ([-(1 << n - 1), 7], np.array([-(1 << n - 1), 7], f"<i{n // 8}").tobytes()) for n in (8, 16, 32, 64)},
    **{f"UINT{n}": ([0, 2**n - 1], np.array([0, 2**n - 1], f"<u{n // 8}").tobytes()) for n in (8, 16, 32, 64)},
    "FP16": ([1.5, -65504.0], np.array([1.5, -65504], "<f2").tobytes()),
    "BF16": ([1.5, -2.0], bytes.fromhex("c03f00c0")),
    "FP32": ([1.5, -0.25], np.array([1.5, -0.25], "<f4").tobytes()),
    "FP64": ([0.1, -1e300], np.array([0.1, -1e300], "<f8").tobytes()),
    "BYTES": (["a\u00e9", ""], b"\3\0\0\0a\xc3\xa9\0\0\0\0"),
}  # fmt: skip


@pytest.mark.parametrize("datatype", VALUES)
@pytest.mark.parametrize("form", ["flat", "nested", "binary", "raw"])
def test_every_datatype_in_every_form(datatype: str, form: str) -> None:
    """Values come back as JSON and as bytes, to the last bit, whichever way they were sent."""
    values, packed = VALUES[datatype]
    signature = Signature(TYPED.inputs, TYPED.outputs, {"x": datatype, "y": datatype})
    if form == "raw" and datatype == "BYTES":
        call = read_request(b"text", f"{INFER};json=0", Signature({"x": (1,)}, {}, {"x": "BYTES"}))
        assert call.feeds["x"].tolist() == [["text"]]
        return
    if form == "raw":
        call = read_request(packed, f"{INFER};json=0", signature)
    else:
        sent: dict[str, Any] = {"name": "x", "shape": [1, 2], "datatype": datatype}
        sent |= {"data": values if form == "flat" else [values]}
        if form == "binary":
            sent = {**sent, "parameters": {"binary_data_size": len(packed)}}
            del sent["data"]
        call = make_request(sent, signature=signature, behind=packed if form == "binary" else b"")
    for binary in (True, False):
        asked = replace(call, outputs=[AskedOutput("y", binary=binary)])
        body, media = write_answer(asked, "m", {"y": call.feeds["x"]})
        size = int(media.partition(";json=")[2] or len(body))
        (output,) = json.loads(body[:size])["outputs"]
        assert (output["datatype"], output["shape"]) == (datatype, [1, 2])
        assert body[size:] == packed if binary else output["data"] == values


@pytest.mark.parametrize(
    ("datatype", "data", "said"),
    [
        ("INT32", [1, 3000000000], "data[1]: 3000000000 is not within -2147483648 to 2147483647, the range of INT32"),
        ("UINT8", [-1, 0], "data[0]: -1 is not within 0 to 255"),
        ("INT64", [1, 2**63], "is not within"),
        ("INT32", [1.5, 2], "data[0]: expected a whole number of INT32, not a fraction"),
        ("INT8", [True, 2], "expected a whole number of INT8, not a boolean"),
        ("BOOL", [1, 0], "expected true or false, not an integer"),
        ("FP16", [1, 65520], "data[1]: the number is not finite in FP16"),
        ("BF16", [1, 1e39], "not finite in BF16"),
        ("FP64", ["1", 2], "data[0]: expected a number, not a string"),
        ("BYTES", [1, "a"], "data[0]: expected a string, not an integer"),
        ("INT32", [[1], [2, 3]], "expected a list of 1, not of 2"),
        ("INT32", [[1, [2]]], "data[0][1]: expected a whole number of INT32, not a list"),
        ("INT32", [1], "expected a list of 2, not of 1"),
        ("INT32", 7, "expected a list of 2, not an integer"),
    ],
)
def test_values_that_a_datatype_cannot_hold(datatype: str, data: Any, said: str) -> None:
    """They are refused with their place, never wrapped, rounded or converted."""
    signature = Signature(TYPED.inputs, TYPED.outputs, {"x": datatype})
    with pytest.raises(RequestError) as caught:
        make_request({"name": "x", "shape": [1, 2], "datatype": datatype, "data": data}, signature=signature)
    assert said in f"{caught.value.field}: {caught.value.message}"


@pytest.mark.parametrize(
    ("datatype", "packed", "said"),
    [
        ("BOOL", b"\0\2", "x[0][1]: a BOOL is the byte 0 or 1, not 2"),
        ("BF16", bytes.fromhex("c03f807f"), "x[0][1]: the number is not finite in BF16"),
        ("FP64", np.array([1, np.inf]).tobytes(), "x[0][1]: the number is not finite"),
        ("BYTES", b"\1\0\0\0a", "element 1 of 2 is longer than what is left"),
        ("BYTES", b"\xff\xff\xff\xffa", "element 0 of 2 is longer"),
        ("BYTES", b"\0\0\0\0\1\0\0\0\xff", "element 1 is not text in UTF-8"),
        ("BYTES", bytes(9), "1 bytes follow the last of 2 elements"),
    ],
)
def test_bytes_that_are_no_values(datatype: str, packed: bytes, said: str) -> None:
    """Binary data are checked as JSON is."""
    signature = Signature(TYPED.inputs, TYPED.outputs, {"x": datatype})
    sent = {"name": "x", "shape": [1, 2], "datatype": datatype, "parameters": {"binary_data_size": len(packed)}}
    with pytest.raises(RequestError) as caught:
        make_request(sent, signature=signature, behind=packed)
    assert said in f"{caught.value.field}: {caught.value.message}"


def test_strings_are_bounded() -> None:
    """Each is an object, so their number is bounded before they are made."""
    count = MOST_STRINGS + 1
    signature = Signature({"x": (-1,)}, {}, {"x": "BYTES"})
    for sent in ({"data": [""] * count}, {"parameters": {"binary_data_size": 4 * count}}):
        behind = b"" if "data" in sent else bytes(4 * count)
        with pytest.raises(RequestError, match=f"{count} strings are more than {MOST_STRINGS}"):
            make_request(
                {"name": "x", "shape": [count], "datatype": "BYTES", **sent}, signature=signature, behind=behind
            )


def test_an_open_axis_may_be_empty_or_deduced() -> None:
    """No number is a number of values too; a raw body says how long the one open axis is."""
    signature = Signature({"x": (-1,)}, {"y": (-1,)})
    assert make_request({"name": "x", "shape": [1, 0], "data": []}, signature=signature).feeds["x"].shape == (1, 0)
    assert read_request(bytes(12), f"{INFER};json=0", signature).feeds["x"].shape == (1, 3)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)


@given(
    st.sampled_from(sorted(VALUES)),
    st.sampled_from([(2,), (-1,), (), (0,), (-1, 2)]),
    JSON_VALUES,
    st.binary(max_size=40),
)
def test_no_values_raise_anything_else(datatype: str, shape: tuple[int, ...], data: Any, packed: bytes) -> None:
    """Of any datatype and shape: a RequestError, or an array of that shape."""
    signature = Signature({"x": shape}, {}, {"x": datatype})
    sent = [abs(length) for length in shape]
    binary = {"parameters": {"binary_data_size": len(packed)}}
    for more, behind in (({"data": data}, b""), (binary, packed)):
        with suppress(RequestError):
            call = make_request(
                {"name": "x", "shape": sent, "datatype": datatype, **more}, signature=signature, behind=behind
            )
            assert call.feeds["x"].shape == (1, *sent)
    with suppress(RequestError):
        read_request(packed, f"{INFER};json=0", signature)
