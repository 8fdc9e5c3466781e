"""`fleetcast settings-table`: the README's generated tables: settings, metrics and so on. `make docs` runs it."""

from pathlib import Path
from typing import Annotated

import typer

from handlers.architectures import SUMMARIES
from server import metrics
from server.cli.setting_flags import render_settings
from server.cli.terminal import one_line_errors
from server.routes.doors import tabulate_doors


def settings_table(
    document: Annotated[Path | None, typer.Argument(help="write the tables between their marks in this file")] = None,
) -> None:
    """Print every setting as a Markdown table, or write all generated tables into a document."""
    if document is None:
        print(render_settings())  # noqa: T201
        return
    with one_line_errors():
        document.write_text(update_tables(document.read_text()))


def update_tables(document: str) -> str:
    """The document with its generated tables brought up to date. Raises ValueError without their marks."""
    tables = {
        "settings": render_settings(),
        "metrics": metrics.render_metrics_table(),
        "architectures": _tabulate_architectures(),
        "doors": tabulate_doors(),
    }
    for name, rows in tables.items():
        first, last = f"<!-- {name}: written by `make docs` -->", f"<!-- end of {name} -->"
        head, start, rest = document.partition(first)
        _, end, tail = rest.partition(last)
        if not (start and end):
            raise ValueError(f"the document needs the lines {first} and {last}")
        document = f"{head}{start}\n{rows}\n{end}{tail}"
    return document


def _tabulate_architectures() -> str:
    rows = ["| `--architecture` | what it is |", "|---|---|"]
    return "\n".join([*rows, *(f"| `{name}` | {summary} |" for name, summary in SUMMARIES.items())])
