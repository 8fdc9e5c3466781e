"""Model names: what the wire's rule accepts and what it refuses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_store.names import (
    MAX_NAME,
    InvalidModelName,
    ModelName,
    at_version,
    is_left_by_desktop,
    parse_model_name,
    parse_model_names,
    parse_versioned_name,
    split_version,
)


def keeps_the_rules(raw: str) -> bool:
    """The rule of CONTRACTS said a second time, as plainly as possible."""
    if not 1 <= len(raw) <= 1024 or "\\" in raw or any(not character.isprintable() for character in raw):
        return False
    return not {"", ".", ".."} & set(raw.split("/"))


@pytest.mark.slow
@given(st.one_of(st.text(), st.text(alphabet="a./\\\0 é\n", max_size=12), st.from_regex(r"([a-z0-9_.-]{1,9}/?){1,9}")))
def test_a_name_is_accepted_exactly_when_the_rules_hold(raw: str) -> None:
    """No text slips through, none is refused for nothing, and an accepted name is not changed."""
    if keeps_the_rules(raw):
        assert parse_model_name(raw) == raw
    else:
        with pytest.raises(InvalidModelName):
            parse_model_name(raw)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("", "empty"),
        ("a" * 1025, "1025 characters"),
        ("/etc/passwd", "leading or trailing slash"),
        ("au//NSW1.mar", "empty segment"),
        ("au/../secret.mar", "'..'"),
        ("./NSW1.mar", "'.'"),
        ("au\\NSW1.mar", "backslash"),
        ("NSW1.mar\0", "control"),
        ("x" * 500 + "\n", "..."),
    ],
)
def test_the_message_names_the_broken_rule(raw: str, said: str) -> None:
    """A client can see which rule its name breaks, and a long name does not flood the message."""
    with pytest.raises(InvalidModelName) as caught:
        parse_model_name(raw)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 200


def test_the_longest_name_is_accepted() -> None:
    """The limit itself still is a name."""
    assert len(parse_model_name("a" * 1024)) == 1024


@pytest.mark.parametrize(
    "path",
    ["._a.mar", "au/._a.mar", "._au/a.mar", ".DS_Store", "x/.DS_Store", "__MACOSX/x", "x/Thumbs.db", "Desktop.ini"],
)
def test_what_desktops_leave_is_known(path: str) -> None:
    """Files of Finder and Explorer, at any depth and however their case is written."""
    assert is_left_by_desktop(path)


@pytest.mark.parametrize(
    "path", ["a.mar", ".hidden", "_.a", "a._b", "my.DS_Store", "DS_Store", "MACOSX/x", "thumbs.db.mar"]
)
def test_files_of_users_are_not_taken_for_those(path: str) -> None:
    """Hidden files and names that are only alike are kept."""
    assert not is_left_by_desktop(path)


def test_a_name_with_a_version_is_nobodys_name() -> None:
    """It comes apart again, is parsed inside the server, and no client can send it."""
    name = parse_model_name("au/nsw1@v2.mar")
    key = at_version(name, "W/0eae77ba-12=")
    assert split_version(key) == (name, "W/0eae77ba-12=")
    assert split_version(name) == (name, "")
    assert parse_versioned_name(key) == key
    assert parse_versioned_name(name) == name
    with pytest.raises(InvalidModelName, match="backslash"):
        parse_model_name(key)


@pytest.mark.parametrize("raw", ["a.mar\\", "a.mar\\\n", "a.mar\\v\\w", "\\v", "a//b\\v", f"a.mar\\{'v' * 257}"])
def test_what_is_no_name_with_a_version(raw: str) -> None:
    """Either part breaks a rule."""
    with pytest.raises(InvalidModelName):
        parse_versioned_name(raw)


PARTS = st.sampled_from(["a", "m.mar", "/", "//", ".", "..", "\\", "\n", "\x00", "ü", " ", "x" * MAX_NAME])


@given(st.lists(st.one_of(st.none(), st.lists(PARTS, max_size=4).map("".join))))
def test_many_names_are_names_exactly_when_each_is_one(raws: list[str | None]) -> None:
    """One rule for one name and for many."""
    wanted: list[ModelName] | None = []
    try:
        wanted = [parse_model_name(raw or "") for raw in raws]
    except InvalidModelName:
        wanted = None
    assert parse_model_names(raws) == wanted


@pytest.mark.parametrize(
    "raw", ["/a", "a/", "a//b", "./a", "a/.", "a/../b", "..", "a\\b", "a\tb", "", "x" * (MAX_NAME + 1)]
)
def test_one_wrong_name_among_many_is_found(raw: str) -> None:
    """Wherever it stands; its neighbours do not hide it."""
    for raws in ([raw], [raw, "b"], ["b", raw], ["b", raw, "c"]):
        assert parse_model_names(raws) is None
    assert parse_model_names(["b", None]) is None
    assert parse_model_names(["...", ".a", "x" * MAX_NAME]) == ["...", ".a", "x" * MAX_NAME]
