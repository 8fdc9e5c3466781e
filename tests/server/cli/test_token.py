"""`fleetcast token` prints lines that a server accepts."""

import pytest
from typer.testing import CliRunner

from server.access.tokens import Forbidden, Scope, parse_tokens
from server.cli.main import app


def make(*arguments: str) -> tuple[str, bytes]:
    """The lines for the server's file, and the token."""
    result = CliRunner().invoke(app, ["token", *arguments])
    assert result.exit_code == 0, result.stderr
    secret = result.stderr.split()[-1]
    assert secret not in result.stdout
    return result.stdout, secret.encode()


def test_the_lines_let_the_token_in() -> None:
    """Appended to a file that has others, with its scopes and prefixes, whatever these hold."""
    first, _ = make("ops", "--scope", "manage", "--scope", "metrics")
    second, secret = make("desk-au", "--scope", "invoke", "--model", "au/", "--model", 'ü "x"\\/')
    token = parse_tokens((first + second).encode(), "file").find(b"Bearer " + secret)
    assert (token.name, token.scopes, token.models) == ("desk-au", (Scope.INVOKE,), ("au/", 'ü "x"\\/'))
    with pytest.raises(Forbidden):
        token.require(Scope.INVOKE, "de/lu.mar")
    assert make("a", "--scope", "invoke")[1] != make("a", "--scope", "invoke")[1]


@pytest.mark.parametrize("arguments", [("desk",), ("desk", "--scope", "admin"), ("a b", "--scope", "invoke")])
def test_what_no_server_takes_is_not_made(arguments: tuple[str, ...]) -> None:
    """No scope, none of ours, and a name that a log line would not show."""
    result = CliRunner().invoke(app, ["token", *arguments])
    assert result.exit_code == 2
    assert "sha256 =" not in result.stdout
