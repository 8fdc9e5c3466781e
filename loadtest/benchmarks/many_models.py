"""A whole tick in one call for many models, beside one call for each model.

One worker and one front share two cores with the client. Every model is resident; bodies are DeepAR JSON of a week of
hours and the longest lag before it. The single calls come from wrk over 32 connections, which is the most that this
server answers; the ratio is that of forecasts per second. Saves a record.
"""

import http.client
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from loadtest import flags, record
from loadtest.driver import wrk
from loadtest.driver.dialects import find_fault
from loadtest.fleets.network_shape import make_request
from loadtest.fleets.synthetic_archives import make_archive
from loadtest.observe.local_server import LocalServer, run_local_server
from server.contract import FORECASTS_PATH, INVOCATIONS_PATH, JSON

SEED = 11
CONNECTIONS, SINGLES_S = 32, 2.0
SIZES = (100, 500, 1000)

CONSOLE = Console(width=None if sys.stdout.isatty() else 110)


app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(rounds: flags.CallRounds = 9) -> None:
    """Measure calls for 100, 500 and 1,000 models."""
    wrk.require_wrk()
    before = record.describe_machine()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = [f"m{i}.mar" for i in range(max(SIZES))]
        (folder / "store").mkdir()
        for seed, name in enumerate(track(names, "packing", transient=True)):
            (folder / "store" / name).write_bytes(make_archive("tcn", name, seed))
        server = stack.enter_context(run_local_server(str(folder / "store"), ["--workers", "1"]))
        results = measure_calls(server, names, folder, rounds)
    table = Table("models in one call", "ms end to end", "forecasts/s", "forecasts/s / single calls'")
    for size in SIZES:
        row = results[f"{size} models"]
        told = (_format_spread(row[key], digits) for key, digits in (("ms", 1), ("per_s", 0), ("ratio", 2)))
        table.add_row(str(size), *told)
    CONSOLE.print(
        table, f"single calls over {CONNECTIONS} connections: {_format_spread(results['singles_per_s'], 0)}/s"
    )
    CONSOLE.print(f"record: {record.save_record('many', SEED, before, results)}")


def measure_calls(server: LocalServer, names: list[str], folder: Path, rounds: int) -> dict[str, Any]:
    """Measure calls of each size and single calls in turn; the first round is warm-up."""
    request = make_request(SEED)
    (folder / "body.json").write_text(json.dumps(request))
    single = wrk.WrkTarget(
        "single calls", f"{server.inference}{INVOCATIONS_PATH}", len(names), ".mar", folder / "body.json", JSON
    )
    (instance,) = request["instances"]
    bodies = {
        size: json.dumps({"requests": [{"target_model": name, **instance} for name in names[:size]]}).encode()
        for size in SIZES
    }
    connection = http.client.HTTPConnection(urlsplit(server.inference).netloc, timeout=60)
    times: dict[int, list[float]] = {size: [] for size in SIZES}
    singles: list[float] = []
    for turn in track(range(rounds + 1), "calls", transient=True):
        for size in SIZES:
            times[size].append(_time_call(connection, bodies[size], size))
        singles.append(wrk.run_wrk(single, CONNECTIONS, SINGLES_S if turn else 1.0).requests_per_s)
    rates = singles[1:]
    found: dict[str, Any] = {"singles_per_s": record.summarise_spread(rates), "body_bytes": len(bodies[500])}
    for size, seconds in times.items():
        per_s = [size / each for each in seconds[1:]]
        found[f"{size} models"] = {
            "ms": record.summarise_spread([each * 1e3 for each in seconds[1:]]),
            "per_s": record.summarise_spread(per_s),
            "ratio": record.summarise_spread([many / one for many, one in zip(per_s, rates, strict=True)]),
        }
    return found


def _time_call(connection: http.client.HTTPConnection, body: bytes, size: int) -> float:
    """Return the seconds from the first byte sent to the last received. Raises RuntimeError for a failed forecast."""
    started = time.perf_counter()
    connection.request("POST", FORECASTS_PATH, body)
    reply = connection.getresponse()
    answer = reply.read()
    seconds = time.perf_counter() - started
    found = json.loads(answer)
    if reply.status != http.HTTPStatus.OK or found["failed"] or len(found["predictions"]) != size or find_fault(answer):
        raise RuntimeError(f"a call for {size} models answered {reply.status}: {answer[:300]!r}")
    return seconds


def _format_spread(values: dict[str, float], digits: int) -> str:
    return f"{values['median']:.{digits}f} ({values['min']:.{digits}f}-{values['max']:.{digits}f})"
