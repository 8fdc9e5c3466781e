"""Pages of registered names: the tokens between them, and the pattern that a client asks for. Pure."""

import base64
import binascii

from server.supervisor.registrations.refusals import BadOption

MAX_PATTERN = 200
ANYTHING = "*"


class NamePattern:
    """Text in which `.*` and `*` stand for anything; `^` and `$` around it mean nothing. Raises BadOption.

    INVARIANT: a name is compared in time that grows with its length alone: no client's regular expression is run.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_PATTERN:
            raise BadOption(f"Parameter model_name_pattern has more than {MAX_PATTERN} characters.")
        self._pieces = text.removeprefix("^").removesuffix("$").replace(".*", ANYTHING).split(ANYTHING)

    def __repr__(self) -> str:
        """For example `<NamePattern nsw*>`."""
        return f"<NamePattern {ANYTHING.join(self._pieces)}>"

    def fits(self, name: str) -> bool:
        """Whether all of the name is what the pattern says."""
        first, *others = self._pieces
        if not others:
            return name == first
        *inner, last = others
        at, end = len(first), len(name) - len(last)
        if at > end or not name.startswith(first) or not name.endswith(last):
            return False
        for piece in inner:
            at = name.find(piece, at, end)
            if at < 0:
                return False
            at += len(piece)
        return True


def make_token(name: str) -> str:
    """The token of the page after this name, in characters that need no escape in a query."""
    return base64.urlsafe_b64encode(name.encode()).decode().rstrip("=")


def read_token(token: str) -> str:
    """The name after which a page begins. Raises BadOption."""
    try:
        return base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise BadOption("Parameter next_page_token is none that this server has given.") from error
