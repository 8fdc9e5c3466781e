"""Which names are like one that is not there, and what looking for them may cost."""

from collections.abc import Iterator

import pytest

from server.front.near_names import LONGEST, MOST_LOOKED_AT, find_near_names

KNOWN = ["au/NSW1.mar", "au/VIC1.mar", "eu/de.tar.gz", "load/total"]


@pytest.mark.parametrize(
    ("wanted", "near"),
    [
        ("au/nsw1.mar", ["au/NSW1.mar"]),
        ("au/NSW1", ["au/NSW1.mar"]),
        ("NSW1.tar.gz", ["au/NSW1.mar"]),
        ("eu/DE", ["eu/de.tar.gz"]),
        ("au/NWS1.mar", ["au/NSW1.mar"]),
        ("laod/total", ["load/total"]),
        ("something/else", []),
        ("", []),
    ],
)
def test_names_that_were_meant(wanted: str, near: list[str]) -> None:
    """Another case, ending or folder, and letters that were swapped."""
    assert find_near_names(wanted, KNOWN) == near


def test_the_look_is_bounded() -> None:
    """So many names are looked at, and a long name is compared with none."""
    looked = 0

    def name_all() -> Iterator[str]:
        nonlocal looked
        while True:
            looked += 1
            yield "b" * 10

    assert find_near_names("x", name_all()) == []
    assert looked == MOST_LOOKED_AT
    assert find_near_names("b" * (LONGEST + 1), name_all()) == []
    assert len(find_near_names("b" * 10, name_all())) == 3
