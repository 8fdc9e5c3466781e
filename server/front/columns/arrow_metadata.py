"""Reads the metadata of Arrow IPC messages: only the fields of FlatBuffers that our tables need. Pure.

Every place is checked before it is read, and every list is bounded by the bytes that hold it, so that no metadata
makes this read or allocate more than its own size. Source: the Arrow columnar format, `Message.fbs` and `Schema.fbs`.
"""

from collections.abc import Iterator, Mapping
from struct import Struct as Layout
from typing import NamedTuple

SCHEMA, RECORD_BATCH = 1, 3  #: of `MessageHeader`
INT, FLOAT, UTF8, LIST, FIXED_SIZE_LIST, LARGE_UTF8, LARGE_LIST = 2, 3, 5, 12, 16, 20, 21  #: of `Type`
MOST_DEPTH = 2  #: of nested fields that are looked at
_U8, _I16, _U16, _I32, _U32, _I64 = (Layout(f"<{code}") for code in "BhHiIq")
_PAIR = Layout("<qq")


class BadArrow(ValueError):
    """Bytes that are no Arrow stream, or one that is not taken here; the message says what to do."""


TYPES: Mapping[int, str] = {
    INT: "int", FLOAT: "float", 4: "binary", UTF8: "utf8", 6: "bool", 7: "decimal", 8: "date", 9: "time",
    10: "timestamp", LIST: "list", 13: "struct", FIXED_SIZE_LIST: "fixed_size_list", 17: "map", 18: "duration",
    LARGE_UTF8: "large_utf8", LARGE_LIST: "large_list", 24: "utf8_view", 25: "list_view",
}  # fmt: skip  #: the names of some


class Field(NamedTuple):
    """A column: its type by the number of the format, what belongs to the type, and the field of its values."""

    name: str
    type: int
    bits: int = 0  #: of an int; of a float, 16, 32 or 64
    is_signed: bool = True
    size: int = 0  #: of a list of fixed size
    is_dictionary: bool = False
    children: "tuple[Field, ...]" = ()

    def describe(self) -> str:
        """The type in words."""
        kind = TYPES.get(self.type, f"type {self.type}")
        if self.is_dictionary:
            return f"dictionary of {kind}"
        return f"{kind}{self.bits}" if self.type in (INT, FLOAT) else kind


class Schema(NamedTuple):
    """The columns, and the texts that go with the table."""

    fields: list[Field]
    metadata: dict[str, str]


class Batch(NamedTuple):
    """Rows: their number, (length, nulls) of each column and of its values, (offset, bytes) of each buffer."""

    rows: int
    nodes: list[tuple[int, int]]
    buffers: list[tuple[int, int]]


class Message(NamedTuple):
    """One message: what it is, its table, and the bytes of the body that follows it."""

    kind: int
    table: "Table"
    body_bytes: int


class Table:
    """A FlatBuffers table at a place in a buffer. Raises BadArrow for places outside of it."""

    def __init__(self, view: memoryview, at: int) -> None:
        self._view, self._at = view, at
        vtable = at - _read(_I32, view, at)
        self._size = _read(_U16, view, vtable)
        self._vtable = vtable

    def find(self, slot: int) -> int:
        """Find the place of a field; 0 if it has its default."""
        place = 4 + 2 * slot
        if place + 2 > self._size:
            return 0
        offset = _read(_U16, self._view, self._vtable + place)
        return self._at + offset if offset else 0

    def get(self, slot: int, layout: Layout, default: int = 0) -> int:
        """The number of a field."""
        at = self.find(slot)
        return _read(layout, self._view, at) if at else default

    def follow(self, slot: int) -> "Table | None":
        """The table of a field."""
        at = self.find(slot)
        return Table(self._view, at + _read(_U32, self._view, at)) if at else None

    def text(self, slot: int) -> str:
        """The text of a field, empty if it has none."""
        start, count = self._find_vector(slot, 1)
        try:
            return bytes(self._view[start : start + count]).decode()
        except UnicodeDecodeError:
            raise BadArrow("a name in the schema is not UTF-8") from None

    def tables(self, slot: int, most: int) -> Iterator["Table"]:
        """The tables of a list. Raises BadArrow for more than `most`."""
        start, count = self._find_vector(slot, 4)
        if count > most:
            raise BadArrow(f"a list of {count} entries in the schema, {most} are the most")
        for at in range(start, start + 4 * count, 4):
            yield Table(self._view, at + _read(_U32, self._view, at))

    def pairs(self, slot: int, most: int) -> list[tuple[int, int]]:
        """A list of pairs of 64-bit numbers."""
        start, count = self._find_vector(slot, _PAIR.size)
        if count > most:
            raise BadArrow(f"a list of {count} entries in a batch, {most} are the most")
        return [_PAIR.unpack_from(self._view, at) for at in range(start, start + _PAIR.size * count, _PAIR.size)]

    def _find_vector(self, slot: int, width: int) -> tuple[int, int]:
        at = self.find(slot)
        if not at:
            return 0, 0
        at += _read(_U32, self._view, at)
        count = _read(_U32, self._view, at)
        if count * width > len(self._view) - at - 4:
            raise BadArrow("a list in the metadata is longer than the metadata")
        return at + 4, count


def read_message(metadata: memoryview) -> Message:
    """Read one message. Raises BadArrow."""
    table = Table(metadata, _read(_U32, metadata, 0))
    header = table.follow(2)
    body_bytes = table.get(3, _I64)
    if header is None or body_bytes < 0:
        raise BadArrow("a message without a header")
    return Message(table.get(1, _U8), header, body_bytes)


def read_schema(table: Table, most_columns: int) -> Schema:
    """Read a schema. Raises BadArrow."""
    if table.get(0, _I16):
        raise BadArrow("the stream is big-endian; send little-endian numbers")
    fields = [_read_field(each, 0) for each in table.tables(1, most_columns)]
    return Schema(fields, {each.text(0): each.text(1) for each in table.tables(2, most_columns)})


def read_batch(table: Table, most_columns: int) -> Batch:
    """Read the metadata of rows. Raises BadArrow."""
    if table.find(3):
        raise BadArrow("the buffers are compressed; write the stream without compression, HTTP has Content-Encoding")
    batch = Batch(table.get(0, _I64), table.pairs(1, 2 * most_columns), table.pairs(2, 8 * most_columns))
    if batch.rows < 0:
        raise BadArrow("a batch of fewer than no rows")
    return batch


def _read_field(table: Table, depth: int) -> Field:
    try:
        children = tuple(_read_field(each, depth + 1) for each in table.tables(5, 1)) if depth < MOST_DEPTH else ()
    except BadArrow:
        message = f"the column {table.text(0)[:100]!r} is of a nested type that is not taken; send lists of numbers"
        raise BadArrow(message) from None
    kind, details = table.get(2, _U8), table.follow(3)
    bits = size = 0
    is_signed = True
    if details is not None and kind == INT:
        bits, is_signed = details.get(0, _I32), bool(details.get(1, _U8))
    elif details is not None and kind == FLOAT:
        bits = 16 << max(0, min(details.get(0, _I16), 3))
    elif details is not None and kind == FIXED_SIZE_LIST:
        size = details.get(0, _I32)
    return Field(table.text(0), kind, bits, is_signed, size, bool(table.find(4)), children)


def _read(layout: Layout, view: memoryview, at: int) -> int:
    """A number at a place. Raises BadArrow for a place outside."""
    if not 0 <= at <= len(view) - layout.size:
        raise BadArrow("the metadata points outside of itself")
    number: int = layout.unpack_from(view, at)[0]
    return number
