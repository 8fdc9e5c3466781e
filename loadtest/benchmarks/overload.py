"""What a server does at once, twice and three times its peak: answers in time, late answers, refusals and their time.

One worker and one front share the machine with the client. Every model is resident; each request has a deadline. The
peak is what a closed loop over 32 connections is answered, measured before and after each load, since a shared machine
is faster at one time than at another: a load is compared with the mean of the two. Each load is followed by half of the
peak, which shows how soon all is well. A minute or two; saves a record.
"""

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from loadtest import record
from loadtest.driver.dialects import BodyKind
from loadtest.driver.driver_pool import DriverPool
from loadtest.driver.open_loop import LoadTarget
from loadtest.driver.profiles import Float64, Int64, Schedule
from loadtest.driver.run import RequestSource, ServerUnderLoad, measure_memory
from loadtest.driver.run_result import Run
from loadtest.fleets.synthetic_archives import make_archive
from loadtest.observe.local_server import LocalServer, run_local_server
from server.contract import HEADER_TIMEOUT_MS

SEED = 15
CONNECTIONS, MAX_CONNECTIONS = 32, 2048
FACTORS = (1.0, 2.0, 3.0)
AFTER, AFTER_S = 0.5, 3.0  #: of the peak, and for how long
SECOND_S = 1.0  #: after the overload, in which some requests may still be refused
TRANSPORT_S = 0.05  #: what the way to and from the server may add to the deadline, as the client sees it
OK, REFUSED, EXPIRED = 200, (429, 503), 424

CONSOLE = Console(width=None if sys.stdout.isatty() else 110)


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True, slots=True)
class OverloadPlan:
    """The fleet and the loads. `deadline_s`: of each request."""

    models: int = 50
    kind: str = "gru-192"  # slow enough that the client and the front are not what is measured
    deadline_s: float = 0.5
    seconds: float = 8.0
    burst: int = 600  #: requests of the closed loop that measures the peak


@app.command()
def main(
    deadline_ms: Annotated[int, typer.Option(min=1, help="of each request")] = 500,
    seconds: Annotated[float, typer.Option(min=2, help="of each load")] = 8.0,
    kind: Annotated[str, typer.Option(help="kind of the models, as of `fleetcast-load fleet`")] = "gru-192",
    save: Annotated[bool, typer.Option(help="write the record")] = True,
) -> None:
    """Measure and print."""
    before = record.describe_machine()
    results = measure_overload(OverloadPlan(kind=kind, deadline_s=deadline_ms / 1e3, seconds=seconds))
    CONSOLE.print(build_table(results))
    for name, found in results["loads"].items():
        for why in found["invalid"]:
            CONSOLE.print(f"{name} is not valid: {why}")
    if save:
        CONSOLE.print(f"record: {record.save_record('overload', SEED, before, results)}")


def measure_overload(plan: OverloadPlan) -> dict[str, Any]:
    """The peak, then each load. Raises RuntimeError where the server answers wrong."""
    with ExitStack() as stack:
        store = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for seed in track(range(plan.models), "packing", transient=True):
            (store / f"m{seed}.mar").write_bytes(make_archive(plan.kind, f"m{seed}.mar", seed))
        server = stack.enter_context(run_local_server(str(store), ["--workers", "1", "--fronts", "1"]))
        patient, target = make_target(server, store, None), make_target(server, store, plan.deadline_s)
        peaks = [measure_peak(patient, plan)]
        loads, size = {}, measure_memory(server)
        with DriverPool(target, 1, connections=MAX_CONNECTIONS) as pool:
            for factor in track(FACTORS, "loads", transient=True):
                run = pool.drive(make_load(plan, factor * peaks[-1], AFTER * peaks[-1]))
                peaks.append(measure_peak(patient, plan))
                loads[f"{factor:g}x"] = summarize_load(run, plan, (peaks[-2] + peaks[-1]) / 2)
        grown = {name: now - size.get(name, 0) for name, now in measure_memory(server).items()}
    return {
        "models": plan.models,
        "kind": plan.kind,
        "deadline_ms": plan.deadline_s * 1e3,
        "peak_per_s": record.summarise_spread(peaks),
        "loads": loads,
        "grown_bytes": grown,
    }


