"""`fleetcast token`: makes a token, and the lines by which a server knows it."""

import json
import sys
from typing import Annotated

import typer

from server.access.tokens import Scope, hash_token, make_token, parse_tokens
from server.cli.terminal import one_line_errors


def token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="what the audit log says, such as desk-au")],
    *,
    scope: Annotated[list[Scope], typer.Option(help="what it allows (repeatable)")],
    model: Annotated[
        list[str] | None, typer.Option(metavar="PREFIX", help="only models of these names (repeatable); else all")
    ] = None,
) -> None:
    """Make a token: its secret on stderr, shown this once, and the server's lines on standard output.

    \b
    fleetcast token desk-au --scope invoke --model au/ >> tokens.toml
    fleetcast token prometheus --scope metrics >> tokens.toml
    fleetcast serve --store ./models --tokens tokens.toml

    A client sends it as the header Authorization: Bearer TOKEN. The file has the token's hash alone; a running server
    takes a changed file within a second. Take the lines out to withdraw the token.
    """  # noqa: D301 -- click's mark for "do not wrap"
    secret = make_token()
    with one_line_errors():
        lines = _lines(name, secret, scope, model or [])
        parse_tokens(lines.encode(), "the token")
    print(lines)  # noqa: T201
    print(f"the token of {name}, which is kept nowhere: {secret}", file=sys.stderr)  # noqa: T201


def _lines(name: str, secret: str, scopes: list[Scope], models: list[str]) -> str:
    """TOML to append to the server's file."""
    rows: dict[str, object] = {
        "name": name,
        "sha256": hash_token(secret.encode()),
        "scopes": [str(scope) for scope in scopes],
    }
    if models:
        rows["models"] = models
    values = (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in rows.items())
    return "\n".join(["[[tokens]]", *values, ""])
