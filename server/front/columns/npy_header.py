"""The headers of .npy files: what an array's numbers are and how they lie. Pure: no numpy.

A header is the text of a Python literal. It is read by a grammar of its own that knows texts, whole numbers, lists,
tuples and dictionaries, each bounded, and evaluates nothing. Source: `numpy.lib.format`.
"""

import re
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

MAGIC = b"\x93NUMPY"
MOST_HEADER = 10_000  #: bytes of a header: np.load reads no longer one unless it is told otherwise
MOST_DEPTH = 5  #: of lists in lists
ALIGNED = 64
_LENGTHS = {1: 2, 2: 4, 3: 4}  #: by version, the bytes of a header's length
_TOKEN = re.compile(
    r"""\s*(?:(?P<text>'[^'\\]*'|"[^"\\]*")|(?P<number>\d{1,15})(?!\d)|(?P<word>True|False)|(?P<mark>[][(){},:]))"""
)
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_FORMAT = re.compile(r"([<>|=])([A-Za-z?])(\d{0,9})(?:\[(\w{1,9})\])?", re.ASCII)
_WORDS = {"f": "float", "i": "int", "u": "uint", "c": "complex", "b": "bool", "O": "objects", "U": "text", "S": "text",
          "M": "datetime64", "m": "timedelta64", "V": "raw bytes"}  # fmt: skip
OBJECTS = "objects are pickled, and pickles are never read: send float64 (NaN where a value is missing) or texts"
_NUMBERS = {("f", 4): "f", ("f", 8): "d", ("i", 4): "i", ("i", 8): "q"}


class BadNpy(ValueError):
    """Bytes that are no .npy or .npz file, or one that is not taken here; the message says what to do."""


class Format(NamedTuple):
    """The type of a number or text: its kind by numpy's letter, its bytes, and the unit of a datetime64."""

    kind: str
    size: int
    unit: str = ""

    @property
    def code(self) -> str | None:
        """The code of a type of numbers in `struct` and `array`; None for others."""
        return _NUMBERS.get((self.kind, self.size))

    @property
    def is_text(self) -> bool:
        """Whether it is `U` (UTF-32) or `S` (UTF-8)."""
        return self.kind in "US"

    def describe(self) -> str:
        """The type in words."""
        word = _WORDS.get(self.kind, self.kind)
        if self.kind in "fiuc":
            return f"{word}{8 * self.size}"
        return f"{word}[{self.unit}]" if self.unit else word


