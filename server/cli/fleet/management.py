"""What the commands of this folder have in common: the address of the management listener, and its answers."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, urlencode

import typer

from server.cli.terminal import BAD, fail, one_line_errors
from server.contract import MANAGEMENT_PORT

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from server.sdk.http_connection import HttpConnection

DEFAULT_URL = f"http://127.0.0.1:{MANAGEMENT_PORT}"
TIMEOUT_S = 120.0  #: longer than any load that the server allows
PAGE = 1000  #: models of one answer
AT_ONCE = 8  #: models that a command asks for at the same time
PIPE_WIDTH = 240  #: most characters of a line where standard output is no terminal
SHOWN_VERSION = 13  #: characters of a version that people are shown

Url = Annotated[str, typer.Option(metavar="URL", help="management address of the server")]
Models = Annotated[
    list[str], typer.Argument(metavar="MODEL...", help="keys under the store, such as au/nsw1.mar", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs: one object for each model")]


@dataclass(frozen=True)
class Management:
    """The management listener of one server."""

    connection: "HttpConnection"

    def get(self, path: str, **query: str) -> Any:
        """What the listener says to GET. Raises FleetcastError."""
        asked = f"{path}?{urlencode(query)}" if query else path
        return self.connection.request("GET", asked).json()

    def post(self, verb: str, model: str, **query: str) -> dict[str, Any]:
        """What the listener says to `POST /fleet/VERB/MODEL`. Raises FleetcastError."""
        asked = f"/fleet/{verb}/{quote(model)}" + (f"?{urlencode(query)}" if query else "")
        answer: dict[str, Any] = self.connection.request("POST", asked).json()
        return answer

    def list_models(self, prefix: str = "") -> Iterator[dict[str, Any]]:
        """Every model that a worker holds, loads or could not load, by name. Raises FleetcastError."""
        after: str | None = ""
        while after is not None:
            page = self.get("/fleet/models", prefix=prefix, after=after, limit=str(PAGE))
            yield from page["models"]
            after = page["next_after"]


@contextmanager
def open_management(url: str) -> Iterator[Management]:
    """The listener at `url`, asked with the token of FLEETCAST_TOKEN. Errors end the command with one line."""
    from server.sdk.errors import FleetcastError, Unreachable  # noqa: PLC0415 -- urllib3
    from server.sdk.http_connection import HttpConnection  # noqa: PLC0415
    from server.sdk.signing import find_token  # noqa: PLC0415

    with one_line_errors():
        try:
            connection = HttpConnection(url, timeout_s=TIMEOUT_S, retries=2, connections=AT_ONCE, token=find_token())
            with connection:
                yield Management(connection)
        except Unreachable as error:
            fail(str(error))
        except FleetcastError as error:
            fail(str(error), BAD)


@dataclass(frozen=True)
class Outcome:
    """What became of one model: the server's answer, or why it refused."""

    model: str
    took_s: float
    answer: Mapping[str, Any]
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        found = {"error": self.error} if self.error else dict(self.answer)
        return {"model": self.model, **found, "took_ms": round(self.took_s * 1e3, 1)}


def ask_for_each(models: Sequence[str], ask: Callable[[str], Mapping[str, Any]]) -> Iterator[Outcome]:
    """Ask for the models, some at once, in their order. A refusal of one keeps none of the others from being asked.

    Raises Unreachable: there is no server to ask for the others.
    """
    from server.sdk.errors import FleetcastError, Unreachable  # noqa: PLC0415 -- urllib3

    def ask_for(model: str) -> Outcome:
        began = time.perf_counter()
        try:
            answer = ask(model)
        except Unreachable:
            raise
        except FleetcastError as error:
            return Outcome(model, time.perf_counter() - began, {}, str(error))
        return Outcome(model, time.perf_counter() - began, answer)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(ask_for, models)


def make_table(*columns: str, header: bool = True) -> "Table":
    """A table without lines; a column whose name begins with `>` is aligned to the right."""
    from rich.table import Table  # noqa: PLC0415 -- a twentieth of a second that `--json` saves

    table = Table(show_header=header, box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    return table


def print_wide(shown: "RenderableType") -> None:
    """Print it; where standard output is no terminal, lines are as long as they need to be, for `grep` and `awk`."""
    from rich.console import Console  # noqa: PLC0415

    console = Console()
    Console(width=None if console.is_terminal else PIPE_WIDTH).print(shown)


def shorten_version(version: object) -> str:
    """Return the first characters of a version: enough to compare by eye. JSON has all of it."""
    return str(version)[:SHOWN_VERSION]
