"""Tokens: the contents of a file, the lookup, the permissions, and that no secret leaks."""

from pathlib import Path

import pytest

from server.access.tokens import (
    LOOK_S,
    MAX_TOKEN_BYTES,
    Forbidden,
    Scope,
    TokenFile,
    Unauthorized,
    hash_token,
    make_token,
    parse_tokens,
    read_tokens,
)

FILE = f"""
[[tokens]]
name = "desk-au"
sha256 = "{hash_token(b"au-secret")}"
scopes = ["invoke"]
models = ["au/", "nz/"]

[[tokens]]
name = "ops"
sha256 = "{hash_token(b"ops-secret")}"
scopes = ["manage", "metrics"]
"""


def test_a_token_is_found_by_its_hash() -> None:
    """The header's scheme in any case, spaces around the token; the repr shows neither token nor hash."""
    tokens = parse_tokens(FILE.encode(), "f")
    for header in (b"Bearer au-secret", b"bearer au-secret", b"BEARER  au-secret "):
        assert tokens.find(header).name == "desk-au"
    assert repr(tokens.find(b"Bearer ops-secret")) == "<Token ops: manage, metrics of all models>"
    assert repr(tokens) == "<Tokens desk-au, ops>"


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (None, "wants a token"),
        (b"Basic au-secret", "as Bearer TOKEN"),
        (b"Bearer ", "not one of"),
        (b"Bearer au-secre", "not one of"),
        (b"Bearer au-secret2", "not one of"),
        (b"Bearer \xff\xfe", "not one of"),
        (b"Bearer " + b"x" * (MAX_TOKEN_BYTES + 1), "as Bearer TOKEN"),
    ],
)
def test_others_are_refused(header: bytes | None, said: str) -> None:
    """What was wrong is said; what was shown is not repeated."""
    with pytest.raises(Unauthorized, match=said) as refused:
        parse_tokens(FILE.encode(), "f").find(header)
    assert "secre" not in str(refused.value)


def test_scopes_and_models() -> None:
    """A token allows its scopes, for models of its prefixes where it has some."""
    tokens = parse_tokens(FILE.encode(), "f")
    desk, ops = tokens.find(b"Bearer au-secret"), tokens.find(b"Bearer ops-secret")
    desk.require(Scope.INVOKE, "au/nsw1.mar")
    ops.require(Scope.MANAGE, "de/lu.mar")
    ops.require(Scope.METRICS)
    ops.require_all_models("the list")
    for model in ("de/lu.mar", "a", "AU/nsw1.mar", ""):
        with pytest.raises(Forbidden, match="allows models of au/, nz/, not"):
            desk.require(Scope.INVOKE, model)
    with pytest.raises(Forbidden, match="the token desk-au allows invoke, not manage"):
        desk.require(Scope.MANAGE, "au/nsw1.mar")
    with pytest.raises(Forbidden, match="the list shows all"):
        desk.require_all_models("the list")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("desk-au", "ops"), "more than one token is called ops"),
        (("desk-au", "a b"), "tokens[0].name"),
        (('["invoke"]', '["admin"]'), "tokens[0].scopes[0]"),
        (('["invoke"]', "[]"), "tokens[0].scopes"),
        (("scopes", "scope"), "unknown field `scope`"),
        ((hash_token(b"au-secret"), "au-secret"), "tokens[0].sha256"),
        (("[[tokens]]", "[tokens"), "TOML|toml|line|Expected"),
    ],
)
def test_a_wrong_file_is_named_with_the_place(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    """And a token that somebody wrote in the place of its hash is not repeated."""
    path = tmp_path / "tokens.toml"
    path.write_text(FILE.replace(*change))
    with pytest.raises(ValueError, match=str(path)) as wrong:
        read_tokens(path)
    assert said in str(wrong.value) or any(each in str(wrong.value) for each in said.split("|"))
    assert "au-secret" not in str(wrong.value)


def test_a_file_that_others_can_write_is_refused(tmp_path: Path) -> None:
    """The message says what to do; one that is not there is named."""
    path = tmp_path / "tokens.toml"
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_tokens(path)
    path.write_text(FILE)
    path.chmod(0o622)
    with pytest.raises(ValueError, match="chmod go-w"):
        read_tokens(path)


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    """A new token is known, an old one gone, after a second; a file that turned bad leaves the last good ones."""
    path, now = tmp_path / "tokens.toml", [0.0]
    path.write_text(FILE)
    file = TokenFile(path, lambda: now[0])
    path.write_text(FILE.replace(hash_token(b"au-secret"), hash_token(b"newer")))
    assert file.current.find(b"Bearer au-secret").name == "desk-au"
    now[0] += LOOK_S
    assert file.current.find(b"Bearer newer").name == "desk-au"
    with pytest.raises(Unauthorized):
        file.current.find(b"Bearer au-secret")
    path.write_text("nonsense")
    now[0] += LOOK_S
    assert file.current.find(b"Bearer newer").name == "desk-au"
    path.unlink()
    now[0] += LOOK_S
    assert file.current.find(b"Bearer newer").name == "desk-au"


def test_tokens_are_random() -> None:
    """No two are alike, and each has at least 256 bits."""
    made = {make_token() for _ in range(100)}
    assert (len(made), min(map(len, made)) >= 46) == (100, True)
