"""Archives with code beside Multi Model Server: the same handler, network and weights on both, in one run.

Both servers are up from the start, and take turns within each round: a new archive of 100 KB, from the request to its
first answer (registration included there); then load from wrk on one model at 1 and 8 connections, and on 16 models at
8. After the rounds: private memory of an extra model's process, and 100 archives asked in turn by a server with room
for 20. The network is small (two layers on 32 features, eager), so that what is compared are the servers;
`--network tcn` takes that of `bench peers`, whose own time is the same on both. CPU time a request tells them apart
also on a machine that others use. Saves a record. The first run installs Multi Model Server with pip, about 1 GB under
`.fleetcast/peers`; it needs Java and wrk.
"""

import json
import re
import signal
import statistics
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from loadtest import record
from loadtest.driver import wrk
from loadtest.observe.local_server import LocalServer, run_local_server
from loadtest.peers.comparison import SEED, Models, write_models
from loadtest.peers.comparison_table import OURS, order_turns
from loadtest.peers.environments import HERE
from loadtest.peers.network import PlainMlp
from loadtest.peers.peer_server import PeerServer
from loadtest.peers.servers import start_mms, wrap_server
from server.contract import EVICTIONS, JSON, MODELS_PATH

RECORDED = 7  #: least number of rounds of a record
PEER, WARM = "mms", 16  #: models of the load over many
LOADS = {"1 model, 1 connection": (1, 1), "1 model, 8 connections": (1, 8), "16 models, 8 connections": (WARM, 8)}
TURNS_OF, ROOM, LAPS = 100, 20, 2  #: archives that are asked in turn, how many have room, and how often
SETTLE_S = 1  #: of load before the rounds
GOALS = {
    "load p50, ms": ("<=", 60.0),
    "private MB a process": ("<=", 16.0),
    "p50 / theirs, 1 model, 1 connection": ("<=", 0.5),
    "requests/s / theirs, 1 model, 8 connections": (">=", 2.0),
    "requests/s / theirs, 16 models, 8 connections": (">=", 4.0),
    f"failed of {TURNS_OF} archives in room for {ROOM}": ("<=", 0.0),
}


class Network(StrEnum):
    """What the archives hold."""

    MLP = "mlp"
    TCN = "tcn"


CONSOLE = Console(width=None if sys.stdout.isatty() else 120)


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    rounds: Annotated[int, typer.Option(min=1, help="number of rounds; fewer than 7 save no record")] = RECORDED,
    seconds: Annotated[int, typer.Option(min=1, help="duration of each of the three loads of a turn")] = 3,
    network: Annotated[Network, typer.Option(help="of each archive")] = Network.MLP,
) -> None:
    """Measure, print, and compare with the goals."""
    wrk.require_wrk()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that every server is ended
    before = record.describe_machine()
    results = measure_code(network, rounds, seconds, lambda text: CONSOLE.print(text, style="dim"))
    CONSOLE.print(build_table(results))
    for load, found in results["loads"].items():
        spent = ", ".join(f"{name} {each['cpu_ms']['median']:.2f}" for name, each in found.items())
        CONSOLE.print(f"CPU ms a request, {load}: {spent}", highlight=False)
    if rounds >= RECORDED:
        CONSOLE.print(f"record: {record.save_record('code', SEED, before, results)}")


