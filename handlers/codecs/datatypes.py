"""The datatypes of the Open Inference Protocol: JSON data or little-endian bytes on one side, arrays on the other.

BF16 has no type in numpy: its arrays are the bit patterns, as uint16. BYTES are arrays of `str`, as ONNX has them.
Every wrong value is a RequestError that names its place. No torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson

from handlers.base import Shape
from handlers.codecs import tensors
from handlers.errors import RequestError
from model_store.archives.json_faults import explain_fault

Array = npt.NDArray[Any]
MOST_STRINGS = 1 << 16  #: of one tensor: an object of Python each
PREFIX_BYTES = 4  #: of an element of BYTES in binary data: its length
FP32, BYTES, BOOL, BF16 = "FP32", "BYTES", "BOOL", "BF16"
_BF16_EXPONENT = 0x7F80  #: all ones: infinity, or no number


@dataclass(frozen=True, slots=True)
class Datatype:
    """One datatype. `kind`: how its values are written in JSON; `dtype`: binary data's, `native`: that of arrays."""

    name: str
    kind: Literal["boolean", "integer", "float", "string"]
    dtype: np.dtype[Any]
    native: np.dtype[Any]

    @property
    def size(self) -> int:
        """Bytes of one element in binary data; 0 where each says its own length."""
        return 0 if self.kind == "string" else self.dtype.itemsize


def _list_datatypes() -> Mapping[str, Datatype]:
    integers = {
        f"{sign}INT{bits}": f"<{sign.lower() or 'i'}{bits // 8}" for sign in ("", "U") for bits in (8, 16, 32, 64)
    }
    found = [_make_datatype(name, "integer", text) for name, text in integers.items()]
    floats = {"FP16": "<f2", BF16: "<u2", FP32: "<f4", "FP64": "<f8"}
    found += [_make_datatype(name, "float", text) for name, text in floats.items()]
    found += [_make_datatype(BOOL, "boolean", np.bool_), _make_datatype(BYTES, "string", object)]
    return {each.name: each for each in found}


def _make_datatype(name: str, kind: Literal["boolean", "integer", "float", "string"], dtype: Any) -> Datatype:
    return Datatype(name, kind, np.dtype(dtype), np.dtype(dtype).newbyteorder("="))


DATATYPES = _list_datatypes()  #: by name


def read_data(raw: bytes, datatype: Datatype, shape: Sequence[int], field: str) -> Array:
    """Read `data` of a JSON document: one list of all values, or lists as the shape has them. Raises RequestError."""
    is_flat = not raw[1:].lstrip(b" \t\r\n").startswith(b"[")
    dims = (prod(shape),) if is_flat else tuple(shape)
    if datatype.name == FP32:
        return _read_fp32(raw, dims, field).reshape(shape)
    try:
        document = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the data are not JSON: {explain_fault(error).message}", field=field) from error
    values = list[Any]()
    _flatten(document, dims, field, values)
    return _CONVERT[datatype.kind](values, datatype, _Place(dims, field)).reshape(shape)


def _read_fp32(raw: bytes, dims: Shape, field: str) -> Array:
    """As tensor JSON, under a name without brackets: these are counted to find lists among the numbers."""
    try:
        found = tensors.read_json(b'{"data":%b}' % raw, {"data": dims})
    except RequestError as error:
        raise RequestError(error.message, field=f"{field}{(error.field or '').removeprefix('data')}") from None
    assert found is not None, "the one name is not `instances`"
    return found["data"]


def read_values(values: object, datatype: Datatype, shape: Shape, field: str) -> Array:
    """Read nested lists of a shape in which -1 stands for any length. Raises RequestError that names the place."""
    dims, first = list[int](), values
    for want in shape:
        dims.append(want if want != -1 else len(first) if isinstance(first, list) else 1)
        first = first[0] if isinstance(first, list) and first else None
    found = list[Any]()
    _flatten(values, tuple(dims), field, found)
    return _CONVERT[datatype.kind](found, datatype, _Place(dims, field)).reshape(dims)


