"""One request's tensors as bytes: nested JSON numbers and `application/x-npy`, read strictly, written fast. No torch.

JSON has three paths that must agree, which property tests check. The compiled reader takes plain numbers straight to
float32. What it gives back, or everything where it was not compiled, goes from simdjson's tape to numpy without a
Python float for each number. A body that looks unusual there is parsed by the careful path, which walks Python lists
and reads the body or names the first wrong place. 8 x 168 floats of 4 decimals (11 KB), microseconds of one machine:
compiled 17, simdjson 30 with all checks; with 17 digits (28 KB) 20 and 80. orjson and `np.array` take 1.8 times
simdjson's, msgspec with typed lists 2.3 times.
"""

import ast
import io
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import isfinite, prod
from typing import Any, Literal

import numpy as np
import orjson
import simdjson

from handlers.base import Float32, Shape
from handlers.codecs.quick_numbers import are_finite, read_tensors
from handlers.errors import RequestError, RunFailed
from model_store.archives.json_faults import explain_fault

FLOAT32_MAX = float(np.finfo(np.float32).max)
NPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "<f4": np.dtype("<f4"),
    "<f8": np.dtype("<f8"),
    ">f4": np.dtype(">f4"),
    ">f8": np.dtype(">f8"),
}
Place = Callable[[int], Float32]  #: memory for so many rows; their last axis may be shorter than a request's
BLOCK = 1 << 15  #: most numbers that are written at once, in about two milliseconds
NPY_HEADER_LIMIT = 1024  #: most bytes
NPY_USUAL_HEAD = 128  #: bytes of magic, version and header, as numpy writes them for every shape that is served
Layout = tuple[int, np.dtype[Any], Literal["C", "F"], Shape, int]  #: start, dtype, order, shape, bytes of the numbers


def read_json(body: bytes, shapes: Mapping[str, Shape]) -> dict[str, Float32] | None:
    """Read `{"x": [8][168]}` as {"x": array [8, 168]} for every name in `shapes` (-1: any length of at least 1).

    Returns None if the object has `instances`, which request a forecast. Raises RequestError that names the first wrong
    place.
    """
    plain = read_plain(body, shapes)
    if plain is not None:
        return plain
    try:
        document = simdjson.Parser().parse(body)  # a fresh parser: a kept one cannot be used while proxies live
        if isinstance(document, simdjson.Object):
            found = _read_fast(document, body, shapes)
            if found is not None or "instances" in document:
                return found
    except (ValueError, TypeError, RuntimeError):  # malformed, other types, too deep or beyond 64 bits
        pass
    return _read_carefully(body, shapes)


def read_plain(body: bytes, shapes: Mapping[str, Shape]) -> dict[str, Float32] | None:
    """Read as `read_json` does, if there are exactly these names and plain numbers; None for every other body."""
    names, wanted = _list_wanted(tuple(shapes.items()))
    found = read_tensors(body, names, wanted)
    if found is None:
        return None
    return {
        name: np.frombuffer(numbers, np.float32).reshape(dims)
        for name, (numbers, dims) in zip(shapes, found, strict=True)
    }


@lru_cache(maxsize=256)
def _list_wanted(shapes: tuple[tuple[str, Shape], ...]) -> tuple[tuple[bytes, ...], tuple[Shape, ...]]:
    """Return names and shapes as the compiled reader takes them; none where it is to give the body back.

    It compares the bytes of a name with those of the body, where JSON writes some characters in several ways.
    """
    if any(ord(char) < ord(" ") or char in '"\\' for name, _ in shapes for char in name):
        return (), ()
    return tuple(name.encode() for name, _ in shapes), tuple(shape for _, shape in shapes)


def read_npy(body: bytes | memoryview, name: str, shape: Shape, *, copy: bool = True) -> Float32:
    """Read an npy file (version 1 or 2) of float32 or float64 in any byte order and layout -> float32 array of `shape`.

    Without `copy` it may be a view of the body, at any address and in any order. It accepts no pickle, only those four
    dtypes, and only a payload of the length in the header. Raises RequestError.
    """
    head = bytes(body[:NPY_USUAL_HEAD])
    start, dtype, order, sent, needed = _lay_out_usual(head, name, shape) or _lay_out(body, name, shape)
    if len(body) - start != needed:
        raise RequestError(
            f"npy: {list(sent)} of {dtype.str} are {needed} bytes, but {len(body) - start} follow the header"
        )
    flat = np.frombuffer(body, dtype, offset=start)
    if dtype != np.float32:
        with np.errstate(over="ignore"):
            flat = flat.astype(np.float32)
    elif copy:
        flat = flat.copy()
    array: Float32 = flat.reshape(sent, order=order)
    if not are_finite(flat):
        at = "".join(f"[{i}]" for i in np.argwhere(~np.isfinite(array))[0])
        raise RequestError("the number is not finite in float32", field=name + at)
    return np.ascontiguousarray(array) if copy and order == "F" else array


