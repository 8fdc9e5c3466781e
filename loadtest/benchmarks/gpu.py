"""The accelerator's steps on a GPU, without HTTP. Takes minutes and saves a record.

A process of the server (`server.worker.engine.bench_gpu`) measures a tick of 1,000 models beside their networks one by
one, 10,000 resident models, and the return of an evicted model from host memory.
"""

import json
import subprocess
import sys
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from loadtest import record

SEED = 7  #: seed of server.worker.engine.bench_gpu
TICK_GOAL_MS, RATIO_GOAL, RETURN_GOAL_MS = 1.0, 100.0, 1.0

CONSOLE = Console(width=None if sys.stdout.isatty() else 110)


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(save: bool = True) -> None:
    """Measure and print; the record is written unless `--no-save`."""
    before = record.describe_machine()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "server.worker.engine.bench_gpu"], stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        raise typer.Exit(done.returncode)  # the process has printed the cause
    results = json.loads(done.stdout)
    CONSOLE.print(build_table(results))
    if save:
        CONSOLE.print(f"record: {record.save_record('gpu', SEED, before, results)}")


def build_table(results: dict[str, Any]) -> Table:
    """Make a table of the results with their goals and floors."""
    tick, many, back = results["tick"], results["scattered"], results["returning"]
    floor = tick["floor_ms"]
    shown = Table("", "median", "min", "max", "against", title=results["device"])
    against = f"goal {TICK_GOAL_MS:g}; floor {floor['sum']:.3f} ms of bytes and launches"
    _add_row(shown, f"tick of {tick['models']} models, ms", tick["ms"], against)
    share = f"{floor['gather_of_copy_bandwidth']:.0%} of copy bandwidth in the gather"
    _add_row(shown, "... one by one, eager, ms", tick["one_by_one_eager_ms"], share)
    shown.add_row("... ratio", f"{tick['ratio']:.0f}", "", "", f"goal {RATIO_GOAL:g}")
    _add_row(shown, f"tick out of {many['resident']} resident, ms", many["tick_ms"], "")
    _add_row(shown, "single request, ms", many["single_ms"], "")
    _add_row(shown, "evicted model back, ms", back["copy_ms"], f"goal {RETURN_GOAL_MS:g}; {back['row_bytes']} bytes")
    _add_row(shown, "... and its first answer, ms", back["first_answer_ms"], "")
    for family in ("tcn", "gru"):
        for rows, taken in results[family].items():
            _add_row(shown, f"{family}, batch {rows}, ms", taken, f"{taken['us_a_request']:.1f} us a request")
    return shown


def _add_row(shown: Table, what: str, spread: dict[str, float], against: str) -> None:
    shown.add_row(what, *(f"{spread[key]:.3f}" for key in ("median", "min", "max")), against)
