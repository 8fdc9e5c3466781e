"""The fenced blocks of code of a page, and what the commands in them are."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_TITLE = re.compile(r'title="([\w./-]+)"')
_FIRST_LINE_PATH = re.compile(r"# ([\w/-]+\.(?:py|properties))\n")
_METACHARACTERS = re.compile(r"[|><;&$`]")
_ASSIGNMENT = re.compile(r"[A-Z_]+=")
SHELLS = ("sh", "bash")
DATA = ("json", "toml", "yaml", "properties")


class Block(NamedTuple):
    """A block of a page. `file`: the path that its title or first line names, for blocks that are files."""

    page: str
    language: str
    text: str
    file: str

    @property
    def place(self) -> str:
        """For messages: the page and how the block begins."""
        return f"{self.page}: {self.text.splitlines()[0][:80]}"


class Command(NamedTuple):
    """A command of a block of a shell. `plain`: words alone, without pipes, redirections and variables."""

    words: tuple[str, ...]
    plain: bool


def list_pages() -> list[Path]:
    """The README and every page that is not generated."""
    pages = [page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "reference"]
    return [ROOT / "README.md", *sorted(pages)]


def read_blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    name = str(page.relative_to(ROOT))
    return [_make_block(name, fence, text) for fence, text in _FENCE.findall(page.read_text())]


def list_commands(block: Block) -> Iterator[Command]:
    """The commands of a block of a shell, without what is assigned before them."""
    joined = block.text.replace("\\\n", " ")
    if "'{" in joined or '"$' in joined:  # a body over several lines is one word
        joined = re.sub(r"'[^']*'", lambda found: found[0].replace("\n", " "), joined)
    for line in joined.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            continue
        while words and (words[0] in ("export", "sudo") or _ASSIGNMENT.match(words[0])):
            if words[0] == "sudo":
                break
            words = words[1:]
        if words:
            unquoted = re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", line)
            yield Command(tuple(words), not _METACHARACTERS.search(unquoted))


def _make_block(page: str, fence: str, text: str) -> Block:
    language = fence.split(" ", maxsplit=1)[0]
    named = _TITLE.search(fence) or _FIRST_LINE_PATH.match(text)
    return Block(page, language, text, named[1] if named else "")
