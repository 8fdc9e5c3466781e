"""Registered names in a front: the longest one wins, and the supervisor's word replaces what was there."""

import pytest

from server.front.registrations import RegisteredPath, Registrations, find_version, key_of
from server.ipc.operations import RegisteredModel, ServedVersion

MODEL = RegisteredModel("1.0", {"1.0": ServedVersion("one.mar", 1, 5.0), "2": ServedVersion("two.mar", 1, 5.0)})


@pytest.mark.parametrize(
    ("path", "name", "rest"),
    [
        ("au/NSW1", "au/NSW1", ""),
        ("au/NSW1/2", "au/NSW1/2", ""),
        ("au/NSW1/3", "au/NSW1", "3"),
        ("au/NSW1/3/a/b", "au/NSW1", "3/a/b"),
        ("au/NSW1/", "au/NSW1", ""),
        ("au", "au", ""),
        ("au/QLD1", "au", "QLD1"),
    ],
)
def test_longest_registered_name_wins(path: str, name: str, rest: str) -> None:
    """Names have slashes, so that what follows is what no registered name has."""
    registrations = Registrations()
    registrations.follow({"au": MODEL, "au/NSW1": MODEL, "au/NSW1/2": MODEL}, whole=True)
    assert registrations.find_longest(path) == RegisteredPath(name, MODEL, rest)


def test_table_follows_the_supervisor() -> None:
    """Changes come one by one; a whole table replaces all."""
    registrations = Registrations()
    registrations.follow({"a": MODEL, "b": MODEL}, whole=False)
    registrations.follow({"a": None, "nosuch": None}, whole=False)
    assert registrations.find_longest("a") is None
    assert registrations.find_longest("") is None
    registrations.follow({"c": MODEL}, whole=True)
    assert set(registrations.models) == {"c"}


def test_version_is_the_default_where_none_is_named() -> None:
    """And none where the model does not have it."""
    found = [find_version(MODEL, version) for version in (None, "2", "9")]
    assert [each and key_of(each) for each in found] == ["one.mar", "two.mar", None]
