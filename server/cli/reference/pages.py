"""All pages of the reference, each a text of Markdown. Pure, but for the imports of what is described."""

from collections.abc import Mapping

import typer

from handlers.architectures import SUMMARIES
from server.cli.reference.commands import render_commands
from server.cli.reference.errors import render_errors
from server.cli.reference.routes import render_routes
from server.cli.setting_flags import render_settings
from server.metrics import render_metrics_table

MARK = "<!-- `make docs` writes this page: change the program instead. -->"


def render_pages(programs: Mapping[str, typer.Typer]) -> dict[str, str]:
    """The text of each page by its file. `programs`: the command lines to describe, by name."""
    pages = {
        "settings.md": _join(
            "# Settings",
            "Each setting is a flag of `fleetcast serve`. The flag `--inference-port` is also the variable "
            "`FLEETCAST_INFERENCE_PORT` and the key `inference_port` of `fleetcast.toml`. "
            "[How settings are given](../settings.md) says which of them wins, and which matter first.",
            render_settings(),
        ),
        "metrics.md": _join(
            "# Metrics",
            "All series of `GET /metrics`. [Metrics and alerts](../monitoring.md) says how they are counted, and has "
            "alerts and a dashboard that are made of them.",
            render_metrics_table(),
        ),
        "routes.md": _join("# Routes", render_routes()),
        "errors.md": _join("# Errors, and what to do about each", render_errors()),
        "architectures.md": _join(
            "# Architectures",
            "What `fleetcast train --architecture` and `fleetcast pack --architecture` take. "
            "[Models from prices](../models-from-prices.md#which-architecture) says how to choose.",
            _tabulate_architectures(),
        ),
    }
    names = {"fleetcast": "commands.md"}
    for program, app in programs.items():
        pages[names.get(program, f"{program}.md")] = _join(f"# {program}", render_commands(program, app))
    return pages


def _join(heading: str, *parts: str) -> str:
    return "\n\n".join([heading, MARK, *parts]) + "\n"


def _tabulate_architectures() -> str:
    rows = ["| `--architecture` | what it is |", "|---|---|"]
    return "\n".join([*rows, *(f"| `{name}` | {summary} |" for name, summary in SUMMARIES.items())])
