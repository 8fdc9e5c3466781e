"""The requests for each server protocol, and the check of its answers."""

import io
import json

import numpy as np
import pytest

from loadtest.driver.dialects import DIALECTS, encode_npy, find_call_fault, find_fault, find_words
from server.contract import JSON
from tests.loadtest.peer import SOUND


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (SOUND, None),
        (b'{"predictions": [[1, 2.5]]}', None),
        (b'{"predictions": [[1, null]]}', "None where a number"),
        (b'{"predictions": [[1, true]]}', "True where a number"),
        (b'{"predictions": [1e999]}', "infinity"),
        (b'{"predictions": []}', "no predictions"),
        (b'{"message": "no"}', "no predictions"),
        (b"[[1, 2.5]]", None),
        (b'{"outputs": [{"name": "y", "shape": [1, 2], "data": [1, 2.5]}]}', None),
        (b'{"outputs": [{"name": "y", "shape": [1, 2], "data": []}]}', "no predictions"),
        (b'{"outputs": [{"datatype": "BYTES", "data": ["{\\"predictions\\": [{\\"mean\\": [1.5]}]}"]}]}', None),
        (b'{"outputs": [{"datatype": "BYTES", "data": ["{\\"predictions\\": [NaN]}"]}]}', "not JSON"),
        (b'{"outputs": [{"datatype": "BYTES", "data": ["a"]}]}', "no predictions"),
        (encode_npy(np.ones((2, 3), np.float32)), None),
        (encode_npy(np.array([[1, np.nan]], np.float32)), "not finite"),
        (encode_npy(np.empty(0, np.float32)), "no numbers"),
        (encode_npy(np.ones(9, np.float32))[:100], "not npy"),
        (b"", "not JSON"),
    ],
)
def test_sound_answers(body: bytes, why: str | None) -> None:
    """Predictions with numbers that are all finite; else what is wrong."""
    found = find_fault(body)
    assert found is None if why is None else why in str(found)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"predictions": [{"mean": [1.5]}, {"mean": [2]}], "failed": 0}', None),
        (b'{"predictions": [{"mean": [1.5]}, {"error": {"message": "no"}}], "failed": 1}', None),
        (b'{"predictions": [{"mean": [1.5]}], "failed": 0}', "not 2 predictions"),
        (b'{"predictions": [{"mean": [1.5]}, {"error": {}}], "failed": 0}', "0 said to have failed, but 1 errors"),
        (b'{"predictions": [{"mean": [1.5]}, {"mean": [null]}], "failed": 0}', "None where a number"),
        (b'{"predictions": [{"mean": [1.5]}, {"mean": []}], "failed": 0}', "no predictions"),
        (b'{"predictions": [1, 2], "failed": 0}', "not 2 predictions"),
        (b"[1, 2]", "not 2 predictions"),
        (b'{"predictions": [', "not JSON"),
    ],
)
def test_sound_answers_to_calls_for_many(body: bytes, why: str | None) -> None:
    """A prediction with finite numbers or an error for each of two models, as many errors as are said."""
    found = find_call_fault(body, 2)
    assert found is None if why is None else why in str(found)


@pytest.mark.parametrize(
    ("dialect", "line", "header"),
    [
        ("forecasts", "POST /v1/forecasts HTTP/1.1", "Content-Type: application/json"),
        ("sagemaker", "POST /invocations HTTP/1.1", "X-Amzn-SageMaker-Target-Model: au/NSW 1.mar"),
        ("torchserve", "POST /predictions/au/NSW%201.mar HTTP/1.1", "Content-Type: application/json"),
        ("mms", "POST /predictions/au/NSW%201.mar HTTP/1.1", "Content-Type: application/json"),
        ("v2", "POST /v2/models/au/NSW%201.mar/infer HTTP/1.1", "Content-Type: application/json"),
        ("ray", "POST / HTTP/1.1", "serve_multiplexed_model_id: au/NSW 1.mar"),
    ],
)
def test_where_the_model_stands(dialect: str, line: str, header: str) -> None:
    """In the path (quoted) or in a header (as it is), as each protocol has it; the body follows its length."""
    head, _, body = DIALECTS[dialect].request("host:1", "au/NSW 1.mar", b"{}").decode().partition("\r\n\r\n")
    lines = head.split("\r\n")
    assert lines[:2] == [line, "Host: host:1"]
    assert header in lines
    assert (lines[-1], body) == ("Content-Length: 2", "{}")


def test_a_model_in_a_path_of_its_own() -> None:
    """A container's name is one segment; a version follows where the protocol has a place for one."""
    assert DIALECTS["container"].request("h", "au/a.mar", b"").startswith(b"POST /models/au%2Fa.mar/invoke HTTP/1.1")
    assert (
        DIALECTS["torchserve"].request("h", "au/a", b"", version="2/1").startswith(b"POST /predictions/au/a/2%2F1 HTTP")
    )
    assert (
        DIALECTS["v2"].request("h", "au/a", b"", version="1").startswith(b"POST /v2/models/au/a/versions/1/infer HTTP")
    )
    with pytest.raises(ValueError, match="mms has no place for the version"):
        DIALECTS["mms"].request("h", "a", b"", version="1")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"positive", None),
        (b'{"label": "positive", "score": 0.5}', None),
        (b"", "empty"),
        (b'{"predictions": [[1, 2.5]]}', None),
        (b'{"predictions": [NaN]}', "not JSON"),
        (b' {"model_name": "m", "outputs": []}', "no predictions"),
    ],
)
def test_answers_of_code_may_be_anything(body: bytes, why: str | None) -> None:
    """But predictions and tensors are looked into all the same."""
    found = find_fault(body, free_form=True)
    assert found is None if why is None else why in str(found)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"code": 404, "type": "ModelNotFoundException", "message": "Model not found: m"}', "Model not found: m"),
        (b'{"error": "inputs[0]: no"}', "inputs[0]: no"),
        (b'{"error": {"code": "x", "message": "no\\nmore"}}', "no more"),
        (b"<html> \x1b[31m" + b"x" * 1000, "<html> ?[31m" + "x" * 188),
        (b"", ""),
        (b'{"predictions": 1}', ""),
    ],
)
def test_the_words_of_an_error(body: bytes, words: str) -> None:
    """In each protocol's shape; short, on one line, and nothing that a terminal acts on."""
    assert find_words(body) == words


def test_tensor_bodies() -> None:
    """The same numbers in every protocol, to four digits; V2 says name, shape and type beside them."""
    x = np.linspace(0, 5 / 7, 6, dtype=np.float32).reshape(2, 3)
    plain = json.loads(DIALECTS["sagemaker"].tensor_body(x))
    assert plain == {"x": [[0.0, 0.1429, 0.2857], [0.4286, 0.5714, 0.7143]]}
    (one,) = json.loads(DIALECTS["v2"].tensor_body(x))["inputs"]
    assert (one["shape"], one["datatype"], one["data"]) == ([1, 2, 3], "FP32", [*plain["x"][0], *plain["x"][1]])
    assert np.load(io.BytesIO(encode_npy(x))).tolist() == x.tolist()
    assert JSON in DIALECTS["v2"].request("h", "m", b"").decode()
