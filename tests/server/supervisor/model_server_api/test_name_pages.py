"""Pages of names: tokens lead on, and a pattern is text with wildcards."""

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.supervisor.model_server_api.name_pages import MAX_PATTERN, NamePattern, make_token, read_token
from server.supervisor.registrations.refusals import BadOption

TEXTS = st.text(alphabet="ab*", max_size=12)


@given(TEXTS, st.text(alphabet="ab", max_size=12))
def test_a_star_stands_for_anything(pattern: str, name: str) -> None:
    """As `fnmatch` has it; `.*` is the same."""
    expected = fnmatch.fnmatchcase(name, pattern)
    assert NamePattern(pattern).fits(name) == expected
    assert NamePattern(f"^{pattern.replace('*', '.*')}$").fits(name) == expected


def test_a_pattern_is_bounded_and_no_regular_expression() -> None:
    """One that takes a regular expression's time for ever takes none here."""
    assert not NamePattern("(a+)+b").fits("a" * 1000)
    assert NamePattern("(a+)+b").fits("(a+)+b")
    assert not NamePattern("*a" * 99 + "b").fits("a" * 1024)
    with pytest.raises(BadOption, match="more than 200"):
        NamePattern("a" * (MAX_PATTERN + 1))


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_tokens_need_no_escape_and_come_back(name: str) -> None:
    """A client puts them into a query as they are."""
    token = make_token(name)
    assert all(each.isalnum() or each in "-_" for each in token)
    assert read_token(token) == name


@pytest.mark.parametrize("token", ["1", "é", "____", "a b"])
def test_other_tokens_are_refused(token: str) -> None:
    """They are said to be none of ours."""
    with pytest.raises(BadOption, match="next_page_token"):
        read_token(token)
