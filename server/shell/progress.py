"""Tells on standard error how far long work is: a bar on a terminal, else lines with an estimate, few of them."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING

from server.shell.escaping import escape_text

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

LINE_S = 10.0  #: least seconds between two lines of progress where there is no bar


def make_progress_bar(amount: "ProgressColumn | None" = None) -> "Progress":
    """A progress bar on standard error, removed when it is done. `amount`: the column that shows the progress."""
    from rich.console import Console  # noqa: PLC0415 -- a twentieth of a second that most commands save
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), amount or MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


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
    """A bar on standard error, or lines with an estimate where that is no terminal.

    The yielded function takes how many are done, how many there are in all, and more in words.
    """
    if not sys.stderr.isatty():
        yield ProgressLines(what)
        return
    from rich.progress import TextColumn  # noqa: PLC0415 -- a twentieth of a second that most commands save

    with make_progress_bar(TextColumn("{task.completed:.0f}/{task.total} {task.fields[note]}")) as shown:
        task = shown.add_task(what, total=None, note="")
        yield lambda done, total, note: shown.update(task, completed=done, total=total, note=note)


class ProgressLines:
    """Says in lines on standard error how far a task is: at most one each LINE_S seconds, with an estimate."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._clock = what, clock
        self._began = self._said = clock()
        self._before: float | None = None  #: what was done when the task began here, such as by an earlier run

    def __repr__(self) -> str:
        return f"<ProgressLines of {self._what}>"

    def __call__(self, done: float, total: int, note: str) -> None:
        """Say it if it is time: how many are done, how many there are in all, and more in words."""
        now = self._clock()
        if self._before is None:
            self._before = done
        if now - self._said < LINE_S:
            return
        self._said = now
        newly = done - self._before
        left = f", about {_format_span((total - done) * (now - self._began) / newly)} left" if newly > 0 else ""
        more = f", {note}" if note else ""
        print(escape_text(f"{self._what}: {done:.0f} of {total}{left}{more}"), file=sys.stderr, flush=True)  # noqa: T201


def _format_span(seconds: float) -> str:
    """Format a duration by its largest unit: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 100:  # noqa: PLR2004 -- more is read as minutes
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
