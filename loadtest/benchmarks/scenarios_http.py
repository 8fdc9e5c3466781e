"""The latency of joint scenarios through a server, beside that of the quantiles they are drawn from.

45 products x 300 steps x 100 scenarios: a market of 5 regions and 9 products, a day of 5-minute steps. One call for the
quantiles, one for the scenarios as npy and one as JSON, in turn, to a server with one worker in which every model is
resident. It shares two cores with the client. `bench scenarios` measures the drawing alone. Saves a record.
"""

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.progress import track
from rich.table import Table

from handlers.evaluation.correlation import estimate_gaussian
from handlers.forecasters import build_family, random_tensors
from handlers.kinds import ArchiveParts, pack_model
from loadtest import flags, record
from loadtest.benchmarks.scenarios import CONSOLE, PRODUCTS, SCENARIOS, SEED, STEPS, WINDOWS
from loadtest.driver.dialects import find_call_fault, find_fault
from loadtest.driver.market_client import BUDGET_S, MarketClient, write_turn_bodies
from loadtest.fleets.network_shape import make_request
from loadtest.observe.local_server import run_local_server
from model_store.archives.manifest import ForecastSpec, InputChannel, Kind, Scaler
from model_store.names import ModelName
from server.contract import JSON, NPY

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
CONTEXT = 48
JOINTLY = ModelName("joint.mar")


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    rounds: flags.CallRounds = 9,
    save: flags.SaveRecord = True,
) -> None:
    """Measure, print, and save a record."""
    before = record.describe_machine()
    with ExitStack() as stack:
        store = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = write_store(store, PRODUCTS, STEPS)
        server = stack.enter_context(run_local_server(str(store), ["--workers", "1"]))
        client = stack.enter_context(MarketClient(server.inference))
        results = {"steps": STEPS, **measure_calls(client, names, SCENARIOS, rounds)}
    CONSOLE.print(build_table(results))
    if save:
        CONSOLE.print(f"record: {record.save_record('scenarios_http', SEED, before, results)}")


def write_store(store: Path, products: int, steps: int, called: str = "m") -> list[ModelName]:
    """Write forecasters with random weights, and a correlation from errors that products share and that persist."""
    names = [ModelName(f"{called}{i}.mar") for i in range(products)]
    for seed, name in enumerate(names):
        (store / name).write_bytes(_pack_archive(name, steps, seed))
    rng = np.random.default_rng(SEED)
    noise = rng.normal(size=(WINDOWS, products, steps)) + rng.normal(size=(WINDOWS, 1, steps))
    found = estimate_gaussian(noise.cumsum(axis=2), tuple(names))
    (store / JOINTLY).write_bytes(
        pack_model(Kind.CORRELATION, ArchiveParts(correlation=found.record, tensors=found.tensors), model_name="joint")
    )
    return names


def measure_calls(client: MarketClient, names: Sequence[ModelName], scenarios: int, rounds: int) -> dict[str, Any]:
    """Measure milliseconds from the first byte sent to the last received; round one is warm-up. Raises NotAnswered."""
    (series,) = make_request(SEED, steps=CONTEXT)["instances"]
    asked = write_turn_bodies([{"target_model": name, **series} for name in names], JOINTLY, scenarios, SEED)
    ways = {
        "quantiles": (asked.quantiles, JSON),
        "joint, npy": (asked.scenarios, NPY),
        "joint, JSON": (asked.scenarios, JSON),
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    sizes: dict[str, int] = {}
    for turn in track(range(rounds + 1), "calls", transient=True, console=CONSOLE):
        for way, (body, accept) in ways.items():
            started = time.perf_counter()
            answer, _ = client.forecasts(body, accept)
            seconds = time.perf_counter() - started
            if why := find_fault(answer) if accept == NPY else find_call_fault(answer, len(names)):
                raise RuntimeError(f"{way}: {why}")
            sizes[way] = len(answer)
            if turn:
                taken[way].append(seconds * 1e3)
    return {
        "products": len(names),
        "scenarios": scenarios,
        "answer_bytes": sizes,
        "ms": {way: record.summarise_spread(each) for way, each in taken.items()},
    }


def build_table(results: dict[str, Any]) -> Table:
    """Make a table of the calls and their share of 20 seconds."""
    title = f"{results['products']} products x {results['steps']} steps x {results['scenarios']} scenarios"
    shown = Table(title, "median ms", "min", "max", "MB", f"of {BUDGET_S:g} s")
    for column in shown.columns[1:]:
        column.justify = "right"
    for way, ms in results["ms"].items():
        size, share = results["answer_bytes"][way] / 1e6, ms["median"] / BUDGET_S / 1e3
        shown.add_row(way, *(f"{ms[key]:.1f}" for key in ("median", "min", "max")), f"{size:.1f}", f"{share:.2%}")
    return shown


def _pack_archive(name: str, steps: int, seed: int) -> bytes:
    config = {"features": 1, "context_length": CONTEXT, "prediction_length": steps, "quantiles": len(LEVELS)}
    forecast = ForecastSpec(
        frequency="5min",
        context_length=CONTEXT,
        prediction_length=steps,
        quantile_levels=LEVELS,
        inputs=(InputChannel(source="target"),),
        scaler=Scaler(kind="asinh", center=60.0, scale=25.0),
        tail="clamp",
    )
    tensors = random_tensors(build_family("tcn", config), seed)
    return pack_model(
        Kind.FORECASTER,
        ArchiveParts(tensors=tensors, architecture="tcn", config=config, forecast=forecast),
        model_name=name,
    )
