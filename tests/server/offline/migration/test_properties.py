"""The reader of .properties files: what `java.util.Properties` of Java 17 gave for the same bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.offline.migration.properties import MAX_BYTES, MAX_KEYS, PropertiesInvalid, parse_properties

ALPHABET = ("\\", "\n", "\r\n", "\r", "=", ":", " ", "\t", "\f", "#", "!", "a", "\\u0041", "é", "t", "\x85")


def read(raw: bytes) -> dict[str, str]:
    """Key -> value."""
    return {found.key: found.value for found in parse_properties(raw)}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"a=1\nb: 2\nc 3\nd\n", {"a": "1", "b": "2", "c": "3", "d": ""}),
        (b"a = 1 \n\t b\t:\t2\r\nc==3\rd= :4", {"a": "1 ", "b": "2", "c": "=3", "d": ":4"}),
        (b"# no\n! no\n  # no\n#c\\\na=1", {"a": "1"}),
        (b"a=1,\\\n   2,\\\r\n\t# 3\nb=4", {"a": "1,2,# 3", "b": "4"}),
        (b"a=1\\\\\nb=2", {"a": "1\\", "b": "2"}),
        (b"a=1\\\n\nb=2", {"a": "1", "b": "2"}),
        (b"a\\ b\\=c\\:d=e\\=f", {"a b=c:d": "e=f"}),
        (b"a=\\t\\n\\r\\f\\b\\q\\\\", {"a": "\t\n\r\fbq\\"}),
        (b"a=\\u0041\\u20ac\\ud83d\\ude00", {"a": "A€😀"}),
        (b"a=1\nb=2\na=3", {"b": "2", "a": "3"}),
        (b"a=\xe9", {"a": "é"}),
        (b"a\x0b=1\nb\x85c 2", {"a\x0b": "1", "b\x85c": "2"}),
        (b"\\\n#:\\\n!abb\r\na=1\n=2\n", {"a": "1", "": "2"}),
        (b"", {}),
    ],
)
def test_files_as_java_reads_them(raw: bytes, expected: dict[str, str]) -> None:
    """Separators, comments, continued lines, escapes, keys that stand there twice: each was given to Java 17."""
    assert read(raw) == expected


def test_lines_are_counted_as_an_editor_does() -> None:
    """From 1; that of a continued line is its first."""
    found = parse_properties(b"\n# a\nb=1,\\\n 2\nc=3")
    assert [(each.key, each.line) for each in found] == [("b", 3), ("c", 5)]


def test_files_that_are_none_are_refused_before_they_cost_anything() -> None:
    """An escape without its digits, too many bytes, too many keys; each says what is wrong."""
    with pytest.raises(PropertiesInvalid, match=r"line 2: \\u00zz is no character"):
        parse_properties(b"a=1\nb=\\u00zz")
    with pytest.raises(PropertiesInvalid, match="more than 1048576 bytes"):
        parse_properties(b"a" * (MAX_BYTES + 1))
    with pytest.raises(PropertiesInvalid, match="more than 10000 keys"):
        parse_properties(b"".join(b"k%d\n" % i for i in range(MAX_KEYS + 1)))


@pytest.mark.slow
@given(st.lists(st.sampled_from(ALPHABET), max_size=40).map("".join))
def test_any_text_is_read(text: str) -> None:
    """Whatever stands there is read, and what was read comes back from a file in which everything is escaped."""
    found = read(text.encode("latin-1"))
    written = "\n".join(f"{_escape(key)}={_escape(value)}" for key, value in found.items())
    assert read(written.encode("latin-1")) == found


def _escape(text: str) -> str:
    return "".join(f"\\u{ord(one):04x}" for one in text)
