"""The same weights and the same input on other servers and on Fleetcast, in one run.

All servers are up from the start. In each round every server has its turn of load, from wrk over 8 models at 1, 8 and
32 connections, while the others idle; a server that uses CPU time when idle is stopped between its turns. Before the
rounds: each server's answers are compared with those of the weights in plain torch, and the time from registering a
model to its first response is measured, with its files on the local disk. After them, unless --no-memory: memory per
extra model, and what happens when models exceed memory. All settings are printed. Saves one record. The first run
installs the peers with pip, each apart, about 6 GB under `.fleetcast/peers`. ModelMesh is missing: pip has it not.
"""

import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from loadtest import record
from loadtest.driver import wrk
from loadtest.peers import over_memory
from loadtest.peers.comparison import LOST, SEED, PeerComparison, write_models
from loadtest.peers.comparison_table import (
    CONNECTIONS,
    OURS,
    build_table,
    describe_servers,
    judge_goals,
    list_goals,
    list_settings,
)
from loadtest.peers.lineup import (
    CHOICES,
    FLEET,
    MODELS,
    describe_choice,
    list_our_entries,
    list_peer_entries,
    parse_choice,
)
from server.contract import JSON

RECORDED = 7  #: least number of rounds of a record
SPARE = 64
BUDGET_MB = 1000.0  #: MB by which a server may grow when it gets more models

CONSOLE = Console(width=None if sys.stdout.isatty() else 165)


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    *,
    rounds: Annotated[int, typer.Option(min=1, help="number of rounds; fewer than 7 save no record")] = RECORDED,
    seconds: Annotated[int, typer.Option(min=1, help="duration of each of the three loads of a turn")] = 3,
    peers: Annotated[str, typer.Option(help="peers to compare, comma-separated")] = ",".join(CHOICES),
    memory: Annotated[bool, typer.Option(help="also measure memory per model, and models that exceed memory")] = True,
    tell: Annotated[bool, typer.Option("--list", help="list the peers and exit")] = False,
) -> None:
    """Compare with Triton, Mosec, Ray Serve, TorchServe, Multi Model Server, MLServer and plain servers."""
    if tell:
        for peer in CHOICES:
            CONSOLE.print(describe_choice(peer), highlight=False)
        return
    try:
        chosen = parse_choice(peers)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    wrk.require_wrk()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that every server is ended
    before = record.describe_machine()
    results = compare_servers(chosen, rounds, seconds, memory=memory)
    CONSOLE.print(build_table(results))
    lines = [*describe_servers(results), "Goals:", *(f"  {line}" for line in list_goals(results))]
    CONSOLE.print("\n".join([*lines, *list_settings(results)]), soft_wrap=True, highlight=False, markup=False)
    if rounds >= RECORDED:
        CONSOLE.print(f"record: {record.save_record('peers', SEED, before, results)}")


def compare_servers(peers: Sequence[str], rounds: int, seconds: int, *, memory: bool) -> dict[str, Any]:
    """Run the whole comparison and end all its processes."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        progress = stack.enter_context(Progress(*columns, console=CONSOLE, transient=True))
        step = progress.add_task("making models")
        comparison = PeerComparison(write_models(folder, FLEET + SPARE), folder, stack)
        _enter_servers(comparison, peers, folder, lambda text: progress.update(step, description=text))
        comparison.settle()
        for number, name, connections in comparison.play(rounds, seconds):
            progress.update(step, description=f"round {number + 1} of {rounds}: {name}, {connections} connections")
        for name in list(comparison.contenders) if memory else ():
            progress.update(step, description=f"{name}: more models")
            _exceed_memory(comparison, name)
        servers = comparison.results()
        return {
            "models": MODELS,
            "rounds": rounds,
            "seconds": seconds,
            "body_bytes": len(comparison.contenders[OURS].request.body),
            "connections": CONNECTIONS,
            "servers": servers,
            "goals": list(judge_goals(servers)),
            "unavailable": comparison.lost,
        }


def _enter_servers(comparison: PeerComparison, peers: Sequence[str], folder: Path, say: Callable[[str], None]) -> None:
    """Start Fleetcast and the chosen peers; one of theirs that cannot be had is told in the results."""
    models = comparison.models
    entries = [*list_our_entries(models)]
    for peer in peers:
        entries += list_peer_entries(peer, models, folder, say)
    for entry in entries:
        say(f"{entry.name}: starting")
        comparison.enter(entry.name, entry.version, entry.start, entry.count, entry.encode)


def _exceed_memory(comparison: PeerComparison, name: str) -> None:
    """Load more models, and then more than fit in memory."""
    contender, names = comparison.contenders[name], comparison.models.names
    if contender.server.fixed or contender.target.count == FLEET or contender.target.content_type != JSON:
        return
    request, found = contender.request, contender.found
    try:
        with contender.awake():
            growth = over_memory.grow_past_memory(contender.server, names[MODELS:FLEET], request.body, BUDGET_MB)
            found["growth"] = {"models": growth.models, "mb": growth.mb, "refused": growth.refused}
            found["mb_per_model"] = growth.mb / growth.models if growth.models else None
            if name == OURS:
                told = over_memory.measure_ours(comparison.models.store, names[:FLEET], request.body)
            elif name.startswith("ray"):
                told = over_memory.measure_ray(comparison.models.weights, names[:MODELS], request.body)
            elif name == "mlserver":
                told = over_memory.measure_limited(contender.server, names[:MODELS], names[FLEET:], request.body)
            else:
                told = str(growth)
    except LOST as error:  # the results of its turns are kept
        told = f"the trial failed: {error}"
    found["beyond"] = told
