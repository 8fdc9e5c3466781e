"""Cuts JSON at the borders of its values, in slices of bounded work and without decoding a value. Pure.

Text that msgspec reads quickly is given to msgspec. Of longer text only the borders are found: brackets are counted
outside of strings, a piece at a time. So what is cut out may not be JSON inside; but no value can reach into the next
one, for JSON of which it is a part is sound only if its own brackets and quotes are.
"""

import re
from array import array
from collections.abc import Iterator
from itertools import accumulate
from typing import Final, TypeVar

import msgspec

from model_store.archives.json_faults import FAULTS, explain_fault
from server.front.slices import AT_ONCE, ITEM, UNIT, Slices

MAX_DEPTH = 500  #: of nested brackets in a value
MAX_TOKEN = UNIT  #: bytes of a name, a number, or the white space between two tokens
FIRST_PIECE = 256  #: bytes; each further piece is twice as long, up to UNIT
SMALL = 32  #: bytes that are looked at one by one
COLLAPSES = 4  #: times that innermost pairs of brackets are taken out before they are counted one by one

T = TypeVar("T")

_FIELDS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ITEMS: Final = msgspec.json.Decoder(list[msgspec.Raw])
_SPACE: Final = rb"[ \t\n\r]*+"
_BLANK: Final = re.compile(_SPACE)
_NAME: Final = re.compile(_SPACE + rb'("(?:[^"\\]++|\\.)*+")' + _SPACE + b":" + _SPACE, re.DOTALL)
_MORE: Final = re.compile(_SPACE + rb"([,\]}])" + _SPACE)
_SCALAR: Final = re.compile(rb"[-+.0-9A-Za-z]++")
_IN_STRING: Final = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
#: An object of plain strings, numbers and arrays of at most two dimensions, as forecast requests are: one pass in C.
_FREE: Final = rb'[^{}\[\]"\\]*+'
_ROW: Final = rb"\[" + _FREE + rb"\]"
_ARRAY: Final = rb"\[" + _FREE + b"(?:" + _ROW + _FREE + rb")*+\]"
_PLAIN: Final = re.compile(rb"\{" + _FREE + rb'(?:(?:"[^"\\]*+"|' + _ARRAY + b")" + _FREE + rb")*+\}")
#: The same with one array, which is right if the array has none of `_MARKS`: four times as fast, since all that is
#: looked for is one byte.
_TEXTS: Final = rb'(?:"[^"\\]*+"' + _FREE + b")*+"
_SERIES: Final = re.compile(rb"\{" + _FREE + _TEXTS + rb"\[([^\]]*+)\]" + _FREE + _TEXTS + rb"\}")
_MARKS: Final = (b'"', b"[", b"{", b"}", b"\\")
_OPEN, _CLOSE, _QUOTE, _ESCAPE = b"[", b"]", b'"', b"\\"
_BRACKETS: Final = bytes.maketrans(b"{}", b"[]")
_OTHERS: Final = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEPS: Final = bytes.maketrans(_OPEN + _CLOSE, b"\x01\xff")  #: one level down or, as a signed byte, up


class NotJson(Exception):
    """The text is not what was to be cut; the message says where."""


def cut_fields(text: bytes | msgspec.Raw, most: int = 1000) -> Slices[dict[str, msgspec.Raw]]:
    """The values of a JSON object by name. Raises NotJson, and of a long text also for more than `most` fields."""
    if len(memoryview(text)) <= AT_ONCE:
        yield len(memoryview(text))
        return _decode(_FIELDS, text)
    cutter, found, count = _Cutter(text), dict[str, msgspec.Raw](), 0
    more = cutter.begin(b"{", "an object")
    while more:
        count += 1
        if count > most:
            raise NotJson(f"more than {most} fields")
        name = cutter.take_name()
        start = cutter.at
        yield from cutter.skip_value()
        found[name] = cutter.cut_from(start)
        more = cutter.take_comma(b"}")
        yield ITEM
    cutter.end()
    return found