def read_bytes(part: memoryview, datatype: Datatype, shape: Sequence[int], field: str) -> Array:
    """Read the binary data of so many elements. Raises RequestError."""
    count = prod(shape)
    if datatype.kind == "string":
        return _make_strings(_split_strings(part, count, field)).reshape(shape)
    if len(part) != count * datatype.size:
        needed = count * datatype.size
        raise RequestError(f"{list(shape)} of {datatype.name} are {needed} bytes, not {len(part)}", field=field)
    if datatype.kind == "boolean":
        found: Array = np.frombuffer(part, np.uint8)
        if (found > 1).any():
            at = int(np.argmax(found > 1))
            raise RequestError(f"a {BOOL} is the byte 0 or 1, not {found[at]}", field=_Place(shape, field).find(at))
        return found.astype(np.bool_).reshape(shape)
    found = np.frombuffer(part, datatype.dtype).astype(datatype.native, copy=False)
    require_finite(found, datatype, _Place(shape, field).find)
    return found.reshape(shape)


def write_data(array: Array, datatype: Datatype) -> Any:
    """What `write_json` takes for `data`: all values in one list."""
    flat = array.reshape(-1)
    if datatype.kind == "string":
        return flat.tolist()
    return tensors.encode_in_blocks(widen_bf16(flat) if datatype.name == BF16 else flat)


def nest_values(array: Array, datatype: Datatype) -> Any:
    """What `write_json` takes for nested lists of the array."""
    if datatype.kind == "string":
        return array.tolist()
    return widen_bf16(array) if datatype.name == BF16 else array


def widen_bf16(array: Array) -> npt.NDArray[np.float32]:
    """The numbers that BF16's bit patterns stand for."""
    return (array.astype(np.uint32) << 16).view(np.float32)


def write_bytes(array: Array, datatype: Datatype) -> bytes:
    """The array as binary data."""
    if datatype.kind != "string":
        return array.astype(datatype.dtype, copy=False).tobytes()
    encoded = [value.encode() for value in array.reshape(-1)]
    return b"".join(len(value).to_bytes(PREFIX_BYTES, "little") + value for value in encoded)


def find_not_finite(array: Array, datatype: Datatype) -> int | None:
    """The place of the first number that is not finite, counted through all; None where there is none."""
    if datatype.kind != "float":
        return None
    sound = (array & _BF16_EXPONENT) != _BF16_EXPONENT if datatype.name == BF16 else np.isfinite(array)
    return None if sound.all() else int(np.argmin(sound.reshape(-1)))


def require_finite(array: Array, datatype: Datatype, name_place: Callable[[int], str]) -> None:
    """Raises RequestError that names the first number that is not finite."""
    at = find_not_finite(array, datatype)
    if at is not None:
        raise RequestError(f"the number is not finite in {datatype.name}", field=name_place(at))


class _Place:
    """Names elements of a tensor by their place in the request."""

    def __init__(self, dims: Sequence[int], field: str) -> None:
        self._dims, self._field = tuple(dims), field

    def __repr__(self) -> str:
        return f"<_Place in {self._field} {list(self._dims)}>"

    def find(self, at: int) -> str:
        """The name of the element `at`, counted through all."""
        return self._field + "".join(f"[{i}]" for i in np.unravel_index(at, self._dims)) if self._dims else self._field


def _flatten(value: object, dims: Shape, field: str, into: list[Any]) -> None:
    """Append the values of nested lists of these lengths. Raises RequestError that names the place."""
    if not dims:
        into.append(value)
        return
    if not isinstance(value, list):
        raise RequestError(f"expected a list of {dims[0]}, not {_name_type(value)}", field=field)
    if len(value) != dims[0]:
        raise RequestError(f"expected a list of {dims[0]}, not of {len(value)}", field=field)
    if len(dims) == 1:
        into.extend(value)
        return
    for i, each in enumerate(value):
        _flatten(each, dims[1:], f"{field}[{i}]", into)


