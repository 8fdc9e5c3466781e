"""Codecs decode a body into numbers or raise an error that names the place, and raise no other exception."""

import io
import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from handlers.base import Float32, Shape
from handlers.codecs import open_inference, tensors
from handlers.codecs.codec import JSON, LINES, NPY, FamilyCodec, SingleCodec, negotiate_media
from handlers.errors import RequestError, RunFailed, UnsupportedMedia
from model_store.archives.manifest import ForecastSpec, InputChannel


class Tensor:
    """Two channels of three steps in, one step of two levels out."""

    input_name = "x"
    input_shape = (2, 3)
    output_shape = (1, 2)


CODEC = FamilyCodec(Tensor())
FORECASTER = FamilyCodec(
    Tensor(),
    ForecastSpec(
        frequency="1h",
        context_length=3,
        prediction_length=1,
        quantile_levels=(0.1, 0.9),
        inputs=(InputChannel(source="target"), InputChannel(source="target", lag=1)),
    ),
)
SINGLE = SingleCodec({"x": (2, -1), "scale": (1,)}, {"y": (2,), "z": (-1,)})
BODY = b'{"x": [[1, 2.5, 3e0], [4, 5, -6]]}'
ROWS = np.array([[[1, 2.5, 3], [4, 5, -6]]], np.float32)


def save_npy(array: np.ndarray[Any, Any]) -> bytes:
    """The array as numpy itself saves it."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npy_with(header: bytes, payload: bytes = b"", version: bytes = b"\1\0") -> bytes:
    """A file with any header text."""
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + payload


def npy_of(dtype: str, order: Any) -> bytes:
    """`ROWS` in some layout."""
    return save_npy(np.asarray(ROWS[0], dtype, order=order))


def test_tensor_json_there_and_back() -> None:
    """A nested list becomes one row, an answer row becomes nested lists, without the batch axis on both sides."""
    call = CODEC.decode(memoryview(BODY), "", "")
    assert call.rows.dtype == np.float32
    assert np.array_equal(call.rows, ROWS)
    body, content_type = call.encode(np.array([[[0.1, 2]]], np.float32))
    assert (body, content_type) == (b'{"predictions":[[0.1,2.0]]}', JSON)


@pytest.mark.parametrize(
    ("body", "media"),
    [
        (BODY, JSON),
        (b'{"instances": [{"start": "2024-01-01", "target": [7, 1, 2.5, 3]}]}', JSON),
        (b'{"start": "2024-01-01", "target": [7, 1, 2.5, 3]}\n{}\n', LINES),
        *((npy_of(dtype, order), NPY) for dtype in ("<f4", ">f4", "<f8", ">f8") for order in ("C", "F")),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_rows_are_written_to_their_place_without_the_steps_that_nobody_reads(
    body: bytes, media: str, steps: int
) -> None:
    """From every kind of body: the same numbers as elsewhere, and nothing else of the memory there is written."""
    memory = np.full((5, 2, steps), np.nan, np.float32)
    call = FORECASTER.decode(memoryview(body), media, "", lambda rows: memory[1 : 1 + rows])
    elsewhere = FORECASTER.decode(body, media, "")
    assert np.shares_memory(call.rows, memory)
    assert np.array_equal(call.rows, elsewhere.rows[..., -steps:])
    assert np.array_equal(memory[1:2], call.rows)
    assert np.isnan(memory[[0, 2, 3, 4]]).all()
    answer = np.array([[[0.1, 2]]], np.float32)
    assert call.encode(answer) == elsewhere.encode(answer)


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e300])
def test_a_wrong_number_among_those_that_nobody_reads_is_an_error_too(number: float) -> None:
    """What is wrong does not depend on where the rows go, and nothing is written."""
    memory = np.zeros((1, 2, 1), np.float32)
    wrong = np.array([[number, 0, 0], [0, 0, 0]])
    with pytest.raises(RequestError, match="not finite in float32") as error:
        CODEC.decode(save_npy(wrong), NPY, "", lambda rows: memory[:rows])
    assert error.value.field == "x[0][0]"
    assert not memory.any()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8"])
def test_npy_there_and_back(order: Any, dtype: str) -> None:
    """Every float layout that numpy writes is read as the same numbers, and numpy reads our answer."""
    call = CODEC.decode(npy_of(dtype, order), NPY, "")
    assert np.array_equal(call.rows, ROWS)
    assert call.rows.flags.c_contiguous
    body, content_type = call.encode(np.array([[[0.1, 2]]], np.float32))
    assert content_type == NPY
    assert np.array_equal(np.load(io.BytesIO(body), allow_pickle=False), np.array([[0.1, 2]], np.float32))


@pytest.mark.parametrize(
    ("content_type", "accept", "expected"),
    [
        ("", "", (JSON, JSON)),
        ("Application/JSON; charset=utf-8", "*/*", (JSON, JSON)),
        (NPY, "*/*", (NPY, NPY)),
        (NPY, "application/*;q=0.8, text/html", (NPY, NPY)),
        (NPY, JSON, (NPY, JSON)),
        (JSON, f"{JSON};q=0.5, {NPY}", (JSON, NPY)),
        (JSON, f"{NPY};q=0, text/html, */*;q=0.1", (JSON, JSON)),
    ],
)
def test_negotiation(content_type: str, accept: str, expected: tuple[str, str]) -> None:
    """The body's own type answers unless the client prefers the other one."""
    assert negotiate_media(content_type, accept) == expected


