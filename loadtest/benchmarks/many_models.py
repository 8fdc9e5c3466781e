"""A whole tick in one call for many models, beside one call for each model, and beside the least that it can take.

One worker and one front share two cores with the client. Every model is resident; bodies are DeepAR JSON of a week of
hours and the longest lag before it, or the same numbers as an Arrow table (needs pyarrow) or a file of numpy. The
single calls come from wrk over 32 connections, which is the most that this server answers; `ratio` is that of forecasts
per second, turn by turn. `floor` is measured in this process: the bytes of the call through two sockets each way, the
family's forward, and one pass of array operations over histories and quantiles. A market is asked as well, by one call
each: 45 products x 300 steps x 5 quantiles, and 100 joint scenarios of them. Saves a record.

With --beside the server of another checkout takes turns with this one, and `before` is how many times faster this one
is, for JSON calls, the market's scenarios, single calls and tensors as npy: `git worktree add ../before COMMIT`, then
--beside ../before.
"""

import http.client
import json
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from handlers.forecasters import build_family
from loadtest import flags, record
from loadtest.benchmarks.call_ways import (
    MARKET,
    SIZES,
    list_market_calls,
    list_tick_calls,
    measure_rate,
    write_market,
)
from loadtest.benchmarks.core import write_bodies
from loadtest.driver import wrk
from loadtest.driver.call_encodings import Encoding
from loadtest.fleets.network_shape import CONFIG, LEVELS, PREDICTION, make_request
from loadtest.fleets.synthetic_archives import make_archive
from loadtest.observe.local_server import LocalServer, run_local_server
from model_store.names import ModelName
from server.contract import INVOCATIONS_PATH, JSON, NPY

SEED = 11
CONNECTIONS, SINGLES_S = 32, 2.0
HERE, BESIDE = "here", "beside"
SINGLES, TENSORS = "single calls", "single tensors, npy"
ROWS_AT_ONCE = 64  #: of a forward: more of them leave the processor's cache

CONSOLE = Console(width=None if sys.stdout.isatty() else 110)


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    rounds: flags.CallRounds = 9,
    beside: Annotated[Path | None, typer.Option(exists=True, help="a checkout to compare with")] = None,
    save: flags.SaveRecord = True,
) -> None:
    """Measure calls for 100, 500 and 1,000 models and for a market, as JSON and as tables."""
    wrk.require_wrk()
    before = record.describe_machine()
    trees = {HERE: None} if beside is None else {HERE: None, BESIDE: beside.resolve()}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = [f"m{i}.mar" for i in range(max(SIZES))]
        (folder / "store").mkdir()
        for seed, name in enumerate(track(names, "packing", transient=True)):
            (folder / "store" / name).write_bytes(make_archive("tcn", name, seed))
        products = write_market(folder / "store")
        servers = {
            name: stack.enter_context(run_local_server(str(folder / "store"), ["--workers", "1"], tree=tree))
            for name, tree in trees.items()
        }
        results = measure_calls(servers, names, products, folder, rounds)
    if beside is not None:
        results["beside_commit"] = record.find_commit(beside)
    CONSOLE.print(build_table(results))
    if save:
        CONSOLE.print(f"record: {record.save_record('many', SEED, before, results)}")


def measure_calls(
    servers: Mapping[str, LocalServer], names: list[str], products: list[ModelName], folder: Path, rounds: int
) -> dict[str, Any]:
    """Measure forecasts a second of each way to ask, on each server in turn; the first round is warm-up."""
    ways = {name: make_ways(name, server, names, products, folder) for name, server in servers.items()}
    rates: dict[tuple[str, str], list[float]] = {}
    for turn in track(range(rounds + 1), "calls", transient=True):
        order = list(servers)[:: 1 if turn % 2 else -1]
        for way in ways[HERE]:
            for name in order:
                if way in ways[name]:
                    rates.setdefault((name, way), []).append(ways[name][way]())
    measured = {key: found[1:] for key, found in rates.items()}
    results: dict[str, Any] = {}
    for way in ways[HERE]:
        found = measured[HERE, way]
        row = {"per_s": found}
        if not way.startswith(MARKET):  # whose forecasts are longer than the single calls'
            row["ratio"] = _divide(found, measured[HERE, SINGLES])
        if (BESIDE, way) in measured:
            row["before"] = _divide(found, measured[BESIDE, way])
        results[way] = {key: record.summarise_spread(values) for key, values in row.items()}
    floors = [measure_floor(names) for _ in range(3)]
    results["floor_per_s"] = len(names) / min(floors)
    return results


