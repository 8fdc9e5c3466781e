"""Fleetcast on Ray beside Ray's own `@serve.multiplexed`: the same weights, the same body, in one run. Needs wrk.

Contenders: Ray Serve as it comes, and in its best shape (HAProxy, throughput options); `fleetcast cluster` by its
fronts (direct), and through Ray's proxy. Each has one replica on this host. In each round every contender is started,
measured and ended, in rotating order, since Ray's processes use the machine when they idle. Measured: a warm load at 1,
8 and 32 connections, 100 models that nothing has asked before at once, a tick of 500 models over 32 connections, and
the memory by which the processes grow for these models. Five rounds save a record. The first run installs Ray with pip.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from loadtest import record
from loadtest.driver import wrk
from loadtest.driver.dialects import DIALECTS
from loadtest.observe.processes import find_free_port
from loadtest.peers.comparison import CLOSE, SEED, Models, write_models
from loadtest.peers.environments import find_requirements, make_environment, parse_pins
from loadtest.peers.peer_server import PeerServer
from loadtest.peers.process_tree import ProcessTree, read_log_end, start_process
from loadtest.peers.servers import start_ray
from server.contract import JSON

RECORDED = 5  #: least number of rounds of a record
WARM_MODELS, COLD_MODELS, TICK_MODELS = 8, 100, 500
CONNECTIONS = (1, 8, 32)
TICK_CONNECTIONS = 32
START_S = 300.0
ROOT = Path(__file__).parents[2]
BEST = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
DIRECT, PROXY, RAY, RAY_BEST = "fleetcast direct", "fleetcast by Ray's proxy", "ray", "ray best"
CONTENDERS = (DIRECT, PROXY, RAY, RAY_BEST)

CONSOLE = Console(width=None if sys.stdout.isatty() else 140)
Start = Callable[[], Any]
Found = dict[str, Any]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    *,
    rounds: Annotated[int, typer.Option(min=1, help="number of rounds; fewer than 5 save no record")] = RECORDED,
    seconds: Annotated[int, typer.Option(min=1, help="duration of each of the three warm loads")] = 4,
    contenders: Annotated[str, typer.Option(help="whom to measure, comma-separated")] = ",".join(CONTENDERS),
) -> None:
    """Measure Fleetcast on Ray beside Ray's own multiplexing."""
    chosen = [name.strip() for name in contenders.split(",")]
    if unknown := [name for name in chosen if name not in CONTENDERS]:
        raise typer.BadParameter(f"there is no contender {', '.join(unknown)}: known are {', '.join(CONTENDERS)}")
    wrk.require_wrk()
    before = record.describe_machine()
    found: dict[str, list[Found]] = {name: [] for name in chosen}
    lost: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as text:
        models = write_models(Path(text), TICK_MODELS + COLD_MODELS)
        for number in range(rounds):
            for name in [*chosen[number % len(chosen) :], *chosen[: number % len(chosen)]]:
                CONSOLE.print(f"round {number + 1} of {rounds}: {name}", highlight=False)
                try:
                    found[name].append(measure_contender(_make_starter(name, models), models, Path(text), seconds))
                except Exception as error:  # Ray may fail in any way
                    if not name.startswith("ray"):
                        raise
                    lost[name] = " ".join(str(error).split())[:500]
    measured = {name: summarise_rounds(each) for name, each in found.items() if each}
    results = {
        "ray": parse_pins(find_requirements("ray").read_text())["ray"],
        "rounds": rounds,
        "models": {"warm": WARM_MODELS, "cold": COLD_MODELS, "tick": TICK_MODELS},
        "contenders": measured,
        "unavailable": lost,
    }
    CONSOLE.print(build_table(measured))
    for name, why in lost.items():
        CONSOLE.print(f"{name}: {why}", highlight=False)
    if rounds >= RECORDED:
        CONSOLE.print(f"record: {record.save_record('ray', SEED, before, results)}")


def measure_contender(start: Start, models: Models, folder: Path, seconds: int) -> Found:
    """Start one, measure it, and end it."""
    with start() as server:
        body = server.dialect.tensor_body(models.x)
        check_answers(server, models, body)
        found: Found = {"warm": {}, "memory_mb": server.tree.memory() / 1e6}
        file = folder / "body.json"
        file.write_bytes(body)
        target = wrk.WrkTarget(server.name, server.url, WARM_MODELS, server.suffix, file, JSON, server.dialect)
        wrk.run_wrk(target, CONNECTIONS[-1], 1)
        for connections in CONNECTIONS:
            ran = wrk.run_wrk(target, connections, seconds)
            found["warm"][str(connections)] = {"rps": ran.requests_per_s, "p50_ms": ran.p50_ms, "p99_ms": ran.p99_ms}
        names = models.names
        found["cold"] = ask_at_once(server, names[TICK_MODELS:], body, COLD_MODELS)
        before = server.tree.memory()
        for name in names[WARM_MODELS:TICK_MODELS]:
            server.ask(name, body)
        count = TICK_MODELS - WARM_MODELS
        found["mb_per_model"] = (server.tree.memory() - before) / 1e6 / count
        found["tick"] = ask_at_once(server, names[:TICK_MODELS], body, TICK_CONNECTIONS)
        return found