@pytest.mark.parametrize(
    ("content_type", "accept", "field"), [("text/csv", "", "content-type"), (JSON, "text/html", "accept")]
)
def test_unknown_media_name_what_is_served(content_type: str, accept: str, field: str) -> None:
    """A client that sends or wants something else learns both types that work."""
    with pytest.raises(UnsupportedMedia, match=f"{JSON}.*{NPY}") as caught:
        CODEC.decode(BODY, content_type, accept)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        (b"", None, "not valid JSON"),
        (b"[1]", None, r"must be a JSON object of x \[2, 3\], not a list"),
        (b"{}", "x", "missing"),
        (b'{"y": 1}', "x", "missing"),
        (b'{"x": [[1,2,3],[4,5,6]], "y": 1}', "y", "no such input"),
        (b'{"x": 7}', "x", "expected a list of 2, not a number"),
        (b'{"x": "ab"}', "x", "expected a list of 2, not a string"),
        (b'{"x": [[1,2,3]]}', "x", "expected a list of 2, not of 1"),
        (b'{"x": [[1,2,3],[4,5]]}', "x[1]", "expected a list of 3, not of 2"),
        (b'{"x": [[1,2,3],"abc"]}', "x[1]", "expected a list of 3, not a string"),
        (b'{"x": [[1,2,3],[4,[5],6]]}', "x[1][1]", "expected a number, not a list"),
        (b'{"x": [[1,2,3],[4,[],[5,6]]]}', "x[1][1]", "expected a number, not a list"),
        (b'{"x": [[1,2,null],[4,5,6]]}', "x[0][2]", "expected a number, not null"),
        (b'{"x": [[1,2,true],[4,5,6]]}', "x[0][2]", "expected a number, not a boolean"),
        (b'{"x": [[1,2,1e39],[4,5,6]]}', "x[0][2]", "not finite in float32"),
        (b'{"x": [[1,2,NaN],[4,5,6]]}', None, "not valid JSON"),
        (b"[" * 100_000, None, "not valid JSON"),
        (b'{"instances": []}', "instances", "answers tensors only"),
    ],
)
def test_wrong_json_names_the_place(body: bytes, field: str | None, message: str) -> None:
    """The first wrong place is named, so that a client can find it in eleven kilobytes of numbers."""
    with pytest.raises(RequestError, match=message) as caught:
        CODEC.decode(body, "", "")
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not an npy file"),
        (BODY, "not an npy file"),
        (save_npy(ROWS[0])[:100], "longer than the body"),
        (save_npy(ROWS[0])[:-1], "24 bytes, but 23 follow"),
        (save_npy(ROWS[0]) + b"\0", "24 bytes, but 25 follow"),
        (save_npy(ROWS), r"must have the shape \[2, 3\], not \[1, 2, 3\]"),
        (save_npy(ROWS[0].T), r"not \[3, 2\]"),
        (save_npy(ROWS[0].astype(np.int32)), "float32 or float64, not '<i4'"),
        (save_npy(np.array([[{}, {}, {}]] * 2, dtype=object)), r"float32 or float64, not '\|O'"),
        (save_npy(np.zeros((2, 3), "f4,f4")), "float32 or float64, not \"\\[\\('f0'"),
        (save_npy(np.array([[1, 2, np.inf], [1, 2, 3]], np.float32)), "not finite"),
        (save_npy(np.array([[1, 2, 1e39], [1, 2, 3]])), "not finite"),
        (npy_with(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, %d)}" % 10**30), "must be a tuple"),
        (npy_with(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, -3)}"), "must be a tuple"),
        (npy_with(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, True)}"), "must be a tuple"),
        (npy_with(b"{'descr': '<f4', 'fortran_order': 0, 'shape': (2, 3)}"), "True or False"),
        (npy_with(b"{'descr': '<f4', 'shape': (2, 3)}"), "must have exactly"),
        (npy_with(b"{[]: 1}"), "not a Python literal"),
        (npy_with(b"(" * 1000), "not a Python literal"),
        (npy_with(b"__import__('os').abort()"), "not a Python literal"),
        (npy_with(b"\xff" * 30), "not a Python literal"),
        (npy_with(b" " * 2000), "a header of 2000 bytes"),
        (npy_with(b"", version=b"\3\0"), "version 1 or 2"),
    ],
)
def test_hostile_npy_is_refused(body: bytes, message: str) -> None:
    """Pickles, foreign dtypes, lying headers and lengths: each is refused before a byte is taken as a number."""
    with pytest.raises(RequestError, match=message):
        CODEC.decode(body, NPY, "")


