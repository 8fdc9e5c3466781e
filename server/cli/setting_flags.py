"""Turns the settings into command-line flags, error messages and a table. `server.settings` owns names and texts.

The settings, and pydantic with them, are imported when a function needs them: most commands read settings only when
they run, and their help has none.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from tomllib import TOMLDecodeError
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from server.cli.variables import ADVICE, PREFIX, explain_unknown_variables, is_service_link, suggest_name

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from server.settings import Settings

_SECRET = "access_keys"  # noqa: S105 -- the field's name: its value is never shown
_METAVARS: Mapping[str, str] = {"int": "INTEGER", "float": "SECONDS", "ByteSize": "SIZE", "Path": "PATH"}


def with_setting_flags(command: Callable[..., None]) -> Callable[..., None]:
    """The command with one option per setting; typer calls it with their texts, None where a flag was not given."""
    from server.settings import Settings  # noqa: PLC0415 -- see above

    parameters = [_make_parameter(name, field) for name, field in Settings.model_fields.items()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def settings_from(flags: Mapping[str, Any]) -> "Settings":
    """The settings: flags, then variables, file and defaults. Raises ValueError of one line that names every flag.

    A variable with our prefix that is no setting is an error, as a flag or a key of the file is.
    """
    from pydantic import ValidationError  # noqa: PLC0415 -- see above
    from pydantic_settings import SettingsError  # noqa: PLC0415

    from server.settings import TOML_FILE, Settings  # noqa: PLC0415

    if unknown := list(explain_unknown_variables(os.environ, Settings.model_fields)):
        raise ValueError("; ".join(unknown))
    given = {name: _parse_value(name, Settings.model_fields[name], value) for name, value in flags.items() if value}
    try:
        return Settings(**given)
    except TOMLDecodeError as error:
        raise ValueError(f"{TOML_FILE}: {error}") from error
    except SettingsError as error:
        raise ValueError(f"{error}; in a variable a list is JSON, such as '[\"au/nsw1.mar\"]'") from error
    except ValidationError as error:
        raise ValueError("; ".join(_explain_problem(problem) for problem in error.errors())) from error


def render_settings() -> str:
    """Every setting as a row of Markdown."""
    from server.settings import Settings  # noqa: PLC0415 -- see above

    rows = ["| flag | default | what it is |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        rows.append(f"| `{name_flag(name)}` | {_format_default(field)} | {field.description} |")
    return "\n".join(rows)


def name_flag(name: str) -> str:
    """For example `--inference-port` of `inference_port`."""
    return "--" + name.replace("_", "-")


def _make_parameter(name: str, field: "FieldInfo") -> inspect.Parameter:
    """All are texts here: pydantic alone says what is valid, for flags, variables and file alike."""
    many = get_origin(field.annotation) in (list, dict)
    note = " (repeatable)" if many else f" [{_format_default(field)}]"
    option = typer.Option(
        name_flag(name), help=f"{field.description}{note}", metavar=_choose_metavar(field), show_default=False
    )
    kind: Any = list[str] | None if many else str | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _choose_metavar(field: "FieldInfo") -> str:
    if get_origin(field.annotation) is Literal:
        return "|".join(map(str, get_args(field.annotation)))
    if get_origin(field.annotation) is dict:
        return "KEY=SECRET"
    kinds = (getattr(kind, "__name__", "") for kind in (field.annotation, *get_args(field.annotation)))
    return next((_METAVARS[kind] for kind in kinds if kind in _METAVARS), "TEXT")


def _format_default(field: "FieldInfo") -> str:
    from pydantic import ByteSize  # noqa: PLC0415 -- see above

    from server.settings import format_bytes  # noqa: PLC0415

    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, ByteSize):
        return format_bytes(value)
    return "none" if value in (None, [], {}) else str(value)


def _parse_value(name: str, field: "FieldInfo", given: str | list[str]) -> Any:
    """A flag's text as pydantic takes it."""
    if get_origin(field.annotation) is dict:
        if not all(pair.partition("=")[2] for pair in given):
            raise ValueError(f"{name_flag(name)} takes KEY=SECRET")
        return {key: secret for key, _, secret in (pair.partition("=") for pair in given)}
    if get_origin(field.annotation) is Literal:  # of which pydantic takes no texts for numbers
        return next((choice for choice in get_args(field.annotation) if str(choice) == given), given)
    return given


def _explain_problem(problem: Any) -> str:
    """One of pydantic's findings, with every place where the setting may have come from."""
    from server.settings import TOML_FILE, Settings  # noqa: PLC0415 -- see above

    name = str(problem["loc"][0])
    if name not in Settings.model_fields:
        return f"{TOML_FILE}: there is no setting {name!r}{suggest_name(name, Settings.model_fields)}"
    where = f"{name_flag(name)} (or FLEETCAST_{name.upper()}, or {name} in {TOML_FILE})"
    if problem["type"] == "missing":
        return f"{where} is required: {Settings.model_fields[name].description}"
    shown = "" if name == _SECRET else f", not {problem['input']!r}"
    variable = f"{PREFIX}{name.upper()}"
    link = f"; {ADVICE}" if is_service_link(variable, os.environ.get(variable, "")) else ""
    return f"{where}: {problem['msg']}{shown}{link}"
