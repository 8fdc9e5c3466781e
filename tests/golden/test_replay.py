"""The comparison that golden tests rely on finds what differs, and tables cannot go stale."""

import pytest

from tests.golden.replay import (
    ABSENT,
    Answered,
    Entry,
    Table,
    check_differences,
    find_differences,
    find_stale,
)

SAME = Answered(200, "OK", {"a": "1"}, '{"x": [1, 2], "y": {"z": "t"}}')


@pytest.mark.parametrize(
    ("ours", "place", "pair"),
    [
        (Answered(201, "OK", {"a": "1"}, SAME.body), "status", ("200", "201")),
        (Answered(200, "", {"a": "1"}, SAME.body), "reason", ("OK", "")),
        (Answered(200, "OK", {"a": "2"}, SAME.body), "header/a", ("1", "2")),
        (Answered(200, "OK", {}, SAME.body), "header/a", ("1", ABSENT)),
        (Answered(200, "OK", {"a": "1"}, "text"), "body", (SAME.body, "text")),
        (Answered(200, "OK", {"a": "1"}, '{"x": [1, 3], "y": {"z": "t"}}'), "body/x/1", ("2", "3")),
        (Answered(200, "OK", {"a": "1"}, '{"x": [1], "y": {"z": "t"}}'), "body/x/1", ("2", ABSENT)),
        (Answered(200, "OK", {"a": "1"}, '{"x": [1, 2.0], "y": {"z": "t"}}'), "body/x/1", ("2", "2.0")),
        (Answered(200, "OK", {"a": "1"}, '{"x": [1, 2], "y": {}}'), "body/y/z", ("t", ABSENT)),
        (
            Answered(200, "OK", {"a": "1"}, '{"y": {"z": "t"}, "x": [1, 2]}'),
            "body/(order)",
            ("['x', 'y']", "['y', 'x']"),
        ),
        (
            Answered(200, "OK", {"a": "1"}, '{\n  "x": [\n    1,\n    2\n  ],\n  "y": {\n    "z": "t"\n  }\n}\n'),
            "layout",
            ("False", "True"),
        ),
    ],
)
def test_each_difference_has_a_place(ours: Answered, place: str, pair: tuple[str, str]) -> None:
    """Status, reason, headers, values and their types, order and layout."""
    assert find_differences(SAME, ours) == {place: pair}
    assert find_differences(SAME, SAME) == {}


def test_difference_that_no_entry_names_fails() -> None:
    """An entry counts for its exchanges, its places, and what this server answers there."""
    differs = [Entry(["body/message"], "better", [3], ours="no*"), Entry(["header/*"], "ours")]
    table = Table([Entry(["body/*/pid"], "nature")], differs)
    found = {"body/message": ("", "no such"), "header/date": ("", "now"), "body/0/pid": ("1", "2")}
    assert list(check_differences(table, 3, found)) == []
    (other,) = check_differences(table, 4, found)
    assert other.startswith("exchange 4: body/message")
    (wrong,) = check_differences(table, 3, {"body/message": ("", "yes")})
    assert "'yes'" in wrong


def test_entry_that_names_nothing_fails() -> None:
    """What differs no more is taken out of the table."""
    table = Table([], [Entry(["status", "reason"], "better", [1, 2])])
    assert list(find_stale(table, [(1, "status"), (2, "reason")])) == []
    assert len(list(find_stale(table, [(1, "status")]))) == 2
