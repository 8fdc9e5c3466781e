"""What a tick of 1,000 requests costs the host of a GPU, on a device that does nothing. Needs no GPU; saves a record.

Rows of `server.worker.engine.bench_tick`: `tick` from decoded rows to answers, `bodies` from npy bodies to npy answers,
and `cpu`, 64 bodies on the CPU's engine, which computes. `cpu ms` is the process's CPU time, which a busy machine
disturbs less than the clock. With --beside the modules of another checkout take turns with this one's, and `ratio` is
their time by ours, turn by turn: `git worktree add ../before COMMIT`, then --beside ../before.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from loadtest import record

SEED = 7  #: of server.worker.engine.bench_tick
ROOT = Path(__file__).parents[2]
SCRIPT = Path("server/worker/engine/bench_tick.py")
PARTS = ("tick", "bodies", "cpu")
HERE, BESIDE = "here", "beside"
TICK_GOAL_MS, RATIO_GOAL = 0.4, 8.0

CONSOLE = Console(width=None if sys.stdout.isatty() else 110)

Rounds = Mapping[str, list[dict[str, float]]]


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    *,
    rounds: Annotated[int, typer.Option(min=1, help="number of rounds")] = 25,
    beside: Annotated[Path | None, typer.Option(exists=True, help="a checkout to compare with")] = None,
    save: Annotated[bool, typer.Option(help="save a record")] = True,
) -> None:
    """Measure and print."""
    if beside is not None and not (beside / "server/worker").is_dir():  # the installed modules would be measured
        raise typer.BadParameter(f"{beside} is no checkout: it has no server/worker")
    before = record.describe_machine()
    trees = {HERE: ROOT} if beside is None else {HERE: ROOT, BESIDE: beside.resolve()}
    results: dict[str, Any] = summarise_rounds(measure_rounds(trees, rounds))
    results["load_average_after"] = os.getloadavg()[0]
    if beside is not None:
        results["beside_commit"] = record.find_commit(beside)
    CONSOLE.print(build_table(results))
    if save:
        CONSOLE.print(f"record: {record.save_record('tick', SEED, before, results)}")


def measure_rounds(trees: Mapping[str, Path], rounds: int) -> Rounds:
    """Let the trees measure in turns, each first in every other round; a round before the first does not count."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(_run_script(tree)) for name, tree in trees.items()}
        for turn in range(rounds + 1):
            for name in list(trees)[:: 1 if turn % 2 else -1]:
                line = _ask_round(processes[name])
                if turn:
                    found[name].append(line)
    return found


def summarise_rounds(found: Rounds) -> dict[str, Any]:
    """The spread of each number of each tree, and of each part's ratio by the clock and by CPU time."""
    results: dict[str, Any] = {
        name: {key: record.summarise_spread([line[key] for line in lines]) for key in lines[0]}
        for name, lines in found.items()
    }
    if BESIDE in found:
        pairs = list(zip(found[BESIDE], found[HERE], strict=True))
        results["ratio"] = {
            key: record.summarise_spread([theirs[key] / ours[key] for theirs, ours in pairs]) for key in pairs[0][0]
        }
    return results


def build_table(results: Mapping[str, Any]) -> Table:
    """Make a table of medians with their spread."""
    shown = Table("", "ms", "cpu ms", "beside ms", "ratio", "ratio of cpu ms", "goal")
    for part in PARTS:
        keys = (f"{part}_ms", f"{part}_cpu_ms")
        cells = [_format_spread(results[HERE][key]) for key in keys]
        cells += [_format_spread(results[BESIDE][keys[0]])] if BESIDE in results else [""]
        cells += [_format_spread(results["ratio"][key]) if "ratio" in results else "" for key in keys]
        shown.add_row(part, *cells, f"<= {TICK_GOAL_MS:g} ms, ratio >= {RATIO_GOAL:g}" if part == "tick" else "")
    return shown


@contextmanager
def _run_script(tree: Path) -> Iterator["subprocess.Popen[str]"]:
    """Our script with a tree's modules. It measures a round for each line, and ends with its input."""
    process = subprocess.Popen(
        [sys.executable, "-P", str(ROOT / SCRIPT)],
        cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        yield process
        assert process.stdin is not None, "it is a pipe"
        process.stdin.close()


def _ask_round(process: "subprocess.Popen[str]") -> dict[str, float]:
    assert process.stdin is not None, "it is a pipe"
    assert process.stdout is not None, "it is a pipe"
    process.stdin.write("\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise typer.Exit(process.wait() or 1)  # it has printed the cause
    found: dict[str, float] = json.loads(line)
    return found


def _format_spread(spread: Mapping[str, float]) -> str:
    digits = 2 if spread["median"] < 10 else 1  # noqa: PLR2004 -- as many as fit
    return f"{spread['median']:.{digits}f} ({spread['min']:.{digits}f}-{spread['max']:.{digits}f})"
