"""What the commands have in common: errors in one line, exit codes, progress bars, dates. No torch."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, NoReturn

import typer

from model_store.errors import LoadError
from server.logs import escape_text

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn
    from rich.text import Text

BAD = 1  #: exit code: the result is negative, or a part failed
WRONG = 2  #: exit code: the command could not be run as given


def fail(message: str, code: int = WRONG) -> NoReturn:
    """Print what was wrong, and exit."""
    print(f"error: {escape_text(message)}", file=sys.stderr)  # noqa: T201 -- the answer
    raise typer.Exit(code)


def verbatim(text: str, style: str = "") -> "Text":
    """A cell of a table that shows the text itself: no markup, no links, nothing that a terminal acts on."""
    from rich.text import Text  # noqa: PLC0415 -- a twentieth of a second that most commands save

    return Text(escape_text(text), style)


@contextmanager
def one_line_errors(*more: type[Exception]) -> Iterator[None]:
    """Print errors that a user can fix, also `more`, in one line; other errors are bugs and keep their traceback."""
    known: tuple[type[Exception], ...] = (LoadError, ValueError, OSError, ModuleNotFoundError, *more)
    try:
        yield
    except known as error:
        fail(str(error))


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
    """A bar of one task. The yielded function takes how many are newly done, and how many there are in all."""
    with make_progress_bar() as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, advance=done, total=total)


def parse_moment(flag: str, text: str) -> datetime | None:
    """A flag's date, None where it was not given. Raises ValueError that names the flag."""
    if not text:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{flag}: expected a date such as 2024-01-01, not {text!r}") from None
