"""What a worker's death costs: SIGKILL with thousands of resident models under load.

Requests arrive on a schedule, whatever the answers do, and each answer is compared byte by byte with the one before the
deaths. Printed are the latencies of the second before each death and of the seconds after it, counted from when a
request was due, and whether a model was loaded again. FLEETCAST_SPARE_WORKER=off and FLEETCAST_KEEP_ROWS=off show what
these settings are for. Saves a record.
"""

import asyncio
import datetime as dt
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import numpy as np
import typer
import uvloop
from rich.console import Console

from handlers.forecasters import build_family
from loadtest import record
from loadtest.benchmarks.core import write_bodies, write_fleet
from loadtest.benchmarks.steady_hits import OK, Connection
from loadtest.fleets.network_shape import CONFIG as TCN
from loadtest.observe.local_server import LocalServer, run_local_server
from loadtest.observe.processes import wait_until
from server.contract import LOADING

SEED = 7
CONNECTIONS = 16
BEFORE_S, AFTER_S = 1.0, 3  #: what is looked at: a second before a death, and single seconds after it

CONSOLE = Console(width=None if sys.stdout.isatty() else 110)
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request: when it was due (monotonic), seconds until its answer from then on, and what was wrong with that."""

    due: float
    seconds: float
    problem: str


@app.command()
def main(
    models: Annotated[int, typer.Option(min=1, help="resident models")] = 2500,
    rate: Annotated[float, typer.Option(min=1, help="requests a second")] = 300.0,
    deaths: Annotated[int, typer.Option(min=1, help="how often the worker is killed")] = 3,
) -> None:
    """Kill the only worker under load, again and again, and measure the seconds after it."""
    before = record.describe_machine()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = [f"m{i}.mar" for i in range(models)]
        write_fleet(folder / "store", build_family("tcn", TCN), TCN, names)
        body = write_bodies(folder)[1].read_bytes()
        settings = {"FLEETCAST_SPARE_WORKER": os.environ.get("FLEETCAST_SPARE_WORKER", "on")}
        flags = ["--workers", "1", "--model-cache-bytes", "1GiB", "--watch-store", "off", "--revalidate-s", "36000"]
        flags += ["--log-level", "info", "--log-format", "json"]
        said = stack.enter_context(folder.joinpath("log").open("w+"))
        server = stack.enter_context(run_local_server(str(folder / "store"), flags, settings, said))
        results = uvloop.run(measure_deaths(server, names, body, rate, deaths, settings["FLEETCAST_SPARE_WORKER"]))
        results["starts"] = find_stages(folder.joinpath("log").read_text().splitlines(), results.pop("killed_at"))
    for name, value in results.items():
        CONSOLE.print(f"{name:24} {value}")
    CONSOLE.print(f"record: {record.save_record('death', SEED, before, results)}")


async def measure_deaths(
    server: LocalServer, names: Sequence[str], body: bytes, rate: float, deaths: int, spare: str
) -> dict[str, Any]:
    """Make all models resident, then kill the worker under load."""
    address = urlsplit(server.inference)
    assert address.hostname is not None
    assert address.port is not None
    connections = [Connection(address.hostname, address.port) for _ in range(CONNECTIONS)]
    await connections[0].open()
    answers = {name: (await connections[0].ask(name, body)).partition(b"\r\n\r\n")[2] for name in names}
    for each in connections[1:]:  # only now: the server ends connections that are idle for long
        await each.open()
    loads = await asyncio.to_thread(count_loads, server)
    outcomes, killed, killed_at = list[Outcome](), list[float](), list[float]()
    stop = asyncio.Event()
    load = asyncio.create_task(run_load(connections, answers, body, rate, outcomes, stop))
    for _ in range(deaths):
        if spare == "on":
            await asyncio.to_thread(wait_until, lambda: has_spare(server))
        await asyncio.sleep(BEFORE_S)
        worker = await asyncio.to_thread(find_worker, server)
        killed.append(time.monotonic())
        killed_at.append(time.time())
        os.kill(worker, signal.SIGKILL)
        await asyncio.sleep(AFTER_S)
    stop.set()
    await load
    for each in connections:
        each.close()
    spans = {"before": (-BEFORE_S, 0.0)} | {f"second_{i + 1}": (float(i), i + 1.0) for i in range(AFTER_S)}
    return {
        "models": len(names),
        "rate": rate,
        "spare_worker": spare,
        **{name: summarise_span(outcomes, killed, *span) for name, span in spans.items()},
        "answers": len(outcomes),
        "problems": sorted({each.problem for each in outcomes if each.problem}),
        "loaded_again": count_loads(server),
        "loaded_before": loads,
        "killed_at": killed_at,
    }


async def run_load(
    connections: Sequence[Connection],
    answers: dict[str, bytes],
    body: bytes,
    rate: float,
    outcomes: list[Outcome],
    stop: asyncio.Event,
) -> None:
    """Send requests at drawn times until `stop`, on whichever connection is free; the wait for one counts."""
    draw, names = random.Random(SEED), list(answers)
    free = asyncio.Queue[Connection]()
    for each in connections:
        free.put_nowait(each)
    due, running = time.monotonic(), set[asyncio.Task[None]]()

    async def ask(name: str, due: float) -> None:
        connection = await free.get()
        answer = await connection.ask(name, body)
        free.put_nowait(connection)
        head, _, found = answer.partition(b"\r\n\r\n")
        problem = "" if found == answers[name] else "wrong" if head.startswith(OK) else head[:16].decode()
        outcomes.append(Outcome(due, time.monotonic() - due, problem))

    while not stop.is_set():
        due += draw.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = asyncio.create_task(ask(draw.choice(names), due))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)


def summarise_span(
    outcomes: Sequence[Outcome], killed: Sequence[float], start: float, end: float
) -> dict[str, float | int]:
    """The latencies in ms of what was due in this span around any death."""
    found = [each.seconds * 1e3 for each in outcomes for at in killed if start <= each.due - at < end]
    p50, p99, most = map(float, np.percentile(found or [0.0], [50, 99, 100]))
    return {"requests": len(found), "p50_ms": round(p50, 1), "p99_ms": round(p99, 1), "max_ms": round(most, 1)}


def find_stages(lines: Sequence[str], killed_at: Sequence[float]) -> list[dict[str, Any]]:
    """When the server noticed each death and when the next worker was ready, in ms after it; and that one's stages.

    `lines`: the server's log. `killed_at`: wall clock. Pure.
    """
    found = list[dict[str, Any]]()
    said = [json.loads(line) for line in lines if line.startswith("{")]
    for at in killed_at:
        start: dict[str, Any] = {}
        for event, name in (("ended", "noticed_ms"), ("worker_ready", "ready_ms")):
            first = next(
                (each for each in said if each.get("event") == event and _parse_time(each["timestamp"]) >= at), None
            )
            if first is not None:
                start[name] = round((_parse_time(first["timestamp"]) - at) * 1e3, 1)
                start |= {"stages_ms": first["stages_ms"]} if "stages_ms" in first else {}
        found.append(start)
    return found


def _parse_time(text: str) -> float:
    return dt.datetime.fromisoformat(text).timestamp()


def count_loads(server: LocalServer) -> int:
    """Loads from disk and store so far."""
    return int(sum(server.counters(f"{LOADING.series}_count").values()))


def find_worker(server: LocalServer) -> int:
    """The worker's process."""
    return int(next(each["pid"] for each in server.processes() if each["kind"] == "worker"))


def has_spare(server: LocalServer) -> bool:
    """Whether a spare has imported all and waits."""
    return any(each["kind"] == "spare" and each["up"] for each in server.processes())


if __name__ == "__main__":
    app()
