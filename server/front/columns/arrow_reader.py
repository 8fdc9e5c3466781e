"""Reads a call for many models from an Arrow IPC stream, without pyarrow. Pure.

Taken are texts, whole numbers, and lists of float32, float64, int32 or int64, uncompressed and without dictionaries:
what `pa.ipc.new_stream` writes of such a table, and what polars and pandas make of it. All else is refused with what to
do.
Memory: the body itself, and 8 bytes for each number of a column that is not of floats or has nulls.
"""

import re
import struct
from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, cast

from server.errors import Refused, Situation
from server.front.columns.arrow_metadata import (
    FIXED_SIZE_LIST,
    FLOAT,
    INT,
    LARGE_LIST,
    LARGE_UTF8,
    LIST,
    RECORD_BATCH,
    SCHEMA,
    UTF8,
    BadArrow,
    Batch,
    Field,
    Message,
    Schema,
    read_batch,
    read_message,
    read_schema,
)
from server.front.columns.asked_table import (
    LEFT_OUT,
    MOST_COLUMNS,
    MOST_NAME,
    TARGET,
    TEXTS,
    AskedTable,
    Numbers,
    Series,
    WholeSeries,
)
from server.front.raw_json import MAX_ITEMS
from server.front.slices import Slices
from server.ipc.packed import cast_numbers

ARROW = "application/vnd.apache.arrow.stream"
CONTINUES = b"\xff\xff\xff\xff"
MOST_METADATA = 256 * 1024  #: bytes of one message's metadata
MOST_BATCHES = 1024
MOST_CHANGED = 500_000  #: numbers of a column that are changed here, one by one: whole numbers and nulls
VIEW_HINT = "; polars writes it so with compat_level=pl.CompatLevel.oldest()"
NAN = {"f": struct.pack("<f", float("nan")), "d": struct.pack("<d", float("nan"))}
_BROKEN = re.compile(b"[^\xff]")  # a byte of a validity bitmap with a null
_LISTS = {LIST: "i", LARGE_LIST: "q"}
_TEXTS = {UTF8: "i", LARGE_UTF8: "q"}


class _Buffers:
    """Takes the nodes and buffers of a batch in the order of its columns. Raises BadArrow."""

    def __init__(self, batch: Batch, body: memoryview) -> None:
        self._nodes, self._buffers, self._body = iter(batch.nodes), iter(batch.buffers), body
        self._left = len(body)  # so that buffers which share bytes are no longer than these together

    def take_node(self) -> tuple[int, int]:
        """Length and nulls of the next column."""
        node = next(self._nodes, None)
        if node is None or node[0] < 0 or node[1] < 0:
            raise BadArrow("the batch has fewer columns than its schema")
        return node

    def take(self, least: int = 0) -> memoryview:
        """The next buffer, which must have so many bytes."""
        place = next(self._buffers, None)
        if place is None or place[0] < 0 or place[1] < 0 or sum(place) > len(self._body) or place[1] < least:
            raise BadArrow("a buffer is missing, lies outside of its message, or is shorter than its column")
        self._left -= place[1]
        if self._left < 0:
            raise BadArrow("buffers lie on each other")
        return self._body[place[0] : sum(place)]

    def take_numbers(self, code: str, count: int) -> "memoryview[Any]":
        """The next buffer as so many numbers."""
        width = struct.calcsize(code)
        return cast_numbers(self.take(count * width)[: count * width], code)


class _Lists(NamedTuple):
    """A column of lists: where each row's numbers lie, and which rows are null."""

    code: str
    values: "memoryview[Any]"
    borders: Sequence[int]
    valid: "Sequence[bool] | None"

    def cut(self, row: int) -> Numbers | None:
        """The numbers of a row. Raises Refused where they lie outside."""
        if self.valid is not None and not self.valid[row]:
            return None
        start, end = self.borders[row], self.borders[row + 1]
        if not 0 <= start <= end <= len(self.values):
            raise Refused(Situation.BAD_REQUEST, "the list of this row lies outside of its column")
        return Numbers(self.code, self.values[start:end].cast("B"))

    def take_whole(self) -> WholeSeries | None:
        """See `Series`. Borders ascend."""
        borders = self.borders
        first, end = borders[0], borders[-1]
        if not 0 <= first <= end <= len(self.values) or (self.valid is not None and not all(self.valid)):
            return None
        if isinstance(borders, range):
            sizes = [borders.step]
        else:
            sizes = [after - before for before, after in pairwise(borders)]
        return WholeSeries(self.code, self.values[first:end].cast("B"), sizes)


class _JoinedLists:
    """A column of lists that came in several batches."""

    def __init__(self, columns: Sequence[_Lists]) -> None:
        self._places = [(column, row) for column in columns for row in range(len(column.borders) - 1)]

    def cut(self, row: int) -> Numbers | None:
        """The numbers of a row. Raises Refused where they lie outside."""
        column, at = self._places[row]
        return column.cut(at)

    def take_whole(self) -> WholeSeries | None:
        """None: batches do not lie side by side."""
        return None


