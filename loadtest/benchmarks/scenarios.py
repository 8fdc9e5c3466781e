"""The cost of joint scenarios on one core, from quantiles to the bytes of the response, without HTTP.

45 products x 300 steps x 100 scenarios: a market of 5 regions and 9 products, a day of 5-minute steps. The floor is the
time to draw as many normal numbers and to write the bytes. A call for one product shows the fixed cost. Saves a record.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from handlers.codecs.scenarios import (
    CorrelationModel,
    Marginal,
    draw_normals,
    draw_scenarios,
    load_correlation,
    make_random_bits,
)
from handlers.codecs.tensors import write_npy
from handlers.evaluation.correlation import estimate_gaussian, estimate_schaake
from loadtest import flags, record

SEED = 5
PRODUCTS, STEPS, SCENARIOS = 45, 300, 100
WINDOWS = 200  #: windows of errors from which the archives are estimated
LEVELS = np.array([0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95])
GOAL_MS = 500.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

CONSOLE = Console(width=None if sys.stdout.isatty() else 110)


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    rounds: flags.CallRounds = 9,
    save: flags.SaveRecord = True,
) -> None:
    """Measure in a process of one thread; libraries read their number of threads when they are imported."""
    if any(os.environ.get(name) != "1" for name in ONE_THREAD):
        done = subprocess.run([sys.executable, *sys.orig_argv[1:]], env={**os.environ, **ONE_THREAD}, check=False)
        raise typer.Exit(done.returncode)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    before = record.describe_machine()
    results = measure_ways(rounds)
    CONSOLE.print(build_table(results))
    if save:
        CONSOLE.print(f"record: {record.save_record('scenarios', SEED, before, results)}")


def measure_ways(rounds: int, products: int = PRODUCTS, steps: int = STEPS, samples: int = SCENARIOS) -> dict[str, Any]:
    """Measure the milliseconds of every way in turn; the first round is warm-up."""
    copula, templates = _make_correlations(products, steps)
    marginals = _make_marginals(products, steps)
    found = np.empty((samples, products, steps), np.float32)
    ways: dict[str, Callable[[], object]] = {
        "gaussian": lambda: write_npy(draw_scenarios(marginals, copula, samples, SEED)),
        "schaake": lambda: write_npy(draw_scenarios(marginals, templates, samples, SEED)),
        "gaussian, one product": lambda: write_npy(draw_scenarios(marginals[-1:], copula, samples, SEED)),
        "floor: normal numbers": lambda: _draw_normals(products, steps, samples),
        "floor: bytes written": lambda: write_npy(found),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:
                taken[name].append((time.perf_counter() - started) * 1e3)
    return {
        "products": products,
        "steps": steps,
        "scenarios": samples,
        "answer_bytes": len(write_npy(found)),
        "ms": {name: record.summarise_spread(each) for name, each in taken.items()},
    }


def build_table(results: dict[str, Any]) -> Table:
    """Make a table of the results with goal and floor."""
    size = f"{results['products']} products x {results['steps']} steps x {results['scenarios']} scenarios"
    shown = Table(size, "median ms", "min", "max", "goal")
    for name, spread in results["ms"].items():
        goal = f"{GOAL_MS:g}" if name in ("gaussian", "schaake") else ""
        shown.add_row(name, *(f"{spread[key]:.1f}" for key in ("median", "min", "max")), goal)
    return shown


def _make_correlations(products: int, steps: int) -> tuple[CorrelationModel, CorrelationModel]:
    """Make correlations of both kinds, from errors that products share and that persist."""
    rng, names = np.random.default_rng(SEED), tuple(f"market-{i}.mar" for i in range(products))
    noise = rng.normal(size=(WINDOWS, products, steps)) + rng.normal(size=(WINDOWS, 1, steps))
    errors = noise.cumsum(axis=2)
    copula, templates = (
        load_correlation(each.record, each.tensors)
        for each in (estimate_gaussian(errors, names), estimate_schaake(errors, names))
    )
    return copula, templates


def _make_marginals(products: int, steps: int) -> list[Marginal]:
    """Make marginals that differ for every product and step."""
    rng = np.random.default_rng(SEED)
    values = (
        rng.normal(60, 30, (products, steps, 1)) + np.cumsum(rng.random((products, steps, len(LEVELS))), axis=-1) * 10
    )
    return [Marginal(f"market-{i}.mar", LEVELS, each) for i, each in enumerate(values)]


def _draw_normals(products: int, steps: int, samples: int) -> None:
    """Draw as many normal numbers as the scenarios need."""
    for i in range(products):
        draw_normals([make_random_bits(SEED, str(i))], steps * samples)
