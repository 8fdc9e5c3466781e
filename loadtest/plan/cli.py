"""The commands `fleetcast-load plan` and `fleetcast-load calibrate`."""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from loadtest import flags
from loadtest.driver.profiles import Shape, make_profile
from loadtest.driver.run import EXPECTED, RequestSource, ServerUnderLoad, connect_server
from loadtest.flags import LOAD, OUTPUT, SERVER, SLO, make_flag, with_flags
from loadtest.fleets.fleet import make_fleet
from loadtest.observe.local_server import run_local_server
from loadtest.observe.server_access import OPEN, ServerAccess, open_access
from loadtest.plan.calibrate import HIT_RATE, LOADED, PARTS, calibrate
from loadtest.plan.costs import DEFAULT, Costs, read_costs
from loadtest.plan.demand import Demand, make_profile_demand, make_trace_demand
from loadtest.plan.machine_choice import Promise, find_offers
from loadtest.plan.miss_ratio_curves import SIZES, compute_curve
from loadtest.plan.placement import Placement
from loadtest.plan.plan_report import PlanFindings
from loadtest.plan.prices import EXAMPLE, read_prices
from loadtest.plan.simulate import Loss, Machines, SimulationResult, simulate
from loadtest.report.terminal import render_table
from model_store.cache.eviction import POLICIES
from server.contract import EVICTION_POLICY, LOADER_THREADS, MIB, SLAB_BYTES, verb_path
from server.shell.errors import describe_error
from server.shell.progress import follow_tasks

SHARES = (0.1, 0.25, 0.5, 0.75, 1.1)  #: the simulated cache sizes, as shares of the size of the fleet
MODEL_SIZE, SECONDS, WARMUP_S = "70KB", 300.0, 100.0

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFlags:
    """The flags of `fleetcast-load plan`."""

    trace: Annotated[Path | None, make_flag(LOAD, "trace file, or the folder of an access log", exists=True)] = None
    profile: Annotated[
        Shape, make_flag(LOAD, "without a trace: shape of the load, as of `run`: " + ", ".join(Shape))
    ] = Shape.POISSON
    models: Annotated[int, make_flag(LOAD, "number of models of the profile", min=1)] = 1_000
    rate: flags.Rate = None
    seconds: Annotated[float, make_flag(LOAD, "duration of the load")] = SECONDS
    warmup: Annotated[float, make_flag(LOAD, "seconds of load before, which fill the caches")] = WARMUP_S
    zipf: flags.Zipf = None
    drift_s: flags.Drift = None
    every_s: flags.TickInterval = None
    spread_s: flags.TickSpread = None
    shuffled: flags.Shuffled = None
    model_size: Annotated[
        str | None, make_flag(LOAD, "size of a model in the cache, such as 70KB, or 70KB:1 (lognormal); default 70KB")
    ] = None
    seed: Annotated[int, make_flag(LOAD, "same seed, same plan", min=0)] = 0
    costs: Annotated[
        Path | None,
        make_flag(SERVER, "file that `calibrate` or `run --out` wrote; default: costs from our records", exists=True),
    ] = None
    cache: Annotated[
        str | None, make_flag(SERVER, "cache sizes of a node, such as 64MiB,256MiB; default: shares of the fleet")
    ] = None
    workers: Annotated[int, make_flag(SERVER, "number of workers of a node", min=1)] = 1
    nodes: Annotated[int, make_flag(SERVER, "number of nodes, over which the models are distributed", min=1)] = 1
    regions: Annotated[
        int,
        make_flag(SERVER, "number of regions, each of so many nodes; each serves every model to its clients", min=1),
    ] = 1
    replicas: Annotated[int, make_flag(SERVER, "number of nodes that serve each model in turn", min=1)] = 1
    lose_at: Annotated[float | None, make_flag(SERVER, "second at which a node is lost; default never")] = None
    lose_region_at: Annotated[
        float | None, make_flag(SERVER, "second at which a region is lost, whose clients then ask the others")
    ] = None
    policy: Annotated[str, make_flag(SERVER, "eviction policy: " + ", ".join(POLICIES))] = EVICTION_POLICY
    loader_threads: Annotated[int, make_flag(SERVER, "number of loads that a worker runs at a time", min=1)] = (
        LOADER_THREADS
    )
    slab: Annotated[str, make_flag(SERVER, "unit of the cache; see the server's slab_bytes")] = (
        f"{SLAB_BYTES // MIB}MiB"
    )
    p99_ms: flags.MostP99 = None
    hit_ratio: flags.LeastHitRatio = None
    availability: Annotated[float, make_flag(SLO, "share of time for which enough nodes are up", min=0, max=1)] = 0.999
    prices: Annotated[
        Path | None,
        make_flag(SLO, "price table; default: a dated example to copy and edit", exists=True),
    ] = None
    html: Annotated[Path | None, make_flag(OUTPUT, "write a page with plots for the browser")] = None
    out: Annotated[Path | None, make_flag(OUTPUT, "write the plan as JSON", "--json")] = None


