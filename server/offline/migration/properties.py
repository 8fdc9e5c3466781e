"""Reads a .properties file as java.util.Properties does, and says on which line each key stands. Pure.

Source: the documentation of `Properties.load(Reader)` (Java SE 17). On thousands of random files it gave what Java 17
gives, but for a single backslash at a file's end, which is an empty key there.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_BYTES = 2**20
MAX_KEYS = 10_000

_BLANK = " \t\f"
_LINE_END = re.compile(r"\r\n|\r|\n")
_KEY = re.compile(r"(?:\\.|[^\\=: \t\f])*", re.DOTALL)
_SEPARATOR = re.compile(r"[ \t\f]*[=:]?[ \t\f]*")
_ESCAPE = re.compile(r"\\(?:u(.{0,4})|(.)|$)", re.DOTALL)
_CONTROL = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}
_HEX = re.compile(r"[0-9a-fA-F]{4}")


class PropertiesInvalid(ValueError):
    """The file is none that Java would read, or is larger than such a file ever is."""


@dataclass(frozen=True, slots=True)
class Property:
    """One key, its value, and the line (from 1) on which it begins."""

    key: str
    value: str
    line: int


def parse_properties(raw: bytes) -> list[Property]:
    """The keys in the order of the file; of a key that stands there twice the last value counts, as in Java.

    Both servers read the file as ISO 8859-1. Raises PropertiesInvalid for a Unicode escape without four digits, for
    more than MAX_BYTES and for more than MAX_KEYS keys.
    """
    if len(raw) > MAX_BYTES:
        raise PropertiesInvalid(f"it has more than {MAX_BYTES} bytes: is this a config.properties?")
    found: dict[str, Property] = {}
    for line, text in _join_lines(raw.decode("latin-1")):
        key = _KEY.match(text)
        assert key is not None, "the pattern matches the empty text"
        separator = _SEPARATOR.match(text, key.end())
        assert separator is not None, "so does this one"
        name = _replace_escapes(key[0], line)
        found.pop(name, None)
        found[name] = Property(name, _replace_escapes(text[separator.end() :], line), line)
        if len(found) > MAX_KEYS:
            raise PropertiesInvalid(f"it has more than {MAX_KEYS} keys: is this a config.properties?")
    return list(found.values())


def _join_lines(text: str) -> Iterator[tuple[int, str]]:
    """The logical lines with the number of their first: without comments and blank lines, continued lines joined."""
    lines = enumerate(_LINE_END.split(text), 1)
    for number, natural in lines:
        line = natural.lstrip(_BLANK)
        if not line or line[0] in "#!" or line == "\\":  # of the last nothing is left to be continued
            continue
        parts = []
        while _is_continued(line):
            parts.append(line[:-1])
            _, following = next(lines, (0, ""))
            line = following.lstrip(_BLANK)
        yield number, "".join([*parts, line])


def _is_continued(line: str) -> bool:
    """Whether it ends with a backslash that no other backslash escapes."""
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


def _replace_escapes(text: str, line: int) -> str:
    def replace(found: re.Match[str]) -> str:
        digits, character = found[1], found[2]
        if digits is None:
            return _CONTROL.get(character or "", character or "")
        if not _HEX.fullmatch(digits):
            raise PropertiesInvalid(f"line {line}: \\u{digits} is no character: \\u takes four hexadecimal digits")
        return chr(int(digits, 16))

    units = _ESCAPE.sub(replace, text).encode(
        "utf-16-le", "surrogatepass"
    )  # Java's text: two escapes may be one character
    return units.decode("utf-16-le", "replace")
