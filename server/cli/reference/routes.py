"""The page of routes, made of the one table of routes. Pure."""

from collections.abc import Sequence

from server.routes.inference import PROTOCOLS
from server.routes.management import FLEET, METRICS, MMS_MANAGEMENT, TORCHSERVE_MANAGEMENT
from server.routes.record import Protocol, Route

LISTENERS: tuple[tuple[str, str, Sequence[Protocol]], ...] = (
    ("Inference listener", "Port 8080, for clients.", tuple(PROTOCOLS.values())),
    ("Management listener", "Port 8081, for operators.", (FLEET, TORCHSERVE_MANAGEMENT, MMS_MANAGEMENT)),
    ("Metrics listener", "Port 8082, for Prometheus.", (METRICS,)),
)
_INTRODUCTION = """Every route that a server has. `{model}` stands for a model's name, whose slashes may be written
as they are or as `%2F`. A running server says the same: `GET /openapi.json` on the management
listener is an OpenAPI 3.1 document of it, and `/docs` a page that tries routes.
[Clients](../clients.md) has a working program for each protocol."""


def render_routes() -> str:
    """A section for each listener, and in it one for each protocol."""
    parts = [_INTRODUCTION]
    for title, purpose, protocols in LISTENERS:
        parts += [f"## {title}", purpose]
        for protocol in protocols:
            parts += [f"### {protocol.title}", f"Who speaks it: {protocol.clients}.", _tabulate(protocol)]
    return "\n\n".join(parts)


def _tabulate(protocol: Protocol) -> str:
    """The routes of a protocol, those of one path and purpose in one row."""
    methods: dict[tuple[str, str], list[Route]] = {}
    for route in protocol.routes:
        methods.setdefault((route.path, route.summary), []).append(route)
    rows = ["| request | what it does | answer |", "|---|---|---|"]
    for (path, summary), routes in methods.items():
        asked = "/".join(route.method for route in routes)
        query = f"; query: {', '.join(f'`{name}`' for name, _ in routes[0].query)}" if routes[0].query else ""
        statuses = ", ".join(map(str, sorted({status for route in routes for status in route.statuses})))
        rows.append(f"| `{asked} {path}` | {summary}{query} | {statuses} |")
    return "\n".join(rows)
