"""JSON cut in slices: what msgspec cuts, wherever a slice ends, and no slice that works longer than its share."""

import json
from typing import Any
from unittest import mock

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.front import json_cutter
from server.front.json_cutter import MAX_DEPTH, NotJson, cut_fields, cut_items
from server.front.slices import AT_ONCE, UNIT, finish_slices
from tests.server.front.counted import count_work

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text() | st.text('\\"[]{},: /u')
VALUES = st.recursive(LEAVES | TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=30)


def cut_small(unit: int) -> Any:
    """Every text counts as large, and pieces are of so many bytes at most."""
    return mock.patch.multiple(json_cutter, AT_ONCE=-1, UNIT=unit, FIRST_PIECE=min(unit, 4))


@pytest.mark.slow
@given(st.dictionaries(TEXTS, VALUES), st.integers(2, 70), st.sampled_from([None, 1]))
def test_fields_are_those_that_msgspec_finds(value: dict[str, Any], unit: int, indent: int | None) -> None:
    """In any spelling, and wherever a piece ends: inside an escape, between brackets, in a name."""
    text = json.dumps(value, indent=indent, ensure_ascii=indent is None).encode()
    with cut_small(unit):
        found = finish_slices(cut_fields(text))
    assert {name: bytes(raw) for name, raw in found.items()} == {
        name: bytes(raw) for name, raw in msgspec.json.decode(text, type=dict[str, msgspec.Raw]).items()
    }


@pytest.mark.slow
@given(st.lists(VALUES), st.integers(2, 70), st.sampled_from([None, 1]))
def test_items_are_those_that_msgspec_finds(value: list[Any], unit: int, indent: int | None) -> None:
    """The same of an array."""
    text = json.dumps(value, indent=indent).encode()
    with cut_small(unit):
        found = finish_slices(cut_items(text, 1000))
    assert list(map(bytes, found)) == list(map(bytes, msgspec.json.decode(text, type=list[msgspec.Raw])))


PLAIN = st.dictionaries(
    st.text("abé ", max_size=3), st.text("ab,:é") | st.lists(LEAVES) | st.lists(st.lists(LEAVES)) | LEAVES
)


@pytest.mark.slow
@given(st.lists(PLAIN | VALUES), st.integers(2, 70) | st.just(UNIT), st.sampled_from([None, 1]))
def test_plain_objects_are_cut_where_msgspec_cuts_them(value: list[Any], unit: int, indent: int | None) -> None:
    """Objects that one pattern finds, beside others and beside those that are longer than what it is given."""
    text = json.dumps(value, indent=indent, ensure_ascii=False).encode()
    with cut_small(unit):
        found = finish_slices(cut_items(text, 1000))
    assert list(map(bytes, found)) == list(map(bytes, msgspec.json.decode(text, type=list[msgspec.Raw])))


@given(st.text('[]{}",:\\1a ', max_size=60).map(str.encode), st.integers(2, 20))
@example(b"[[\\]", 2)  # a backslash that is in no string
def test_what_is_cut_stays_within_its_borders(text: bytes, unit: int) -> None:
    """Of text that is no JSON either nothing is cut, or pieces that cannot become JSON together with anything around:
    a request made of one is refused by its model, and never read as another.
    """
    with cut_small(unit):
        try:
            found = finish_slices(cut_items(text, 100))
        except NotJson:
            return
    for item in map(bytes, found):
        spliced = b'{"instances":[' + item + b'],"configuration":{}}'
        try:
            read = json.loads(spliced)
        except ValueError:
            continue
        assert read == {"instances": [json.loads(item)], "configuration": {}}


FILLINGS = [
    b"1.25,",
    b'{"a":[1,[2]],"b":"c"},',
    b'{"a":[' + b"1," * UNIT + b"1]},",
    b"[],",
    b'"",',
    b'{"a":[1,{"b":2}]},',
    b"[" * 400 + b"]" * 400 + b",",
    b'"\\"\\\\",',
    b" 1 ,",
]


@pytest.mark.slow
@pytest.mark.parametrize("filling", [*FILLINGS, b'"' + b"x" * 5 * UNIT + b'",', b'"' + b"\\n" * 5 * UNIT + b'",'])
def test_no_slice_works_longer_than_its_share(filling: bytes) -> None:
    """Whatever the text is full of, a slice reads at most what msgspec is given at once, and every byte is counted.

    Pieces double: only of a text four times as long would one be too large if nothing bounded it.
    """
    text = b'{"a":[' + filling * -(-4 * AT_ONCE // len(filling)) + b'1],"b":"c"}'
    fields, works = count_work(cut_fields(text))
    assert max(works) <= AT_ONCE
    assert sum(works) >= len(text) - 100
    assert max(count_work(cut_items(fields["a"], 10**6))[1]) <= AT_ONCE


def test_items_beyond_the_most_are_not_cut() -> None:
    """One more than allowed is cut, so that the caller sees it; the rest is not looked at."""
    text = b"[" + b"1," * AT_ONCE + b"1]"
    assert len(finish_slices(cut_items(text, 10))) == 11


@pytest.mark.parametrize("depth", [MAX_DEPTH - 1, MAX_DEPTH + 1])
def test_depth_is_bounded(depth: int) -> None:
    """The numbers of the message are the bound's."""
    inner = b"[" * depth + b"1" * UNIT + b"]" * depth
    text = b"[" + inner + b"]"
    with cut_small(UNIT):
        if depth < MAX_DEPTH:
            assert bytes(finish_slices(cut_items(text, 1))[0]) == inner
        else:
            with pytest.raises(NotJson, match=f"more than {MAX_DEPTH} nested brackets"):
                finish_slices(cut_items(text, 1))
