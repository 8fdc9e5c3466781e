"""Instances and predictions as packed numbers, for calls that come or go as tables. Pure: no numpy.

An instance is a zero byte (JSON never begins with one), a head and the bytes of its numbers; a prediction is a head and
float32 numbers. A head is a u16 (little-endian) with its length and one msgpack array.
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec
from msgspec import Struct

NUMBERS = "application/vnd.fleetcast.numbers"  #: the content type of an item's answer that is a packed prediction
MARK = b"\x00"
LENGTH = 2
ITEM_BYTES: Mapping[str, int] = {"f": 4, "d": 8}
CUT_SHORT = "the numbers of a row do not fit its head"


class InstanceHead(Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """`code`: `f` or `d`, the type of all numbers. `names`: of the series after the target, then of the categories."""

    start: str
    item_id: str | int | None
    code: str
    sizes: list[int]  #: numbers of the target, then of each further series
    names: list[str]
    cat: list[int]


class PredictionHead(Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    """`start`: of the first step. The numbers are the mean [steps], if there is one, and each level's [steps]."""

    start: str
    steps: int
    has_mean: bool
    levels: list[str]


class PlainPrediction(Struct):
    """What a prediction in JSON says that has a place in a table; its further fields have none."""

    start: str = ""
    mean: list[float] | None = None
    quantiles: dict[str, list[float]] = {}


_encode = msgspec.msgpack.Encoder().encode
_instance, _prediction = msgspec.msgpack.Decoder(InstanceHead).decode, msgspec.msgpack.Decoder(PredictionHead).decode
_plain = msgspec.json.Decoder(PlainPrediction).decode


def cast_numbers(view: memoryview, code: str) -> "memoryview[Any]":
    """The bytes as numbers of a type by its code in `struct`."""
    found: memoryview[Any] = cast("Any", view).cast(code)
    return found


def pack_instance(head: InstanceHead, series: Sequence[bytes | memoryview]) -> bytes:
    """Pack an instance; `series` are the bytes of its target and further series."""
    packed = _encode(head)
    return b"".join((MARK, len(packed).to_bytes(LENGTH, "little"), packed, *series))


def is_packed(instance: bytes | memoryview | msgspec.Raw) -> bool:
    """Whether an instance is packed, and not JSON."""
    return memoryview(instance)[:1] == MARK


def read_instance_head(raw: bytes | memoryview) -> tuple[InstanceHead, list[memoryview]]:
    """The head of a packed instance, and the bytes of its series. Raises ValueError."""
    view = memoryview(raw)[1:]
    end = LENGTH + int.from_bytes(view[:LENGTH], "little")
    head = _instance(view[LENGTH:end])
    width, series, at = ITEM_BYTES[head.code], list[memoryview](), end
    for size in head.sizes:
        series.append(view[at : at + size * width])
        at += size * width
    if at != len(view) or any(size < 0 for size in head.sizes):
        raise ValueError(CUT_SHORT)
    return head, series


def write_instance(raw: bytes | memoryview | msgspec.Raw) -> bytes:
    """Write a packed instance as JSON, for a model that is asked alone. Raises ValueError for infinite numbers."""
    head, series = read_instance_head(memoryview(raw))
    target, *features = (cast_numbers(view, head.code).tolist() for view in series)
    if any(math.isinf(number) for numbers in (target, *features) for number in numbers):
        raise ValueError("the table has infinite numbers")
    found: dict[str, object] = {"start": head.start, "target": target}  # NaN is written as null: it is missing
    if head.item_id is not None:
        found["item_id"] = head.item_id
    if features:
        found["dynamic_feat"] = features
    if head.cat:
        found["cat"] = head.cat
    if head.names:
        found["names"] = head.names
    return msgspec.json.encode(found)


def pack_prediction(head: PredictionHead, numbers: Sequence[bytes | memoryview]) -> bytes:
    """Pack a prediction; `numbers` are the float32 bytes of the mean, if it has one, and of each level."""
    packed = _encode(head)
    return b"".join((len(packed).to_bytes(LENGTH, "little"), packed, *numbers))


def read_prediction(raw: bytes | memoryview) -> tuple[PredictionHead, list[memoryview]]:
    """The head of a packed prediction, and the float32 bytes of each of its columns. Raises ValueError."""
    view = memoryview(raw)
    end = LENGTH + int.from_bytes(view[:LENGTH], "little")
    head = _prediction(view[LENGTH:end])
    size, count = 4 * head.steps, len(head.levels) + head.has_mean
    if len(view) != end + size * count:
        raise ValueError(CUT_SHORT)
    return head, [view[at : at + size] for at in range(end, len(view), size or 1)]


def pack_json_prediction(text: bytes) -> bytes:
    """Pack a prediction that is JSON. Raises msgspec.MsgspecError, ValueError for what has no place in a table."""
    found = _plain(text)
    rows = [*([] if found.mean is None else [found.mean]), *found.quantiles.values()]
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("the model answers no series of one product")
    head = PredictionHead(found.start, len(rows[0]), found.mean is not None, list(found.quantiles))
    return pack_prediction(head, [array("f", row).tobytes() for row in rows])
