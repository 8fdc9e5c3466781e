"""Latency of a market's ticks with and without prefetch, over other traffic that evicts the models in between.

Every `every_s` seconds each model of a fleet is requested once, within `spread_s` seconds and in the same order.
Meanwhile other models are requested, more than fit, so that few models of the fleet are resident at its next tick. The
cache has room for the fleet and a tenth more. One worker and one front share the cores with the client; the disk cache
has all archives after a tick or two. Measurement begins after LEARNT ticks. Saves a record.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import numpy as np
import orjson
import typer
import urllib3
from rich.console import Console
from rich.table import Table

from loadtest import flags, record
from loadtest.driver.dialects import DIALECTS
from loadtest.driver.driver_pool import DriverPool
from loadtest.driver.open_loop import make_target
from loadtest.driver.profiles import Profile, Schedule, Tick
from loadtest.driver.run_result import CACHE, Run
from loadtest.fleets.fleet import list_fleet_names, make_fleet
from loadtest.fleets.network_shape import make_request
from loadtest.fleets.synthetic_archives import build_network
from loadtest.observe.local_server import LocalServer, run_local_server
from loadtest.observe.resource_counts import list_pids, read_cpu_seconds
from server.contract import PREFETCH
from server.shell.progress import follow_tasks

LEARNT = 4  #: ticks before the first one that can be predicted
OK = 200

CONSOLE = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


@dataclass(frozen=True, slots=True)
class PrefetchPlan:
    """A fleet of `models` models, and `others` requested at `rate` a second; a slab holds `slab_rows` models."""

    models: int = 200
    others: int = 600
    rate: float = 60.0
    every_s: float = 8.0
    spread_s: float = 1.0
    ticks: int = LEARNT + 7
    slab_rows: int = 20
    family: str = "tcn"
    seed: int = 0

    @property
    def seconds(self) -> float:
        """The seconds of a run."""
        return self.ticks * self.every_s

    def flags(self, prefetch: str) -> list[str]:
        """The flags of the server."""
        slab = self.slab_rows * build_network(self.family).family.row_floats * 4
        slabs = -(-self.models * 11 // (10 * self.slab_rows))
        room = ["--slab-bytes", str(slab), "--model-cache-bytes", str(slabs * slab)]
        return ["--workers", "1", "--prefetch", prefetch, *room]

    def schedule(self) -> Schedule:
        """Make the schedule of a run; the models of the fleet have the first numbers, then the others."""
        tick = Tick(self.models, self.every_s, self.spread_s, seed=self.seed).schedule(self.seconds)
        noise = Profile(self.others, self.rate, zipf=0.3, seed=self.seed).schedule(self.seconds)
        at = np.concatenate([tick.at, noise.at])
        order = np.argsort(at, kind="stable")
        return Schedule(at[order], np.concatenate([tick.model, self.models + noise.model])[order], self.seconds)


USUAL = PrefetchPlan()


@dataclass(frozen=True, slots=True)
class PrefetchResult:
    """The ticks after LEARNT, one value for each: the share of calls that were not hits, and latencies.

    `others` has the same for all other calls since then, `prefetched` the prefetches by result, `worker_s` the CPU time
    of the whole run, `failed` the failed requests of any kind, and `invalid` the reasons why the run is invalid.
    """

    cold: Sequence[float]
    p50_ms: Sequence[float]
    p99_ms: Sequence[float]
    others: Mapping[str, float]
    prefetched: Mapping[str, float]
    worker_s: float
    failed: int
    invalid: Sequence[str]

    @property
    def cold_share(self) -> float:
        """The share of calls that were not hits, over all ticks."""
        return float(np.mean(self.cold))


def measure_ticks(plan: PrefetchPlan, store: Path, prefetch: str, look: Callable[[float], None]) -> PrefetchResult:
    """Run once on a new server; `look` gets the current second."""
    with run_local_server(str(store), plan.flags(prefetch)) as server:
        host, body = urlsplit(server.inference).netloc, orjson.dumps(make_request(plan.seed))
        names = list_fleet_names(plan.models + plan.others)
        requests = [DIALECTS["sagemaker"].request(host, name, body) for name in names]
        with DriverPool(make_target(server.inference, requests), 1) as pool:
            run = pool.drive(plan.schedule(), look=look)
        return summarize_run(plan, run, _count_prefetched(server), read_cpu_seconds(list_pids(server)["worker 0"]))


def summarize_run(plan: PrefetchPlan, run: Run, prefetched: Mapping[str, float], worker_s: float) -> PrefetchResult:
    """Summarize a run as its client saw it."""
    cold, ms = run.cache != CACHE.index("hit"), run.latency * 1e3
    of_fleet, late = run.schedule.model < plan.models, run.schedule.at >= LEARNT * plan.every_s
    tick = (run.schedule.at / plan.every_s).astype(int)
    ticks = [of_fleet & (tick == number) for number in range(LEARNT, plan.ticks)]
    others = ~of_fleet & late
    return PrefetchResult(
        cold=[float(cold[each].mean()) for each in ticks],
        p50_ms=[float(np.percentile(ms[each], 50)) for each in ticks],
        p99_ms=[float(np.percentile(ms[each], 99)) for each in ticks],
        others={
            "cold": float(cold[others].mean()),
            "p50_ms": float(np.percentile(ms[others], 50)),
            "p99_ms": float(np.percentile(ms[others], 99)),
        },
        prefetched=prefetched,
        worker_s=worker_s,
        failed=int((run.status != OK).sum()) + len(run.unsound),
        invalid=run.invalid(),
    )


def _count_prefetched(server: LocalServer) -> dict[str, float]:
    """Count prefetches by result, such as used."""
    return dict(server.totals(PREFETCH.series, "result"))


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    every_s: Annotated[float, typer.Option(min=2, help="seconds between ticks")] = USUAL.every_s,
    ticks: Annotated[int, typer.Option(min=LEARNT + 1, help="number of ticks of each of the two runs")] = USUAL.ticks,
    seed: flags.Seed = 0,
    keep: flags.KeepRecord = True,
) -> None:
    """Measure ticks with prefetch off, then on: about three minutes."""
    plan, before, results = (
        PrefetchPlan(every_s=every_s, ticks=ticks, seed=seed),
        record.describe_machine(),
        dict[str, PrefetchResult](),
    )
    try:
        with tempfile.TemporaryDirectory(prefix="fleetcast-prefetch-") as folder:
            make_fleet(folder, plan.models + plan.others, seed, plan.family)
            with follow_tasks() as tasks:
                for prefetch in ("off", "on"):
                    task = tasks.start_task(f"prefetch {prefetch}", round(plan.seconds))
                    look = lambda t, task=task: task.update(round(t))  # noqa: E731 -- of this run
                    results[prefetch] = measure_ticks(plan, Path(folder), prefetch, look)
    except (RuntimeError, ValueError, OSError, urllib3.exceptions.HTTPError) as error:
        raise SystemExit(f"nothing measured: {error}") from error
    CONSOLE.print(_make_result_table(plan, results), *_explain_results(results))
    if keep:
        saved = {"plan": asdict(plan)} | {f"prefetch {name}": _record_results(each) for name, each in results.items()}
        CONSOLE.print(f"record: {record.save_record('prefetch', seed, before, saved)}")


def _record_results(each: PrefetchResult) -> dict[str, Any]:
    """Make the results of a record, with the spread over ticks."""
    spreads = {name: record.summarise_spread(getattr(each, name)) for name in ("cold", "p50_ms", "p99_ms")}
    return {**asdict(each), "over_ticks": spreads, "cold_share": each.cold_share}


def _make_result_table(plan: PrefetchPlan, results: Mapping[str, PrefetchResult]) -> Table:
    room = f"{plan.models} models every {plan.every_s:g} s within {plan.spread_s:g} s, {plan.ticks - LEARNT} ticks"
    table = Table("prefetch", "cold", "p50 ms", "p99 ms", "others cold", "others p99 ms", "worker s", title=room)
    for name, each in results.items():
        over = [record.summarise_spread(values) for values in (each.p50_ms, each.p99_ms)]
        times = [f"{of['median']:.1f} ({of['min']:.1f}-{of['max']:.1f})" for of in over]
        others = (f"{each.others['cold']:.1%}", f"{each.others['p99_ms']:.1f}")
        table.add_row(name, f"{each.cold_share:.2%}", *times, *others, f"{each.worker_s:.1f}")
    return table


def _explain_results(results: Mapping[str, PrefetchResult]) -> Iterator[str]:
    ahead = ", ".join(f"{count:.0f} {result}" for result, count in results["on"].prefetched.items())
    yield f"loads ahead of time: {ahead or 'none'}"
    for name, each in results.items():
        if each.failed or each.invalid:
            yield f"prefetch {name}: {each.failed} requests failed; {'; '.join(each.invalid) or 'the run is valid'}"