@with_flags(PlanFlags)
def plan(asked: PlanFlags) -> None:
    """Simulate how many models fit, the tail latency and the cost of a fleet.

    The simulation runs the server's own cache in simulated time. It gives
    miss-ratio curves, latency by cache size, the cheapest machines that reach
    the targets, and the cost of one endpoint per model. Prefetch is not
    simulated: a fleet that is requested at regular times does better.

    \b
    fleetcast-load calibrate --out costs.json
        measure a hit, a step and a load on this machine
    fleetcast-load plan --costs costs.json --models 5000 --rate 500 --p99-ms 50 --html plan.html
        a fleet of 5,000 models under Zipf popularity
    fleetcast-load plan --trace access-log --cache 64MiB,256MiB --hit-ratio 0.99
        plan for real requests, which `fleetcast serve --access-log` recorded
    fleetcast-load plan --models 1000000 --rate 10000 --nodes 4 --workers 7 --loader-threads 16 --lose-at 150
        plan for several machines and the loss of one
    fleetcast-load plan --models 1000000 --rate 10000 --regions 3 --nodes 4 --workers 3 --lose-region-at 150
        plan for three regions of four machines each, and the loss of one
    """  # noqa: D301 -- click's mark for "do not wrap"
    try:
        found = _simulate_plan(asked)
    except EXPECTED as error:
        raise SystemExit(f"no plan: {describe_error(error)}") from error
    _show_findings(found)
    if asked.html is not None:
        asked.html.write_text(found.html(), encoding="utf-8")
        console.print(f"plan: {asked.html}")
    if asked.out is not None:
        asked.out.write_bytes(msgspec.json.format(msgspec.json.encode(found.as_json()), indent=1) + b"\n")
        console.print(f"numbers: {asked.out}")


def calibrate_server(
    *,
    store: Annotated[
        str | None,
        make_flag(SERVER, "folder or URL of archives, for which a server is started; default: a fleet is made"),
    ] = None,
    url: Annotated[str | None, make_flag(SERVER, "address of a running server that has no other load")] = None,
    metrics_url: Annotated[
        str | None, make_flag(SERVER, "its metrics address, to measure the duration of a step")
    ] = None,
    management_url: Annotated[
        str | None,
        make_flag(SERVER, "its management address, to unload models and measure loads from disk"),
    ] = None,
    ca: flags.Ca = None,
    client_cert: flags.ClientCert = None,
    client_key: flags.ClientKey = None,
    token_file: flags.TokenFile = None,
    rate: Annotated[float, make_flag(LOAD, "planned requests per second and worker", min=1)] = HIT_RATE,
    allow_remote: flags.AllowRemote = False,
    out: Annotated[Path, make_flag(OUTPUT, "file to write the costs to")] = Path("costs.json"),
) -> None:
    """Measure the costs that `plan` uses in about twenty seconds: a hit, a step, and loads from store and disk.

    Run it on the machine and with the archives and the store that you plan for:

    \b
    fleetcast-load calibrate --store s3://bucket/models
    """  # noqa: D301 -- click's mark for "do not wrap"
    try:
        if url is None and (ca or client_cert or client_key or token_file):
            raise ValueError("--ca, --client-cert, --client-key and --token-file are for the server at --url")
        access = open_access(ca, client_cert, client_key, token_file) if url else OPEN
        with _serve_measured(store, url, metrics_url, management_url, access) as (subject, management, where):
            to = subject.target("sagemaker", allow_remote=allow_remote)
            names = list(subject.questions)
            forget = make_unloader(management, names, subject.access) if management else None
            with follow_tasks(console) as tasks:
                look = tasks.start_task("measuring loads, hits and full load, parts", PARTS).advance
                found = calibrate(to, subject.scrape if subject.metrics else None, forget, where, rate, look)
    except EXPECTED as error:
        raise SystemExit(f"no costs: {describe_error(error)}") from error
    out.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    table = Table("ms", "p50", "p99", title=found.said)
    for name, seconds in (
        ("a hit beside its step", found.overhead),
        ("a GET", found.get),
        ("a load's rest", found.build),
    ):
        table.add_row(name, *(f"{seconds[round(level * (len(seconds) - 1))] * 1e3:.3f}" for level in (0.5, 0.99)))
    table.add_row("a step", f"{found.step_s * 1e3:.3f}", "")
    table.add_row("a request in it", f"{found.row_s * 1e3:.3f}", "")
    console.print(table, f"costs: {out}")


# --- parts of a plan ------------------------------------------------------------------------------------------------


def _simulate_plan(asked: PlanFlags) -> PlanFindings:
    """Simulate the demand on the machines of the flags. Raises EXPECTED for what a user can fix."""
    demand = _make_demand(asked)
    loss = _choose_loss(asked)
    slab = _parse_bytes(asked.slab)
    base = Machines(
        0, asked.workers, asked.nodes, asked.replicas, loss, asked.policy, slab, asked.loader_threads, asked.regions
    )
    wanted = Promise(asked.p99_ms, asked.hit_ratio, availability=asked.availability)
    console.print(f"{demand.said}; {demand.fleet_bytes / 1e6:,.1f} MB of models")
    costs = read_costs(asked.costs) if asked.costs else DEFAULT
    sizes = _choose_sizes(asked.cache, base, demand)
    return _compute_findings(demand, costs, base, sizes, wanted, asked.prices or EXAMPLE, asked.seed)


