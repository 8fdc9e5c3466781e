"""Progress where standard error is no terminal: lines, not many, with an estimate."""

import io

import pytest
from rich.console import Console

from server.shell import progress
from server.shell.progress import ProgressLines, follow_tasks


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


def test_work_of_unknown_length_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a total there is no estimate; the text of others cannot act on the terminal."""
    now = [0.0]
    lines = ProgressLines("fetching \x1b[2J", lambda: now[0])
    for second in (0, 10):
        now[0] = second
        lines(second, None, "")
    assert capsys.readouterr().err == "fetching \\x1b[2J: 10 done\n"


def test_tasks_say_their_own_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Advanced, updated or tracked, a task says how far it is; short work says nothing."""
    with follow_tasks() as tasks:
        tasks.start_task("quick", 3).advance(3)
        monkeypatch.setattr(progress, "LINE_S", 0.0)
        tasks.start_task("writing", 10, done=4).advance(2)
        tasks.start_task("fitting").update(1, 8, "tcn")
        assert list(tasks.track("ab", "asking", 2)) == ["a", "b"]
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(", about")[0] for line in said if not line.endswith(" 0 done")] == [
        "writing: 4 of 10",
        "writing: 6 of 10",
        "fitting: 1 of 8",
        "asking: 0 of 2",
        "asking: 1 of 2",
        "asking: 2 of 2",
    ]


def test_tasks_are_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar for each, with its count; none is left behind."""
    shown = io.StringIO()
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    console = Console(file=shown, force_terminal=True, width=100)
    with follow_tasks(console) as tasks:
        task = tasks.start_task("fitting [bold]", 8)
        task.update(3, note="tcn")
        console.print("a line")  # which draws the bar anew
    assert "fitting [bold]" in shown.getvalue()
    assert "3/8 tcn" in shown.getvalue()
