"""A thousand models that are only in a slow store, all asked at the same moment, beside hits of another.

The store answers each GET after 20 ms, on loopback; it counts the requests for each key and how many it had at a time.
The model beside them is resident and asked over one connection all the time: its latency alone and meanwhile is
compared. `worker_cpu_ms_a_model` has the hits beside them too. Saves a record.
"""

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console

from handlers.forecasters import build_family
from loadtest import record
from loadtest.benchmarks.core import write_bodies, write_fleet
from loadtest.fleets.network_shape import CONFIG as TCN
from loadtest.observe.local_server import LocalServer, run_local_server
from loadtest.observe.moto_server import S3_ENVIRONMENT
from loadtest.observe.resource_counts import read_cpu_seconds
from loadtest.observe.slow_store import read_counts, serve_slow_store
from server.contract import HEADER_TARGET_MODEL, INVOCATIONS_PATH, NPY

SEED = 7
LATENCY_S = 0.02
ALONE_S = 2.0
OK = b"HTTP/1.1 200"

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
        write_fleet(
            folder / "store", build_family("tcn", TCN), TCN, ["hit.mar", *(each for row in names for each in row)]
        )
        body = write_bodies(folder)[1].read_bytes()
        endpoint = stack.enter_context(serve_slow_store(folder / "store", LATENCY_S))
        flags = ["--workers", "1", "--s3-endpoint-url", endpoint, "--model-cache-bytes", "1GiB", "--watch-store", "off"]
        server = stack.enter_context(run_local_server("s3://bench", flags, S3_ENVIRONMENT))
        worker = next(each["pid"] for each in server.processes() if each["kind"] == "worker")
        found = []
        for row in names:
            used = read_cpu_seconds(worker)
            found.append(asyncio.run(measure_round(server, row, body)))
            found[-1]["worker_cpu_ms"] = (read_cpu_seconds(worker) - used) * 1e3 / models
        counts = read_counts(endpoint)
    asked = [counts.gets.get(name, 0) for row in names for name in row]
    results: dict[str, Any] = {
        "models": models,
        "all_answered_s": record.summarise_spread([each["all_answered_s"] for each in found]),
        "failed": sum(each["failed"] for each in found),
        "gets_of_a_model": {"min": min(asked), "max": max(asked)},
        "store_requests_at_a_time": counts.most_at_a_time,
        "worker_cpu_ms_a_model": record.summarise_spread([each["worker_cpu_ms"] for each in found]),
        "hit_p50_ratio": record.summarise_spread([each["hit_p50_ratio"] for each in found]),
        "hit_p50_ms": record.summarise_spread([each["hit_p50_ms"] for each in found]),
    }
    for name, value in results.items():
        CONSOLE.print(f"{name:28} {value}")
    CONSOLE.print(f"record: {record.save_record('cold-thousand', SEED, before, results)}")


async def measure_round(server: LocalServer, names: Sequence[str], body: bytes) -> dict[str, float]:
    """Ask the hit alone for a while, then all names at once with the hit beside them."""
    address = urlsplit(server.inference)
    assert address.hostname is not None
    assert address.port is not None
    hit = Connection(address.hostname, address.port)
    others = [Connection(address.hostname, address.port) for _ in names]
    for each in (hit, *others):
        await each.open()
    await hit.ask("hit.mar", body)
    alone = await hit.ask_until("hit.mar", body, asyncio.sleep(ALONE_S))
    began = time.perf_counter()
    asking = asyncio.gather(*(each.ask(name, body) for each, name in zip(others, names, strict=True)))
    beside = await hit.ask_until("hit.mar", body, asking)
    took = time.perf_counter() - began
    answers = await asking
    for each in (hit, *others):
        each.close()
    quiet, busy = statistics.median(alone), statistics.median(beside)
    return {
        "all_answered_s": took,
        "failed": float(sum(not each.startswith(OK) for each in answers)),
        "hit_p50_ratio": busy / quiet,
        "hit_p50_ms": busy * 1e3,
    }


class Connection:
    """One client's connection, kept alive."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def open(self) -> None:
        """Connect."""
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)

    async def ask(self, model: str, body: bytes) -> bytes:
        """Invoke a model; the answer with its head."""
        head = (
            f"POST {INVOCATIONS_PATH} HTTP/1.1\r\nHost: bench\r\nContent-Type: {NPY}\r\n"
            f"{HEADER_TARGET_MODEL}: {model}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._writer.write(head.encode() + body)
        answer = await self._reader.readuntil(b"\r\n\r\n")
        lines = answer.lower().split(b"\r\n")
        length = next(int(line.partition(b":")[2]) for line in lines if line.startswith(b"content-length:"))
        return answer + await self._reader.readexactly(length)

    async def ask_until(self, model: str, body: bytes, until: Any) -> list[float]:
        """Invoke a model again and again until the other is done; the seconds of each answer."""
        task, seconds = asyncio.ensure_future(until), list[float]()
        while not task.done() or not seconds:
            began = time.perf_counter()
            await self.ask(model, body)
            seconds.append(time.perf_counter() - began)
        return seconds

    def close(self) -> None:
        """Disconnect."""
        self._writer.close()


if __name__ == "__main__":
    app()
