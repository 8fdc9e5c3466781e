"""Commands of many flags: the flags are the fields of a record, which the command passes on to its parts. No torch."""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from inspect import Parameter, Signature
from typing import Any, TypeVar, get_args

from typer.models import ArgumentInfo, OptionInfo

T = TypeVar("T")


def with_flags(kind: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """A command whose flags are the fields of the dataclass `kind`, and which is called with one of these.

    A field without a default is a flag, or an argument, that must be given.
    """

    def decorate(command: Callable[[T], None]) -> Callable[..., None]:
        def call(**given: Any) -> None:
            command(kind(**given))

        described = fields(kind)  # type: ignore[arg-type]  # a dataclass, which no type says
        parameters = [
            Parameter(
                field.name,
                Parameter.KEYWORD_ONLY,
                default=Parameter.empty if field.default is MISSING else field.default,
                annotation=field.type,
            )
            for field in described
        ]
        call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {field.name: field.type for field in described}
        call.__name__, call.__doc__ = command.__name__, command.__doc__
        return call

    return decorate


def write_command(name: str, flags: Any) -> str:
    """Write the command that gave these flags, for a shell; what has its default is left out.

    `flags` is a record of `with_flags`; arguments come first.
    """
    arguments: list[str] = []
    options: list[str] = []
    for field in fields(flags):
        value = getattr(flags, field.name)
        if value == field.default:
            continue
        if any(isinstance(each, ArgumentInfo) for each in get_args(field.type)):
            arguments += [str(each) for each in (value if isinstance(value, list | tuple) else [value])]
        else:
            options += _write_option(field, value)
    return shlex.join(["fleetcast", name, *arguments, *options])


def _write_option(field: "Field[Any]", value: Any) -> Iterator[str]:
    info = next(each for each in get_args(field.type) if isinstance(each, OptionInfo))
    names = (info.default, *(info.param_decls or ()))  # typer has the first name of an annotation as the default
    own = f"--{field.name.replace('_', '-')}"
    flag = next((each for each in names if isinstance(each, str) and each.startswith("--")), own)
    on, _, off = flag.partition("/")
    if isinstance(value, bool):
        yield on if value else off
        return
    for each in value if isinstance(value, list | tuple) else [value]:
        yield from (on, str(each))
