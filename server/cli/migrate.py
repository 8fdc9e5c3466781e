"""`fleetcast migrate` turns another server's configuration into ours. It imports no torch."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from server.cli.terminal import fail, one_line_errors
from server.offline.migration.configuration import read_configuration
from server.offline.migration.model_servers import SERVERS, ServerName
from server.offline.migration.outcome import Fate
from server.offline.migration.properties import MAX_BYTES, PropertiesInvalid
from server.offline.migration.rendering import render_command, render_report, render_toml
from server.offline.migration.translation import Translation, translate
from server.shell.escaping import escape_text


def migrate(
    properties: Annotated[Path, typer.Argument(metavar="CONFIG.PROPERTIES", help="the old server's configuration")],
    *,
    of: Annotated[
        ServerName | None, typer.Option("--from", help="whose it is; default: the one that reads more of its keys")
    ] = None,
    store: Annotated[str, typer.Option(help="location of the archives, instead of model_store")] = "",
    flags: Annotated[
        bool, typer.Option("--flags", help="print a command line; what became of each key goes to standard error")
    ] = False,
) -> None:
    """Print the settings that equal a config.properties of TorchServe or Multi Model Server, key by key.

    \b
    fleetcast migrate config.properties > fleetcast.toml
    fleetcast migrate config.properties --store s3://models/prices --flags

    Every key is in the output: what it became, or why it has no counterpart, or what is left to do by hand. Variables
    such as TS_INFERENCE_ADDRESS count where the file says enable_envvars_config=true, as they do for the old server.
    """  # noqa: D301 -- click's mark for "do not wrap"
    with one_line_errors():
        raw = _read(properties)
        try:
            config = read_configuration(raw, os.environ, SERVERS[of] if of else None)
        except PropertiesInvalid as error:
            fail(f"{properties}: {error}")
    translation = translate(config, store)
    if flags:
        sys.stderr.write(render_report(translation))
        sys.stdout.write(render_command(translation))
    else:
        title = (
            f"Made by `fleetcast migrate` from {properties.name} of {config.server}; `fleetcast serve` reads this file"
        )
        sys.stdout.write(render_toml(translation, f"{title} in the folder in which it is started."))
    _say_what_is_left(translation, str(config.server))


def _read(path: Path) -> bytes:
    """The file, or as much of it as shows that it is too large."""
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _say_what_is_left(translation: Translation, server: str) -> None:
    counts = {fate: len(translation.of(fate)) for fate in Fate}
    words = ", ".join(f"{count} {fate}" for fate, count in counts.items() if count)
    print(escape_text(f"{server}: {words}"), file=sys.stderr)  # noqa: T201
