"""What becomes of one key: the words that rules and output share. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from server.offline.migration.configuration import Configuration

Value = str | int | float | list[str]


class Fate(StrEnum):
    """What becomes of a key; the value is the heading in the output."""

    SET = "settings"
    BY_HAND = "to do by hand"
    HOLDS = "so without a setting"
    IGNORED = "ignored"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What becomes of a key, why, and the settings that follow; they follow from keys to be finished by hand too."""

    fate: Fate
    why: str = ""
    settings: Mapping[str, Value] = field(default_factory=dict)


#: What becomes of a key, from the whole configuration. Raises ValueError for a value that the old server refuses too.
Rule = Callable[[Configuration], Outcome]


def become(settings: Mapping[str, Value], why: str = "") -> Outcome:
    """The key becomes settings."""
    return Outcome(Fate.SET, why, settings)


def leave(why: str, settings: Mapping[str, Value] | None = None) -> Outcome:
    """Something is left to do for the operator."""
    return Outcome(Fate.BY_HAND, why, settings or {})


def hold(why: str) -> Outcome:
    """The key asks for what is so here anyway."""
    return Outcome(Fate.HOLDS, why)


def ignore(why: str) -> Outcome:
    """The key has no counterpart."""
    return Outcome(Fate.IGNORED, why)


def always(outcome: Outcome) -> Rule:
    """The rule of a key whose value does not matter."""
    return lambda _: outcome
