"""What is wrong with a document is said in our words: no text of msgspec or orjson gets through."""

from typing import Annotated, Any, Literal

import msgspec
import orjson
import pytest

from model_store.archives.json_faults import FAULTS, explain_fault


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    """Every kind of check."""

    count: Annotated[int, msgspec.Meta(ge=1, le=9)] = 1
    name: Annotated[str, msgspec.Meta(max_length=3, pattern="^a")] = "a"
    kind: Literal["x", "y"] = "x"
    number: float | None = None
    pair: tuple[int, int] = (1, 2)

    def __post_init__(self) -> None:
        """A check of our own."""
        if self.count == 7:
            raise ValueError("seven is not served")


class Outer(msgspec.Struct):
    """A record with a list."""

    items: Annotated[list[Inner], msgspec.Meta(min_length=1)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "it ends before its JSON does"),
        (b'{"items":[}', "it is not JSON at byte 10"),
        (b'{"items":[]} x', "items: expected a list of at least 1 values"),
        (b'{"items":[{}]} x', "it is not JSON at byte 16"),
        (b'{"items":[{"name":"\xff"}]}', "it is not UTF-8"),
        (b"[]", "expected an object, not a list"),
        (b"{}", "items: it is missing"),
        (b'{"items":[{"count":0}]}', "items[0].count: expected a whole number of at least 1"),
        (b'{"items":[{"count":10}]}', "items[0].count: expected a whole number of at most 9"),
        (b'{"items":[{"count":1.5}]}', "items[0].count: expected a whole number, not a fraction"),
        (b'{"items":[{"count":7}]}', "items[0]: seven is not served"),
        (b'{"items":[{"name":"aaaa"}]}', "items[0].name: expected text of at most 3 characters"),
        (b'{"items":[{"name":"b"}]}', "items[0].name: expected text of the form '^a'"),
        (b'{"items":[{"kind":"z"}]}', "items[0].kind: 'z' is not one of the values it may have"),
        (b'{"items":[{"number":"z"}]}', "items[0].number: expected a number or null, not text"),
        (b'{"items":[{"number":1e999}]}', "items[0].number: the number is out of range"),
        (b'{"items":[{"pair":[1]}]}', "items[0].pair: expected a list of 2"),
        (b'{"items":[{"colour":1}]}', "items[0].colour: there is no such key"),
    ],
)
def test_faults_have_a_place_and_words(text: bytes, said: str) -> None:
    """Each kind of fault."""
    with pytest.raises(FAULTS) as caught:
        msgspec.json.decode(text, type=Outer)
    assert str(explain_fault(caught.value)) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [(b"", "it is empty, not JSON"), (b"[1 2]", "it is not JSON at character 3"), (b'"\xff"', "it is not UTF-8")],
)
def test_faults_of_the_other_parser(text: bytes, said: str) -> None:
    """It is asked where a body looks unusual."""
    with pytest.raises(FAULTS) as caught:
        orjson.loads(text)
    assert str(explain_fault(caught.value)) == said


def test_what_is_too_deep_and_no_text() -> None:
    """Other exceptions of parsers."""
    assert str(explain_fault(RecursionError("maximum recursion"))) == "it is nested too deeply"
    with pytest.raises(UnicodeDecodeError) as caught:
        b"a\xff".decode()
    assert str(explain_fault(caught.value)) == "it is not UTF-8 at byte 1"
    deep: Any = b"[" * 100_000
    with pytest.raises(FAULTS) as caught_deep:
        msgspec.json.decode(deep)
    assert "recursion" not in str(explain_fault(caught_deep.value))