def _require_type(values: Sequence[Any], types: set[type], wanted: str, place: _Place) -> None:
    if not types.issuperset(map(type, values)):
        at = next(i for i, value in enumerate(values) if type(value) not in types)
        raise RequestError(f"expected {wanted}, not {_name_type(values[at])}", field=place.find(at))


def _convert_booleans(values: Sequence[Any], datatype: Datatype, place: _Place) -> Array:
    _require_type(values, {bool}, "true or false", place)
    return np.array(values, datatype.dtype)


def _convert_integers(values: Sequence[Any], datatype: Datatype, place: _Place) -> Array:
    """INVARIANT: an integer that the datatype cannot hold is refused, never wrapped."""
    _require_type(values, {int}, f"a whole number of {datatype.name}", place)
    limits = np.iinfo(datatype.dtype)
    low, high = int(limits.min), int(limits.max)
    if values and not low <= min(values) <= max(values) <= high:
        at = next(i for i, value in enumerate(values) if not low <= value <= high)
        message = f"{values[at]} is not within {low} to {high}, the range of {datatype.name}"
        raise RequestError(message, field=place.find(at))
    return np.array(values, datatype.native)


def _convert_floats(values: Sequence[Any], datatype: Datatype, place: _Place) -> Array:
    _require_type(values, {int, float}, "a number", place)
    wide = np.array(values, np.float64)
    with np.errstate(over="ignore"):
        if datatype.name == BF16:
            found: Array = _round_to_bf16(wide.astype(np.float32))
        else:
            found = wide.astype(datatype.native)
    require_finite(found, datatype, place.find)
    return found


def _convert_strings(values: Sequence[Any], datatype: Datatype, place: _Place) -> Array:
    del datatype
    _require_few(len(values), place)
    _require_type(values, {str}, "a string", place)
    return _make_strings(values)


_CONVERT: Mapping[str, Callable[[Sequence[Any], Datatype, _Place], Array]] = {
    "boolean": _convert_booleans,
    "integer": _convert_integers,
    "float": _convert_floats,
    "string": _convert_strings,
}


def _round_to_bf16(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The nearest BF16 of finite float32, ties to even; what is beyond its range becomes infinity."""
    bits = numbers.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _make_strings(values: Sequence[str]) -> Array:
    found = np.empty(len(values), object)
    found[:] = values
    return found


def _require_few(count: int, place: _Place) -> None:
    if count > MOST_STRINGS:
        raise RequestError(f"{count} strings are more than {MOST_STRINGS} in one tensor", field=place.find(0))


def _split_strings(part: memoryview, count: int, field: str) -> list[str]:
    """The elements of binary BYTES, each behind its length. Raises RequestError."""
    _require_few(count, _Place((count,), field))
    found, at = list[str](), 0
    for i in range(count):
        start = at + PREFIX_BYTES
        at = start + int.from_bytes(part[at:start], "little")
        if start > len(part) or at > len(part):
            raise RequestError(f"element {i} of {count} is longer than what is left of the binary data", field=field)
        try:
            found.append(str(part[start:at], "utf-8"))
        except UnicodeDecodeError:
            raise RequestError(f"element {i} is not text in UTF-8, which strings of a model are", field=field) from None
    if at != len(part):
        raise RequestError(f"{len(part) - at} bytes follow the last of {count} elements", field=field)
    return found


def _name_type(value: object) -> str:
    """The JSON name of the type of a value."""
    names: tuple[tuple[type, str], ...] = (
        (bool, "a boolean"), (int, "an integer"), (float, "a fraction"), (str, "a string"), (list, "a list"),
        (dict, "an object"),
    )  # fmt: skip
    return next((name for types, name in names if isinstance(value, types)), "null")
