"""Reads a call for many models from a .npy or an .npz file, without numpy. Pure.

A .npy file is a table whose rows have fields: `model`, `start`, `target`, `(numbers,)` each. An .npz file has a member
for each column, [rows] or [rows, numbers], and one of no dimension for what all rows share. Taken are texts (U and S),
datetime64, int64, int32, float64 and float32, little-endian. Objects are pickles, and are refused by their header.
Memory: the body itself; of columns of Fortran's order or of whole numbers, the rows that are asked for.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from math import prod
from typing import NamedTuple, TypeVar

from server.errors import Refused, Situation
from server.front.columns.asked_table import (
    MOST_COLUMNS,
    MOST_NAME,
    TARGET,
    TEXTS,
    AskedTable,
    Numbers,
    Series,
    WholeSeries,
)
from server.front.columns.npy_header import MAGIC, BadNpy, Format, Header, read_header
from server.front.columns.npz_members import ZIP, find_members
from server.front.raw_json import MAX_ITEMS
from server.front.slices import UNIT, Slices
from server.ipc.packed import ITEM_BYTES, cast_numbers

SHARED = ("start", "configuration")
MOST_SHARED = len(SHARED)
MOST_INTS = 500_000  #: whole numbers of a column, which become float64 here
MOST_GATHERED = 500_000  #: numbers of a row in Fortran's order, which are picked from as many places
TOKENS = 16  #: what it counts to read a byte of a header
WIDE = 4  #: bytes of a character of numpy's texts
CELL = 64  #: what it counts to read a cell, beside its bytes
NOT_A_TIME = -(2**63)
_SECONDS = {"D": 86_400, "h": 3600, "m": 60, "s": 1}
_PARTS = {"ms": 1000, "us": 1_000_000, "ns": 1_000_000_000}  #: of a second
_EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 -- starts have no zone
_TABLE = "a table has a field for each column (model, start, target), or is an .npz file with a member for each"
T = TypeVar("T")


class _Column(NamedTuple):
    """A column: where the cell of each row lies, and how many numbers it has; None for one that is no series."""

    name: str
    format: Format
    numbers: int | None
    rows: int
    data: memoryview
    offset: int
    stride: int
    is_fortran: bool = False

    @property
    def size(self) -> int:
        """Bytes of a cell."""
        return self.format.size * (1 if self.numbers is None else self.numbers)

    def cut(self, row: int) -> memoryview:
        """The bytes of a row's cell."""
        at = self.offset + row * self.stride
        return self.data[at : at + self.size]

    def describe(self) -> str:
        """The type of its cells in words."""
        return self.format.describe() if self.numbers is None else f"{self.numbers} of {self.format.describe()} a row"


def read_npy(body: bytes) -> Slices[AskedTable]:
    """Read a call. Raises Refused for a body that is none."""
    view = memoryview(body)
    try:
        is_zip = bytes(view[: len(ZIP)]) == ZIP
        return (yield from (_read_npz(view) if is_zip else _read_rows(view)))
    except BadNpy as error:
        raise Refused(Situation.BAD_REQUEST, f"not a table that is taken here: {error}") from None


def _read_rows(view: memoryview) -> Slices[AskedTable]:
    if bytes(view[: len(MAGIC)]) != MAGIC:
        raise BadNpy("it is neither a .npy nor an .npz file; write one by np.save or np.savez, without pickles")
    return (yield from _make_table(_cut_fields(read_header(view, MOST_COLUMNS), view), {}))


def _cut_fields(header: Header, view: memoryview) -> list[_Column]:
    """The columns of a table of rows. Raises BadNpy."""
    if len(header.shape) != 1 or not header.parts or not header.parts[0].name:
        raise BadNpy(f"the array is {list(header.shape)} and has no rows with fields; {_TABLE}")
    (rows,) = header.shape
    data = _cut_data(header, view, "the file")
    columns = list[_Column]()
    for part in header.parts:
        if len(part.shape) > 1:
            raise BadNpy(f"the column {part.name[:40]!r} is {list(part.shape)} a row; a row has one series")
        count = part.shape[0] if part.shape else None
        columns.append(_Column(part.name, part.format, count, rows, data, part.offset, header.row_bytes))
    return columns


