"""One route of a listener as a record. Pure, stdlib only."""

from dataclasses import dataclass

JSON, LINES, NPY = "application/json", "application/jsonlines", "application/x-npy"
BYTES, TEXT, ANY = "application/octet-stream", "text/plain", "*/*"


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
