"""Says for every key of a configuration what becomes of it here. Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from server.offline.migration.addresses import find_missing_certificate
from server.offline.migration.configuration import Configuration, Entry
from server.offline.migration.outcome import Fate, Outcome, Value, become, ignore, leave
from server.offline.migration.rules import DEFAULTS, RULES


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found, such as `inference_address=http://0.0.0.0:8080 (line 1)`, and what becomes of it."""

    what: str
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Translation:
    """A whole file. `settings` are those of all findings, in their order."""

    findings: Sequence[Finding]

    @property
    def settings(self) -> Mapping[str, Value]:
        """Setting -> value."""
        return {name: value for found in self.findings for name, value in found.outcome.settings.items()}

    def of(self, fate: Fate) -> list[Finding]:
        """Those of one fate."""
        return [found for found in self.findings if found.outcome.fate is fate]


def translate(config: Configuration, store: str = "") -> Translation:
    """What becomes of each key, and of defaults that are not ours. `store`: wins over `model_store`."""
    findings = [Finding(_describe(entry), _judge(config, entry)) for entry in config.entries.values()]
    for what, find in {"https": find_missing_certificate, **DEFAULTS}.items():
        if (outcome := _apply(find, config)) is not None and not (store and what == "its store"):
            findings.append(Finding(f"{config.server}: {what}", outcome))
    if store:
        findings.append(Finding("--store", become({"store": store})))
    return Translation(list(_keep_last_of_each(findings)))


def _describe(entry: Entry) -> str:
    return f"{entry.key}={entry.shown} ({entry.origin})"


def _judge(config: Configuration, entry: Entry) -> Outcome:
    rule = RULES.get(entry.key)
    if rule is None or entry.key not in config.server.keys:
        return ignore(f"{config.server} does not know this key either")
    if entry.missing:
        return leave(f"it needs the variable {entry.missing}, which is not set: set it, and run this again")
    outcome = _apply(rule, config)
    assert outcome is not None, "a key has an outcome"
    return outcome


def _apply(rule: Callable[[Configuration], Outcome | None], config: Configuration) -> Outcome | None:
    """What a rule says; a value that the old server refuses is left to the operator."""
    try:
        return rule(config)
    except ValueError as error:
        return leave(str(error))


def _keep_last_of_each(findings: Sequence[Finding]) -> Iterator[Finding]:
    """The findings, each setting only with the last that has it: two keys may say the same."""
    owner = {name: index for index, found in enumerate(findings) for name in found.outcome.settings}
    for index, found in enumerate(findings):
        settings, why = found.outcome.settings, found.outcome.why
        kept = {name: value for name, value in settings.items() if owner[name] == index}
        others = dict.fromkeys(findings[owner[name]].what for name in settings if name not in kept)
        if others and not kept:
            why = "; ".join(filter(None, (why, f"its settings are with {' and '.join(others)}")))
        yield Finding(found.what, Outcome(found.outcome.fate, why, kept))
