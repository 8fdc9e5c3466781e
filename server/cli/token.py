"""`fleetcast token` makes a token, and the lines of the server's token file that accept it."""

import json
import sys
from typing import Annotated

import typer

from server.access.tokens import Scope, hash_token, make_token, parse_tokens
from server.cli.terminal import one_line_errors


def token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="name of the token in the audit log, such as desk-au")],
    *,
    scope: Annotated[list[Scope], typer.Option(help="operation that the token allows (repeatable)")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PREFIX", help="prefix of the model names that the token allows (repeatable); default: all models"
        ),
    ] = None,
) -> None:
    """Make a token. Its secret is printed once, on stderr; the lines for the server go to standard output.

    \b
    fleetcast token desk-au --scope invoke --model au/ >> tokens.toml
    fleetcast token prometheus --scope metrics >> tokens.toml
    fleetcast serve --store ./models --tokens tokens.toml

    A client sends it as the header Authorization: Bearer TOKEN. The file contains only the hash of the token; a running
    server reads a changed file within a second. Remove the lines to revoke the token.
    """  # noqa: D301 -- click's mark for "do not wrap"
    secret = make_token()
    with one_line_errors():
        lines = _lines(name, secret, scope, model or [])
        parse_tokens(lines.encode(), "the token")
    print(lines)  # noqa: T201
    print(f"the token of {name}, which is stored nowhere: {secret}", file=sys.stderr)  # noqa: T201


def _lines(name: str, secret: str, scopes: list[Scope], models: list[str]) -> str:
    """The TOML to append to the server's token file."""
    rows: dict[str, object] = {
        "name": name,
        "sha256": hash_token(secret.encode()),
        "scopes": [str(scope) for scope in scopes],
    }
    if models:
        rows["models"] = models
    values = (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in rows.items())
    return "\n".join(["[[tokens]]", *values, ""])
