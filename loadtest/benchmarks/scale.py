"""A large fleet on one host: an hour of traffic in minutes, its cost, thousands of resident models.

fleetcast-load bench scale             10,000 archives, room for 1,000, an hour at 20 requests/s in four minutes

Memory, tail latency, descriptors, threads, files and metric series, none of which may grow, are read between spans of
the same traffic. Verdicts are by the trend of the later spans, because the first third fills the caches. Everything
runs on loopback, in a temporary folder of 1 GB. Saves a record, and exits with 1 when a verdict fails.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import numpy as np
import orjson
import typer
import urllib3
from rich.console import Console

from loadtest import flags, record
from loadtest.benchmarks.growth_checks import (
    Cost,
    Crowd,
    GrowthVerdict,
    TrafficSpan,
    build_costs_table,
    build_spans_table,
    build_verdicts_table,
    compute_trend,
    judge_costs,
    judge_crowd,
    judge_spans,
)
from loadtest.driver.dialects import DIALECTS
from loadtest.driver.driver_pool import DriverPool
from loadtest.driver.open_loop import LoadTarget, make_target
from loadtest.driver.profiles import Profile, Schedule
from loadtest.driver.run_result import CACHE, Run
from loadtest.driver.summary import draw_sparkline
from loadtest.fleets.fleet import Fleet, list_fleet_names, write_fleet
from loadtest.fleets.network_shape import make_request
from loadtest.fleets.synthetic_archives import build_network
from loadtest.observe.local_server import LocalServer, run_local_server
from loadtest.observe.processes import read_pss
from loadtest.observe.resource_counts import Census, list_pids, read_cpu_seconds, take_census
from model_store.errors import LoadError
from server.contract import MODELS_PATH
from server.shell.progress import TaskList, follow_tasks

SHOWN_MODELS = 50  #: models with own series, so that series of evicted models would be noticed
COSTS = (100, 1_000)  #: numbers of archives of the smaller stores, with which the large one is compared
HOT, PROBES, PAGES = 50, 2_000, 30  #: models requested to measure the cost of routing, and how often; pages listed
LOAD_RATE, PROBE_RATE = 200.0, 400.0  #: rates of misses and of hits, in requests/s
STEPS = 5  #: steps in which the models of one worker are loaded
MIN_SPANS = 6

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True, slots=True)
class ScalePlan:
    """The sizes and durations. `disk`: archives that fit in the disk cache; `many`: models for one worker."""

    models: int = 10_000
    resident: int = 1_000
    disk: int = 2_500
    many: int = 5_000
    workers: int = 2
    spans: int = 20
    span_s: float = 12.0
    rate: float = 300.0
    slab_rows: int = 60
    family: str = "tcn"
    seed: int = 0

    @property
    def row_bytes(self) -> int:
        """The bytes of a resident model."""
        return build_network(self.family).family.row_floats * 4

    def flags(self, resident: int, workers: int) -> list[str]:
        """Return the flags of a server whose cache holds so many models, or up to a slab more per worker."""
        slab = self.slab_rows * self.row_bytes
        slabs = workers * -(-resident // (workers * self.slab_rows))
        return ["--workers", str(workers), "--slab-bytes", str(slab), "--model-cache-bytes", str(slabs * slab)]


USUAL = ScalePlan()
Drive = Callable[[Schedule], Run]


# --- stages ---------------------------------------------------------------------------------------------------------


@contextmanager
def serve_store(
    plan: ScalePlan, store: Path, folder: Path, resident: int, workers: int
) -> Iterator[tuple[LocalServer, Path, Path]]:
    """Run a server for a store, with its disk cache and its TMPDIR in `folder`."""
    disk, temp = folder / "disk", folder / "tmp"
    temp.mkdir(parents=True)
    archive = next(path for path in store.rglob("*.mar"))
    flags = [*plan.flags(resident, workers), "--disk-cache", str(disk)]
    flags += ["--disk-cache-bytes", str(plan.disk * archive.stat().st_size)]
    flags += ["--metrics-per-model", str(SHOWN_MODELS)]
    with run_local_server(str(store), flags, {"TMPDIR": str(temp)}) as server:
        yield server, disk, temp


@contextmanager
def start_driver(server: LocalServer, models: int, tasks: TaskList, what: str, seconds: float) -> Iterator[Drive]:
    """Start a driver process for `models` models of a fleet, with a progress bar over so many seconds."""
    with DriverPool(_load_target(server, models), 1) as pool:
        task = tasks.start_task(what, round(seconds))
        done = 0.0

        def drive(schedule: Schedule) -> Run:
            nonlocal done
            run = pool.drive(schedule, look=lambda t: task.update(round(done + min(t, schedule.seconds))))
            done += schedule.seconds
            return run

        yield drive
        task.end()


def run_traffic(plan: ScalePlan, server: LocalServer, disk: Path, temp: Path, drive: Drive) -> list[TrafficSpan]:
    """Run the traffic, one span after another."""
    profile = Profile(plan.models, plan.rate, seed=plan.seed)
    pids, spans = list_pids(server), []
    for part in range(plan.spans):
        before = {name: read_cpu_seconds(pid) for name, pid in pids.items()}
        run = drive(profile.schedule(plan.span_s, part))
        spent = {name: read_cpu_seconds(pid) - before[name] for name, pid in pids.items()}
        spans.append(_summarise_span(run, spent, take_census(server, disk, temp)))
    return spans


def measure_cost(server: LocalServer, archives: int, drive: Drive, requests: int = PROBES) -> Cost:
    """Measure repeated requests for a few models, and pages of the list of models."""
    hot = np.arange(requests) % min(HOT, archives)
    drive(_schedule_each_once(range(min(HOT, archives)), LOAD_RATE))  # from now on they are resident
    fronts = [pid for name, pid in list_pids(server).items() if name.startswith("front")]
    before = sum(map(read_cpu_seconds, fronts))
    run = drive(Schedule(np.arange(requests) / PROBE_RATE, hot, requests / PROBE_RATE))
    front_us = (sum(map(read_cpu_seconds, fronts)) - before) / requests * 1e6
    resident = server.loaded_models()
    return Cost(archives, resident, front_us, _latency_ms(run, "hit", 50), measure_page_ms(server))


def load_crowd(plan: ScalePlan, server: LocalServer, drive: Drive) -> Crowd:
    """Load more and more models into the only worker, then request each once more."""
    worker = list_pids(server)["worker 0"]
    resident, memory, pages = [], [], []
    parts = np.array_split(np.arange(plan.many), STEPS)
    for part in parts:
        drive(_schedule_each_once(part.tolist(), LOAD_RATE))
        resident.append(server.loaded_models())
        memory.append(read_pss(worker))
        pages.append(measure_page_ms(server))
    again = drive(_schedule_each_once(range(plan.many), PROBE_RATE))
    hits = float((again.cache == CACHE.index("hit")).mean())
    each = compute_trend(memory) / (plan.many / STEPS)
    return Crowd(resident, memory, pages, each, hits, _latency_ms(again, "hit", 99))


def measure_page_ms(server: LocalServer) -> float:
    """Measure the median time of a page of the management API's list of models."""
    with urllib3.PoolManager() as pool:
        return statistics.median(_list_page(pool, server) for _ in range(PAGES))