def _read_npz(view: memoryview) -> Slices[AskedTable]:
    columns, shared = list[_Column](), dict[str, str]()
    for name, member in find_members(view, MOST_COLUMNS + MOST_SHARED, MOST_NAME).items():
        what = f"the member {name[:40]!r}"
        try:
            header = read_header(member, MOST_COLUMNS)
        except BadNpy as error:
            raise BadNpy(f"{what}: {error}") from None
        if len(header.parts) != 1 or header.parts[0].name:
            raise BadNpy(f"{what} has rows with fields; send that array alone, as a .npy file")
        kind, data = header.parts[0].format, _cut_data(header, member, what)
        if not header.shape:
            shared[name] = _read_shared(_Column(name, kind, None, 1, data, 0, kind.size))
            continue
        if len(header.shape) > 2:  # noqa: PLR2004 -- [rows, numbers]
            raise BadNpy(f"{what} is {list(header.shape)}; a column is [rows], a series of each row [rows, numbers]")
        rows, *counts = header.shape
        count = counts[0] if counts else None
        is_fortran = header.is_fortran and count is not None
        stride = kind.size * (1 if count is None else count)
        columns.append(_Column(name, kind, count, rows, data, 0, stride, is_fortran))
        yield TOKENS * header.begins
    return (yield from _make_table(columns, shared))


def _cut_data(header: Header, view: memoryview, what: str) -> memoryview:
    """The numbers behind a header. Raises BadNpy where there are fewer or more bytes than it says."""
    size = header.row_bytes * prod(header.shape)
    if len(view) - header.begins != size:
        raise BadNpy(f"{what} has {len(view) - header.begins} bytes of numbers, and {size} by its header")
    return view[header.begins :]


def _read_shared(column: _Column) -> str:
    """What an array of no dimension says for all rows. Raises BadNpy."""
    if column.name not in SHARED or not (column.format.is_text or column.format.kind == "M"):
        message = f"the member {column.name[:40]!r} is one value; only {' and '.join(SHARED)} are, as texts"
        raise BadNpy(f"{message}; a column has a value for each row")
    if column.format.is_text:
        return _make_text_reader(column)(0) or ""
    if column.name != "start":
        raise BadNpy("configuration is a text: the JSON object of a JSON call")
    return _make_time_reader(column)(0) or ""


def _make_table(columns: Sequence[_Column], shared: Mapping[str, str]) -> Slices[AskedTable]:
    """The call in columns of equal length. Raises BadNpy."""
    if not columns or len(columns) > MOST_COLUMNS:
        raise BadNpy(f"{len(columns)} columns; 1 to {MOST_COLUMNS} are taken")
    rows = columns[0].rows
    names = [each.name for each in columns]
    texts, series, categories = dict[str, list[str | None]](), dict[str, Series](), dict[str, list[int | None]]()
    if rows > MAX_ITEMS:
        raise BadNpy(f"a call has 1 to {MAX_ITEMS} rows, not {rows}")
    for each in columns:
        if not each.name or len(each.name) > MOST_NAME or names.count(each.name) > 1:
            raise BadNpy(f"a column's name is empty, longer than {MOST_NAME} characters or twice: {each.name[:40]!r}")
        if each.rows != rows:
            raise BadNpy(f"the column {each.name!r} has {each.rows} rows, {columns[0].name!r} has {rows}")
        _check_type(each)
        if each.name in TEXTS:
            if each.format.kind == "M":
                texts[each.name] = yield from _read_cells(each, _make_time_reader(each))
            elif each.stride == each.size:
                texts[each.name] = yield from _read_texts(each)
            else:
                texts[each.name] = yield from _read_cells(each, _make_text_reader(each))
        elif each.numbers is None:
            categories[each.name] = yield from _read_cells(each, _make_int_reader(each))
        else:
            series[each.name] = _NpySeries(each)
    return AskedTable(rows, texts, series, categories, shared)


def _check_type(column: _Column) -> None:
    """Raises BadNpy for a column of a type that is not taken under its name."""
    name, kind, said = column.name, column.format, f"the column {column.name!r} is of {column.describe()}"
    if name in TEXTS:
        is_time = kind.kind == "M" and name == "start"
        if column.numbers is not None or not (kind.is_text or is_time):
            raise BadNpy(f"{said}, and must be of texts{' or datetime64' if name == 'start' else ''}, one a row")
    elif kind.code is None or (column.numbers is None and kind.kind != "i"):
        what = "[rows, numbers] of float64 or float32"
        raise BadNpy(f"{said}; a series is {what}, a category int64, and only {', '.join(TEXTS)} are texts")
    elif column.numbers is None:
        if name == TARGET:
            raise BadNpy(f"{said}, and must be [rows, numbers] of float64 or float32")
    elif column.is_fortran and column.numbers > MOST_GATHERED:
        raise BadNpy(f"{said} in Fortran's order, {MOST_GATHERED} are the most; send np.ascontiguousarray(array)")
    elif kind.kind == "i" and column.rows * column.numbers > MOST_INTS:
        raise BadNpy(f"{said}: {column.rows * column.numbers} whole numbers, {MOST_INTS} are the most; send float64")


