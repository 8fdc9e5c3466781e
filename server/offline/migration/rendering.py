"""Writes a translation as fleetcast.toml, or as a command line. Pure."""

import json
import shlex
from collections.abc import Iterator
from textwrap import wrap

from server.offline.migration.outcome import Fate, Value
from server.offline.migration.translation import Finding, Translation
from server.shell.escaping import escape_text

_WIDTH = 116


def render_toml(translation: Translation, title: str) -> str:
    """The settings, each below the key that it comes from, and then every other key with what becomes of it."""
    lines = [*_comment(title), ""]
    for found in translation.findings:
        if found.outcome.settings:
            lines += [*_comment(_explain(found)), *_assign(found), ""]
    for fate in Fate:
        lines += _report(translation, fate)
    return "\n".join(lines).rstrip() + "\n"


def render_report(translation: Translation) -> str:
    """Every key with what becomes of it."""
    lines: list[str] = []
    for found in translation.findings:
        settings = ", ".join(f"{name} = {_quote(value)}" for name, value in found.outcome.settings.items())
        if settings:
            lines.append(escape_text(f"{_explain(found)}: {settings}"))
    for fate in Fate:
        lines += [line.removeprefix("# ") for line in _report(translation, fate)]
    return "\n".join(lines).rstrip() + "\n"


def render_command(translation: Translation) -> str:
    """`fleetcast serve` with the settings as flags, quoted for a shell."""
    words = ["fleetcast", "serve"]
    for name, value in translation.settings.items():
        for each in value if isinstance(value, list) else [value]:
            words += ["--" + name.replace("_", "-"), str(each)]
    return shlex.join(words) + "\n"


def _report(translation: Translation, fate: Fate) -> list[str]:
    found = [each for each in translation.of(fate) if fate is not Fate.SET or not each.outcome.settings]
    if not found:
        return []
    lines = [f"# --- {fate} ---"]
    for each in found:
        lines += _comment(f"{each.what}: {each.outcome.why}")
    return [*lines, ""]


def _explain(found: Finding) -> str:
    return found.what + _add("see below" if found.outcome.fate is Fate.BY_HAND else found.outcome.why)


def _add(why: str) -> str:
    return f": {why}" if why else ""


def _assign(found: Finding) -> Iterator[str]:
    for name, value in found.outcome.settings.items():
        yield f"{name} = {_quote(value)}"


def _quote(value: Value) -> str:
    """As TOML has it, which for these types is JSON but for the character DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _comment(text: str) -> list[str]:
    """Lines of a comment; no character of the text can end it."""
    return [f"# {line}" for line in wrap(escape_text(text), _WIDTH, break_long_words=False, break_on_hyphens=False)]