def _list_page(pool: urllib3.PoolManager, server: LocalServer) -> float:
    started = time.perf_counter()
    reply = pool.request("GET", f"{server.management}{MODELS_PATH}?limit=100")
    assert reply.status == 200, reply.data  # noqa: PLR2004
    return (time.perf_counter() - started) * 1e3


def _load_target(server: LocalServer, models: int) -> LoadTarget:
    host, body = urlsplit(server.inference).netloc, orjson.dumps(make_request(0))
    return make_target(
        server.inference, [DIALECTS["sagemaker"].request(host, name, body) for name in list_fleet_names(models)]
    )


def _schedule_each_once(models: Sequence[int], rate: float) -> Schedule:
    """Make a schedule that requests each model once, in order."""
    return Schedule(np.arange(len(models)) / rate, np.array(models), len(models) / rate)


def _summarise_span(run: Run, spent: Mapping[str, float], census: Census) -> TrafficSpan:
    n = len(run.status)
    return TrafficSpan(
        seconds=run.schedule.seconds,
        requests=n,
        failed=int((run.status != 200).sum()) + len(run.unsound),  # noqa: PLR2004
        hit_ratio=float((run.cache == CACHE.index("hit")).mean()),
        hit_p50_ms=_latency_ms(run, "hit", 50),
        hit_p99_ms=_latency_ms(run, "hit", 99),
        miss_p50_ms=_latency_ms(run, "miss", 50),
        miss_p99_ms=_latency_ms(run, "miss", 99),
        cpu_us={name: seconds / n * 1e6 for name, seconds in spent.items()},
        census=census,
        invalid=run.invalid(),
    )


def _latency_ms(run: Run, cache: str, percentile: float) -> float:
    of_these = run.latency[(run.status == 200) & (run.cache == CACHE.index(cache))]  # noqa: PLR2004
    return float(np.percentile(of_these, percentile)) * 1e3 if len(of_these) else float("nan")


# --- the whole ------------------------------------------------------------------------------------------------------