def check_answers(server: PeerServer, models: Models, body: bytes) -> None:
    """Compare the warm models' answers with the plain network's. Raises RuntimeError where one differs."""
    for name in islice(models.names, WARM_MODELS):
        got = server.ask(name, body)
        if not np.allclose(got, models.answers[name], rtol=CLOSE, atol=CLOSE):
            raise RuntimeError(f"{server.name} answers {got[:3]} for {name}, not {models.answers[name][:3]}")


def ask_at_once(server: PeerServer, names: Sequence[str], body: bytes, connections: int) -> Found:
    """Request each model once over so many connections: the time of all, and of each."""

    def ask(name: str) -> float:
        begin = time.perf_counter()
        server.ask(name, body)
        return (time.perf_counter() - begin) * 1e3

    with ThreadPoolExecutor(connections) as pool:
        begin = time.perf_counter()
        took = list(pool.map(ask, names))
        whole = time.perf_counter() - begin
    p50, p99 = np.percentile(took, [50, 99])
    return {"all_ms": whole * 1e3, "p50_ms": float(p50), "p99_ms": float(p99)}


def summarise_rounds(rounds: Sequence[Found]) -> Found:
    """Summarise each number over the rounds, in the shape of one round."""
    first = rounds[0]
    return {
        key: summarise_rounds([each[key] for each in rounds])
        if isinstance(first[key], dict)
        else record.summarise_spread([float(each[key]) for each in rounds])
        for key in first
    }


def build_table(results: Mapping[str, Found]) -> Table:
    """Show the medians, with each contender's throughput and cold p99 relative to Ray in its better shape."""
    table = Table("", "1 conn.", "8", "32 req/s", "p99 ms at 8", "100 cold p99", "tick of 500", "MB a model", box=None)
    for name, each in results.items():
        warm = each["warm"]
        table.add_row(
            name,
            *(f"{warm[str(connections)]['rps']['median']:,.0f}" for connections in CONNECTIONS),
            f"{warm['8']['p99_ms']['median']:.1f}",
            f"{each['cold']['p99_ms']['median']:,.0f} ms",
            f"{each['tick']['all_ms']['median']:,.0f} ms",
            f"{each['mb_per_model']['median']:.2f}",
        )
    rays = [each for name, each in results.items() if name.startswith("ray")]
    for name, each in results.items():
        if rays and not name.startswith("ray"):
            most = max(ray["warm"]["32"]["rps"]["median"] for ray in rays)
            coldest = min(ray["cold"]["p99_ms"]["median"] for ray in rays)
            times = each["warm"]["32"]["rps"]["median"] / most
            part = each["cold"]["p99_ms"]["median"] / coldest
            table.add_row(f"{name} / better ray", "", "", f"{times:.1f}x", "", f"{part:.2f}x", "", "")
    return table


def _make_starter(name: str, models: Models) -> Start:
    if name in (RAY, RAY_BEST):
        return partial(start_ray, models.weights, CONSOLE.print, environment=BEST if name == RAY_BEST else {})
    return partial(start_cluster, models.store, by_proxy=name == PROXY)


@contextmanager
def start_cluster(store: Path, *, by_proxy: bool) -> Iterator[PeerServer]:
    """`fleetcast cluster` of one replica, in the peer's environment, which finds our packages behind its own."""
    python = make_environment("ray", CONSOLE.print) / "bin" / "python"
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    (site / "fleetcast-behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    with tempfile.TemporaryDirectory(prefix="peer-") as text:
        folder, port, ray_port = Path(text), find_free_port(), find_free_port()
        flags = {
            "store": store, "replicas": 1, "cpus": 1, "device": "cpu", "inference-port": port, "management-port": 0,
            "metrics-port": 0, "ray-port": ray_port, "disk-cache": folder / "disk",
        }  # fmt: skip
        line = [str(python), "-P", "-m", "server.cli.main", "cluster"]
        line += [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
        environment = {
            **_quiet(folder), "PYTHONPATH": str(ROOT), "RAY_TMPDIR": text, "RAY_AUTH_MODE": "disabled",
        }  # fmt: skip
        with start_process(line, folder, environment) as (tree, log):
            _wait_until_ready(tree, log)
            at = ray_port if by_proxy else port
            yield PeerServer("fleetcast", f"http://127.0.0.1:{at}", DIALECTS["sagemaker"], ".mar", tree)


def _quiet(folder: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "LANG")}
    return {**kept, "HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


def _wait_until_ready(tree: ProcessTree, log: Path) -> None:
    until = time.monotonic() + START_S
    while "\nready " not in log.read_text(errors="replace"):
        if not tree.pids() or time.monotonic() > until:
            raise RuntimeError(f"fleetcast cluster did not start: {read_log_end(log)}")
        time.sleep(0.2)
