"""Bearer tokens: who holds one, what it allows, and for which models. Pure but for reading the file.

The file names tokens by their hashes, so that whoever reads it cannot use them:

    [[tokens]]
    name = "desk-au"                # what the audit log says
    sha256 = "9f86d081884c7d65..."  # of the token; `fleetcast token` makes both
    scopes = ["invoke"]             # invoke, actuals, manage, metrics
    models = ["au/"]                # prefixes of model names; left out: all
"""

import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import structlog
from msgspec import Meta, Struct

from server.access.secret_files import read_secret_file

MAX_TOKEN_BYTES = 1024
LOOK_S = 1.0  #: how often the file's date is looked at
_BEARER = b"bearer "

log = structlog.get_logger()


class Scope(StrEnum):
    """What a listener lets do whoever shows a token."""

    INVOKE = "invoke"
    ACTUALS = "actuals"  #: beside invoke: send observed prices, which change bands
    MANAGE = "manage"
    METRICS = "metrics"


class Unauthorized(Exception):
    """No token was shown, or one that this server does not know (HTTP 401)."""


class Forbidden(Exception):
    """The token is known and does not allow this (HTTP 403)."""


class Token(Struct, frozen=True, forbid_unknown_fields=True):
    """One holder of a token. `models`: prefixes of the names it may ask for or manage; empty means all."""

    name: Annotated[str, Meta(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._@-]+$")]
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[tuple[Scope, ...], Meta(min_length=1)]
    models: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Without the hash. For example `<Token desk-au: invoke of au/>`."""
        return f"<Token {self.name}: {', '.join(self.scopes)} of {', '.join(self.models) or 'all models'}>"

    def require(self, scope: Scope, model: str | None = None) -> None:
        """Raises Forbidden unless the token allows this, for this model where one is named."""
        if scope not in self.scopes:
            raise Forbidden(f"the token {self.name} allows {', '.join(self.scopes)}, not {scope}")
        if model is not None and self.models and not model.startswith(self.models):
            raise Forbidden(f"the token {self.name} allows models of {', '.join(self.models)}, not {model}")

    def require_all_models(self, what: str) -> None:
        """Raises Forbidden for a token of some models where `what` shows all of them."""
        if self.models:
            raise Forbidden(f"the token {self.name} allows models of {', '.join(self.models)}, and {what} shows all")


class _File(Struct, frozen=True, forbid_unknown_fields=True):
    tokens: Annotated[tuple[Token, ...], Meta(min_length=1, max_length=1000)]


class Tokens:
    """The tokens of one file as it was read."""

    def __init__(self, tokens: tuple[Token, ...]) -> None:
        self._tokens = tokens

    def __repr__(self) -> str:
        """For example `<Tokens desk-au, grafana>`."""
        return f"<Tokens {', '.join(token.name for token in self._tokens)}>"

    def allow(self, scope: Scope) -> bool:
        """Whether at least one token has the scope."""
        return any(scope in token.scopes for token in self._tokens)

    def find_named(self, name: str) -> Token | None:
        """The token of this name; None where there is none."""
        return next((token for token in self._tokens if token.name == name), None)

    def find(self, authorization: bytes | None) -> Token:
        """The token that the Authorization header shows. Raises Unauthorized.

        INVARIANT: the time this takes tells nothing of a token: its hash is compared with every known one, in constant
        time each.
        """
        if authorization is None:
            raise Unauthorized("this server wants a token: send the header Authorization: Bearer TOKEN")
        if authorization[: len(_BEARER)].lower() != _BEARER or len(authorization) > len(_BEARER) + MAX_TOKEN_BYTES:
            raise Unauthorized("this server wants the header Authorization as Bearer TOKEN")
        shown = hash_token(authorization[len(_BEARER) :].strip())
        found = None
        for token in self._tokens:
            if hmac.compare_digest(token.sha256, shown):
                found = token
        if found is None:
            raise Unauthorized("the token is not one of this server's")
        return found


class TokenFile:
    """The tokens of a file, read anew when it changes. A file that turns bad leaves the last good tokens in force."""

    def __init__(self, path: Path, now: Callable[[], float] = time.monotonic) -> None:
        """Raises ValueError that names the file, and what is wrong with it."""
        self._path, self._now = path, now
        self._looked_at = now()
        self._seen, self._tokens = read_tokens(path)

    def __repr__(self) -> str:
        return f"<TokenFile {self._path}: {self._tokens!r}>"

    @property
    def current(self) -> Tokens:
        """The tokens now in force."""
        now = self._now()
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            self._look()
        return self._tokens

    def _look(self) -> None:
        try:
            if _identify_file(self._path.stat()) == self._seen:
                return
            self._seen, self._tokens = read_tokens(self._path)
        except (OSError, ValueError) as error:
            log.error("tokens_not_read", file=str(self._path), error=str(error), kept=repr(self._tokens))  # noqa: TRY400
        else:
            log.info("tokens_read", file=str(self._path), tokens=repr(self._tokens))


def read_tokens(path: Path) -> tuple[tuple[int, ...], Tokens]:
    """The file's identity (to see a change by) and its tokens. Raises ValueError that says what is wrong, and where."""
    found, raw = read_secret_file(path, "the tokens' file", "tokens")
    return _identify_file(found), parse_tokens(raw, str(path))


def parse_tokens(raw: bytes, where: str) -> Tokens:
    """Tokens of TOML. Raises ValueError that names the place; a hash that is wrong is never repeated in it."""
    try:
        file = msgspec.toml.decode(raw, type=_File)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: {error} (tokens)") from error
    names = [token.name for token in file.tokens]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{where}: more than one token is called {', '.join(sorted(twice))} (tokens)")
    return Tokens(file.tokens)


def make_token() -> str:
    """A new token of 256 random bits."""
    return f"fc_{secrets.token_urlsafe(32)}"


def hash_token(token: bytes) -> str:
    """What the file has of a token: SHA-256 in hex. A token is random, so it needs no salt and no slow hash."""
    return hashlib.sha256(token).hexdigest()


def _identify_file(found: os.stat_result) -> tuple[int, ...]:
    return found.st_ino, found.st_size, found.st_mtime_ns