def make_ways(
    which: str, server: LocalServer, names: list[str], products: list[ModelName], folder: Path
) -> dict[str, Callable[[], float]]:
    """What gives the forecasts a second of each way to ask a server; another checkout's may take no tables."""
    (folder / "single.json").write_text(json.dumps(make_request(SEED)))
    _, npy = write_bodies(folder)
    connection = http.client.HTTPConnection(urlsplit(server.inference).netloc, timeout=60)
    encodings = list_encodings() if which == HERE else [Encoding.JSON]
    calls = [*list_tick_calls(names, encodings), *list_market_calls(products, encodings)]
    ways: dict[str, Callable[[], float]] = {each.name: partial(measure_rate, connection, each) for each in calls}
    for name, body, media in ((SINGLES, folder / "single.json", JSON), (TENSORS, npy, NPY)):
        target = wrk.WrkTarget(name, f"{server.inference}{INVOCATIONS_PATH}", len(names), ".mar", body, media)
        ways[name] = partial(_time_singles, target)
    return ways


def list_encodings() -> list[Encoding]:
    """Those that can be written here."""
    return [each for each in Encoding if each is not Encoding.ARROW or find_spec("pyarrow") is not None]


def _time_singles(target: wrk.WrkTarget) -> float:
    return wrk.run_wrk(target, CONNECTIONS, SINGLES_S).requests_per_s


def measure_floor(names: list[str]) -> float:
    """Measure the seconds of what no server for this call can leave out: bytes, array operations, the forward."""
    count, steps = len(names), len(make_request(SEED)["instances"][0]["target"])
    outputs = count * PREDICTION * (len(LEVELS) + 1)
    hops = 2  # client to front, front to worker
    moved = sum(_time_transfer(4 * numbers) for numbers in (2 * count * steps, outputs) for _ in range(hops))
    rng = np.random.default_rng(SEED)
    history, quantiles = rng.normal(size=(count, steps)), rng.normal(size=outputs)
    started = time.perf_counter()
    np.arcsinh(history)
    np.sort(np.sinh(quantiles).reshape(count, -1))
    return moved + time.perf_counter() - started + _time_forward(count)


def _time_transfer(size: int) -> float:
    """Seconds of so many bytes through a socket."""
    near, far = socket.socketpair()
    with near, far:
        sender = threading.Thread(target=near.sendall, args=(bytes(size),))
        started = time.perf_counter()
        sender.start()
        left = size
        while left:
            left -= len(far.recv(min(left, 1 << 16)))
        sender.join()
        return time.perf_counter() - started


def _time_forward(count: int) -> float:
    """Seconds of the family's forward for so many models, whose rows lie together already."""
    family = build_family("tcn", CONFIG)
    rows = torch.zeros((ROWS_AT_ONCE, family.row_floats))
    weights, x = family.bind(rows), torch.zeros((ROWS_AT_ONCE, *family.input_shape))
    with torch.inference_mode():
        family.forward(weights, x)
        started = time.perf_counter()
        for _ in range(-(-count // ROWS_AT_ONCE)):
            family.forward(weights, x)
    return time.perf_counter() - started


def _divide(found: list[float], others: list[float]) -> list[float]:
    return [one / other for one, other in zip(found, others, strict=True)]


def build_table(results: Mapping[str, Any]) -> Table:
    """Make a table of medians with a row for each way to ask."""
    table = Table("", "forecasts/s", "/ single calls'", "/ other checkout's", "floor's / these")
    for way, row in results.items():
        if isinstance(row, dict):
            floor = results["floor_per_s"] / row["per_s"]["median"] if way.startswith(str(max(SIZES))) else None
            ratio, before = (_format_spread(row[key], 2) if key in row else "" for key in ("ratio", "before"))
            told = "" if floor is None else f"{floor:.1f}"
            table.add_row(way, _format_spread(row["per_s"], 0), ratio, before, told)
    return table


def _format_spread(values: dict[str, float], digits: int) -> str:
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f}-{values['max']:.{digits}f})"