def run_stages(plan: ScalePlan, folder: Path, tasks: TaskList) -> tuple[list[TrafficSpan], list[Cost], Crowd]:
    """Run all stages. Raises what the server, the driver and the store raise."""
    store = folder / "store"
    write_fleet(Fleet(plan.models, plan.seed, {plan.family: 1.0}), str(store), tasks)
    costs = []
    for archives in (size for size in COSTS if size < plan.models):
        smaller = folder / f"store-{archives}"
        _link_archives(store, smaller, archives)
        with (
            serve_store(plan, smaller, folder / f"{archives}", plan.resident, plan.workers) as (server, *_),
            start_driver(
                server, archives, tasks, f"{archives} archives", archives / LOAD_RATE + PROBES / PROBE_RATE
            ) as drive,
        ):
            drive(_schedule_each_once(range(archives), LOAD_RATE))
            costs.append(measure_cost(server, archives, drive))
    seconds = plan.spans * plan.span_s + PROBES / PROBE_RATE
    with (
        serve_store(plan, store, folder / "hour", plan.resident, plan.workers) as (server, disk, temp),
        start_driver(server, plan.models, tasks, f"{plan.models} archives", seconds) as drive,
    ):
        spans = run_traffic(plan, server, disk, temp, drive)
        costs.append(measure_cost(server, plan.models, drive))
    seconds = plan.many / LOAD_RATE + plan.many / PROBE_RATE
    with (
        serve_store(plan, store, folder / "crowd", plan.many, 1) as (server, *_),
        start_driver(server, plan.many, tasks, f"{plan.many} resident", seconds) as drive,
    ):
        return spans, costs, load_crowd(plan, server, drive)


def _link_archives(store: Path, smaller: Path, archives: int) -> None:
    """Link the first archives of a store into another one, without copying them."""
    for name in list_fleet_names(archives):
        (smaller / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(store / name, smaller / name)


@app.command()
def main(
    *,
    models: Annotated[int, typer.Option(min=200, help="number of archives in the store")] = USUAL.models,
    resident: Annotated[
        int, typer.Option(min=1, help="number of models that fit in memory, all workers together")
    ] = USUAL.resident,
    many: Annotated[
        int, typer.Option(min=STEPS, help="number of models that one worker holds in the last stage")
    ] = USUAL.many,
    rate: Annotated[float, typer.Option(min=10, help="requests per second")] = USUAL.rate,
    spans: Annotated[
        int, typer.Option(min=MIN_SPANS, help="number of spans of traffic, each followed by a count of resources")
    ] = USUAL.spans,
    seconds: Annotated[float, typer.Option(min=1, help="duration of a span")] = USUAL.span_s,
    seed: flags.Seed = 0,
    keep: flags.KeepRecord = True,
) -> None:
    """Check that no resource grows: an hour of traffic over a large fleet in minutes, its cost, thousands resident."""
    plan = ScalePlan(
        models, resident, resident * 5 // 2, min(many, models), spans=spans, span_s=seconds, rate=rate, seed=seed
    )
    before = record.describe_machine()
    hours = spans * seconds * rate / 20 / 3600
    console.print(f"{models} archives, room for {resident}, {hours:.1f} hours of 20 requests/s at {rate:g} requests/s")
    try:
        with tempfile.TemporaryDirectory(prefix="fleetcast-scale-") as folder, follow_tasks() as tasks:
            found, costs, crowded = run_stages(plan, Path(folder), tasks)
    except (RuntimeError, ValueError, OSError, urllib3.exceptions.HTTPError, LoadError) as error:
        raise SystemExit(f"no verdict: {error}") from error
    verdicts = [*judge_spans(found, plan.disk), *judge_costs(costs), *judge_crowd(crowded, plan.many, plan.row_bytes)]
    _show_findings(found, costs, crowded, verdicts)
    if keep:
        results = {
            "plan": asdict(plan),
            "spans": [asdict(span) for span in found],
            "costs": [asdict(cost) for cost in costs],
            "crowd": asdict(crowded),
            "verdicts": [{**asdict(verdict), "met": verdict.met} for verdict in verdicts],
        }
        console.print(f"record: {record.save_record('scale', seed, before, results)}")
    raise SystemExit(not all(verdict.met for verdict in verdicts))


def _show_findings(
    spans: Sequence[TrafficSpan], costs: Sequence[Cost], crowded: Crowd, verdicts: Sequence[GrowthVerdict]
) -> None:
    console.print(build_spans_table(spans), build_costs_table(costs, crowded))
    for what, values in (
        ("p99 of a hit", [span.hit_p99_ms for span in spans]),
        ("p99 of a miss", [span.miss_p99_ms for span in spans]),
        ("memory", [float(sum(span.census.memory.values())) for span in spans]),
    ):
        console.print(f"{what:13}  {draw_sparkline(values)}  {min(values):.4g} to {max(values):.4g}")
    console.print(build_verdicts_table(verdicts))
