"""The one style of the commands `fleetcast` and `fleetcast-load`: `-h`, plain help, completion, and late imports.

A command's file is imported only when the command runs, or when its flags are asked for. So `--help`, `--version` and
the completion of a command's name import none of what the commands need.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

#: Of a program; its commands inherit them.
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


@dataclass(frozen=True, slots=True)
class CommandSource:
    """Where a command is defined, and its line in the list of commands.

    `definition` is the name of its function or its Typer in the module. Its help is its docstring, or the module's
    where `teaches_by_module`.
    """

    module: str
    definition: str
    about: str
    teaches_by_module: bool = False


def make_command_group(commands: Mapping[str, CommandSource], about: str = "", *, is_program: bool) -> typer.Typer:
    """Make a group of commands, each imported when it is used.

    `about` is its help, where its callback says none. A program has `--install-completion` and `--show-completion`.
    """
    group = typer.Typer(
        help=about or typer.models.Default(None),
        no_args_is_help=True,
        add_completion=is_program,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=CONTEXT if is_program else {},
    )
    for name, source in commands.items():
        kind = _make_lazy_command(source)
        group.command(name, cls=kind, short_help=source.about, hidden=not source.about)(_stand_in)
    return group


def load_command(name: str, source: CommandSource) -> TyperCommand | TyperGroup:
    """Import a command's file and return the command, which may be a group of further ones."""
    module = import_module(source.module)
    found = getattr(module, source.definition)
    if not isinstance(found, typer.Typer):
        alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        alone.command(name, cls=SectionedCommand)(found)
        found = alone
    command = typer.main.get_command(found)
    assert isinstance(command, TyperCommand | TyperGroup), "typer makes nothing else"
    if source.teaches_by_module:
        command.help = module.__doc__
    return command


class SectionedCommand(TyperCommand):
    """A command whose plain help lists its options in sections: those of a panel below the panel's name."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then each section's options."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                plain = "Arguments" if param.param_type_name == "argument" else "Options"
                sections.setdefault(getattr(param, "rich_help_panel", None) or plain, []).append(record)
        for name in sorted(sections, key=lambda name: (name != "Arguments", name == "Options")):
            with formatter.section(name):
                formatter.write_dl(sections[name])


def _make_lazy_command(source: CommandSource) -> type[TyperCommand]:
    class LazyCommand(TyperCommand):
        """A command whose file is imported when the command is used; until then its name and help line suffice."""

        def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
            """The context of the real command, which parses the arguments and then runs."""
            assert self.name is not None, "every command is added by name"
            return load_command(self.name, source).make_context(info_name, args, parent, **extra)

    return LazyCommand


def _stand_in() -> None:
    """The function that typer requires of a lazy command; it is never called."""
