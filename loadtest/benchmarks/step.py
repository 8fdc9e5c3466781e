"""A worker's step, from decoded rows to outputs, beside simpler implementations, without HTTP. About a minute.

A process of the server (`server.worker.engine.bench_step`) alternates with peers: batches of a small convolution drawn
from 500 models beside `FlatTcn`; batches of a network of 1.8 MB beside `SplitMlp`, with rows in and out of the CPU's
cache; many inputs of one model beside gathering its row as often. Saves a record.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from loadtest import record

SEED = 7  #: of server.worker.engine.bench_step
PEERS = ("loadtest.peers.flat_rows:FlatTcn", "loadtest.peers.flat_rows:SplitMlp")
ALL_GOAL_MS = 15.0  #: milliseconds for 500 different models
GOALS = ((32, 0.8), (1, 1.0))  #: rows from which the goal holds, and largest share of the peer's time

CONSOLE = Console(width=None if sys.stdout.isatty() else 130)


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(save: Annotated[bool, typer.Option(help="save a record")] = True) -> None:
    """Measure and print."""
    before = record.describe_machine()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "server.worker.engine.bench_step", *PEERS], stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        raise typer.Exit(done.returncode)  # the process has printed the cause
    results = json.loads(done.stdout)
    CONSOLE.print(build_table(results), judge_step(results))
    if save:
        CONSOLE.print(f"record: {record.save_record('step', SEED, before, results)}")


def build_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """Make a table of median microseconds per answer by section and batch, and of ratios with spread and goal."""
    shown = Table("", "rows", "ours", "peer", "ratio", "goal", "gathered", "ratio", "floor", "ways")
    shown.title = "microseconds an answer, one core"
    for column in shown.columns[1:-1]:
        column.justify, column.no_wrap = "right", True
    for section, rows in results.items():
        for row, found in rows.items():
            cells = [f"{found['us']['fleetcast']['median']:.1f}", *_compare_with(found, "peer")]
            cells += [_get_goal(section, row, found), *_compare_with(found, "gathered"), f"{found['floor_us']:.1f}"]
            shown.add_row(section, row, *cells, " ".join(sorted(found["paths"], key=found["paths"].get, reverse=True)))
        shown.add_section()
    return shown


def judge_step(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Judge the step of all models."""
    everyone = results["tcn"]["all"]
    count = sum(everyone["paths"].values())
    ms = everyone["us"]["fleetcast"]["median"] * count / 1e3
    return f"{count} different models in one step: {ms:.2f} ms, goal {ALL_GOAL_MS:g}"


def _compare_with(found: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Format the time of a peer and our ratio to it; empty if it did not run."""
    if name not in found["ratio"]:
        return "", ""
    return f"{found['us'][name]['median']:.1f}", "{median:.2f} ({min:.2f}-{max:.2f})".format(**found["ratio"][name])


def _get_goal(section: str, row: str, found: Mapping[str, Any]) -> str:
    """Return the goal of a batch of the small convolution."""
    if section != "tcn" or not row.isdigit():
        return ""
    goal = next(most for rows, most in GOALS if int(row) >= rows)
    color = "green" if found["ratio"]["peer"]["median"] <= goal else "red"
    return f"[{color}]<= {goal:g}[/]"
