"""Progress where standard error is no terminal: lines, not many, with an estimate."""

import pytest

from server.shell.progress import ProgressLines


def test_lines_are_few_and_estimate_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    """One each ten seconds at most; what an earlier run has done does not make this one look quicker."""
    now = [0.0]
    lines = ProgressLines("fitting", lambda: now[0])
    for second in range(0, 61, 3):
        now[0] = second
        lines(100 + second, 460, "lear")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "fitting: 112 of 460, about 6 min left, lear"
    assert said[-1] == "fitting: 160 of 460, about 5 min left, lear"
    assert len(said) == 5


@pytest.mark.parametrize(("total", "left"), [(70, "50 s"), (1220, "20 min"), (7220, "2.0 h")])
def test_an_estimate_is_in_a_unit_that_is_read_at_a_glance(
    total: int, left: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seconds, minutes or hours; and none where nothing is done yet."""
    now = [0.0]
    lines = ProgressLines("scoring", lambda: now[0])
    for second, done in ((0, 0), (10, 0), (20, 20)):
        now[0] = second
        lines(done, total, "")
    assert capsys.readouterr().err.splitlines() == [
        f"scoring: 0 of {total}",
        f"scoring: 20 of {total}, about {left} left",
    ]
