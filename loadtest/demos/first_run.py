"""A fleet, a server whose cache holds a quarter of it, a forecast, a burst of requests, and commands to continue with.

`make run` starts it. It writes only into `.fleetcast/`; the server is a process of its own.
"""

import json
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import boto3
import typer
import urllib3
from rich.console import Console
from rich.table import Table

from handlers.forecasters import get_family
from loadtest.demos.fan_chart import draw_fan_chart
from loadtest.flags import Once, end_on_sigterm
from loadtest.fleets.fleet import list_fleet_names, make_trained_fleet
from loadtest.fleets.synthetic_markets import make_market_request, make_training_markets
from loadtest.observe.local_server import LocalServer, run_local_server
from model_store.archives.archive import open_archive
from model_store.names import ModelName
from server import contract
from server.shell.progress import follow_tasks

FOLDER = Path(".fleetcast")
STORE, REQUEST = FOLDER / "store", FOLDER / "request.json"
SEED = 0
CONNECTIONS = 8
SHOWN_HOURS = (0, 3, 6, 9, 12, 15, 18, 21, 23)
UNKNOWN_KEYS = {"aws_access_key_id": "any", "aws_secret_access_key": "any", "region_name": "us-east-1"}

console = Console(highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def main(
    *,
    models: Annotated[int, typer.Option(min=1, help="number of models of the fleet")] = 200,
    resident: Annotated[
        int, typer.Option(min=1, help="number of models that fit in the cache, all workers together")
    ] = 50,
    workers: Annotated[int, typer.Option(min=1, help="number of worker processes")] = 2,
    requests: Annotated[int, typer.Option(min=1, help="number of requests of the burst")] = 3000,
    inference_port: int = contract.INFERENCE_PORT,
    management_port: int = contract.MANAGEMENT_PORT,
    metrics_port: int = contract.METRICS_PORT,
    once: Once = False,
) -> None:
    """Show Fleetcast on this machine: make a fleet, serve it, and send requests. It needs no configuration."""
    end_on_sigterm()
    names = _make_fleet(models)
    row_bytes = _row_bytes(names[0])
    flags = ["--inference-port", str(inference_port), "--management-port", str(management_port)]
    flags += ["--metrics-port", str(metrics_port), "--workers", str(workers)]
    flags += ["--model-cache-bytes", str(resident * row_bytes), "--slab-bytes", str(row_bytes)]
    try:
        with run_local_server(str(STORE), flags) as server:
            _print_step("2", f"{workers} workers serve {models} models with room for {resident} in memory")
            console.print(f"   inference {server.inference}, management {server.management}, metrics {server.metrics}")
            _ask_twice(server, names[0])
            _send_burst(server, names, requests, resident)
            _how_to(server, names[0])
            if not once:
                _print_step("6", "the server runs until Ctrl-C")
                signal.pause()
    except RuntimeError as error:  # the process has printed the cause on stderr
        raise SystemExit(f"{error}; flags of `make run` go into ARGS: make run ARGS='--inference-port 0'") from None
    except KeyboardInterrupt:
        console.print("\nstopped")


def _print_step(number: str, text: str) -> None:
    console.print(f"\n[bold]{number}. {text}[/]")


def _make_fleet(models: int) -> list[ModelName]:
    names = list_fleet_names(models)
    if all((STORE / name).exists() for name in names):
        _print_step("1", f"the fleet of {models} is in {STORE} already (make clean removes it)")
        return names
    started = time.perf_counter()
    with follow_tasks(console) as tasks:
        task = tasks.start_task(f"fitting {models} markets together")
        fitted = make_trained_fleet(str(STORE), models, SEED, lambda done, most, _: task.update(done, most))
    seconds = time.perf_counter() - started
    better = sum(each.loss / each.naive_loss for each in fitted) / len(fitted)
    _print_step("1", f"fitted {models} synthetic markets together in {seconds:.1f} s and packed them into {STORE}")
    console.print(
        f"   their mean pinball loss on hours they were not fitted on is {better:.2f} of the naive forecast's"
    )
    return names


def _row_bytes(name: ModelName) -> int:
    """Return the bytes that one model of the fleet takes in memory."""
    spec = open_archive((STORE / name).read_bytes(), name).spec
    assert spec is not None, "a forecaster has a fleetcast.json"
    return get_family(spec).row_floats * 4


def _ask_twice(server: LocalServer, model: ModelName) -> None:
    """Request one model twice by boto3: first from the store, then from memory."""
    request, actual = make_market_request(make_training_markets(1, SEED)[0])
    REQUEST.write_text(json.dumps(request))
    client = boto3.client("sagemaker-runtime", endpoint_url=server.inference, **UNKNOWN_KEYS)
    _print_step("3", f"a forecast of {model} by boto3, DeepAR JSON")
    for _ in range(2):
        started = time.perf_counter()
        reply = client.invoke_endpoint(
            EndpointName="fleetcast", TargetModel=model, ContentType=contract.JSON, Body=REQUEST.read_bytes()
        )
        answer = json.loads(reply["Body"].read())
        seconds = time.perf_counter() - started
        headers = reply["ResponseMetadata"]["HTTPHeaders"]
        cache, times = headers[contract.HEADER_CACHE.lower()], headers[contract.HEADER_SERVER_TIMING.lower()]
        console.print(f"   {cache:<4} {seconds * 1e3:6.1f} ms, {times}")
    prediction = answer["predictions"][0]
    console.print(_forecast_table(prediction))
    console.print("\n   ░ 10-90 %  ▒ 25-75 %  ━ median  ● what really came (EUR/MWh, hours ahead)\n")
    console.print(draw_fan_chart(prediction["quantiles"], actual), markup=False)


def _forecast_table(prediction: dict[str, Any]) -> Table:
    levels: dict[str, list[float]] = prediction["quantiles"]
    table = Table("hour", *(f"q{level}" for level in levels), "mean", title=f"from {prediction['start']}")
    for hour in SHOWN_HOURS:
        values = [*(quantiles[hour] for quantiles in levels.values()), prediction["mean"][hour]]
        table.add_row(f"+{hour + 1}", *(f"{value:.2f}" for value in values))
    return table


def _send_burst(server: LocalServer, names: Sequence[ModelName], requests: int, resident: int) -> None:
    """Send requests whose popularity falls with the rank, as in real fleets, and show what the metrics count."""
    rng = random.Random(0)
    asked = rng.choices(rng.sample(names, len(names)), [1 / rank for rank in range(1, len(names) + 1)], k=requests)
    body = REQUEST.read_bytes()
    pool = urllib3.PoolManager(maxsize=CONNECTIONS)

    def ask(name: ModelName) -> int:
        headers = {contract.HEADER_TARGET_MODEL: name, "Content-Type": contract.JSON}
        return pool.request("POST", f"{server.inference}{contract.INVOCATIONS_PATH}", body=body, headers=headers).status

    _print_step("4", f"{requests} requests over the fleet by {CONNECTIONS} connections, popular models more often")
    before, cpu_before = dict(_read_counts(server)), _read_processor_time(server)
    started = time.perf_counter()
    with ThreadPoolExecutor(CONNECTIONS) as threads, follow_tasks(console) as tasks:
        statuses = list(tasks.track(threads.map(ask, asked), "burst", requests))
    seconds = time.perf_counter() - started
    burst = {key: value - before[key] for key, value in _read_counts(server)}
    cpu_s = _read_processor_time(server) - cpu_before
    table = Table("", "", show_header=False, title="what /metrics says")
    for row in _burst_rows(burst, statuses, seconds, cpu_s):
        table.add_row(*row)
    table.add_row("resident now", f"{server.loaded_models()} of {len(names)} models (room for {resident})")
    console.print(table)


def _read_counts(server: LocalServer) -> Iterator[tuple[tuple[str, str], float]]:
    """Read the counts that the burst changes, summed over workers: (series, value of its main label) -> count."""
    for series, label, values in (
        (contract.CACHE_REQUESTS.series, "result", contract.CACHE_RESULTS),
        (contract.EVICTIONS.series, "tier", ("device",)),
        (contract.LOADING.sum, "tier", ("store", "disk")),
        (contract.LOADING.count, "tier", ("store", "disk")),
    ):
        totals = server.totals(series, label)
        yield from (((series, value), totals[value]) for value in values)


def _read_processor_time(server: LocalServer) -> float:
    """The seconds of processor time that all processes of the server have taken."""
    return sum(server.totals(contract.PROCESS_CPU.series, "process").values())


def _burst_rows(
    burst: Mapping[tuple[str, str], float], statuses: Sequence[int], seconds: float, cpu_s: float
) -> Iterator[tuple[str, str]]:
    """The rows of the table; the server's rate is what its processor time allows, not what this client asks for."""
    failed = sum(status != 200 for status in statuses)  # noqa: PLR2004
    hits, misses, joined = (burst[contract.CACHE_REQUESTS.series, result] for result in contract.CACHE_RESULTS)
    yield "answered", f"{len(statuses) - failed}, failed {failed}"
    each_ms = cpu_s / len(statuses) * 1e3
    yield (
        "the server's rate",
        f"{1e3 / max(each_ms, 1e-3):.0f} requests/s a core: {each_ms:.2f} ms of it each, with loads",
    )
    yield "this Python client's", f"{len(statuses) / seconds:.0f} requests/s, which says nothing about the server"
    yield "hit ratio", f"{hits / max(1, hits + misses + joined):.3f}"
    yield "misses", f"{misses:.0f} started a load, {joined:.0f} more waited for one"
    for tier in ("store", "disk"):
        loads, total = burst[contract.LOADING.count, tier], burst[contract.LOADING.sum, tier]
        mean = f", {total / loads * 1e3:.1f} ms each, verified and proved" if loads else ""
        yield f"loads from {tier}", f"{loads:.0f}{mean}"
    yield "evictions", f"{burst[contract.EVICTIONS.series, 'device']:.0f}"


def _how_to(server: LocalServer, model: ModelName) -> None:
    """Print commands to copy."""
    _print_step("5", "call it yourself")
    python = Path(sys.executable)
    fleetcast = str(script) if (script := python.with_name("fleetcast")).exists() else f"{python} -m server.cli.main"
    fleetcast = fleetcast.removeprefix(f"{Path.cwd()}/")
    lines = f"""
import boto3
client = boto3.client("sagemaker-runtime", endpoint_url="{server.inference}", region_name="us-east-1",
                      aws_access_key_id="any", aws_secret_access_key="any")
reply = client.invoke_endpoint(EndpointName="fleetcast", TargetModel="{model}",
                               ContentType="application/json", Body=open("{REQUEST}", "rb"))
print(reply["Body"].read().decode())

curl -i -H "{contract.HEADER_TARGET_MODEL}: {model}" -H "Content-Type: application/json" \\
  --data @{REQUEST} {server.inference}{contract.INVOCATIONS_PATH}

{fleetcast} invoke {model} --url {server.inference} --body {REQUEST} -v

{fleetcast} train your.csv --time hour --target price --out {STORE}

curl "{server.management}{contract.MODELS_PATH}?limit=3"
curl {server.metrics}{contract.METRICS_PATH}
"""
    console.print(lines, markup=False)