def make_target(server: LocalServer, store: Path, deadline_s: float | None) -> LoadTarget:
    """A request for each model, with the deadline."""
    names = RequestSource(None, sys.maxsize, BodyKind.DEEPAR, None, SEED).of(str(store), CONSOLE)
    found = ServerUnderLoad(server.inference, None, names, "overload").target("sagemaker", allow_remote=False)
    if deadline_s is None:
        return found
    line = f"\r\n{HEADER_TIMEOUT_MS}: {max(1, round(deadline_s * 1e3))}\r\n".encode()
    requests = [request.replace(b"\r\n", line, 1) for request in found.requests]
    return LoadTarget(found.host, found.port, requests)


def measure_peak(target: LoadTarget, plan: OverloadPlan) -> float:
    """Answers a second of a closed loop, once all models are there. Raises RuntimeError for any other answer."""
    with DriverPool(target, 1, connections=CONNECTIONS) as pool:
        for burst in (2 * plan.models, plan.burst):
            run = pool.drive(Schedule(np.zeros(burst), choose_models(plan, burst), 1.0), patience_s=120.0)
            if set(run.status.tolist()) != {OK}:
                raise RuntimeError(f"statuses {sorted(set(run.status.tolist()))} without overload")
    return float(plan.burst / np.nanmax(run.done))


def make_load(plan: OverloadPlan, rate: float, after: float) -> Schedule:
    """Independent clients: `rate` a second, then `after`."""
    rng = np.random.default_rng(SEED)
    parts = [
        start + np.sort(rng.uniform(0, seconds, int(each * seconds)))
        for start, seconds, each in ((0.0, plan.seconds, rate), (plan.seconds, AFTER_S, after))
    ]
    at = np.concatenate(parts)
    return Schedule(at, choose_models(plan, len(at)), plan.seconds + AFTER_S)


def choose_models(plan: OverloadPlan, count: int) -> Int64:
    """[count] models, each as likely."""
    return np.random.default_rng(SEED).integers(0, plan.models, count)


def summarize_load(run: Run, plan: OverloadPlan, peak: float) -> dict[str, Any]:
    """What became of the requests of the load, from when they were sent, and of those after it."""
    at, took = run.schedule.at, run.done - run.sent
    during, after = at < plan.seconds, at >= plan.seconds + SECOND_S
    answered = during & (run.status == OK)
    late = took > plan.deadline_s + TRANSPORT_S
    refused, expired = during & np.isin(run.status, REFUSED), during & (run.status == EXPIRED)
    goodput = float((answered & ~late).sum() / plan.seconds)
    return {
        "sent": int(during.sum()),
        "goodput_per_s": goodput,
        "goodput_of_peak": goodput / peak,
        "late": int((answered & late).sum()),
        "answered_ms": summarize_times(took[answered]),
        "refused": int(refused.sum()),
        "refused_ms": summarize_times(took[refused]),
        "expired": int(expired.sum()),
        "other": int(during.sum() - answered.sum() - refused.sum() - expired.sum()),
        "not_answered_after": int((after & (run.status != OK)).sum()),
        "invalid": run.invalid(),
    }


def summarize_times(seconds: Float64) -> dict[str, float] | None:
    """Milliseconds; None where there is nothing."""
    if not len(seconds):
        return None
    p50, p90, p99 = np.percentile(seconds * 1e3, [50, 90, 99])
    return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "max": float(seconds.max() * 1e3)}


def build_table(results: dict[str, Any]) -> Table:
    """A row for each load."""
    columns = (
        "answered in time/s",
        "of peak",
        "late",
        "p99 ms",
        "refused",
        "after p50 ms",
        "p90",
        "p99",
        "expired",
        "ill after 1 s",
    )
    peak, grown = results["peak_per_s"], ", ".join(f"{k} {v / 1e6:+.1f} MB" for k, v in results["grown_bytes"].items())
    title = f"{results['models']} {results['kind']}, peak {peak['median']:.0f}/s ({peak['min']:.0f}-{peak['max']:.0f})"
    title += f", deadline {results['deadline_ms']:.0f} ms; memory after all: {grown}"
    table = Table("load", *columns, title=title)
    for name, found in results["loads"].items():
        refused = found["refused_ms"] or {"p50": 0.0, "p90": 0.0, "p99": 0.0}
        table.add_row(
            name,
            f"{found['goodput_per_s']:.0f}",
            f"{found['goodput_of_peak']:.0%}",
            str(found["late"]),
            "" if found["answered_ms"] is None else f"{found['answered_ms']['p99']:.0f}",
            str(found["refused"]),
            f"{refused['p50']:.1f}",
            f"{refused['p90']:.1f}",
            f"{refused['p99']:.1f}",
            str(found["expired"]),
            str(found["not_answered_after"]),
        )
    return table