def _read_cells(column: _Column, read: Callable[[int], T]) -> Slices[list[T]]:
    at_once = max(1, UNIT // (column.size + CELL))
    found = list[T]()
    for first in range(0, column.rows, at_once):
        rows = range(first, min(first + at_once, column.rows))
        found += map(read, rows)
        yield len(rows) * (column.size + CELL)
    return found


def _read_texts(column: _Column) -> Slices[list[str | None]]:
    """The texts of cells that lie side by side, many by one look where each character has one width."""
    read, is_wide = _make_text_reader(column), column.format.kind == "U"
    at_once, width = max(1, UNIT // (column.size + CELL)), column.size // (WIDE if is_wide else 1)
    found = list[str | None]()
    for first in range(0, column.rows, at_once):
        rows = range(first, min(first + at_once, column.rows))
        raw = bytes(column.data[column.offset + first * column.size : column.offset + rows.stop * column.size])
        if not width:
            found += [None] * len(rows)
        elif is_wide or raw.isascii():
            text = _decode(raw, column)
            found += [text[at : at + width].rstrip("\0") or None for at in range(0, len(rows) * width, width)]
        else:
            found += map(read, rows)
        yield len(rows) * (column.size + CELL)
    return found


def _decode(raw: bytes | memoryview, column: _Column) -> str:
    """The text. Raises BadNpy."""
    coding = "utf-32-le" if column.format.kind == "U" else "utf-8"
    try:
        return str(raw, coding)
    except UnicodeDecodeError:
        raise BadNpy(f"a text of the column {column.name[:40]!r} is not {coding.upper()}") from None


def _make_text_reader(column: _Column) -> Callable[[int], str | None]:
    """What reads the text of a row; None for an empty one, since numpy has no other way to leave one out."""
    return lambda row: _decode(column.cut(row), column).rstrip("\0") or None


def _make_int_reader(column: _Column) -> Callable[[int], int | None]:
    return lambda row: int.from_bytes(column.cut(row), "little", signed=True)


def _make_time_reader(column: _Column) -> Callable[[int], str | None]:
    """What reads the time of a row, as requests have it; None for NaT. Raises BadNpy for a unit that is not taken."""
    unit, known = column.format.unit, dict[bytes, str | None]()
    if column.format.size != 8 or unit not in (*_SECONDS, *_PARTS):  # noqa: PLR2004 -- bytes
        raise BadNpy(f"start is {column.format.describe()}; send it as datetime64[s]")

    def read(row: int) -> str | None:
        raw = bytes(column.cut(row))
        if raw not in known:
            known[raw] = _write_time(int.from_bytes(raw, "little", signed=True), unit)
        return known[raw]

    return read


def _write_time(value: int, unit: str) -> str | None:
    if value == NOT_A_TIME:
        return None
    seconds, rest = (value * _SECONDS[unit], 0) if unit in _SECONDS else divmod(value, _PARTS[unit])
    if rest:
        raise BadNpy("a start has a fraction of a second; send it as datetime64[s]")
    try:
        return (_EPOCH + timedelta(seconds=seconds)).isoformat(sep=" ")
    except OverflowError:
        raise BadNpy("a start lies outside of the years 1 to 9999") from None


class _NpySeries:
    """Cuts the numbers of a row; float64 and float32 as they lie, without a copy."""

    def __init__(self, column: _Column) -> None:
        code = column.format.code
        assert code is not None, "the type has been checked"
        self._column, self._code = column, code
        self._is_float = code in ITEM_BYTES

    def cut(self, row: int) -> Numbers:
        """The numbers of a row."""
        column, code = self._column, self._code
        if column.is_fortran:
            picked = cast_numbers(column.data, code)[row :: column.rows]
            return Numbers(code, picked.tobytes()) if self._is_float else Numbers("d", array("d", picked).tobytes())
        cell = column.cut(row)
        return Numbers(code, cell) if self._is_float else Numbers("d", array("d", cast_numbers(cell, code)).tobytes())

    def take_whole(self) -> WholeSeries | None:
        """See `Series`. Rows with fields do not lie side by side, and nor do those of Fortran's order."""
        column = self._column
        if column.is_fortran or not self._is_float or column.stride != column.size or column.numbers is None:
            return None
        return WholeSeries(self._code, column.data[column.offset :], [column.numbers])