def cut_items(text: bytes | msgspec.Raw, most: int) -> Slices[list[msgspec.Raw]]:
    """The values of a JSON array; of a longer array than `most`, so many and one more. Raises NotJson."""
    if len(memoryview(text)) <= AT_ONCE:
        yield len(memoryview(text))
        return _decode(_ITEMS, text)
    cutter, found = _Cutter(text), list[msgspec.Raw]()
    more = cutter.begin(b"[", "an array")
    while more and len(found) <= most:
        start = cutter.at
        size = cutter.skip_plain()
        if not size:
            yield from cutter.skip_value()
        found.append(cutter.cut_from(start))
        more = cutter.take_comma(b"]")
        yield size + ITEM
    if not more:
        cutter.end()
    return found


def _decode(decoder: "msgspec.json.Decoder[T]", text: bytes | msgspec.Raw) -> T:
    try:
        return decoder.decode(text)
    except FAULTS as error:
        raise NotJson(explain_fault(error).message) from None


class _Cutter:
    """A place in a text, `at`, which moves from border to border."""

    def __init__(self, text: bytes | msgspec.Raw) -> None:
        self._view, self.at = memoryview(text), 0
        self.at = self._skip(_BLANK)

    def begin(self, bracket: bytes, what: str) -> bool:
        """Enter a container. Whether it holds anything."""
        if bytes(self._view[self.at : self.at + 1]) != bracket:
            raise NotJson(f"expected {what} at byte {self.at}")
        self.at += 1
        self.at = self._skip(_BLANK)
        if bytes(self._view[self.at : self.at + 1]) != (b"}" if bracket == b"{" else b"]"):
            return True
        self.at += 1
        return False

    def take_name(self) -> str:
        """A field's name, up to its value."""
        found = _NAME.match(self._view, self.at, self.at + MAX_TOKEN)
        if found is None:
            raise NotJson(f"expected a field's name of less than {MAX_TOKEN} bytes at byte {self.at}")
        self.at = found.end()
        try:
            name: str = msgspec.json.decode(found[1], type=str)
        except FAULTS as error:
            raise NotJson(f"a key at byte {found.start()}: {explain_fault(error).message}") from None
        return name

    def take_comma(self, closing: bytes) -> bool:
        """What follows a value: True for a comma, False for the container's end."""
        found = _MORE.match(self._view, self.at, self.at + MAX_TOKEN)
        if found is None or found[1] not in (b",", closing):
            raise NotJson(f"expected `,` or `{closing.decode()}` at byte {self.at}")
        self.at = found.end()
        return found[1] == b","

    def end(self) -> None:
        """Nothing but white space may be left."""
        self.at = self._skip(_BLANK)
        if self.at < len(self._view):
            raise NotJson(f"trailing characters at byte {self.at}")

    def cut_from(self, start: int) -> msgspec.Raw:
        """The text since `start`, not copied."""
        return msgspec.Raw(self._view[start : self.at])

    def skip_value(self) -> Slices[None]:
        """Go behind the value that begins here."""
        first = bytes(self._view[self.at : self.at + 1])
        if first == _QUOTE:
            yield from self._skip_string()
        elif first in (b"{", b"["):
            yield from self._skip_container()
        else:
            end = self._skip(_SCALAR)
            if end == self.at:
                raise NotJson(f"expected a value at byte {self.at}")
            self.at = end

    def _skip(self, run: "re.Pattern[bytes]") -> int:
        """Where a run ends that begins here."""
        found = run.match(self._view, self.at, self.at + MAX_TOKEN)
        end = found.end() if found else self.at
        if end - self.at == MAX_TOKEN:
            raise NotJson(f"a number or white space of more than {MAX_TOKEN} bytes at byte {self.at}")
        return end

    def _skip_string(self) -> Slices[None]:
        self.at += 1
        while True:
            found = _IN_STRING.match(self._view, self.at, self.at + UNIT)
            end = found.end() if found else self.at
            if bytes(self._view[end : end + 1]) == _QUOTE:
                yield end - self.at
                self.at = end + 1
                return
            if end == self.at:
                raise NotJson(f"the text ends inside a string, at byte {self.at}")
            yield end - self.at
            self.at = end

    def _find_plain_end(self, start: int, most: int) -> int | None:
        """Where an object ends that begins here, has nothing nested but arrays of numbers, and ends before `most`."""
        found = _SERIES.match(self._view, start, most)
        if found is not None:
            numbers = self._view[found.start(1) : found.end(1)].tobytes()
            if not any([mark in numbers for mark in _MARKS]):  # noqa: C419 -- a generator takes longer than all five
                return found.end()
        found = _PLAIN.match(self._view, start, most)
        return None if found is None else found.end()

    def skip_plain(self) -> int:
        """Go behind an object that begins here and has nothing nested but arrays of numbers; its bytes, else 0."""
        end = self._find_plain_end(self.at, self.at + UNIT)
        size = 0 if end is None else end - self.at
        self.at += size
        return size

    def _skip_container(self) -> Slices[None]:
        """A piece after the other, until one has the bracket that closes the first."""
        size = self.skip_plain()
        if size:
            yield size
            return
        self.at += 1
        depth, quoted, size = 1, False, FIRST_PIECE
        while True:
            piece = _whole_escapes(bytes(self._view[self.at : self.at + size + 1]), size)
            if not piece:
                raise NotJson(f"the text ends inside {depth} brackets, at byte {self.at}")
            closing, opening, after = _sum_brackets(piece, quoted=quoted)
            if closing >= depth:
                self.at += _find_closing(piece, depth, quoted=quoted)
                yield 2 * len(piece)
                return
            depth, quoted = depth - closing + opening, after
            if depth > MAX_DEPTH:
                raise NotJson(f"more than {MAX_DEPTH} nested brackets at byte {self.at}")
            self.at += len(piece)
            size = min(2 * size, UNIT)
            yield len(piece)


