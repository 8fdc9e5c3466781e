"""Break a running server in every way, under load, and count every answer.

A fleet in an S3 server, two workers that have room for two thirds of it, two fronts, and clients that compare each
answer with the networks' own, version by version. Faults come one by one in an order that the seed gives, later also in
pairs: processes are killed, stopped and restarted; the store is slow, hangs, fails, is cut, damages bytes or is gone;
the disk tier is full, read-only, deleted or replaced by a file; the wall clock jumps; a model ends its workers;
archives are replaced and rolled back. Malformed requests and broken archives are there all the time. After each fault
is healed, the server is watched for --settle seconds.

What must hold: no answer is wrong, stale, late or lost, and every recovery takes at most --recovery seconds. Requests
that a killed front, or a killed supervisor's fronts, had under way are counted apart (`cut`), and so are those that a
stopped front answers late. While no server runs, connections are refused or wait for the next one (`down`).

The exit code is 1 if something did not hold. Equal seeds give equal faults and requests, but their timing is the
machine's. A run lasts longer than --seconds by the time of its last step and of the server's start and end.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from tests.chaos.checker import FaultRow, Report, Verdict, Window, count_verdicts
from tests.chaos.clients import Clients
from tests.chaos.faults import FAULTS, Fault, apply_faults, make_schedule
from tests.chaos.world import World, open_world
from tests.patience import wait_until
from tests.s3 import S3Server, s3_server

GONE_SHARE, GONE_S = 0.3, 60.0  #: a store that is gone stays so for this part of the run, at most a minute
WARM_S = 1.0  #: before the first fault

app = typer.Typer(add_completion=False, rich_markup_mode=None)
CONSOLE = Console(width=None if sys.stdout.isatty() else 120)


@app.command(help=__doc__)
def main(
    seed: Annotated[int, typer.Option(help="order of the faults, models and requests")] = 1,
    seconds: Annotated[float, typer.Option(min=5, help="how long faults are injected")] = 180.0,
    faults: Annotated[str, typer.Option(help="names, separated by commas; all: each there is")] = "all",
    settle: Annotated[float, typer.Option(min=1, help="seconds after each fault in which it must be over")] = 5.0,
    recovery: Annotated[float, typer.Option(min=0, help="seconds that a recovery may take")] = 3.0,
    out: Annotated[Path | None, typer.Option(help="file for the figures as JSON")] = None,
    logs: Annotated[Path | None, typer.Option(help="folder to keep the servers' logs in")] = None,
) -> None:
    """See the module."""
    chosen = choose_faults(faults)
    with tempfile.TemporaryDirectory(prefix="fleetcast-chaos-") as folder, s3_server() as s3:
        report, notes, problems = run_chaos(s3, Path(folder), seed, seconds, chosen, settle)
        if logs is not None:
            logs.mkdir(parents=True, exist_ok=True)
            for path in Path(folder).glob("*.log"):
                (logs / path.name).write_bytes(path.read_bytes())
    problems += report.violations(recovery)
    show_report(report, notes, problems)
    if out is not None:
        figures = {"seed": seed, "seconds": seconds, "settle_s": settle, "recovery_s": recovery}
        out.write_text(
            json.dumps({**figures, **report.to_json(), "notes": notes, "problems": problems}, indent=1) + "\n"
        )
    if problems:
        raise typer.Exit(1)


def choose_faults(names: str) -> list[Fault]:
    """The faults of these names. Raises BadParameter that lists them."""
    wanted = list(FAULTS) if names == "all" else [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in FAULTS]
    if unknown:
        raise typer.BadParameter(f"no fault is called {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    return [FAULTS[name] for name in wanted]


def run_chaos(
    s3: S3Server, folder: Path, seed: int, seconds: float, faults: Sequence[Fault], settle_s: float, steps: int = 0
) -> tuple[Report, list[str], list[str]]:
    """Start all, inject faults for so long and at least so many steps, end all.

    The report, notes, and what was wrong beside the requests.
    """
    problems: list[str] = []
    started = time.monotonic()
    clients: Clients | None = None
    world: World | None = None
    try:
        with open_world(s3, folder, seed) as world:
            possible = [fault for fault in faults if not fault.needs or getattr(world, fault.needs) is not None]
            for fault in faults:
                if fault not in possible:
                    world.say(f"{fault.name} is left out: this user cannot make its {fault.needs}")
            with Clients(world.server.address, world.answers, seed) as clients:
                started = time.monotonic()
                time.sleep(WARM_S)
                inject_faults(world, clients, possible, seed, started + seconds, settle_s, steps)
    except AssertionError as error:  # the server did not end as it should, or not start again
        problems.append(str(error).partition("\n")[0])
    assert world is not None, problems
    assert clients is not None, problems
    return count_verdicts(clients.records, world.history, started), world.notes, problems


def inject_faults(
    world: World, clients: Clients, faults: Sequence[Fault], seed: int, until: float, settle_s: float, steps: int
) -> None:
    """One step after another, until the time has come and there were so many."""
    total, began = until - time.monotonic(), time.monotonic()
    for number, step in enumerate(make_schedule(seed, faults)):
        begin = time.monotonic()
        if begin >= until and number >= steps:
            return
        names = tuple(fault.name for fault in step)
        show_progress(
            f"{begin - began:4.0f} s of {max(0.0, total):.0f}: {' + '.join(names)}, {len(clients.records)} requests"
        )
        with apply_faults(world, step):
            time.sleep(max(measure_hold(fault, total) for fault in step))
        healed = time.monotonic()
        wait_until(world.is_whole, "all processes are up")  # else the next fault meets half a server
        whole = time.monotonic()
        time.sleep(max(0.0, settle_s - (whole - healed)))
        world.history.windows.append(Window(names, begin, healed, whole, time.monotonic()))


def measure_hold(fault: Fault, total_s: float) -> float:
    """How long the fault stays, in a run that takes so long."""
    return max(fault.hold_s, min(GONE_S, GONE_SHARE * total_s)) if fault.name == "store-gone" else fault.hold_s


def show_progress(text: str) -> None:
    """A line on stderr, which the next replaces on a terminal."""
    terminal = sys.stderr.isatty()
    with suppress(OSError):
        sys.stderr.write(f"\r\x1b[K{text}" if terminal else f"{text}\n")
        sys.stderr.flush()


def show_report(report: Report, notes: Sequence[str], problems: Sequence[str]) -> None:
    """The figures as tables, then what did not hold."""
    if sys.stderr.isatty():
        sys.stderr.write("\n")
    CONSOLE.print(make_table(report.rows))
    totals = ", ".join(f"{report.counts.get(verdict, 0)} {verdict}" for verdict in Verdict)
    CONSOLE.print(f"{report.requests} requests: {totals}; the slowest took {report.slowest_s:.2f} s")
    for reason, number in report.refusals.items():
        CONSOLE.print(f"{number} refused: {reason}", markup=False, highlight=False)
    for line in (*notes, *report.examples):
        CONSOLE.print(line, markup=False, highlight=False)
    for problem in problems:
        CONSOLE.print(f"DID NOT HOLD: {problem}", markup=False, highlight=False)
    if not problems:
        CONSOLE.print("all held")


def make_table(rows: Sequence[FaultRow]) -> Table:
    """A row for each step."""
    table = Table("fault", "at s", "held s", "while it lasted", "after it", "recovery s", "all up s")
    for row in rows:
        table.add_row(
            " + ".join(row.faults),
            f"{row.begin_s:.0f}",
            f"{row.held_s:.1f}",
            format_counts(row.during),
            format_counts(row.after),
            "not seen" if row.recovery_s is None else f"{row.recovery_s:.2f}",
            f"{row.whole_s:.2f}",
        )
    return table


def format_counts(counts: object) -> str:
    """For example `112 right, 3 refused`."""
    assert isinstance(counts, dict)
    return ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items(), key=lambda each: -each[1]))


if __name__ == "__main__":
    app()
