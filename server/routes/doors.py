"""The README's table of doors, made of the table of routes. `make docs` writes it. Pure."""

from server.routes.inference import PROTOCOLS
from server.routes.management import FLEET, METRICS, MMS_MANAGEMENT, TORCHSERVE_MANAGEMENT
from server.routes.record import Protocol


def tabulate_doors() -> str:
    """Tabulate the protocols of all listeners: who speaks them, and their paths."""
    rows = ["| listener | protocol | clients | paths |", "|---|---|---|---|"]
    rows += [_format_row("inference", each) for each in PROTOCOLS.values()]
    rows += [_format_row("management", each) for each in (FLEET, TORCHSERVE_MANAGEMENT, MMS_MANAGEMENT)]
    return "\n".join([*rows, _format_row("metrics", METRICS)])


def _format_row(listener: str, protocol: Protocol) -> str:
    methods: dict[str, list[str]] = {}
    for route in protocol.routes:
        methods.setdefault(route.path, []).append(route.method)
    paths = ", ".join(f"`{'/'.join(how)} {path}`" for path, how in methods.items())
    return f"| {listener} | {protocol.title} | {protocol.clients} | {paths} |"
