"""`make load`: what tail, hit ratio, load times and memory a fleet has under an open-loop load. A client's view.

python -m loadtest.load                                            a fleet and a server of its own
python -m loadtest.load --url http://127.0.0.1:8080 --store DIR    a server that runs, the names of its store
"""

import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import orjson
import typer
import urllib3
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from handlers.forecasters import build
from loadtest import record, summary
from loadtest.driver import Forbidden, Target, drive, invocation, target
from loadtest.fleet import CONFIG, fleet_names, make_fleet, make_request
from loadtest.local import LocalServer, serve
from loadtest.processes import pss
from loadtest.profiles import Arrivals, Profile
from model_store.errors import LoadError
from model_store.names import ModelName
from model_store.sources import open_source

STORE = Path(".fleetcast/load")
WARMUP = 1  #: part of the profile that is not measured
EXPECTED = (Forbidden, LoadError, urllib3.exceptions.HTTPError, ValueError, OSError, RuntimeError)  #: say what to do

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
app = typer.Typer(add_completion=False, rich_markup_mode=None)


@dataclass(frozen=True, slots=True)
class Subject:
    """A server under load: addresses, the models to ask for, and how to measure its memory, where that is known."""

    inference: str
    metrics: str | None
    names: Sequence[ModelName]
    what: str
    memory: Callable[[], dict[str, int]] | None = None


@app.command()
def load(
    *,
    rate: Annotated[float, typer.Option(help="requests a second")] = 200.0,
    seconds: Annotated[float, typer.Option(help="how long")] = 15.0,
    warmup: Annotated[float, typer.Option(help="seconds of the same load before, not measured; 0: none")] = 5.0,
    arrivals: Annotated[Arrivals, typer.Option(help="how requests follow each other")] = Arrivals.POISSON,
    zipf: Annotated[float, typer.Option(help="popularity of rank r is 1 / r to this power; 0: all alike")] = 1.0,
    models: Annotated[int, typer.Option(min=1, help="size of the fleet; of --store the first so many")] = 200,
    resident: Annotated[int, typer.Option(min=1, help="models that fit in the cache of the own server")] = 50,
    workers: Annotated[int, typer.Option(min=1, help="worker processes of the own server")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="same seed, same schedule")] = 0,
    connections: Annotated[int, typer.Option(min=1, help="connections at most, opened when needed")] = 512,
    url: Annotated[str | None, typer.Option(help="inference address of a server that runs; needs --store")] = None,
    metrics_url: Annotated[str | None, typer.Option(help="its metrics address: hits, loads and evictions")] = None,
    store: Annotated[str | None, typer.Option(help="its store, for the models' names")] = None,
    body: Annotated[Path | None, typer.Option(help="JSON request that its models take", exists=True)] = None,
    allow_remote: Annotated[bool, typer.Option("--allow-remote", help="load an address beyond loopback")] = False,
    keep: Annotated[bool, typer.Option("--record", help="save a record under loadtest/records")] = False,
) -> None:
    """Ask a fleet for forecasts at times and with a popularity drawn beforehand. Exits with 1 when a run is invalid."""
    machine = record.machine()
    request = body.read_bytes() if body else orjson.dumps(make_request(seed))
    try:
        if url is None and (store or metrics_url):
            raise ValueError("--store and --metrics-url are those of the server at --url")
        with _running(url, metrics_url, store, models) if url else _own(models, resident, workers) as subject:
            profile = Profile(len(subject.names), rate, zipf, arrivals, seed)
            how = f"{rate:g} requests/s ({arrivals}) for {seconds:g} s, zipf {zipf:g}, seed {seed}"
            console.print(f"{how}, {subject.what}")
            host = urlsplit(subject.inference).netloc
            requests = [invocation(host, name, request) for name in subject.names]
            to = target(subject.inference, requests, allow_remote=allow_remote)
            LocalServer.get(f"{subject.inference.rstrip('/')}/ping")  # nobody there: said once, not a request each
            found = _measure(subject, profile, to, seconds=seconds, warmup=warmup, connections=connections)
    except EXPECTED as error:
        raise SystemExit(f"no load: {error}") from error
    _show(found)
    if keep:
        console.print(f"record: {record.save('load', seed, machine, {'profile': asdict(profile), **found})}")
    if found["invalid"] or found["unsound"] or not found["answered_per_s"]:
        raise SystemExit(1)


def main() -> None:
    """The command `fleetcast-load`."""
    app()


# --- servers --------------------------------------------------------------------------------------------------------


@contextmanager
def _own(models: int, resident: int, workers: int) -> Iterator[Subject]:
    """A fleet with random weights, made once, and a server with room for some of it."""
    names = fleet_names(models)
    if not all((STORE / name).exists() for name in names):
        make_fleet(str(STORE), models)
    row_bytes = build("tcn", CONFIG).row_floats * 4
    flags = ["--workers", str(workers), "--slab-bytes", str(row_bytes)]
    flags += ["--model-cache-bytes", str(resident * row_bytes)]
    with serve(str(STORE), flags) as server:
        what = f"{models} models, room for {resident}, {workers} worker{'s' * (workers > 1)}"
        yield Subject(server.inference, server.metrics, names, what, lambda: _memory(server))


@contextmanager
def _running(url: str, metrics_url: str | None, store: str | None, models: int) -> Iterator[Subject]:
    if store is None:
        raise ValueError("--url needs --store: the models' names come from there")
    names = [listed.name for listed in itertools.islice(open_source(store).list(), models)]
    yield Subject(url, metrics_url, names, f"{len(names)} models of {store} at {url}")


def _memory(server: LocalServer) -> dict[str, int]:
    """Process -> proportional set size in bytes."""
    return {f"{each['kind']} {each['index']}": pss(each["pid"]) for each in server.processes()}


def _counts(metrics_url: str) -> summary.Counts:
    """The server's metrics, summed over its processes."""
    text = LocalServer.get(f"{metrics_url.rstrip('/')}/metrics").data.decode()
    counts: summary.Counts = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            label = sample.labels.get("result") or sample.labels.get("tier", "")
            counts[sample.name.removeprefix("fleetcast_"), label] += sample.value
    return counts


# --- a run ----------------------------------------------------------------------------------------------------------


def _measure(
    subject: Subject, profile: Profile, to: Target, *, seconds: float, warmup: float, connections: int
) -> summary.Results:
    schedule = profile.schedule(seconds)
    if warmup:
        drive(profile.schedule(warmup, WARMUP), to, connections=connections)
    before = _counts(subject.metrics) if subject.metrics else {}
    run = drive(schedule, to, connections=connections)
    counts = _counts(subject.metrics) if subject.metrics else None
    if counts is not None:
        for key, count in before.items():
            counts[key] -= count
    return summary.results(run, counts, subject.memory and subject.memory())


def _show(found: summary.Results) -> None:
    console.print(summary.latency_table(found), summary.facts_table(found))
    slots = found["worst_ms"]
    console.print(f"slowest over time  {summary.sparkline(slots)}  up to {max(slots):.1f} ms")
    for why in found["unsound"][:3]:
        console.print(f"[red]wrong[/] {why}")
    for why in found["invalid"]:
        console.print(f"[red]invalid[/] {why}")
    if not found["invalid"]:
        console.print("[green]valid[/] the driver kept its schedule")


if __name__ == "__main__":
    main()
