"""Rows and answers of calls that come or go as tables: numbers as bytes, beside what is said of them. Pure: no numpy.

INVARIANT: numbers are little-endian; a missing one is NaN.
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast, overload

import msgspec
from msgspec import Struct

NUMBERS = "application/vnd.fleetcast.numbers"  #: the content type of an item's answer that is a row of a block
ITEM_BYTES: Mapping[str, int] = {"f": 4, "d": 8}
FLOAT_BYTES = 4
ROW_BYTES = 64  #: what a row counts beside its numbers

Buffer: TypeAlias = bytes | memoryview


class TableRow(Struct, gc=False):
    """A row of a table, in the place of an instance in JSON.

    `code`: `f` or `d`, the type of all numbers. `series`: the bytes of the target, then of each further series.
    `names`: of the series after the target, then of the categories; all rows of a call share it.
    """

    start: str
    item_id: str | None
    code: str
    names: Sequence[str]
    series: Sequence[Buffer]
    cat: Sequence[int] = ()


Instance: TypeAlias = bytes | memoryview | msgspec.Raw | TableRow


class NumbersBlock(Struct, gc=False, eq=False):
    """The answers of several forecasts of one start, length and levels, column by column.

    `columns`: the float32 bytes of the mean, if there is one, and of each level: [forecasts, steps].
    """

    start: str  #: of the first step
    steps: int
    has_mean: bool
    levels: Sequence[str]
    columns: Sequence[Buffer]

    @property
    def row_bytes(self) -> int:
        """Bytes of one forecast in all columns."""
        return len(self.columns) * self.steps * FLOAT_BYTES


class BlockRow(Struct, gc=False, eq=False):
    """One forecast of a block."""

    block: NumbersBlock
    at: int


class BlockRows(Sequence[BlockRow]):
    """All forecasts of a block, in order."""

    def __init__(self, block: NumbersBlock, count: int) -> None:
        self.block, self._count = block, count

    def __repr__(self) -> str:
        """For example `<BlockRows of 500 forecasts>`."""
        return f"<BlockRows of {self._count} forecasts>"

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> BlockRow: ...
    @overload
    def __getitem__(self, at: slice) -> list[BlockRow]: ...
    def __getitem__(self, at: int | slice) -> BlockRow | list[BlockRow]:
        places = range(self._count)[at]
        return BlockRow(self.block, places) if isinstance(places, int) else [BlockRow(self.block, i) for i in places]


class PlainPrediction(Struct):
    """What a prediction in JSON says that has a place in a table; its further fields have none."""

    start: str = ""
    mean: list[float] | None = None
    quantiles: dict[str, list[float]] = {}


_plain = msgspec.json.Decoder(PlainPrediction).decode


def cast_numbers(view: memoryview, code: str) -> "memoryview[Any]":
    """The bytes as numbers of a type by its code in `struct`."""
    found: memoryview[Any] = cast("Any", view).cast(code)
    return found


def measure_instance(instance: Instance) -> int:
    """The bytes that an instance counts."""
    if isinstance(instance, TableRow):
        return sum(map(len, instance.series)) + ROW_BYTES
    return len(memoryview(instance))


def write_instance(row: TableRow) -> bytes:
    """Write a row as JSON, for a model that is asked alone. Raises ValueError for infinite numbers."""
    target, *features = (cast_numbers(memoryview(each), row.code).tolist() for each in row.series)
    if any(math.isinf(number) for numbers in (target, *features) for number in numbers):
        raise ValueError("the table has infinite numbers")
    found: dict[str, object] = {"start": row.start, "target": target}  # NaN is written as null: it is missing
    if row.item_id is not None:
        found["item_id"] = row.item_id
    if features:
        found["dynamic_feat"] = features
    if row.cat:
        found["cat"] = row.cat
    if row.names:
        found["names"] = row.names
    return msgspec.json.encode(found)


def read_json_prediction(text: bytes) -> NumbersBlock:
    """A prediction that is JSON as a block of its own. Raises msgspec.MsgspecError, ValueError for one of no table."""
    found = _plain(text)
    rows = [*([] if found.mean is None else [found.mean]), *found.quantiles.values()]
    if not rows or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError("the model answers no series of one product")
    columns = [array("f", row).tobytes() for row in rows]
    return NumbersBlock(found.start, len(rows[0]), found.mean is not None, list(found.quantiles), columns)