def test_npy_keys_may_come_in_any_order() -> None:
    """The format's rule: a reader must not depend on numpy's order of header keys; version 2 counts in four bytes."""
    header = b"{'shape':(2,3),'fortran_order':False,'descr':'<f4'}"
    body = b"\x93NUMPY\2\0" + struct.pack("<I", len(header)) + header + ROWS.tobytes()
    assert np.array_equal(CODEC.decode(body, NPY, "").rows, ROWS)


@pytest.mark.parametrize("accept", [JSON, NPY])
def test_a_non_finite_output_is_the_models_failure(accept: str) -> None:
    """NaN never leaves as a number or null; the message says where it was."""
    call = CODEC.decode(BODY, "", accept)
    with pytest.raises(RunFailed, match=r"predictions\[0\]\[0\]\[1\] is nan"):
        call.encode(np.array([[[0.1, np.nan]]], np.float32))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(2**70), 2**70) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["x", "y", "instances"]), inner),
    max_leaves=20,
)


@given(
    st.one_of(
        st.binary(max_size=200),
        st.binary(max_size=60).map(lambda tail: BODY[:-5] + tail),
        st.binary(max_size=60).map(lambda tail: save_npy(ROWS[0])[:60] + tail),
        JSON_VALUES.map(lambda value: json.dumps(value).encode()),
        JSON_VALUES.map(lambda value: json.dumps({"x": value}).encode()),
        JSON_VALUES.map(lambda value: json.dumps({"instances": value}).encode()),
        JSON_VALUES.map(lambda value: json.dumps({"instances": [{"start": "2024-01-01", "target": value}]}).encode()),
    ),
    st.sampled_from(["", JSON, NPY]),
)
def test_no_body_raises_anything_else(body: bytes, content_type: str) -> None:
    """Arbitrary bytes, near-misses of real bodies and arbitrary JSON give a call or a RequestError."""
    decoders: list[Callable[[bytes, str, str], Any]] = [CODEC.decode, FORECASTER.decode, SINGLE.decode]
    for decode in decoders:
        try:
            decode(body, content_type, "")
        except RequestError as error:
            assert error.message  # noqa: PT017 - either outcome is right


NUMBERS = st.one_of(
    st.floats(-1e6, 1e6), st.integers(-(2**66), 2**66), st.sampled_from([1e39, 3e30, True, None, "1", [1.0]])
)


@pytest.mark.slow
@given(st.lists(st.lists(NUMBERS, min_size=2, max_size=4) | st.just("ab"), min_size=1, max_size=3), st.booleans())
@example([[2**65, 1.0]], False)
@example([[1.0, [1.0]], [1.0, 1.0]], True)
def test_the_fast_path_agrees_with_the_careful_one(value: list[object], extra: bool) -> None:
    """The paths before it accept nothing that the careful path refuses, and read the same numbers.

    The path through simdjson is taken also where the compiled reader would have read the body.
    """
    body = json.dumps({"x": value} | ({"y": 1} if extra else {})).encode()
    shapes: dict[str, Shape] = {"x": (-1, 2)}

    def decode_outcome(read: Callable[[bytes, dict[str, Shape]], dict[str, Float32] | None]) -> object:
        try:
            found = read(body, shapes)
        except RequestError as error:
            return error.message, error.field
        assert found is not None
        return found["x"].shape, found["x"].tobytes()

    careful = decode_outcome(tensors._read_carefully)
    assert decode_outcome(tensors.read_json) == careful
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "read_tensors", lambda *_: None)
        assert decode_outcome(tensors.read_json) == careful


def test_single_takes_every_input_and_gives_every_output() -> None:
    """Several inputs and outputs go by name; an open dimension takes the length that came."""
    call = SINGLE.decode(b'{"scale": [2], "x": [[1, 2, 3, 4], [5, 6, 7, 8]]}', "", "")
    assert call.n == 1
    assert {name: array.shape for name, array in call.feeds.items()} == {"x": (1, 2, 4), "scale": (1, 1)}
    outputs = {"y": np.ones((1, 2), np.float32), "z": np.zeros((1, 1), np.float32)}
    assert call.encode(outputs) == (b'{"predictions":{"y":[1.0,1.0],"z":[0.0]}}', JSON)


