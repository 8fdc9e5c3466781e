"""`fleetcast settings-table`: the settings as the README's table. `make docs` runs it."""

from pathlib import Path
from typing import Annotated

import typer

from server.cli.setting_flags import table, with_table
from server.cli.terminal import one_line_errors


def settings_table(
    document: Annotated[Path | None, typer.Argument(help="write the table between its marks in this file")] = None,
) -> None:
    """Every setting as a Markdown table, printed or written into a document."""
    if document is None:
        print(table())  # noqa: T201
        return
    with one_line_errors():
        document.write_text(with_table(document.read_text()))