def _whole_escapes(text: bytes, size: int) -> bytes:
    """The first `size` bytes, or one more so that the end does not part a backslash from what it escapes."""
    piece = text[:size]
    backslashes = len(piece) - len(piece.rstrip(_ESCAPE))
    return text[: size + 1] if backslashes % 2 else piece


def _sum_brackets(piece: bytes, *, quoted: bool) -> tuple[int, int, bool]:
    """How many brackets close what began before the piece, how many stay open, and whether it ends inside a string."""
    if _ESCAPE in piece:
        piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
    parts = piece.split(_QUOTE)
    brackets = b"".join(parts[quoted::2]).translate(_BRACKETS, _OTHERS)
    for _ in range(COLLAPSES):
        brackets = brackets.replace(b"[]", b"")
    closing = max(0, -min(accumulate(array("b", brackets.translate(_STEPS))), default=0))
    opening = closing + brackets.count(_OPEN) - brackets.count(_CLOSE)
    return closing, opening, quoted ^ (len(parts) % 2 == 0)


def _find_closing(piece: bytes, depth: int, *, quoted: bool) -> int:
    """The offset behind the bracket that closes the outermost of `depth`; the piece has it. Halves, then bytes."""
    at = 0
    while len(piece) > SMALL:
        half = _whole_escapes(piece, len(piece) // 2)
        closing, opening, after = _sum_brackets(half, quoted=quoted)
        if closing >= depth:
            piece = half
        else:
            at += len(half)
            piece, depth, quoted = piece[len(half) :], depth - closing + opening, after
    return at + _count_to_closing(piece, depth, quoted=quoted)


def _count_to_closing(piece: bytes, depth: int, *, quoted: bool) -> int:
    for offset, byte in _unescaped(piece):
        if byte == _QUOTE[0]:
            quoted = not quoted
        elif not quoted and byte in b"[]{}":
            depth += 1 if byte in b"[{" else -1
            if depth == 0:
                return offset + 1
    raise NotJson("a backslash outside of a string")  # it escaped the bracket that the caller has counted


def _unescaped(piece: bytes) -> Iterator[tuple[int, int]]:
    """Each byte with its offset, but none that a backslash escapes, and no backslash."""
    escaped = False
    for offset, byte in enumerate(piece):
        if escaped:
            escaped = False
        elif byte == _ESCAPE[0]:
            escaped = True
        else:
            yield offset, byte