def test_single_with_one_array_each_way_speaks_npy() -> None:
    """One input and one output need no names."""
    codec = SingleCodec({"x": (-1,)}, {"y": (-1,)})
    call = codec.decode(save_npy(np.arange(3.0)), NPY, "")
    assert call.feeds["x"].tolist() == [[0, 1, 2]]
    body, _ = call.encode({"y": np.ones((1, 2), np.float32)})
    assert np.load(io.BytesIO(body)).tolist() == [1, 1]


@pytest.mark.parametrize(("content_type", "accept"), [(NPY, ""), ("", NPY)])
def test_single_with_several_arrays_refuses_npy(content_type: str, accept: str) -> None:
    """One npy array cannot carry two; the error says to use JSON."""
    with pytest.raises(UnsupportedMedia, match=JSON):
        SINGLE.decode(save_npy(ROWS), content_type, accept)


def test_single_refuses_ragged_and_empty_lists() -> None:
    """An open dimension has one length, the first one's, and at least one number."""
    for body, field in (
        (b'{"x": [[1, 2], [3]], "scale": [1]}', "x[1]"),
        (b'{"x": [[], []], "scale": [1]}', "x[0]"),
        (b'{"x": [[1], [2]], "scale": 1}', "scale"),
    ):
        with pytest.raises(RequestError) as caught:
            SINGLE.decode(body, "", "")
        assert caught.value.field == field


@given(st.binary(max_size=200), st.integers(0, 300))
@example(b"{{{", 3)
def test_a_byte_is_counted_up_to_a_bound(body: bytes, most: int) -> None:
    """As `bytes.count` does, but no further than asked."""
    assert tensors.count_up_to(body, b"{", most) == min(body.count(b"{"), most)


def test_a_forecast_is_one_element_of_bytes() -> None:
    """DeepAR JSON in, and the same answer as on any other path out; either input alone is a request."""
    request = {"instances": [{"start": "2024-01-01 00:00:00", "target": [1.0] * 24}] * 2}
    document = {"inputs": [{"name": "request", "shape": [1], "datatype": "BYTES", "data": [json.dumps(request)]}]}
    call = infer(document)
    plain = FORECASTER.decode(json.dumps(request).encode(), "", "")
    assert np.array_equal(call.rows, plain.rows)
    outputs = np.zeros((2, *Tensor.output_shape), np.float32)
    answer = json.loads(call.encode(outputs)[0])
    (output,) = answer["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("response", "BYTES", [1])
    assert json.loads(output["data"][0]) == json.loads(plain.encode(outputs)[0])
    for wrong, said in (([json.dumps(request)] * 2, "expected a list of 1"), (["{"], "JSON"), (["{}"], "missing")):
        document["inputs"][0]["data"] = wrong
        with pytest.raises(RequestError, match=said):
            infer(document)


def test_a_forecast_may_have_the_axis_of_rows_and_mlservers_name() -> None:
    """MLServer's codec of text sends [1, 1], and that of whole requests names the input itself; two are refused."""
    request = json.dumps({"instances": [{"start": "2024-01-01 00:00:00", "target": [1.0] * 24}]})
    given: dict[str, Any] = {"name": "input-1", "shape": [1, 1], "datatype": "BYTES", "data": [request]}
    call = infer({"inputs": [given], "parameters": {"content_type": "str"}})
    assert np.array_equal(call.rows, FORECASTER.decode(request.encode(), "", "").rows)
    (output,) = json.loads(call.encode(np.zeros((1, *Tensor.output_shape), np.float32))[0])["outputs"]
    assert (output["name"], output["shape"]) == ("response", [1, 1])
    with pytest.raises(RequestError, match="'input-1' is none of the model's"):
        infer({"inputs": [given]})
    with pytest.raises(RequestError, match="send one, not 2"):
        infer({"inputs": [{**given, "name": "request", "shape": [2, 1], "data": [request] * 2}]})


def test_a_forecaster_says_what_a_client_must_know() -> None:
    """Its clock, lengths, covariates, levels and products, and the input that takes forecasts."""
    found = json.loads(FORECASTER.decode(b"", open_inference.DESCRIBE, "m").encode(np.empty((0, 1, 1), np.float32))[0])
    assert [each["name"] for each in found["inputs"]] == ["x"], "what every client may send"
    assert found["parameters"]["forecast_input"] == {"name": "request", "datatype": "BYTES", "shape": [1]}
    recipe = found["parameters"]["forecast"]
    named = ("frequency", "time_zone", "origin", "history_length", "dynamic_feat", "cat", "quantile_levels", "products")
    assert all(name in recipe for name in named), recipe


def infer(document: dict[str, Any]) -> Any:
    """What the forecaster makes of a document of the Open Inference Protocol."""
    body = json.dumps(document).encode()
    return FORECASTER.decode(body, f"{open_inference.INFER};json={len(body)}", "m")
