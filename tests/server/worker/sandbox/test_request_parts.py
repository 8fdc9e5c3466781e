"""Forms, and headers by any case: pure, beside the recordings."""

import json
from enum import IntEnum
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.code_messages import CodeRequest, encode_fields
from server.worker.sandbox.inside.handler_context import HandlerContext
from server.worker.sandbox.inside.json_answers import write_json
from server.worker.sandbox.inside.request_parts import (
    MAX_PARTS,
    BadParts,
    RequestHeaders,
    read_headers,
    read_parts,
)


def read_request(request: CodeRequest) -> tuple[dict[str, Any], RequestHeaders]:
    """The parts and the headers, as a handler that asks for both gets them."""
    parts, types = read_parts(request)
    return parts, read_headers(request, types)


def make_request(content_type: str, body: bytes = b"", **headers: str) -> CodeRequest:
    """A request with these headers."""
    fields = {name.replace("_", "-").encode(): value.encode("latin-1") for name, value in headers.items()}
    return CodeRequest("1", content_type, "", body, encode_fields(fields))


def test_headers_are_found_by_any_case() -> None:
    """HTTP does not mind it; the names are spelt as clients spell them."""
    _, headers = read_request(make_request("", x_amzn_sagemaker_target_model="a", x_mode="b"))
    assert list(headers) == ["body", "X-Amzn-SageMaker-Target-Model", "X-Mode", "content-length"]
    assert (headers["x-MODE"], headers.get("X-mode"), "x-mode" in headers) == ("b", "b", True)
    assert (headers.get("nosuch"), "nosuch" in headers) == (None, False)
    with pytest.raises(KeyError):
        headers["nosuch"]


def test_quoted_names_and_bytes_of_a_multipart_body() -> None:
    """A name may hold a semicolon, a value anything but the boundary, and the boundary may be quoted."""
    body = (
        b'preamble\r\n--a b\r\nContent-Disposition: form-data; name="x;y"; filename="f"\r\n\r\n\x00\r\n--a\r\n\r\n\r\n'
        b"--a b\r\nContent-Disposition: form-data; name=t\r\n"
        b"content-type: text/plain; charset=utf-8\r\n\r\nhi\r\n--a b--"
    )
    data, headers = read_request(make_request('multipart/form-data; charset=x; boundary="a b"', body))
    assert data == {"x;y": bytearray(b"\x00\r\n--a\r\n\r\n"), "t": "hi"}
    assert headers["x;y"] == {"content-type": "application/octet-stream"}
    assert headers["t"] == {"content-type": "text/plain"}


@pytest.mark.parametrize(
    ("content_type", "body", "why"),
    [
        ("multipart/form-data", b"", "no boundary"),
        ("multipart/form-data; boundary=b", b"", "does not end with its boundary"),
        ("multipart/form-data; boundary=b", b"--b\r\n\r\nx\r\n--b--", "no Content-Disposition with a name"),
        ("multipart/form-data; boundary=b", b"--b\r\na: b\r\n--b--", "no Content-Disposition with a name"),
        ("multipart/form-data; boundary=b", b"--b\r\n" * (MAX_PARTS + 9) + b"--b--", f"more than {MAX_PARTS} parts"),
        ("application/x-www-form-urlencoded", b"a=b&" * (MAX_PARTS + 9), "the form cannot be read"),
    ],
)
def test_what_is_no_form_is_refused(content_type: str, body: bytes, why: str) -> None:
    """Before memory is taken for more parts than are allowed."""
    with pytest.raises(BadParts, match=why):
        read_request(make_request(content_type, body))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'{"a": [1, -0, 1e5, 123456789012345678901234567890]}', {"a": [1, 0, 1e5, 123456789012345678901234567890]}),
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (b"[Infinity, 1e400]", [float("inf"), float("inf")]),
        (b'"\\ud800"', "\ud800"),
        ("\ufeff1".encode(), 1),
        ('"\xe9"'.encode("utf-16"), "\xe9"),
        (b"[" * 100_000, bytearray(b"[" * 100_000)),
        (b"{bad", bytearray(b"{bad")),
    ],
)
def test_json_is_what_pythons_own_reader_gives(text: bytes, value: object) -> None:
    """Though another one reads most of it; what neither reads stays bytes."""
    data, _ = read_request(make_request("application/json", text))
    assert data["body"] == value


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@pytest.mark.slow
@given(JSON_VALUES)
def test_an_answer_is_written_as_pythons_own_writer_would(value: object) -> None:
    """To the byte, with its indent of two; also what is no strict JSON."""
    assert write_json(value) == json.dumps(value, indent=2).encode()
    assert write_json([float("nan"), value]) == json.dumps([float("nan"), value], indent=2).encode()


@pytest.mark.slow
@given(st.lists(st.floats(-1e17, 1e17) | st.floats(-2e-4, 2e-4) | st.floats(width=32), max_size=8))
def test_the_digits_of_numbers_are_pythons(numbers: list[float]) -> None:
    """Around the sizes too from which on a number is written with an exponent."""
    for value in (numbers, {"predictions": [numbers, [1, *numbers]]}, tuple(numbers)):
        assert write_json(value) == json.dumps(value, indent=2).encode()


@pytest.mark.parametrize("value", [{1, 2}, b"x", [object()], {(1, 2): 3}, Fraction(1, 2), 1j, [[{"a": {1}}]]])
def test_an_answer_that_python_cannot_write_is_refused(value: object) -> None:
    """Although another writer could."""
    with pytest.raises(TypeError):
        write_json(value)


class Size(IntEnum):
    """A number of a class of its own."""

    LARGE = 3


@pytest.mark.parametrize("value", [{1: 2, None: 3, False: 4, 1.5: 5}, Size.LARGE, [2**70], "\x7f", "\x7f\x1f\\ ü"])
def test_an_answer_that_only_python_writes_so_is_written_by_it(value: object) -> None:
    """Keys that are no texts, numbers that are of a class of their own or too large, and escapes."""
    assert write_json(value) == json.dumps(value, indent=2).encode()


def test_headers_are_made_once_and_only_for_a_handler_that_asks() -> None:
    """What the handler changes in them stays, as they are its request's own."""
    made: list[str] = []

    def make(name: str) -> RequestHeaders:
        made.append(name)
        return RequestHeaders({"X-Foo": name})

    context = HandlerContext("m", "folder", {}, 2, {})
    context.begin(["1", "2"], [partial(make, "first"), partial(make, "second")])
    context.set_response_status(201, "Created", 0)
    assert context.get_response_status(0) == (201, "Created")
    assert not made
    assert context.get_request_header(1, "x-foo") == "second"
    context.get_all_request_header(1)["X-Bar"] = "own"
    assert context.get_request_header(1, "X-Bar") == "own"
    assert made == ["second"]
