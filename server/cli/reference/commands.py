"""The page of a command line, made of its parser: each command with its help, arguments and flags. Pure."""

import inspect
import re
from collections.abc import Iterator
from typing import Any

import click
import typer

SETTINGS_COMMAND = "fleetcast serve"  #: whose flags are the settings, which have a page of their own
_MARKUP = re.compile(r"\[/?(?:bold|dim|italic)?\]")


def render_commands(program: str, app: typer.Typer) -> str:
    """A section for each command, in the order of `--help`."""
    group = typer.main.get_command(app)
    commands = list(_list_commands(group, [program]))
    rows = ["| command | what it does |", "|---|---|"]
    for path, command in commands:
        rows.append(f"| [`{path}`](#{_name_anchor(path)}) | {_escape(command.get_short_help_str(200))} |")
    sections = [_render_command(path, command) for path, command in commands]
    return "\n\n".join([f"`{program} COMMAND --help` prints the same of one command.", "\n".join(rows), *sections])


def _list_commands(command: Any, path: list[str]) -> Iterator[tuple[str, click.Command]]:
    """Every command that is shown, with the words by which it is called."""
    below = getattr(command, "commands", None)
    if below is None:
        yield " ".join(path), command
        return
    for name, each in below.items():
        if not each.hidden:
            yield from _list_commands(each, [*path, name])


def _render_command(path: str, command: click.Command) -> str:
    context = command.make_context(path, [], resilient_parsing=True)
    shown = context.command  # of a command that is imported when it runs, the real one
    parts = [f"## {path}", f"`{path} {' '.join(shown.collect_usage_pieces(context))}`".replace(" `", "`")]
    if shown.help:
        parts.append(_render_help(shown.help))
    if path == SETTINGS_COMMAND:
        parts.append("Its flags are [the settings](settings.md).")
    elif rows := list(_list_parameters(shown, context)):
        parts.append("\n".join(["| argument or flag | what it is |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def _list_parameters(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None and "--help" not in parameter.opts:
            yield f"| `{record[0]}` | {_escape(record[1])} |"


def _render_help(text: str) -> str:
    """The paragraphs of a help text; what is not to be wrapped, and lines of commands, are a block."""
    parts: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        lines = _MARKUP.sub("", paragraph.replace("\b", "")).strip("\n")
        if not lines:
            continue
        example = "\b" in paragraph or lines.startswith(("fleetcast", " "))
        parts.append(f"```text\n{lines}\n```" if example else _escape(lines))
    return "\n\n".join(parts)


def _escape(text: str) -> str:
    """The text with what Markdown would take for a table's border or a tag."""
    return _MARKUP.sub("", text).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _name_anchor(heading: str) -> str:
    return heading.replace(" ", "-")