def _choose_loss(asked: PlanFlags) -> Loss | None:
    """Return what is lost, and when. Raises ValueError for two losses."""
    if asked.lose_at is not None and asked.lose_region_at is not None:
        raise ValueError("a plan has one loss: omit lose_at or lose_region_at")
    if asked.lose_region_at is not None:
        return Loss(-1, asked.lose_region_at)
    return None if asked.lose_at is None else Loss(0, asked.lose_at)


def _make_demand(asked: PlanFlags) -> Demand:
    """Make the demand of the flags. Raises ValueError for flags that do not apply, and as the demand's makers do."""
    settings: dict[str, Any] = {
        name: getattr(asked, name) for name in ("rate", "zipf", "drift_s", "every_s", "spread_s", "shuffled")
    }
    if asked.trace is not None:
        if given := [name for name, value in settings.items() if value is not None]:
            raise ValueError(f"a trace has its own times and models: omit {', '.join(given)}")
        return make_trace_demand(asked.trace, asked.model_size)
    if asked.profile is Shape.REPLAY:
        raise ValueError("a replay needs a recording: give its file with --trace")
    profile = make_profile(asked.profile, asked.models, asked.seed, **settings)
    return make_profile_demand(profile, asked.seconds, asked.warmup, asked.model_size or MODEL_SIZE)


def _compute_findings(
    demand: Demand, costs: Costs, base: Machines, sizes: Sequence[int], wanted: Promise, prices: Path, seed: int
) -> PlanFindings:
    table, placement = read_prices(prices), Placement(demand)
    replace(base, cache_bytes=sizes[0]).cache()  # raises for a wrong cache before the long work starts
    with follow_tasks() as tasks:
        looked = tasks.start_task("miss-ratio curves", len(SIZES) * len(POLICIES)).advance
        curves = [compute_curve(demand, policy, look=looked) for policy in POLICIES]
        looked, found = tasks.start_task("cache sizes", len(sizes)).advance, list[SimulationResult]()
        for size in sizes:
            found.append(simulate(placement, replace(base, cache_bytes=size), costs, seed))
            looked()
        looked = tasks.start_task("machines", len(table.machine)).advance
        offered = find_offers(placement, costs, table, wanted, base, seed=seed, look=looked)
    return PlanFindings(demand, costs, table, wanted, curves, found, offered)


def _choose_sizes(text: str | None, base: Machines, demand: Demand) -> list[int]:
    """Return the cache sizes of a node in bytes, rising; each worker's share holds at least a slab."""
    least = base.workers * base.slab_bytes
    if text is not None:
        found = sorted({_parse_bytes(each) for each in text.split(",")})
        if found[0] < least:
            raise ValueError(f"a cache of {found[0]} bytes is less than a slab of {base.slab_bytes} for each worker")
        return found
    whole = demand.fleet_bytes * base.replicas / base.nodes
    return sorted({max(least, round(share * whole)) for share in SHARES})


def _parse_bytes(text: str) -> int:
    try:
        found = int(TypeAdapter(ByteSize).validate_python(text.strip()))
    except ValidationError:
        found = 0
    if found <= 0:
        raise ValueError(f"{text!r} is not a size: give bytes such as 64MiB")
    return found


def _show_findings(found: PlanFindings) -> None:
    for table in found.tables():
        console.print(render_table(table), table.says, "")
    for sentence in found.sentences():
        console.print(sentence)
    console.print(f"costs: {found.costs.said}")


# --- parts of a calibration -----------------------------------------------------------------------------------------


@contextmanager
def _serve_measured(
    store: str | None, url: str | None, metrics: str | None, management: str | None, access: ServerAccess
) -> Iterator[tuple[ServerUnderLoad, str | None, str]]:
    """Open the server to measure; yields it, its management address, and its name in the output."""
    asked = RequestSource(names=None, most=LOADED, body=None, request=None, seed=0)
    if url is not None:
        yield connect_server(url, metrics, store, asked, console, access), management, url
        return
    if metrics or management:
        raise ValueError("--metrics-url and --management-url are for the server at --url")
    with tempfile.TemporaryDirectory(prefix="fleetcast-calibrate-") as folder:
        if store is None:
            make_fleet(folder, LOADED)
        where = store or folder
        questions = asked.of(where, console)
        with run_local_server(where, ["--workers", "1"]) as server:
            what = store or "a fleet of tcn archives in a local folder"
            yield (
                ServerUnderLoad(server.inference, server.metrics, questions, what),
                server.management,
                what,
            )


def make_unloader(management: str, names: Sequence[str], access: ServerAccess = OPEN) -> Callable[[int], None]:
    """Make a function that unloads a model by its number, and raises RuntimeError if the server does not."""

    def unload(model: int) -> None:
        access.request("POST", f"{management.rstrip('/')}{verb_path('unload')}/{quote(names[model])}")

    return unload