def put_rows(rows: Float32, place: Place | None) -> Float32:
    """Write rows [n, *shape] to their place, if they have one, without the first steps that have no room there."""
    if place is None:
        return rows
    placed = place(len(rows))
    placed[...] = rows[..., -placed.shape[-1] :]
    return placed


def check_finite(name: str, outputs: Float32) -> Float32:
    """Return the outputs C-contiguous. Raises RunFailed that names the first number that is not finite."""
    sound = np.ascontiguousarray(outputs)
    if not are_finite(sound):
        at = np.argwhere(~np.isfinite(sound))[0]
        place = name + "".join(f"[{i}]" for i in at)
        raise RunFailed(f"the model's output is not finite: {place} is {sound[tuple(at)]}")
    return sound


def write_json(value: object) -> bytes:
    """Write a JSON body; float32 arrays (C-contiguous) get the fewest digits that give the same float32."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_in_blocks(array: Float32) -> Float32 | orjson.Fragment:
    """Prepare an array for `write_json`: a large one is written here block by block, to the same bytes.

    orjson holds the interpreter lock while it writes; four million numbers at once would hold it for 0.3 s.
    """
    if array.size <= BLOCK:
        return array
    rows = max(1, BLOCK * len(array) // array.size)
    blocks = (write_json(np.ascontiguousarray(array[at : at + rows]))[1:-1] for at in range(0, len(array), rows))
    return orjson.Fragment(b"[" + b",".join(blocks) + b"]")


def write_npy(array: Float32) -> bytes:
    """Write the array as an npy file, version 1, little-endian float32 in C order."""
    return b"".join((_npy_prefix(array.shape), np.ascontiguousarray(array, "<f4").data))  # copied once


def _read_fast(document: simdjson.Object, body: bytes, shapes: Mapping[str, Shape]) -> dict[str, Float32] | None:
    """Read the regular case; returns None for others. Raises TypeError or ValueError for an unexpected value."""
    if len(document) != len(shapes):
        return None
    found: dict[str, Float32] = {}
    lists = 0
    for name, shape in shapes.items():
        value = document.get(name)
        if not isinstance(value, simdjson.Array):
            return None
        dims = _read_leading_dims(value, shape)
        if not dims or not _is_regular(value, dims):
            return None
        lists += _count_lists(dims)
        with np.errstate(over="ignore"):
            flat = np.frombuffer(value.as_buffer(of_type="d"), np.float64).astype(np.float32)
            square = flat.dot(flat)  # finite only if all numbers are, in a quarter of the time of a check of each
        if flat.size != prod(dims) or not isfinite(square):
            return None
        found[name] = flat.reshape(dims)
    # as_buffer flattens, so that lists among the numbers would not be noticed: count their brackets
    return found if np.count_nonzero(np.frombuffer(body, np.uint8) == ord("[")) == lists else None


def count_up_to(body: bytes, mark: bytes, most: int) -> int:
    """Count a byte that is rare in the body, but no further than `most`.

    `bytes.count` looks at each byte by itself (8 us for 11 KB), `bytes.find` at many at a time (0.4 us).
    """
    at = -1
    for found in range(most):
        at = body.find(mark, at + 1)
        if at < 0:
            return found
    return most


def _read_leading_dims(value: Any, shape: Shape) -> Shape | None:
    """Return the lengths along the first elements; None if they do not fit the shape."""
    dims: list[int] = []
    for want in shape:
        have = len(value)
        if not have or want not in (-1, have):
            return None
        dims.append(have)
        value = value[0]
    return tuple(dims)


def _is_regular(value: Any, dims: Shape) -> bool:
    if len(value) != dims[0]:
        return False
    inner = dims[1:]
    if len(inner) == 1:  # the most frequent case, without a call for each
        return set(map(len, value)) == {inner[0]}
    return not inner or all(_is_regular(each, inner) for each in value)


@lru_cache(maxsize=256)
def _count_lists(dims: Shape) -> int:
    """Count the lists in an array."""
    return sum(prod(dims[:depth]) for depth in range(len(dims)))


def _read_carefully(body: bytes, shapes: Mapping[str, Shape]) -> dict[str, Float32] | None:
    document = read_document(body, shapes)
    if document is None:
        return None
    found: dict[str, Float32] = {}
    for name, shape in shapes.items():
        dims = tuple(_first_lengths(document[name], shape))
        _check_lists(document[name], dims, name)
        found[name] = np.array(document[name], np.float32).reshape(dims)
    return found


def read_document(body: bytes, shapes: Mapping[str, Shape]) -> dict[str, Any] | None:
    """Read a JSON object that has exactly these inputs; None for one with `instances`. Raises RequestError."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {explain_fault(error).message}") from error
    if not isinstance(document, dict):
        raise RequestError(
            f"the body must be a JSON object of {_format_names(shapes)}, not {_name_json_type(document)}"
        )
    if "instances" in document:
        return None
    for name in [*shapes, *document]:
        if name not in document:
            message = (
                f"the input is missing; the model takes {_format_names(shapes)}, or `instances` where it forecasts"
            )
            raise RequestError(message, field=name)
        if name not in shapes:
            raise RequestError(f"the model has no such input; it takes {_format_names(shapes)}", field=name[:100])
    return document


