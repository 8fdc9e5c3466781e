"""A thousand models that are only in a slow store, all asked at the same moment, beside hits of another.

The store answers each GET after 20 ms, on loopback; it counts the requests for each key and how many it had at a time.
The model beside them is resident and asked at a steady pace by a process of its own: its latency alone and meanwhile is
compared. All share the machine's cores, so the processor time of each process in that span is printed beside, and how
much the rest of the machine took. Saves a record.
"""

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
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
from loadtest.benchmarks.steady_hits import OK, Connection, SteadyHits, TimedHit, ask_steadily
from loadtest.fleets.network_shape import CONFIG as TCN
from loadtest.observe.local_server import LocalServer, run_local_server
from loadtest.observe.moto_server import S3_ENVIRONMENT
from loadtest.observe.resource_counts import list_pids, read_cpu_seconds
from loadtest.observe.slow_store import read_counts, serve_slow_store

SEED = 7
LATENCY_S = 0.02
ALONE_S = 2.0
HIT = "hit.mar"

CONSOLE = Console(width=None if sys.stdout.isatty() else 110)
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    models: Annotated[int, typer.Option(min=1, help="archives that are asked at once")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="rounds, each with archives of its own")] = 3,
) -> None:
    """Measure how long all answers take, what the store is asked, and what hits of another model cost meanwhile."""
    before = record.describe_machine()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = [[f"r{turn}-{i}.mar" for i in range(models)] for turn in range(rounds)]
        write_fleet(folder / "store", build_family("tcn", TCN), TCN, [HIT, *(each for row in names for each in row)])
        body = write_bodies(folder)[1].read_bytes()
        endpoint = stack.enter_context(serve_slow_store(folder / "store", LATENCY_S))
        flags = ["--workers", "1", "--s3-endpoint-url", endpoint, "--model-cache-bytes", "1GiB", "--watch-store", "off"]
        server = stack.enter_context(run_local_server("s3://bench", flags, S3_ENVIRONMENT))
        hits = stack.enter_context(ask_steadily(server.inference, HIT, body))
        bench = {"store": read_counts(endpoint).pid, "driver": os.getpid(), "client of hits": hits.pid}
        found = [uvloop.run(measure_round(server, row, body, hits, bench)) for row in names]
        counts = read_counts(endpoint)
    asked = [counts.gets.get(name, 0) for row in names for name in row]
    results: dict[str, Any] = {
        "models": models,
        "failed": sum(each["failed"] for each in found),
        "gets_of_a_model": {"min": min(asked), "max": max(asked)},
        "store_requests_at_a_time": counts.most_at_a_time,
    }
    results |= {
        name: record.summarise_spread([round(each[name], 3) for each in found]) for name in found[0] if name != "failed"
    }
    for name, value in results.items():
        CONSOLE.print(f"{name:32} {value}")
    CONSOLE.print(f"record: {record.save_record('cold-thousand', SEED, before, results)}")


async def measure_round(
    server: LocalServer, names: Sequence[str], body: bytes, hits: SteadyHits, bench: Mapping[str, int]
) -> dict[str, float]:
    """Let the hits be alone for a while, then ask all names at once beside them. `bench`: its processes, by name."""
    served = list_pids(server)
    pids = served | dict(bench)
    address = urlsplit(server.inference)
    assert address.hostname is not None
    assert address.port is not None
    connections = [Connection(address.hostname, address.port) for _ in names]
    for each in connections:
        await each.open()
    await asyncio.sleep(ALONE_S)
    used, busy, began = {name: read_cpu_seconds(pid) for name, pid in pids.items()}, read_busy_s(), time.monotonic()
    answers = await asyncio.gather(*(each.ask(name, body) for each, name in zip(connections, names, strict=True)))
    took = time.monotonic() - began
    cpu = {name: read_cpu_seconds(pid) - used[name] for name, pid in pids.items()}
    others = max(0.0, read_busy_s() - busy - sum(cpu.values()))
    for each in connections:
        each.close()
    return {
        "all_answered_s": took,
        "failed": float(sum(not each.startswith(OK) for each in answers)),
        **compare_hits(await asyncio.to_thread(hits.take), began, took),
        **{f"cpu_ms_a_model {name}": seconds * 1e3 / len(names) for name, seconds in cpu.items()},
        "cores_of_the_server": sum(cpu[name] for name in served) / took,
        "cores_of_the_bench": sum(cpu[name] for name in bench) / took,
        "cores_of_others": others / took,
    }


def compare_hits(hits: Sequence[TimedHit], began: float, took: float) -> dict[str, float]:
    """The latencies of the hits that were due in the span, and of those in the time alone before it. Pure."""
    alone = [each.seconds * 1e3 for each in hits if began - ALONE_S <= each.due < began]
    beside = [each.seconds * 1e3 for each in hits if began <= each.due < began + took]
    quiet, busy = statistics.median(alone or [0.0]), statistics.median(beside or [0.0])
    return {
        "hits": len(beside),
        "hit_alone_p50_ms": quiet,
        "hit_p50_ms": busy,
        "hit_p90_ms": float(np.percentile(beside or [0.0], 90)),
        "hit_p50_ratio": busy / quiet if quiet else 0.0,
    }


def read_busy_s() -> float:
    """Processor seconds that all processes of this machine have used since it started."""
    user, nice, system, _, _, irq, soft, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    app()