class Part(NamedTuple):
    """A field of a row, or the whole of an array without fields: [*shape] of one type, at so many bytes of the row."""

    name: str
    format: Format
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Bytes in a row."""
        return self.format.size * prod(self.shape)


class Header(NamedTuple):
    """What a file says of itself, and the place of its numbers."""

    parts: Sequence[Part]  #: one without a name where rows have no fields
    row_bytes: int
    shape: tuple[int, ...]
    is_fortran: bool  #: columns lie one after the other, not rows
    begins: int


def read_header(view: memoryview, most_fields: int) -> Header:
    """Read the header of a file. Raises BadNpy."""
    if bytes(view[: len(MAGIC)]) != MAGIC or len(view) < len(MAGIC) + 2:
        raise BadNpy("it does not begin as a .npy file does")
    digits = _LENGTHS.get(view[6])
    if digits is None:
        raise BadNpy(f"it is a .npy file of version {view[6]}; versions 1 to 3 are read")
    begins = 8 + digits
    length = int.from_bytes(view[8:begins], "little")
    if length > MOST_HEADER or begins + length > len(view):
        raise BadNpy(f"a header of {length} bytes is longer than the file or {MOST_HEADER} bytes")
    try:
        text = bytes(view[begins : begins + length]).decode("utf-8" if view[6] > 2 else "latin-1")  # noqa: PLR2004
    except UnicodeDecodeError:
        raise BadNpy("the header is not UTF-8") from None
    found = _Literal(text).read()
    if not isinstance(found, dict) or found.keys() != {"descr", "fortran_order", "shape"}:
        raise BadNpy("the header has other keys than descr, fortran_order and shape")
    shape, is_fortran = _check_shape(found["shape"]), found["fortran_order"]
    if not isinstance(is_fortran, bool):
        raise BadNpy("fortran_order in the header is neither True nor False")
    parts = _read_parts(found["descr"], most_fields)
    row_bytes = parts[-1].offset + parts[-1].size
    return Header([each for each in parts if not _is_padding(each)], row_bytes, shape, is_fortran, begins + length)


def write_header(fields: Sequence[tuple[str, str]], rows: int) -> bytes:
    """Write the header of a table: (name, type) of its fields, in order."""
    descr = ", ".join(f"({name!a}, {kind!a})" for name, kind in fields)
    text = f"{{'descr': [{descr}], 'fortran_order': False, 'shape': ({rows},), }}".encode()
    text += b" " * (-(len(MAGIC) + 4 + len(text) + 1) % ALIGNED) + b"\n"
    return MAGIC + b"\x01\x00" + len(text).to_bytes(2, "little") + text


class _Literal:
    """Reads the literal of a header. Raises BadNpy for what is none."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def read(self) -> object:
        found = self._read_value(self._next(), 0)
        if self._text[self._at :].strip():
            raise BadNpy("the header has more than one value")
        return found

    def _next(self) -> "re.Match[str]":
        token = _TOKEN.match(self._text, self._at)
        if token is None:
            shown = self._text[self._at : self._at + 30].strip()
            raise BadNpy(f"the header is not one that numpy writes, at {shown!r}")
        self._at = token.end()
        return token

    def _read_value(self, token: "re.Match[str]", depth: int) -> object:
        if token["text"] is not None:
            return token["text"][1:-1]
        if token["number"] is not None:
            return int(token["number"])
        if token["word"] is not None:
            return token["word"] == "True"
        if token["mark"] not in _CLOSING or depth >= MOST_DEPTH:
            raise BadNpy("the header is not one that numpy writes: brackets without their pair, or too many of them")
        return self._read_pairs(depth) if token["mark"] == "{" else self._read_list(_CLOSING[token["mark"]], depth)

    def _read_list(self, end: str, depth: int) -> list[object]:
        found = list[object]()
        while (token := self._next())["mark"] != end:
            found.append(self._read_value(token, depth + 1))
            if self._ends(end):
                break
        return found

    def _read_pairs(self, depth: int) -> dict[str, object]:
        found = dict[str, object]()
        while (token := self._next())["mark"] != "}":
            key = self._read_value(token, depth + 1)
            if not isinstance(key, str) or key in found or self._next()["mark"] != ":":
                raise BadNpy("the header is not one that numpy writes: a key that is no text, or twice")
            found[key] = self._read_value(self._next(), depth + 1)
            if self._ends("}"):
                break
        return found

    def _ends(self, end: str) -> bool:
        """Whether a list ends behind its value; otherwise a comma follows."""
        mark = self._next()["mark"]
        if mark not in (end, ","):
            raise BadNpy(f"the header is not one that numpy writes: neither a comma nor {end} follows a value")
        return mark == end


def _check_shape(found: Any) -> tuple[int, ...]:
    if not isinstance(found, list) or not all(type(each) is int for each in found):
        raise BadNpy("a shape in the header is no tuple of whole numbers")
    return tuple(found)


def _read_parts(descr: Any, most: int) -> list[Part]:
    """The fields of a row, with what lies between them; one without a name where it has none."""
    if isinstance(descr, str):
        return [Part("", _read_format(descr, "the array"), (), 0)]
    if not isinstance(descr, list) or not descr:
        raise BadNpy("the header names no type")
    if len(descr) > 2 * most:  # as many gaps as fields
        raise BadNpy(f"{len(descr)} columns, {most} are the most")
    parts, offset = list[Part](), 0
    for each in descr:
        if not isinstance(each, list) or len(each) not in (2, 3) or not isinstance(each[0], str):
            raise BadNpy("a field of the header has no name, or a title beside it")
        name, kind = each[0], each[1]
        if not isinstance(kind, str):
            raise BadNpy(f"the column {name[:40]!r} has fields of its own; send numbers")
        shape = _check_shape(each[2]) if len(each) > 2 else ()  # noqa: PLR2004
        part = Part(name, _read_format(kind, f"the column {name[:40]!r}"), shape, offset)
        if not name and part.format.kind != "V":
            raise BadNpy("a column has no name")
        parts.append(part)
        offset += parts[-1].size
    return parts


def _is_padding(part: Part) -> bool:
    return not part.name and part.format.kind == "V"


def _read_format(text: str, what: str) -> Format:
    found = _FORMAT.fullmatch(text)
    if found is None:
        raise BadNpy(f"{what} is of a type that is not known: {text[:40]!r}")
    order, kind, digits, unit = found.groups()
    if kind == "O":
        raise BadNpy(f"{what} is of objects; {OBJECTS}")
    if order == ">":
        message = f"{what} is big-endian ({text[:40]}); send little-endian numbers"
        raise BadNpy(f"{message}: array.astype(array.dtype.newbyteorder('<'))")
    size = int(digits or 0) * (4 if kind == "U" else 1)
    return Format(kind, size, unit or "")
