"""Commands of many flags: the flags are the fields of a record, which the command passes on to its parts. No torch."""

from collections.abc import Callable
from dataclasses import MISSING, fields
from inspect import Parameter, Signature
from typing import Any, TypeVar

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
