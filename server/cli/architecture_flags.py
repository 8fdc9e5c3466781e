"""Reads `--architecture`, which names one architecture or the parts of a mixture, with its `--config`. No torch."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from handlers.architectures import SUMMARIES

DECIDED = ("features", "context_length", "prediction_length", "quantiles", "members")
MIXTURE, LINEAR = "mixture", "linear"
MOST_MEMBERS = 64

Stack = Annotated[
    bool,
    typer.Option(
        "--stack",
        help="with several architectures: learn their weights from what the fit holds out; else all are equal",
    ),
]


def parse_architecture(text: str, config: str, members: int = 1, *, stack: bool = False) -> tuple[str, dict[str, Any]]:
    """Parse `lear`, `lear:3` (an ensemble) or `lear,lear:3,tcn` (a mixture) into an architecture and its config.

    `ddnn:2@linear` is a part of a mixture that works with prices where the others have their inverse hyperbolic sines.
    Of a mixture, `config` has an object for each name that differs from the defaults. Raises ValueError.
    """
    options = _parse_object(config)
    parts = [_parse_part(each) for each in text.split(",")] if text else []
    if len(parts) < 2:  # noqa: PLR2004 -- one architecture or the default
        if stack:
            raise ValueError("--stack: name several architectures, such as --architecture lear,lear:3,tcn")
        ((name, count, scaling),) = parts or [("", 1, "")]
        if scaling:
            raise ValueError(f"--architecture {text}: @{LINEAR} is for parts of a mixture; write --scaling {LINEAR}")
        if count > 1 and members > 1:
            raise ValueError(f"--architecture {text}: it has {count} members already; leave --members {members} out")
        return name, _check_fields(options, config) | ({"members": most} if (most := max(count, members)) > 1 else {})
    if members > 1:
        raise ValueError(f"--members {members}: of several architectures, write how many each has, such as lear:3")
    return MIXTURE, {"parts": list(_make_parts(parts, options, config)), "stack": stack}


def _make_parts(parts: Sequence[tuple[str, int, str]], options: Mapping[str, Any], config: str) -> list[dict[str, Any]]:
    names = [name for name, _, _ in parts]
    if unknown := [each for each in options if each not in names]:
        what = f"expected an object by architecture, such as '{{\"{names[0]}\": {{...}}}}'; {unknown[0]!r} is none"
        raise ValueError(f"--config: {what} of {', '.join(names)}")
    found = []
    for name, count, scaling in parts:
        own = _check_fields(options.get(name, {}), config)
        own |= {"scaling": scaling} if scaling else {}
        found.append({"architecture": name, **own, **({"members": count} if count > 1 else {})})
    return found


def _parse_part(text: str) -> tuple[str, int, str]:
    named, at, scaling = text.strip().partition("@")
    if at and scaling != LINEAR:
        raise ValueError(f"--architecture {text}: expected @{LINEAR} or nothing after it, not @{scaling}")
    name, colon, count = named.partition(":")
    if colon and not (count.isdecimal() and 1 <= int(count) <= MOST_MEMBERS):
        raise ValueError(
            f"--architecture {text}: expected a number of members from 1 to {MOST_MEMBERS} after the colon"
        )
    if name not in SUMMARIES:
        raise ValueError(f"--architecture, --config: unknown architecture {name!r}; known are {', '.join(SUMMARIES)}")
    return name, int(count or 1), scaling


def _parse_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--config: not JSON: {error}") from None
    return _check_fields(found, text)


def _check_fields(found: Any, text: str) -> dict[str, Any]:
    if not isinstance(found, dict) or found.keys() & DECIDED:
        what = f"an object such as '{{\"channels\": 32}}' without {', '.join(DECIDED)}, which other options set"
        raise ValueError(f"--config: expected {what}, not {text!r}")
    return found
