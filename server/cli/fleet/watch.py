"""Watches a running server for a while and prints what limits it, for `fleetcast doctor --url`."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict

import typer

from server.cli.fleet.diagnosis import LEAST_REQUESTS, Finding, Observation, diagnose
from server.cli.fleet.management import make_table, open_management, print_wide
from server.cli.fleet.rates import Change
from server.cli.terminal import BAD, verbatim
from server.shell.progress import show_progress


def watch_server(url: str, seconds: float, *, as_json: bool) -> None:
    """Print what limits the server at `url`. The exit code is 1 where something does."""
    with open_management(url) as management:
        before, rows = management.get("/fleet/overview"), {row["model"]: row for row in management.list_models()}
        _let_pass(seconds)
        change = Change(before, management.get("/fleet/overview"))
        seen = Observation(change, rows, {row["model"]: row for row in management.list_models()})
    findings = list(diagnose(seen))
    if as_json:
        listed = [asdict(each) for each in findings]
        found = {"seconds": change.seconds, "requests": seen.requests, "findings": listed}
        print(json.dumps(found))  # noqa: T201 -- the answer
    else:
        _print_findings(seen, findings)
    if findings:
        raise typer.Exit(BAD)


def _let_pass(seconds: float) -> None:
    """Wait, with a bar."""
    whole, rest = int(seconds), seconds % 1
    with show_progress("watching") as told:
        told(0, whole)
        time.sleep(rest)
        for _ in range(whole):
            time.sleep(1)
            told(1, whole)


def _print_findings(seen: Observation, findings: Sequence[Finding]) -> None:
    watched = f"{seen.requests:.0f} requests in {seen.change.seconds:.0f} s"
    few = f"; of {LEAST_REQUESTS} or more the rules say more" if seen.requests < LEAST_REQUESTS else ""
    table = make_table("", "", header=False)
    table.add_row(verbatim("watched", "bold"), verbatim(watched + few))
    for each in findings:
        table.add_row(verbatim("!", "yellow"), verbatim(each.name, "bold"))
        table.add_row("", verbatim(each.numbers))
        table.add_row("", verbatim(each.advice, "yellow"))
    if not findings:
        table.add_row("", verbatim("nothing limits the server that these rules know of"))
    print_wide(table)
