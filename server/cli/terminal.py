"""What the commands have in common: errors in one line, exit codes, dates. No torch."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, NoReturn

import typer

from model_store.errors import LoadError
from server.shell.errors import describe_error
from server.shell.escaping import escape_text

if TYPE_CHECKING:
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
        fail(describe_error(error))


def parse_moment(flag: str, text: str) -> datetime | None:
    """A flag's date, None where it was not given. Raises ValueError that names the flag."""
    if not text:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{flag}: expected a date such as 2024-01-01, not {text!r}") from None
