"""The planner's prediction beside a real server: hit ratio and latency of the same requests.

One worker, 200 models, the same trace for caches of 20, 50 and 80 % of them. Each round measures the costs again and
then each size; the medians of the rounds count, because the speed of a machine varies. Saves a record, and
exits with 1 if a hit ratio is off by a point or a p99 by a quarter.
"""

import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from loadtest import flags, record
from loadtest.driver.driver_pool import DriverPool
from loadtest.driver.profiles import Profile
from loadtest.driver.request_bodies import RequestBody
from loadtest.driver.run import RequestSource, ServerUnderLoad
from loadtest.driver.run_result import Run
from loadtest.fleets.fleet import list_fleet_names, make_fleet
from loadtest.fleets.synthetic_archives import build_network
from loadtest.observe.local_server import LocalServer, run_local_server
from loadtest.observe.metrics_sampler import MetricSums, parse_metrics
from loadtest.plan.calibrate import calibrate
from loadtest.plan.cli import make_unloader
from loadtest.plan.costs import Costs
from loadtest.plan.demand import WARMUP, make_profile_demand
from loadtest.plan.placement import Placement
from loadtest.plan.simulate import Machines, SimulationResult, simulate
from model_store.names import ModelName
from server.contract import CACHE_REQUESTS, CACHE_RESULTS, METRICS_PATH

MODELS, SHARES = 200, (0.2, 0.5, 0.8)
WARMUP_S = 5.0
POINT, QUARTER = 0.01, 0.25

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


@dataclass(frozen=True, slots=True)
class PlanComparison:
    """One run and its simulation; latencies in ms."""

    resident: int
    hit_ratio: float
    simulated_hit_ratio: float
    ms: Mapping[str, float]
    simulated_ms: Mapping[str, float]
    invalid: list[str]

    @property
    def p99_ratio(self) -> float:
        """The simulated p99 divided by the measured one."""
        return self.simulated_ms["p99"] / self.ms["p99"]


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    *,
    rounds: Annotated[int, typer.Option(min=1, help="number of rounds over all sizes, two minutes each")] = 3,
    rate: Annotated[float, typer.Option(min=1, help="requests per second")] = 150.0,
    seconds: Annotated[float, typer.Option(min=1, help="duration of a measured run")] = 20.0,
    seed: flags.Seed = 0,
    keep: flags.KeepRecord = True,
) -> None:
    """Measure, simulate and compare."""
    before = record.describe_machine()
    found: list[PlanComparison] = []
    costs: list[Costs] = []
    with tempfile.TemporaryDirectory(prefix="fleetcast-plan-") as folder:
        make_fleet(folder, MODELS)
        asked = RequestSource(list_fleet_names(MODELS), MODELS, None, None, seed).of(folder, console)
        for i in range(rounds):
            costs.append(measure_costs(folder, asked, rate))
            for share in SHARES:
                found.append(
                    compare_size(
                        folder, asked, round(share * MODELS), Profile(MODELS, rate, seed=seed), seconds, costs[-1]
                    )
                )
                console.print(f"round {i + 1}: {_describe_size(found[-1])}")
    results = summarize_sizes(found)
    _show_sizes(results)
    if keep:
        whole = {"rate": rate, "seconds": seconds, "models": MODELS, "sizes": results}
        whole["costs"] = [msgspec.to_builtins(each) for each in costs]
        console.print(f"record: {record.save_record('plan', seed, before, whole)}")
    raise SystemExit(not all(size["met"] for size in results))


def measure_costs(store: str, asked: Mapping[ModelName, RequestBody], rate: float) -> Costs:
    """Measure the costs of a server whose cache holds all models, at this rate."""
    with run_local_server(store, ["--workers", "1"]) as server:
        subject = ServerUnderLoad(server.inference, server.metrics, asked, store)
        to = subject.target("sagemaker", allow_remote=False)
        return calibrate(to, subject.scrape, make_unloader(server.management, list(asked)), "here", rate)


