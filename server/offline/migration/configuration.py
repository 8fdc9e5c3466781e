"""What a server would make of its file: references replaced, variables over keys. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from server.offline.migration.model_servers import ModelServer, guess_server
from server.offline.migration.properties import parse_properties

_REFERENCE = re.compile(r"\$\$([^$]+[^$])\$\$")
_SECRET = re.compile("pass|secret|credential")
_MOST_SHOWN = 120


@dataclass(frozen=True, slots=True)
class Entry:
    """One key as the server sees it. `missing`: a variable that its value names, and that is not set."""

    key: str
    value: str
    origin: str  #: `line 3`, or the variable that overrides the file
    missing: str = ""

    @property
    def shown(self) -> str:
        """The value as it may be shown: shortened, and no password."""
        if _SECRET.search(self.key):
            return "***"
        text = " ".join(self.value.split())
        return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


@dataclass(frozen=True, slots=True)
class Configuration:
    """All keys of a file, and of the variables that count beside it."""

    server: ModelServer
    entries: Mapping[str, Entry]

    def get(self, key: str, default: str = "") -> str:
        """The value of a key, stripped; the default where it is not given."""
        entry = self.entries.get(key)
        return default if entry is None else entry.value.strip()

    def is_true(self, key: str) -> bool:
        """As Java's `parseBoolean` has it."""
        return self.get(key).lower() == "true"


def read_configuration(raw: bytes, variables: Mapping[str, str], server: ModelServer | None = None) -> Configuration:
    """What `server` reads from the file and the variables; None: the server that reads most of the keys.

    `$$NAME$$` in a value is the variable NAME. Where the file says `enable_envvars_config=true`, variables such as
    TS_INFERENCE_ADDRESS or MMS_INFERENCE_ADDRESS override keys. Raises PropertiesInvalid.
    """
    properties = parse_properties(raw)
    server = server or guess_server(found.key for found in properties)
    entries = {found.key: _resolve(found.key, found.value, f"line {found.line}", variables) for found in properties}
    from_file = Configuration(server, entries)
    if not from_file.is_true("enable_envvars_config"):
        return from_file
    for variable, key in server.variables.items():
        allowed = key != "allowed_urls" or from_file.is_true("use_env_allowed_urls")
        if variable in variables and allowed:
            entries[key] = Entry(key, variables[variable], f"variable {variable}")
    return Configuration(server, entries)


def _resolve(key: str, value: str, origin: str, variables: Mapping[str, str]) -> Entry:
    missing = [name for name in _REFERENCE.findall(value) if name not in variables]
    if missing:
        return Entry(key, value, origin, missing[0])
    return Entry(key, _REFERENCE.sub(lambda found: variables[found[1]], value), origin)
