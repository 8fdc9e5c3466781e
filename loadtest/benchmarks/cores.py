"""Throughput by number of workers and fronts on this machine, and the CPU time of each part of a request.

200 resident models under load by wrk, which shares the machine with the server: JSON and npy bodies, every number of
workers and fronts up to the number of cores, in turn. `front` and `worker` are microseconds of CPU time per request.
`decode`, `forward` and `encode` are wall time as the worker counts it, so they include the wait for a core when there
are more processes than cores. `rest` is what a worker uses beyond these three: frames, queues and its event loop. Saves
a record.

With --beside the server of another checkout takes turns with this one, and `ratio` is this one's requests a second by
the other's, turn by turn: `git worktree add ../before COMMIT`, then --beside ../before.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from handlers.forecasters import build_family
from loadtest import record
from loadtest.benchmarks.core import MODELS, write_bodies, write_fleet
from loadtest.driver import wrk
from loadtest.fleets.network_shape import CONFIG as TCN
from loadtest.observe.local_server import LocalServer, run_local_server
from loadtest.observe.resource_counts import read_cpu_seconds
from server.contract import JSON, NPY, STEP_SECONDS

SEED = 7
SECONDS = 3.0
HERE, BESIDE = "here", "beside"
PARTS = ("decode", "forward", "encode")

CONSOLE = Console(width=None if sys.stdout.isatty() else 110)


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="number of rounds over all combinations")] = 7,
    connections: Annotated[str, typer.Option(help="numbers of wrk's connections, separated by commas")] = "32",
    most: Annotated[int | None, typer.Option(min=1, help="most workers, and fronts; default: the cores")] = None,
    beside: Annotated[Path | None, typer.Option(exists=True, help="a checkout to compare with")] = None,
) -> None:
    """Measure every number of workers and fronts up to the cores."""
    try:
        numbers = [int(each) for each in connections.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{connections!r} are no numbers such as 1,8,32") from None
    wrk.require_wrk()
    before = record.describe_machine()
    cores = len(os.sched_getaffinity(0))
    shapes = list(product(range(1, (most or cores) + 1), repeat=2))
    trees = {HERE: None} if beside is None else {HERE: None, BESIDE: beside.resolve()}
    runs: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_fleet(folder / "store", build_family("tcn", TCN), TCN, [f"m{i}.mar" for i in range(MODELS)])
        bodies = dict(zip((JSON, NPY), write_bodies(folder), strict=True))
        servers = {}
        for (workers, fronts), (name, tree) in product(shapes, trees.items()):
            flags = ["--workers", str(workers), "--fronts", str(fronts)]
            server = stack.enter_context(run_local_server(str(folder / "store"), flags, tree=tree))
            servers[workers, fronts, name] = server
        for turn in track(range(rounds + 1), "rounds", transient=True):
            order = list(trees) if turn % 2 else list(reversed(trees))
            for (workers, fronts), (media, body), count, name in product(shapes, bodies.items(), numbers, order):
                server = servers[workers, fronts, name]
                target = wrk.WrkTarget("", f"{server.inference}/invocations", MODELS, ".mar", body, media)
                found = _measure_combination(server, target, count, SECONDS if turn else 1.0)
                if turn:
                    kind = media.rpartition("-")[2].rpartition("/")[2]
                    key = f"{workers}+{fronts}, {count}, {kind}, {name}"
                    runs.setdefault(key, []).append(found)
    add_ratios(runs)
    results: dict[str, Any] = {
        key: {name: record.summarise_spread([run[name] for run in found]) for name in found[0]}
        for key, found in runs.items()
    }
    if beside is not None:
        results["beside_commit"] = record.find_commit(beside)
    CONSOLE.print(f"record: {record.save_record('cores', SEED, before, results)}")
    CONSOLE.print(build_table(results))


def add_ratios(runs: Mapping[str, list[dict[str, float]]]) -> None:
    """Add to each run here its requests a second by those of the run beside it in the same round, if there is one."""
    for key, found in runs.items():
        others = runs.get(f"{key.removesuffix(HERE)}{BESIDE}", []) if key.endswith(HERE) else []
        for one, other in zip(found, others, strict=False):
            one["ratio"] = one["requests_per_s"] / other["requests_per_s"]


def _measure_combination(
    server: LocalServer, target: wrk.WrkTarget, connections: int, seconds: float
) -> dict[str, float]:
    """Measure requests a second, and the microseconds of a request by part."""
    before = dict(_read_seconds(server))
    found = wrk.run_wrk(target, connections, seconds)
    times = {"requests_per_s": found.requests_per_s, "p50_ms": found.p50_ms, "p99_ms": found.p99_ms}
    return times | compute_request_cost(before, dict(_read_seconds(server)), found.requests_per_s * seconds)


def compute_request_cost(before: Mapping[str, float], after: Mapping[str, float], requests: float) -> dict[str, float]:
    """Compute microseconds a request from two readings of `_read_seconds`; `rest` is worker time beyond its parts."""
    used = {name: (after[name] - before[name]) / requests * 1e6 for name in after}
    return {**used, "rest": used["worker"] - sum(used[part] for part in PARTS)}


def _read_seconds(server: LocalServer) -> Iterator[tuple[str, float]]:
    """Read the CPU seconds of fronts and workers, and the seconds of the workers' parts."""
    for kind in ("front", "worker"):
        yield kind, sum(read_cpu_seconds(each["pid"]) for each in server.processes() if each["kind"] == kind)
    spent = server.totals(STEP_SECONDS.series, "part")
    for part in PARTS:
        yield part, spent[part]


def build_table(results: Mapping[str, Any]) -> Table:
    """Make a table of medians with a row for each combination."""
    columns = ("requests_per_s", "p50_ms", "p99_ms", "front", "worker", *PARTS, "rest")
    shown = Table(
        "workers + fronts, connections",
        "requests/s",
        "p50 ms",
        "p99 ms",
        "front us",
        "worker us",
        *PARTS,
        "rest",
        "ratio",
    )
    for key, row in results.items():
        if not isinstance(row, dict):  # the other checkout's commit
            continue
        cells = [f"{row[name]['median']:.{2 if name.endswith('ms') else 0}f}" for name in columns]
        rate, ratio = row["requests_per_s"], row.get("ratio")
        against = "" if ratio is None else f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
        shown.add_row(key, f"{cells[0]} ({rate['min']:.0f}-{rate['max']:.0f})", *cells[1:], against)
    return shown
