"""Reads from Python source what it imports and defines, without running any of it. Pure.

Tokens are enough for that, and reading them neither recurses nor fails as a whole: hostile nesting cannot exhaust the
stack as it can for a parser, and of source that is none, or is for another Python, what stands before the fault counts.
"""

import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_SOURCE_BYTES = 2**20  #: of one file; what follows is not read
MAX_NAMES = 4096  #: of one file

_BREAKS = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENCODING}


@dataclass(frozen=True, slots=True)
class Import:
    """`module` with its dots, leading ones too; not `always` where it stands in a function or under a condition."""

    module: str
    line: int
    always: bool


@dataclass(frozen=True, slots=True)
class Source:
    """What a file imports, and the functions and classes that it defines at its top."""

    imports: list[Import] = field(default_factory=list)
    defines: list[str] = field(default_factory=list)


def read_source(raw: bytes) -> Source:
    """Read one file; of source that cannot be read to its end, what stands before the fault."""
    source = Source()
    for statement in _split_statements(raw[:MAX_SOURCE_BYTES]):
        first = statement[0]
        is_top = first.start[1] == 0
        if first.string == "import":
            source.imports.extend(Import(name, first.start[0], is_top) for name in _read_import(statement))
        elif first.string == "from" and len(statement) > 1:
            source.imports.extend(Import(name, first.start[0], is_top) for name in _read_from(statement))
        elif is_top and (name := _read_definition(statement)):
            source.defines.append(name)
        if len(source.imports) + len(source.defines) > MAX_NAMES:
            break
    return source


def _split_statements(raw: bytes) -> Iterator[list[tokenize.TokenInfo]]:
    """The first tokens of each simple statement and of each header of a compound one."""
    statement: list[tokenize.TokenInfo] = []
    try:
        for token in tokenize.tokenize(io.BytesIO(raw).readline):
            ends = token.type in _BREAKS or token.string in (";", ":")
            if not ends and len(statement) < MAX_NAMES:
                statement.append(token)
            elif ends and token.type not in (tokenize.NL, tokenize.COMMENT) and statement:
                yield statement
                statement = []
    except (tokenize.TokenError, SyntaxError, ValueError):  # IndentationError and UnicodeDecodeError are among them
        pass
    if statement:
        yield statement


def _read_import(statement: list[tokenize.TokenInfo]) -> Iterator[str]:
    """`import a.b as c, d` -> a.b, d."""
    name, skips = "", False
    for token in statement[1:]:
        if token.string == ",":
            yield from [name] if name else []
            name, skips = "", False
        elif token.string == "as":
            skips = True
        elif not skips and (token.type == tokenize.NAME or token.string == "."):
            name += token.string
    if name:
        yield name


def _read_from(statement: list[tokenize.TokenInfo]) -> Iterator[str]:
    """`from ..a import b, c` -> ..a; of `from . import b, c` the modules are .b and .c."""
    module, rest = "", iter(statement[1:])
    for token in rest:
        if token.string == "import":
            break
        if token.type == tokenize.NAME or set(token.string) == {"."}:
            module += token.string
    if not module.strip("."):
        yield from (module + token.string for token in rest if token.type == tokenize.NAME)
    elif module:
        yield module


def _read_definition(statement: list[tokenize.TokenInfo]) -> str:
    """The name that `def`, `async def` or `class` defines; empty for other statements."""
    words = [token.string for token in statement[:3] if token.type == tokenize.NAME]
    words = words[1:] if words[:1] == ["async"] else words
    return words[1] if len(words) > 1 and words[0] in ("def", "class") else ""
