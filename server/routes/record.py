"""One route of a listener as a record. Pure, stdlib only."""

import re
from dataclasses import dataclass

JSON, LINES, NPY = "application/json", "application/jsonlines", "application/x-npy"
ARROW = "application/vnd.apache.arrow.stream"
BYTES, TEXT, ANY = "application/octet-stream", "text/plain", "*/*"
_PARAMETER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Route:
    """A method and a path. `{model}` in a path is a model's name, whose slashes may be written as they are or as `%2F`.

    `operation` is what `Dialect.match` calls it. `statuses` are those of success; a dialect's errors are told for all
    its routes together. `takes`: media types of the body, none for no body. `headers` and `query` are parameters by
    name with what they say; those of `needed` must be sent.
    """

    method: str
    path: str
    operation: str
    summary: str
    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = (JSON,)
    statuses: tuple[int, ...] = (200,)
    headers: tuple[tuple[str, str], ...] = ()
    query: tuple[tuple[str, str], ...] = ()
    needed: tuple[str, ...] = ()
    schema: str = ""  #: of the body, a name in `server.routes.openapi`


@dataclass(frozen=True, slots=True)
class Protocol:
    """The routes of one protocol. `clients`: who speaks it; `errors`: statuses, and the schema of their bodies."""

    name: str
    title: str
    clients: str
    routes: tuple[Route, ...]
    errors: tuple[int, ...]
    error_schema: str

    @property
    def main_path(self) -> str:
        """For example `/v2/models/MODEL/infer`: the first path that takes a body, else the first of all."""
        path = next((route.path for route in self.routes if route.takes), self.routes[0].path)
        return _PARAMETER.sub(lambda found: found[1].upper(), path)

    def list_statuses(self) -> list[int]:
        """Every status that an answer may have, ascending."""
        return sorted({*self.errors, *(status for route in self.routes for status in route.statuses)})