def measure_code(network: Network, rounds: int, seconds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """The whole comparison. Raises RuntimeError where a server answers wrong."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        say("making archives")
        count = max(WARM + rounds, TURNS_OF)
        models = write_models(folder, count) if network is Network.TCN else write_small_models(folder, count)
        store = folder / "code"
        store.mkdir()
        for name in models.names:
            pack_handler(models.weights / name, store / f"{name}.mar")
        say("starting servers")
        local = stack.enter_context(run_code_server(store))
        servers = {OURS: wrap_server(OURS, local), PEER: stack.enter_context(start_mms(models.weights, say))}
        comparison = Comparison(models, servers, folder / "body.json")
        say(f"loading {WARM} models into each")
        comparison.warm()
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            comparison.play(number, seconds)
        private = [read_private(pid) / 1e6 for pid in list_children(local)]
        say(f"{TURNS_OF} archives in turn, with room for {ROOM}")
        size = measure_room(local)
        return {
            "network": str(network),
            "rounds": rounds,
            "seconds": seconds,
            "archive_bytes": (store / "m0.mar").stat().st_size,
            "body_bytes": comparison.body_file.stat().st_size,
            "private_mb": record.summarise_spread(private),
            "turns": take_turns(store, models, comparison.body, size),
            **comparison.results(),
        }


def write_small_models(folder: Path, count: int) -> Models:
    """Make `count` models of two layers with seeded random weights, and their answers."""
    x = np.random.default_rng(SEED).standard_normal(PlainMlp.features, np.float32).round(4)
    models = Models(folder / "store", folder / "weights", x, {})
    for i in range(count):
        torch.manual_seed(SEED * 1_000_000 + i)
        network = PlainMlp()
        (models.weights / f"m{i}").mkdir(parents=True)
        save_file(network.state_dict(), models.weights / f"m{i}" / "weights.safetensors")
        with torch.inference_mode():
            models.answers[f"m{i}"] = network(torch.from_numpy(x)[None]).numpy().astype(np.float64).ravel()
    return models


def pack_handler(weights: Path, archive: Path) -> None:
    """An archive of the handler that Multi Model Server runs, as its archiver packs it."""
    manifest = {
        "runtime": "python",
        "model": {"modelName": archive.stem, "handler": "handler:handle"},
        "modelServerVersion": "1.0",
        "implementationVersion": "1.0",
        "specificationVersion": "1.0",
    }
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        for source in (HERE / "network.py", HERE / PEER / "handler.py", weights / "weights.safetensors"):
            file.write(source, source.name)


@contextmanager
def run_code_server(store: Path, *flags: str) -> Iterator[LocalServer]:
    """A server of one worker that runs the code of all archives."""
    with run_local_server(str(store), ["--workers", "1", "--fronts", "1", "--allow-code", "*", *flags]) as local:
        yield local


class Comparison:
    """Two servers that take turns. `found`: what was measured, by server."""

    def __init__(self, models: Models, servers: Mapping[str, PeerServer], body_file: Path) -> None:
        self.servers, self.body_file = servers, body_file
        self.body = servers[OURS].dialect.tensor_body(models.x)
        self.loads: dict[str, list[float]] = {name: [] for name in servers}
        self.runs: dict[str, dict[str, list[wrk.WrkResult]]] = {name: {load: [] for load in LOADS} for name in servers}
        self.cpu_ms: dict[str, dict[str, list[float]]] = {name: {load: [] for load in LOADS} for name in servers}
        self._models = models
        body_file.write_bytes(self.body)

    def __repr__(self) -> str:
        return f"<Comparison of {', '.join(self.servers)}>"

    def warm(self) -> None:
        """Load the models that are asked in the rounds, and compare the answers with the plain network's."""
        for server in self.servers.values():
            for name in self._models.names[:WARM]:
                server.load(name, self.body)
                got, wanted = server.ask(name, self.body), self._models.answers[name]
                if got.shape != wanted.shape or abs(got - wanted).max() > 1e-4:  # noqa: PLR2004 -- float32
                    raise RuntimeError(f"{server.name} answers {got[:3]} for {name}, not {wanted[:3]}")
            wrk.run_wrk(self._target(server, WARM), 8, SETTLE_S)

    def play(self, number: int, seconds: int) -> None:
        """One round: each server loads a new model, then each load on each server, in rotating order."""
        order = order_turns(list(self.servers), number)
        for name in order:
            model = self._models.names[WARM + number]
            self.loads[name].append(self.servers[name].load(model, self.body) * 1e3)
        for load, (count, connections) in LOADS.items():
            for name in order:
                server, before = self.servers[name], self.servers[name].tree.cpu_s()
                run = wrk.run_wrk(self._target(server, count), connections, seconds)
                self.runs[name][load].append(run)
                self.cpu_ms[name][load].append((server.tree.cpu_s() - before) * 1e3 / (run.requests_per_s * seconds))

    def _target(self, server: PeerServer, count: int) -> wrk.WrkTarget:
        return wrk.WrkTarget(server.name, server.url, count, server.suffix, self.body_file, JSON, server.dialect)

    def results(self) -> dict[str, Any]:
        """Medians of each server, and of ours / theirs in each round."""
        ours, theirs = self.runs[OURS], self.runs[PEER]
        return {
            "load_ms": {name: record.summarise_spread(found) for name, found in self.loads.items()},
            "loads": {
                load: {
                    name: {
                        "requests_per_s": record.summarise_spread([run.requests_per_s for run in runs[load]]),
                        "p50_ms": record.summarise_spread([run.p50_ms for run in runs[load]]),
                        "cpu_ms": record.summarise_spread(self.cpu_ms[name][load]),
                    }
                    for name, runs in self.runs.items()
                }
                for load in LOADS
            },
            "ratios": {
                load: {
                    "requests_per_s": statistics.median(
                        mine.requests_per_s / its.requests_per_s
                        for mine, its in zip(ours[load], theirs[load], strict=True)
                    ),
                    "p50": statistics.median(
                        mine.p50_ms / its.p50_ms for mine, its in zip(ours[load], theirs[load], strict=True)
                    ),
                }
                for load in LOADS
            },
        }


def list_models(local: LocalServer) -> list[dict[str, Any]]:
    """The models that are resident, each with its holders."""
    rows: list[dict[str, Any]] = local.get(f"{local.management}{MODELS_PATH}").json()["models"]
    return rows


def list_children(local: LocalServer) -> list[int]:
    """The processes of the resident archives."""
    return [holder["pid"] for row in list_models(local) for holder in row["holders"] if "pid" in holder]


def measure_room(local: LocalServer) -> int:
    """The bytes that so many archives take in the cache as they are charged, when about so many are there."""
    sizes = [holder["bytes"] for row in list_models(local) for holder in row["holders"] if "pid" in holder]
    return int(statistics.mean(sizes) * ROOM)


def read_private(pid: int) -> int:
    """The bytes that only this process has."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(found) for found in re.findall(r"^Private_\w+:\s+(\d+) kB", rollup, re.MULTILINE)) * 1024


def take_turns(store: Path, models: Models, body: bytes, budget: int) -> dict[str, Any]:
    """Ask all archives in turn, with room for a part of them: how many failed, and what a request took."""
    failed, took = 0, list[float]()
    with run_code_server(store, "--model-cache-bytes", str(budget)) as local:
        server = wrap_server(OURS, local)
        server.ask(models.names[0], body)  # the template is warm, and the rest is what each archive takes
        for name in models.names[:TURNS_OF] * LAPS:
            try:
                took.append(time_request(server, name, body))
            except (RuntimeError, OSError):
                failed += 1
        evicted = sum(local.counters(EVICTIONS.series).values())
        resident = len(list_children(local))
    return {
        "asked": TURNS_OF * LAPS,
        "failed": failed,
        "evictions": evicted,
        "resident": resident,
        "budget_bytes": budget,
        "ms": record.summarise_spread(took) if took else {},
    }


def time_request(server: PeerServer, model: str, body: bytes) -> float:
    """Milliseconds of one request. Raises RuntimeError for any status but 200."""
    return server.load(model, body) * 1e3


def build_table(results: Mapping[str, Any]) -> Table:
    """The goals and what was reached."""
    ratios = results["ratios"]
    reached = {
        "load p50, ms": results["load_ms"][OURS]["median"],
        "private MB a process": results["private_mb"]["median"],
        "p50 / theirs, 1 model, 1 connection": ratios["1 model, 1 connection"]["p50"],
        "requests/s / theirs, 1 model, 8 connections": ratios["1 model, 8 connections"]["requests_per_s"],
        "requests/s / theirs, 16 models, 8 connections": ratios["16 models, 8 connections"]["requests_per_s"],
        f"failed of {TURNS_OF} archives in room for {ROOM}": float(results["turns"]["failed"]),
    }
    table = Table("", "goal", "reached", "", box=box.SIMPLE)
    for name, (sign, goal) in GOALS.items():
        value = reached[name]
        holds = value <= goal if sign == "<=" else value >= goal
        table.add_row(name, f"{sign} {goal:g}", f"{value:.3g}", "" if holds else "missed")
    return table