def _first_lengths(value: object, shape: Shape) -> list[int]:
    """Return the shape with each -1 replaced by the length found along the first elements (at least 1)."""
    dims: list[int] = []
    for want in shape:
        have = len(value) if isinstance(value, list) else 0
        dims.append(want if want != -1 else max(have, 1))
        value = value[0] if isinstance(value, list) and value else None
    return dims


def _check_lists(value: object, dims: Shape, field: str) -> None:
    """Check lists of exactly these lengths around finite float32 numbers. Raises RequestError that names the place."""
    if not dims:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RequestError(f"expected a number, not {_name_json_type(value)}", field=field)
        if not isfinite(value) or abs(value) > FLOAT32_MAX:
            raise RequestError("the number is not finite in float32", field=field)
        return
    if not isinstance(value, list):
        raise RequestError(f"expected a list of {dims[0]}, not {_name_json_type(value)}", field=field)
    if len(value) != dims[0]:
        raise RequestError(f"expected a list of {dims[0]}, not of {len(value)}", field=field)
    for i, each in enumerate(value):
        _check_lists(each, dims[1:], f"{field}[{i}]")


@lru_cache(maxsize=256)
def _lay_out_usual(head: bytes, name: str, shape: Shape) -> Layout | None:
    """Lay out a body by its first bytes, if these are a whole header of version 1 as numpy writes it, else None.

    Raises RequestError, which is not kept.
    """
    is_usual = len(head) == NPY_USUAL_HEAD and head[6:10] == b"\x01\x00" + (NPY_USUAL_HEAD - 10).to_bytes(2, "little")
    return _lay_out(head, name, shape) if is_usual else None


def _lay_out(body: bytes | memoryview, name: str, shape: Shape) -> Layout:
    """Read the header of a body whose array must fit `shape`. Raises RequestError."""
    start, header_bytes = _npy_header_bytes(bytes(body[: NPY_HEADER_LIMIT + 12]))
    dtype, fortran, sent = _npy_header(header_bytes)
    if len(sent) != len(shape) or any(want not in (-1, have) for want, have in zip(shape, sent, strict=True)):
        raise RequestError(f"npy: the array must have the shape {_format_shape(shape)}, not {list(sent)}", field=name)
    if not prod(sent):
        raise RequestError(f"npy: {list(sent)} has no numbers", field=name)
    return start, dtype, "F" if fortran else "C", sent, prod(sent) * dtype.itemsize


def _npy_header_bytes(head: bytes) -> tuple[int, bytes]:
    """Split the first bytes of a file into (start of the payload, text of the header)."""
    if head[:6] != b"\x93NUMPY" or head[6:8] not in (b"\x01\x00", b"\x02\x00"):
        raise RequestError("the body is not an npy file of version 1 or 2")
    size = 2 if head[6] == 1 else 4
    length = int.from_bytes(head[8 : 8 + size], "little")
    if length > NPY_HEADER_LIMIT or len(head) < 8 + size + length:
        raise RequestError(f"npy: a header of {length} bytes is longer than the body or {NPY_HEADER_LIMIT} bytes")
    return 8 + size + length, head[8 + size : 8 + size + length]


@lru_cache(maxsize=256)
def _npy_header(header: bytes) -> tuple[np.dtype[Any], bool, Shape]:
    """Parse the literal of a header into (dtype, Fortran order, shape). Only known dtypes are made from its text."""
    try:
        # the literal is never evaluated; no writer puts tabs, escapes and the like into it
        fields: Any = ast.literal_eval(header.decode("ascii").strip()) if b"\\" not in header else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise RequestError("npy: the header is not a Python literal") from error
    if not isinstance(fields, dict) or fields.keys() != {"descr", "fortran_order", "shape"}:
        raise RequestError("npy: the header must have exactly descr, fortran_order and shape")
    descr, fortran, shape = fields["descr"], fields["fortran_order"], fields["shape"]
    if not isinstance(descr, str) or descr not in NPY_DTYPES:
        raise RequestError(f"npy: the array must be float32 or float64, not {str(descr)[:40]!r}")
    if not isinstance(fortran, bool):
        raise RequestError("npy: fortran_order must be True or False")
    if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 1 << 31 for n in shape):
        raise RequestError("npy: shape must be a tuple of lengths")
    return NPY_DTYPES[descr], fortran, shape


@lru_cache(maxsize=64)
def _npy_prefix(shape: Shape) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _format_shape(shape: Shape) -> str:
    return "[" + ", ".join("any" if n == -1 else str(n) for n in shape) + "]"


def _format_names(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{name} {_format_shape(shape)}" for name, shape in shapes.items())


def _name_json_type(value: object) -> str:
    """Return the JSON name of the type of a value."""
    names = ((bool, "a boolean"), (int | float, "a number"), (str, "a string"), (dict | simdjson.Object, "an object"))
    for types, name in names:
        if isinstance(value, types):
            return name
    return "null" if value is None else "a list"
