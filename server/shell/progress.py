"""Tells on standard error how far long work is: a bar on a terminal, else lines with an estimate, few of them.

It is the one owner of progress of both commands.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from server.shell.escaping import escape_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

LINE_S = 10.0  #: least seconds between two lines of a task where there is no bar
T = TypeVar("T")


class Task:
    """One piece of long work. Its methods may be called in any thread."""

    def __init__(self, show: Callable[[float, float | None, str], None], end: Callable[[], None]) -> None:
        self._show, self._end, self._lock = show, end, Lock()
        self._done = 0.0
        self._total: float | None = None

    def __repr__(self) -> str:
        """For example `<Task: 3 of 10>`."""
        return f"<Task: {self._done:g} of {self._total}>"

    def advance(self, newly: float = 1) -> None:
        """So much more is done."""
        with self._lock:
            self._done += newly
            self._show(self._done, self._total, "")

    def update(self, done: float, total: float | None = None, note: str = "") -> None:
        """So much is done of `total`, which stays as it was where it is None; `note` says more in words."""
        with self._lock:
            self._done, self._total = done, self._total if total is None else total
            self._show(self._done, self._total, note)

    def end(self) -> None:
        """Take its bar away."""
        self._end()


class TaskList:
    """The tasks of one command, each with a bar or with lines of its own."""

    def __init__(self, bars: "Progress | None") -> None:
        self._bars = bars  #: none: lines

    def __repr__(self) -> str:
        return f"<TaskList: {'lines' if self._bars is None else 'bars'}>"

    def start_task(self, what: str, total: float | None = None, done: float = 0) -> Task:
        """Begin a task of which `done` was done before, such as by an earlier run."""
        task = Task(ProgressLines(what), lambda: None) if self._bars is None else _add_bar(self._bars, what)
        task.update(done, total)
        return task

    def track(self, items: Iterable[T], what: str, total: int) -> Iterator[T]:
        """The items, each of which is done when the next is asked for."""
        task = self.start_task(what, total)
        for item in items:
            yield item
            task.advance()
        task.end()


@contextmanager
def follow_tasks(console: "Console | None" = None) -> Iterator[TaskList]:
    """Show the tasks that are started meanwhile; their bars are removed at the end. `console`: where bars are drawn."""
    if not sys.stderr.isatty():
        yield TaskList(None)
        return
    with _make_bars(console) as bars:
        yield TaskList(bars)


@contextmanager
def show_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """The progress of one task. The yielded function takes how many are newly done, and how many there are in all.

    It may be called in any thread.
    """
    done, lock = 0, Lock()
    with watch_progress(what) as update:

        def told(newly: int, total: int) -> None:
            nonlocal done
            with lock:
                done += newly
                update(done, total, "")

        yield told


@contextmanager
def watch_progress(what: str) -> Iterator[Callable[[float, int, str], None]]:
    """The progress of one task. The yielded function takes how many are done, how many in all, and more in words."""
    with follow_tasks() as tasks:
        yield tasks.start_task(what).update


class ProgressLines:
    """Says in lines on standard error how far a task is: at most one each LINE_S seconds, with an estimate."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._clock = what, clock
        self._began = self._said = clock()
        self._before: float | None = None  #: what was done when the task began here, such as by an earlier run

    def __repr__(self) -> str:
        return f"<ProgressLines of {self._what}>"

    def __call__(self, done: float, total: float | None, note: str) -> None:
        """Say it if it is time: how many are done, how many there are in all, and more in words."""
        now = self._clock()
        if self._before is None:
            self._before = done
        if now - self._said < LINE_S:
            return
        self._said = now
        newly = done - self._before
        more = f", {note}" if note else ""
        if total is None:
            said = f"{done:.0f} done"
        else:
            left = f", about {_format_span((total - done) * (now - self._began) / newly)} left" if newly > 0 else ""
            said = f"{done:.0f} of {total:.0f}{left}"
        print(escape_text(f"{self._what}: {said}{more}"), file=sys.stderr, flush=True)  # noqa: T201


def _make_bars(console: "Console | None") -> "Progress":
    from rich.console import Console  # noqa: PLC0415 -- a twentieth of a second that most commands save
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.fields[most]} {task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console or Console(stderr=True), transient=True)


def _add_bar(bars: "Progress", what: str) -> Task:
    bar: TaskID = bars.add_task(escape_text(what), total=None, note="", most="?")

    def show(done: float, total: float | None, note: str) -> None:
        most = "?" if total is None else f"{total:.0f}"
        bars.update(bar, completed=done, total=total, note=escape_text(note), most=most)

    return Task(show, lambda: bars.remove_task(bar))


def _format_span(seconds: float) -> str:
    """Format a duration by its largest unit: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:  # noqa: PLR2004 -- more is read as minutes
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