def read_arrow(body: bytes) -> Slices[AskedTable]:
    """Read a call. Raises Refused for a body that is none."""
    try:
        return (yield from _read_stream(memoryview(body)))
    except BadArrow as error:
        raise Refused(Situation.BAD_REQUEST, f"not a table that is taken here: {error}") from None


def _read_stream(view: memoryview) -> Slices[AskedTable]:
    message, at = _next_message(view, 0)
    if message is None or message.kind != SCHEMA or message.body_bytes:
        raise BadArrow("an Arrow stream begins with its schema; send the IPC stream format, not the file format")
    schema = read_schema(message.table, MOST_COLUMNS)
    wanted = _check_fields(schema)
    parts: list[list[object]] = []
    rows = 0
    while True:
        message, at = _next_message(view, at)
        if message is None:
            break
        if message.kind != RECORD_BATCH:
            raise BadArrow("dictionaries are not taken; cast such columns to plain strings or numbers")
        if message.body_bytes > len(view) - at:
            raise BadArrow("the stream ends inside a batch")
        batch = read_batch(message.table, MOST_COLUMNS)
        rows += batch.rows
        if rows > MAX_ITEMS or len(parts) >= MOST_BATCHES:
            raise BadArrow(f"a call has 1 to {MAX_ITEMS} rows in at most {MOST_BATCHES} batches")
        buffers = _Buffers(batch, view[at : at + message.body_bytes])
        columns: list[object] = []
        for each in schema.fields:
            columns.append(_read_column(each, batch.rows, buffers))
            yield batch.rows * 16 + 1024
        parts.append(columns)
        at += message.body_bytes
    return _join_batches(rows, wanted, schema, parts)


def _next_message(view: memoryview, at: int) -> tuple[Message | None, int]:
    """The next message and where its body begins; None at the end of the stream."""
    if at >= len(view):
        return None, at
    if bytes(view[at : at + 4]) != CONTINUES:
        raise BadArrow("it is no Arrow IPC stream of version 0.15 or later")
    size = int.from_bytes(view[at + 4 : at + 8], "little", signed=True)
    if len(view) < at + 8 or not 0 <= size <= min(MOST_METADATA, len(view) - at - 8):
        raise BadArrow(f"metadata of {size} bytes is longer than the stream or {MOST_METADATA} bytes")
    if not size:
        return None, at
    return read_message(view[at + 8 : at + 8 + size]), at + 8 + size


def _check_fields(schema: Schema) -> list[Field]:
    """The columns that are used. Raises BadArrow for a type that is not taken, and for two of one name."""
    names = [each.name for each in schema.fields]
    for each in schema.fields:
        if not each.name or len(each.name) > MOST_NAME or names.count(each.name) > 1:
            raise BadArrow(f"a column's name is empty, longer than {MOST_NAME} characters or twice: {each.name[:40]!r}")
        child = each.children[0] if len(each.children) == 1 else None
        is_list = each.type in _LISTS or (each.type == FIXED_SIZE_LIST and each.size >= 0)
        if each.is_dictionary:
            raise BadArrow(f"the column {each.name!r} is a {each.describe()}; cast it to plain values")
        hint = VIEW_HINT if each.describe().endswith("_view") else ""
        if each.name in TEXTS and each.type not in _TEXTS:
            raise BadArrow(f"the column {each.name!r} is {each.describe()}, and must be of strings (utf8){hint}")
        if is_list and (child is None or _find_code(child) is None):
            of = "nothing" if child is None else child.describe()
            raise BadArrow(f"the column {each.name!r} is a list of {of}; lists of float64, float32 or int64 are taken")
        if not is_list and each.type not in _TEXTS and _find_code(each) != "q":
            raise BadArrow(f"the column {each.name!r} is {each.describe()}; take strings, int64 or lists of numbers")
        if each.name == TARGET and not is_list:
            raise BadArrow(f"the column {TARGET!r} is {each.describe()}, and must be of lists of numbers")
        if each.type in _TEXTS and each.name not in TEXTS:
            raise BadArrow(f"the column {each.name!r} is of strings; only {', '.join(TEXTS)} are")
    return [each for each in schema.fields if not each.name.startswith(LEFT_OUT)]


def _find_code(field: Field) -> str | None:
    """The code of a type of numbers in `struct` and `array`; None for others."""
    if field.is_dictionary or field.type not in (INT, FLOAT):
        return None
    if field.type == FLOAT:
        return {32: "f", 64: "d"}.get(field.bits)
    return {32: "i", 64: "q"}.get(field.bits) if field.is_signed else None


