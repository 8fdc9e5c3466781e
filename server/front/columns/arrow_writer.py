"""Writes a table as an Arrow IPC stream: a schema, one batch of rows, the end. Pure: no pyarrow, no numpy.

FlatBuffers are written forwards: a table before what it refers to. Source: the Arrow columnar format.
"""

from collections.abc import Callable, Sequence
from struct import calcsize, pack_into
from typing import NamedTuple

from server.front.columns.arrow_metadata import FLOAT, INT, RECORD_BATCH, SCHEMA, UTF8

VERSION_5 = 4
ALIGNED = 8
SINGLE = 1  #: precision of a float

Buffers = list[bytes | bytearray | memoryview]


class Column(NamedTuple):
    """A column: its name, its type, the rows that are null, and its buffers, of which the first tells which are not."""

    name: str
    type: int
    nulls: int
    buffers: Buffers


class _Number(NamedTuple):
    code: str
    value: int


_Slot = _Number | Callable[[], int] | None  #: a number, what is written behind the table, or the default


class _Writer:
    def __init__(self) -> None:
        self.buffer = bytearray(4)

    def write_table(self, slots: Sequence[_Slot]) -> int:
        """Write a table and what it refers to; returns its place."""
        vtable, at = bytearray(4 + 2 * len(slots)), 4
        for i, slot in enumerate(slots):
            if slot is not None:
                size = calcsize(slot.code) if isinstance(slot, _Number) else 4
                at += -at % size
                pack_into("<H", vtable, 4 + 2 * i, at)
                at += size
        pack_into("<HH", vtable, 0, len(vtable), at)
        start = self._pad(2)
        self.buffer += vtable
        table = self._pad(ALIGNED)
        self.buffer += bytes(at)
        pack_into("<i", self.buffer, table, table - start)
        for i, slot in enumerate(slots):
            place = table + int.from_bytes(vtable[4 + 2 * i : 6 + 2 * i], "little")
            if isinstance(slot, _Number):
                pack_into(f"<{slot.code}", self.buffer, place, slot.value)
            elif slot is not None:
                self._refer(place, slot())
        return table

    def write_text(self, text: str) -> int:
        """Write a text; returns its place."""
        place, raw = self._pad(4), text.encode()
        self.buffer += len(raw).to_bytes(4, "little") + raw + b"\0"
        return place

    def write_list(self, children: Sequence[Callable[[], int]]) -> int:
        """Write a list of tables; returns its place."""
        place = self._pad(4)
        self.buffer += len(children).to_bytes(4, "little") + bytes(4 * len(children))
        for i, child in enumerate(children):
            self._refer(place + 4 + 4 * i, child())
        return place

    def write_pairs(self, pairs: Sequence[tuple[int, int]]) -> int:
        """Write a list of pairs of 64-bit numbers; returns its place."""
        self.buffer += bytes(-(len(self.buffer) + 4) % ALIGNED)
        place = len(self.buffer)
        self.buffer += len(pairs).to_bytes(4, "little")
        for pair in pairs:
            self.buffer += b"".join(number.to_bytes(8, "little") for number in pair)
        return place

    def _refer(self, place: int, target: int) -> None:
        pack_into("<I", self.buffer, place, target - place)

    def _pad(self, size: int) -> int:
        self.buffer += bytes(-len(self.buffer) % size)
        return len(self.buffer)


def write_stream(columns: Sequence[Column], rows: int) -> Buffers:
    """Write a table of so many rows, as parts that follow each other."""
    parts: Buffers = [_write_message(SCHEMA, lambda writer: _write_schema(writer, columns), 0)]
    nodes, places, body = [(rows, column.nulls) for column in columns], list[tuple[int, int]](), Buffers()
    at = 0
    for column in columns:
        for buffer in column.buffers:
            size = len(buffer)
            places.append((at, size))
            body += (buffer, bytes(-size % ALIGNED))
            at += size + -size % ALIGNED

    def write_batch(writer: _Writer) -> int:
        pairs: list[_Slot] = [lambda: writer.write_pairs(nodes), lambda: writer.write_pairs(places)]
        return writer.write_table([_Number("q", rows), *pairs])

    parts.append(_write_message(RECORD_BATCH, write_batch, at))
    return [*parts, *body, b"\xff\xff\xff\xff\0\0\0\0"]


def _write_message(kind: int, write_header: Callable[[_Writer], int], body_bytes: int) -> bytes:
    writer = _Writer()
    head, size = (_Number("h", VERSION_5), _Number("B", kind)), _Number("q", body_bytes)
    header: list[_Slot] = [*head, lambda: write_header(writer), size]
    pack_into("<I", writer.buffer, 0, writer.write_table(header))
    metadata = bytes(writer.buffer) + bytes(-len(writer.buffer) % ALIGNED)
    return b"\xff\xff\xff\xff" + len(metadata).to_bytes(4, "little") + metadata


def _write_schema(writer: _Writer, columns: Sequence[Column]) -> int:
    fields = [lambda column=column: _write_field(writer, column) for column in columns]
    return writer.write_table([None, lambda: writer.write_list(fields)])


def _write_field(writer: _Writer, column: Column) -> int:
    details: Sequence[_Slot] = {
        UTF8: (),
        INT: (_Number("i", 32), _Number("B", 1)),
        FLOAT: (_Number("h", SINGLE),),
    }[column.type]
    return writer.write_table(
        [
            lambda: writer.write_text(column.name),
            _Number("B", 1),
            _Number("B", column.type),
            lambda: writer.write_table(details),
            None,
            lambda: writer.write_list(()),
        ]
    )