def compare_size(
    store: str, asked: Mapping[ModelName, RequestBody], resident: int, load: Profile, seconds: float, costs: Costs
) -> PlanComparison:
    """Compare the real and the simulated server for one size, under the same schedule and warm-up."""
    row_bytes = build_network("tcn").family.row_floats * 4
    flags = ["--workers", "1", "--slab-bytes", str(row_bytes), "--model-cache-bytes", str(resident * row_bytes)]
    with run_local_server(store, flags) as server:
        to = ServerUnderLoad(server.inference, None, asked, store).target("sagemaker", allow_remote=False)
        with DriverPool(to, 1) as pool:
            pool.drive(load.schedule(WARMUP_S, WARMUP))
            before = _read_counts(server)
            run = pool.drive(load.schedule(seconds))
            after = _read_counts(server)
    demand = make_profile_demand(load, seconds, WARMUP_S, str(row_bytes))
    there = simulate(Placement(demand), Machines(resident * row_bytes, slab_bytes=row_bytes), costs, load.seed)
    return _set_beside(resident, run, before, after, there)


def _read_counts(server: LocalServer) -> MetricSums:
    return parse_metrics(server.get(f"{server.metrics}{METRICS_PATH}").data.decode())[0]


def _set_beside(
    resident: int, run: Run, before: MetricSums, after: MetricSums, there: SimulationResult
) -> PlanComparison:
    asked = CACHE_REQUESTS.series
    seen = {result: after[asked, result] - before[asked, result] for result in CACHE_RESULTS}
    ms = {level: float(np.percentile(run.latency, float(level[1:]))) * 1e3 for level in there.ms}
    return PlanComparison(resident, seen["hit"] / sum(seen.values()), there.hit_ratio, ms, there.ms, run.invalid())


def summarize_sizes(found: list[PlanComparison]) -> list[dict[str, Any]]:
    """Summarize each size by medians and spreads of its rounds; invalid runs are left out."""
    sizes = []
    for resident in sorted({each.resident for each in found}):
        here = [each for each in found if each.resident == resident]
        rows = [each for each in here if not each.invalid]
        if not rows:
            raise SystemExit(f"no verdict: with room for {resident}, every run was invalid: {here[0].invalid[0]}")
        off = statistics.median(abs(each.hit_ratio - each.simulated_hit_ratio) for each in rows)
        ms = {level: record.summarise_spread([each.ms[level] for each in rows]) for level in rows[0].ms}
        there = {level: record.summarise_spread([each.simulated_ms[level] for each in rows]) for level in rows[0].ms}
        ratio = there["p99"]["median"] / ms["p99"]["median"]
        sizes.append(
            {
                "resident": resident,
                "hit_ratio": record.summarise_spread([each.hit_ratio for each in rows]),
                "simulated_hit_ratio": record.summarise_spread([each.simulated_hit_ratio for each in rows]),
                "hit_ratio_off": off,
                "ms": ms,
                "simulated_ms": there,
                "p99_ratio": ratio,
                "p99_ratios": record.summarise_spread([each.p99_ratio for each in rows]),
                "met": off <= POINT and abs(ratio - 1) <= QUARTER,
            }
        )
    return sizes


def _describe_size(each: PlanComparison) -> str:
    measured = f"hit ratio {each.hit_ratio:.4f}, p99 {each.ms['p99']:.2f} ms"
    simulated = f"simulated {each.simulated_hit_ratio:.4f}, {each.simulated_ms['p99']:.2f} ms"
    return f"room for {each.resident}: {measured}; {simulated}{' INVALID' * bool(each.invalid)}"


def _show_sizes(sizes: list[dict[str, Any]]) -> None:
    table = Table(
        "room for", "hit ratio", "simulated", "p50 ms", "simulated", "p99 ms", "simulated", "p99 ratio", "met"
    )
    for size in sizes:
        values = (size["hit_ratio"], size["simulated_hit_ratio"], size["ms"]["p50"], size["simulated_ms"]["p50"])
        tails = (size["ms"]["p99"], size["simulated_ms"]["p99"])
        ratio = f"{size['p99_ratio']:.2f} ({size['p99_ratios']['min']:.2f}-{size['p99_ratios']['max']:.2f})"
        told = [f"{each['median']:.4f}" for each in values[:2]] + [
            f"{each['median']:.2f}" for each in (*values[2:], *tails)
        ]
        table.add_row(str(size["resident"]), *told, ratio, "yes" if size["met"] else "NO")
    console.print(table)