def _read_column(field: Field, rows: int, buffers: _Buffers) -> object:
    length, nulls = buffers.take_node()
    if length != rows:
        raise BadArrow(f"the column {field.name[:40]!r} has {length} rows, its batch {rows}")
    bitmap = buffers.take((rows + 7) // 8 if nulls else 0)
    valid = _read_bits(bitmap, rows) if nulls else None
    if field.type in _TEXTS:
        return _read_texts(field, rows, valid, buffers)
    if field.type in _LISTS or field.type == FIXED_SIZE_LIST:
        return _read_lists(field, rows, valid, buffers)
    numbers = buffers.take_numbers("q", rows).tolist()
    return (
        numbers
        if valid is None
        else [each if is_there else None for each, is_there in zip(numbers, valid, strict=True)]
    )


def _read_bits(bitmap: memoryview, count: int) -> list[bool]:
    bits = int.from_bytes(bitmap[: (count + 7) // 8], "little") & (1 << count) - 1  # what fills the last byte is any
    return [each == "1" for each in format(bits | 1 << count, "b")[:0:-1]]


def _read_borders(code: str, rows: int, buffers: _Buffers) -> Sequence[int]:
    """The offsets of a column; there may be none where it has no rows."""
    if not rows:
        buffers.take()
        return (0,)
    return buffers.take_numbers(code, rows + 1)


def _read_texts(field: Field, rows: int, valid: Sequence[bool] | None, buffers: _Buffers) -> list[str | None]:
    borders = list(_read_borders(_TEXTS[field.type], rows, buffers))
    data, first, last = buffers.take(), borders[0], borders[-1]
    if not 0 <= first <= last <= len(data) or borders != sorted(borders):  # so that texts are no longer than the buffer
        raise BadArrow(f"a text of the column {field.name[:40]!r} lies outside of its buffer")
    raw = bytes(data[first:last])
    cuts = pairwise(borders) if not first else pairwise([each - first for each in borders])
    try:
        if raw.isascii():
            text = raw.decode()
            found: list[str | None] = [text[start:end] for start, end in cuts]
        else:
            are_there = [True] * rows if valid is None else valid
            cells = zip(cuts, are_there, strict=True)
            found = [raw[start:end].decode() if there else None for (start, end), there in cells]
    except UnicodeDecodeError:
        raise BadArrow(f"a text of the column {field.name[:40]!r} is not UTF-8") from None
    return found if valid is None else [text if there else None for text, there in zip(found, valid, strict=True)]


def _read_lists(field: Field, rows: int, valid: Sequence[bool] | None, buffers: _Buffers) -> _Lists:
    child = field.children[0]
    code = _find_code(child)
    assert code is not None, "the schema has been checked"
    if field.type == FIXED_SIZE_LIST:
        if rows * field.size > MAX_ITEMS * MOST_METADATA:
            raise BadArrow("the lists of fixed size are too long")
        borders: Sequence[int] = range(0, (rows + 1) * field.size, field.size) if field.size else [0] * (rows + 1)
    else:
        borders = _read_borders(_LISTS[field.type], rows, buffers)
        if any(before > after for before, after in pairwise(borders)):
            raise BadArrow(f"lists of the column {field.name[:40]!r} overlap")  # no number counts many times
    count, nulls = buffers.take_node()
    bitmap = buffers.take((count + 7) // 8 if nulls else 0)
    values = buffers.take_numbers(code, count)
    if code not in NAN:
        if count > MOST_CHANGED:
            raise BadArrow(f"{count} whole numbers in {field.name[:40]!r}, {MOST_CHANGED} are the most; send float64")
        values, code = memoryview(array("d", values)), "d"
    if nulls:
        if nulls > MOST_CHANGED or count - int.from_bytes(bitmap, "little").bit_count() > MOST_CHANGED:
            raise BadArrow(f"{nulls} nulls in {field.name[:40]!r}, {MOST_CHANGED} are the most; send NaN instead")
        values = _mark_missing(values, bitmap, code)
    return _Lists(code, values, borders, valid)


def _mark_missing(values: "memoryview[Any]", bitmap: memoryview, code: str) -> "memoryview[Any]":
    """The numbers, with NaN in the place of nulls."""
    found, width, nan = bytearray(values.cast("B")), struct.calcsize(code), NAN[code]
    count = len(values)
    for match in _BROKEN.finditer(bitmap[: (count + 7) // 8]):
        byte, first = bitmap[match.start()], 8 * match.start()
        for bit in range(min(8, count - first)):
            if not byte >> bit & 1:
                found[(first + bit) * width : (first + bit + 1) * width] = nan
    return cast_numbers(memoryview(found), code)


def _join_batches(rows: int, wanted: Sequence[Field], schema: Schema, parts: Sequence[Sequence[object]]) -> AskedTable:
    """One table of all batches."""
    places = {each.name: schema.fields.index(each) for each in wanted}
    texts: dict[str, Sequence[str | None]] = {}
    series: dict[str, Series] = {}
    categories: dict[str, Sequence[int | None]] = {}
    for each in wanted:
        columns = [part[places[each.name]] for part in parts]
        if each.type in _TEXTS:
            texts[each.name] = [text for column in columns for text in cast("list[str | None]", column)]
        elif each.type == INT:
            categories[each.name] = [value for column in columns for value in cast("list[int | None]", column)]
        else:
            series[each.name] = _join_lists(cast("list[_Lists]", columns))
    return AskedTable(rows, texts, series, categories, schema.metadata)


def _join_lists(columns: Sequence[_Lists]) -> Series:
    return columns[0] if len(columns) == 1 else _JoinedLists(columns)
