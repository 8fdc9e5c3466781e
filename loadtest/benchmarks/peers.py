"""The same weights and the same body on other servers and on Fleetcast, in one run.

All servers are up from the start. In each round every server has its turn of load, from wrk over 8 models at 1, 8 and
32 connections, while the others idle; a server that uses CPU time when idle is stopped between its turns. Before the
rounds: the time from registering a model to its first response, with its files on the local disk. After them: memory
per extra model, and what happens when models exceed memory. Saves one record. The first run installs the peers with
pip, about 5 GB under `.fleetcast/peers`. Triton and ModelMesh are missing, because pip has neither.
"""

import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from loadtest import record
from loadtest.driver import wrk
from loadtest.peers import over_memory
from loadtest.peers.comparison import LOST, SEED, PeerComparison, write_models
from loadtest.peers.comparison_table import CONNECTIONS, OURS, OURS_NPY, build_table, describe_servers
from loadtest.peers.environments import find_requirements, is_installed, parse_pins
from loadtest.peers.network import load_network
from loadtest.peers.servers import PACKAGE, PEERS, start_fleetcast, start_plain
from server.contract import NPY

RECORDED = 7  #: least number of rounds of a record
MODELS, FLEET, SPARE = 8, 200, 64
BUDGET_MB = 1000.0  #: MB by which a server may grow when it gets more models

CONSOLE = Console(width=None if sys.stdout.isatty() else 165)


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    *,
    rounds: Annotated[int, typer.Option(min=1, help="number of rounds; fewer than 7 save no record")] = RECORDED,
    seconds: Annotated[int, typer.Option(min=1, help="duration of each of the three loads of a turn")] = 3,
    peers: Annotated[str, typer.Option(help="peers to compare, comma-separated")] = ",".join(PEERS),
    tell: Annotated[bool, typer.Option("--list", help="list the peers and exit")] = False,
) -> None:
    """Compare with TorchServe, Multi Model Server, MLServer, Ray Serve and a plain ONNX Runtime server."""
    if tell:
        return show_peers()
    chosen = [peer.strip() for peer in peers.split(",") if peer.strip()]
    if unknown := [peer for peer in chosen if peer not in PEERS]:
        raise typer.BadParameter(f"there is no peer {', '.join(unknown)}: known are {', '.join(PEERS)}")
    wrk.require_wrk()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that every server is ended
    before = record.describe_machine()
    results = compare_servers(chosen, rounds, seconds)
    CONSOLE.print(build_table(results))
    CONSOLE.print("\n".join(describe_servers(results)), soft_wrap=True, highlight=False)
    if rounds >= RECORDED:
        CONSOLE.print(f"record: {record.save_record('peers', SEED, before, results)}")
    return None


def show_peers() -> None:
    """List the peers with their versions, and whether their environments are installed."""
    for peer in PEERS:
        found = parse_pins(find_requirements(peer).read_text())
        state = "installed" if is_installed(peer) else "installed at its first run"
        CONSOLE.print(
            f"{peer:11} {PACKAGE[peer]} {found[PACKAGE[peer]]}, torch {found['torch']}: {state}", highlight=False
        )


def compare_servers(peers: list[str], rounds: int, seconds: int) -> dict[str, Any]:
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
        for name in list(comparison.contenders):
            progress.update(step, description=f"{name}: more models")
            _exceed_memory(comparison, name)
        return {
            "models": MODELS,
            "rounds": rounds,
            "seconds": seconds,
            "body_bytes": len(comparison.contenders[OURS].body),
            "connections": CONNECTIONS,
            "servers": comparison.results(),
            "unavailable": comparison.lost,
        }


def _enter_servers(comparison: PeerComparison, peers: list[str], folder: Path, say: Callable[[str], None]) -> None:
    """Start Fleetcast (with few models, with many, with binary bodies), the plain peer, and the chosen peers."""
    models = comparison.models
    for name, count in ((OURS, MODELS), (f"{OURS} x{FLEET}", FLEET)):
        say(f"{name}: starting")
        comparison.enter(name, record.find_commit()[:7], partial(start_fleetcast, name, models.store), count)
    say(f"{OURS_NPY}: starting")
    comparison.enter(OURS_NPY, record.find_commit()[:7], partial(start_fleetcast, OURS_NPY, models.store), MODELS, NPY)
    say("plain: starting")
    network = load_network(str(models.weights / "m0"))
    comparison.enter(
        "plain", f"onnxruntime {version('onnxruntime')}", partial(start_plain, folder, network, MODELS), MODELS
    )
    for peer in peers:
        say(f"{peer}: starting")
        pinned = parse_pins(find_requirements(peer).read_text())[PACKAGE[peer]]
        comparison.enter(peer, pinned, partial(PEERS[peer], models.weights, say), MODELS)


def _exceed_memory(comparison: PeerComparison, name: str) -> None:
    """Load more models, and then more than fit in memory."""
    contender, names = comparison.contenders[name], comparison.models.names
    if contender.server.fixed or contender.target.count == FLEET or name == OURS_NPY:
        return
    body, found = contender.body, contender.found
    try:
        with contender.awake():
            growth = over_memory.grow_past_memory(contender.server, names[MODELS:FLEET], body, BUDGET_MB)
            found["growth"] = {"models": growth.models, "mb": growth.mb, "refused": growth.refused}
            found["mb_per_model"] = growth.mb / growth.models if growth.models else None
            if name == OURS:
                told = over_memory.measure_ours(comparison.models.store, names[:FLEET], body)
            elif name == "ray":
                told = over_memory.measure_ray(comparison.models.weights, names[:MODELS], body)
            elif name == "mlserver":
                told = over_memory.measure_limited(contender.server, names[:MODELS], names[FLEET:], body)
            else:
                told = str(growth)
    except LOST as error:  # the results of its turns are kept
        told = f"the trial failed: {error}"
    found["beyond"] = told
