"""Measure a server under load: tail latency, hit ratio, load times and memory.

A fleet and a server that it makes:     fleetcast-load run
Your archives, a server that it starts: fleetcast-load run --store s3://bucket/models --cache 256MiB --html report.html
A server that is running:               fleetcast-load run --url http://127.0.0.1:8080 --store s3://bucket/models
One with TLS and tokens:                fleetcast-load run --url https://127.0.0.1:8080 --ca ca.pem --token-file token
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from loadtest import cli_groups, flags, record
from loadtest.driver import summary
from loadtest.driver.dialects import DIALECTS, BodyKind
from loadtest.driver.profiles import Load, Shape, list_ramp_rates, make_profile
from loadtest.driver.run import (
    EXPECTED,
    RequestSource,
    RunPlan,
    ServerUnderLoad,
    climb_rates,
    connect_server,
    measure_run,
    parse_names,
    serve_fleet,
    serve_store,
)
from loadtest.driver.trace import Trace, make_trace, read_trace, write_trace
from loadtest.flags import LOAD, OUTPUT, SERVER, SLO, make_flag
from loadtest.fleets import fleet
from loadtest.observe.server_access import OPEN, ServerAccess, open_access
from loadtest.plan import cli as plan_cli
from loadtest.report import render_page, write_report
from model_store.names import ModelName
from server.contract import PING_PATH

SHAPES = "; ".join(f"{shape}: {shape.about}" for shape in Shape)

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
app = typer.Typer(add_completion=False, rich_markup_mode="rich", no_args_is_help=True, help=__doc__)


@app.command()
def run(
    *,
    profile: Annotated[Shape, make_flag(LOAD, SHAPES)] = Shape.POISSON,
    rate: flags.Rate = None,
    seconds: Annotated[float, make_flag(LOAD, "duration of the measured load")] = 15.0,
    warmup: Annotated[
        float | None, make_flag(LOAD, "seconds of unmeasured load before; default 5, before a replay 0")
    ] = None,
    zipf: flags.Zipf = None,
    drift_s: flags.Drift = None,
    drift_share: Annotated[
        float | None, make_flag(LOAD, "share of the models that exchange ranks; default 0.1")
    ] = None,
    day_s: Annotated[float | None, make_flag(LOAD, "diurnal: length of a day in seconds; default 60")] = None,
    trough: Annotated[
        float | None, make_flag(LOAD, "diurnal: lowest rate as a share of the highest; default 0.2")
    ] = None,
    every_s: flags.TickInterval = None,
    spread_s: flags.TickSpread = None,
    shuffled: flags.Shuffled = None,
    newcomers: Annotated[int | None, make_flag(LOAD, "onboarding: number of new models; default 100")] = None,
    at_s: Annotated[float | None, make_flag(LOAD, "onboarding: second at which they appear; default 5")] = None,
    trace: Annotated[
        Path | None, make_flag(LOAD, "replay: a trace file, or the folder of an access log", exists=True)
    ] = None,
    speed: Annotated[float | None, make_flag(LOAD, "replay: speed factor; default 1")] = None,
    start_s: Annotated[
        float | None, make_flag(LOAD, "replay: second of the trace to start from; default its first")
    ] = None,
    ramp_to: Annotated[
        float | None, make_flag(LOAD, "raise the rate from --rate to this, until one is not sustained")
    ] = None,
    ramp_factor: Annotated[float, make_flag(LOAD, "factor between successive rates of a ramp")] = 1.5,
    seed: Annotated[int, make_flag(LOAD, "same seed, same schedule", min=0)] = 0,
    connections: Annotated[int, make_flag(LOAD, "maximum number of connections, opened when needed", min=1)] = 512,
    processes: Annotated[
        int | None, make_flag(LOAD, "driver processes; default as many as the rate needs", min=1)
    ] = None,
    store: Annotated[
        str | None, make_flag(SERVER, "folder or URL of archives; without --url a server is started for it")
    ] = None,
    url: Annotated[str | None, make_flag(SERVER, "inference address of a server that runs")] = None,
    metrics_url: Annotated[str | None, make_flag(SERVER, "its metrics address: hits, loads and evictions")] = None,
    ca: flags.Ca = None,
    client_cert: flags.ClientCert = None,
    client_key: flags.ClientKey = None,
    token_file: flags.TokenFile = None,
    per_call: Annotated[int | None, make_flag(SERVER, "dialect forecasts: models per call; default all", min=1)] = None,
    names: Annotated[
        Path | None,
        make_flag(SERVER, "file of model names, one per line, instead of the store's", exists=True, dir_okay=False),
    ] = None,
    dialect: Annotated[str, make_flag(SERVER, "protocol of the server: " + ", ".join(DIALECTS))] = "sagemaker",
    body: Annotated[
        BodyKind | None, make_flag(SERVER, "kind of request body; default each archive's golden sample")
    ] = None,
    request: Annotated[
        Path | None, make_flag(SERVER, "file with one request body for all models", exists=True, dir_okay=False)
    ] = None,
    models: Annotated[
        int, make_flag(SERVER, "size of the fleet that is made; of a store, maximum number of models", min=1)
    ] = 200,
    resident: Annotated[int, make_flag(SERVER, "made fleet: number of models that fit in the cache", min=1)] = 50,
    cache: Annotated[str | None, make_flag(SERVER, "with --store: size of the model cache, such as 256MiB")] = None,
    workers: Annotated[int, make_flag(SERVER, "started server: number of worker processes", min=1)] = 1,
    allow_remote: flags.AllowRemote = False,
    p50_ms: Annotated[float | None, make_flag(SLO, "maximum median latency")] = None,
    p99_ms: flags.MostP99 = None,
    failed: Annotated[float | None, make_flag(SLO, "maximum share of failed requests")] = None,
    hit_ratio: flags.LeastHitRatio = None,
    out: Annotated[Path | None, make_flag(OUTPUT, "write the results as JSON")] = None,
    html: Annotated[Path | None, make_flag(OUTPUT, "write a report for the browser")] = None,
    trace_out: Annotated[Path | None, make_flag(OUTPUT, "write the requests and their outcomes as a trace")] = None,
    keep: Annotated[bool, make_flag(OUTPUT, "save a record under loadtest/records", "--record")] = False,
) -> None:
    """Load a fleet on a schedule that is drawn beforehand. The exit code is 1 for an invalid run or a missed SLO.

    Latency is measured from the intended time, so that a stall counts for every request that is due during it.

    With [bold]--dialect forecasts[/] a request is a call of POST /v1/forecasts for
    [bold]--per-call[/] models, or for all. A call is a hit if all its models were
    resident; failed items are counted. This is a market's tick:
    [bold]--dialect forecasts --profile tick --every-s 0.5 --spread-s 0[/]
    """
    before = record.describe_machine()
    warmup = (0.0 if profile is Shape.REPLAY and not start_s else 5.0) if warmup is None else warmup
    settings = {
        "rate": rate, "zipf": zipf, "drift_s": drift_s, "drift_share": drift_share, "day_s": day_s, "trough": trough,
        "every_s": every_s, "spread_s": spread_s, "shuffled": shuffled, "newcomers": newcomers, "at_s": at_s,
        "speed": speed, "start_s": start_s,
    }  # fmt: skip
    settings = {name: value for name, value in settings.items() if value is not None}
    many = dialect in DIALECTS and DIALECTS[dialect].many
    body = BodyKind.DEEPAR if many and body is None else body
    try:
        if dialect not in DIALECTS:
            raise ValueError(f"there is no dialect {dialect!r}: known dialects are {', '.join(DIALECTS)}")
        if many and (trace is not None or trace_out is not None):
            raise ValueError(
                "a trace has a row for each model, so --trace and --trace-out do not go with calls for many models"
            )
        recorded = None if trace is None else read_trace(trace)
        asked = RequestSource(
            names=_choose_fleet(names, recorded),
            most=models,
            body=body,
            request=request.read_bytes() if request else None,
            seed=seed,
        )
        if url is None and (ca or client_cert or client_key or token_file):
            raise ValueError("--ca, --client-cert, --client-key and --token-file are for the server at --url")
        access = open_access(ca, client_cert, client_key, token_file) if url else OPEN
        with _open_subject(asked, url, metrics_url, store, cache, models, resident, workers, access) as subject:
            to = subject.target(dialect, allow_remote=allow_remote, per_call=per_call)
            load = _make_load(profile, recorded, subject, len(to.requests), seed, settings)
            slo = summary.Slo(p50_ms, p99_ms, failed, hit_ratio)
            plan = RunPlan(load, seconds, warmup, connections, processes, slo)
            title = _describe_load(profile, seconds, seed, settings, ramp_to)
            title += f", calls for {max(to.forecasts)} models" if many else ""
            console.print(f"{title}; {subject.what}")
            if dialect in ("sagemaker", "forecasts"):
                # an unreachable server is reported once, not for every request
                subject.access.request("GET", f"{subject.inference.rstrip('/')}{PING_PATH}")
            if ramp_to is None:
                found, ran = measure_run(subject, plan, to, console)
            else:
                rates = list_ramp_rates(rate or 200.0, ramp_to, factor=ramp_factor)
                found, ran = climb_rates(subject, plan, to, rates, console)
    except EXPECTED as error:
        raise SystemExit(f"no load: {error}") from error
    size = sum(len(each.body) for each in subject.questions.values()) // len(subject.questions)
    found |= {"title": title, "subject": subject.what, "dialect": dialect, "body": body or "golden", "body_bytes": size}
    found |= {"profile": {"shape": profile, "seconds": seconds, "warmup": warmup, "models": load.models, **settings}}
    _show_results(found)
    if trace_out is not None:
        write_trace(trace_out, make_trace(ran, list(subject.questions)))
        console.print(f"trace: {trace_out}")
    _keep_record(found, seed, before, out, html, keep=keep)
    if (
        found["invalid"]
        or found["unsound"]
        or not found["answered_per_s"]
        or (found["forecasts"] or {"per_s": True})["per_s"] == 0
        or not (found["slo"] or {"met": True})["met"]
    ):
        raise SystemExit(1)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN.json [OTHER.json]", exists=True, dir_okay=False)],
    html: Annotated[Path, typer.Option(help="file of the report")] = Path("report.html"),
) -> None:
    """Write a report of one run, or of two side by side, from files of `run --out` or records."""
    try:
        write_report(runs, html)
    except (ValueError, OSError) as error:
        raise SystemExit(f"no report: {error}") from error
    console.print(f"report: {html}")


app.command("fleet")(fleet.main)
app.command("plan")(plan_cli.plan)
app.command("calibrate")(plan_cli.calibrate_server)
app.add_typer(cli_groups.bench, name="bench")
app.add_typer(cli_groups.demo, name="demo")


def main() -> None:
    """The command `fleetcast-load`."""
    app()


# --- parts of a run -------------------------------------------------------------------------------------------------


def _choose_fleet(file: Path | None, recorded: Trace | None) -> Sequence[ModelName] | None:
    if recorded is not None:
        return recorded.names
    return None if file is None else parse_names(file.read_text())


@contextmanager
def _open_subject(
    asked: RequestSource,
    url: str | None,
    metrics_url: str | None,
    store: str | None,
    cache: str | None,
    models: int,
    resident: int,
    workers: int,
    access: ServerAccess,
) -> Iterator[ServerUnderLoad]:
    """Open the server to load: the one at `url`, else one started for `store`, else one started for a made fleet."""
    if url is not None:
        yield connect_server(url, metrics_url, store, asked, console, access)
    elif metrics_url or (asked.names is not None and store is None):
        raise ValueError("--metrics-url and --names are for the server at --url")
    elif store is not None:
        with serve_store(store, cache, workers, asked, console) as subject:
            yield subject
    elif cache is not None:
        raise ValueError("--cache goes with --store; the cache of a made fleet is given in models, by --resident")
    else:
        with serve_fleet(models, resident, workers, asked, console) as subject:
            yield subject


def _make_load(
    profile: Shape,
    recorded: Trace | None,
    subject: ServerUnderLoad,
    requests: int,
    seed: int,
    settings: Mapping[str, Any],
) -> Load:
    """Make the load of a profile over `requests` different requests, or the replay of a recording."""
    if recorded is None:
        return make_profile(profile, requests, seed, **settings)
    names = list(subject.questions)
    return make_profile(profile, len(names), seed, recording=recorded.recording(names), **settings)


def _describe_load(
    profile: Shape, seconds: float, seed: int, settings: Mapping[str, Any], ramp_to: float | None
) -> str:
    """Describe the load in one line."""
    said = ", ".join(f"{name.removesuffix('_s').replace('_', ' ')} {value:g}" for name, value in settings.items())
    until = f" up to {ramp_to:g}/s" if ramp_to else ""
    return f"{profile}{until} for {seconds:g} s{', ' if said else ''}{said}, seed {seed}"


def _show_results(found: summary.Results) -> None:
    console.print(summary.build_latency_table(found), summary.build_facts_table(found))
    slots = found["worst_ms"]
    console.print(f"slowest over time  {summary.draw_sparkline(slots)}  up to {max(slots):.1f} ms")
    for why in found["unsound"][:3]:
        console.print(f"[red]wrong[/] {why}")
    for why in found["invalid"]:
        console.print(f"[red]invalid[/] {why}")
    if not found["invalid"]:
        console.print("[green]valid[/] the driver kept its schedule")


def _keep_record(
    found: summary.Results, seed: int, before: Mapping[str, Any], out: Path | None, html: Path | None, *, keep: bool
) -> None:
    whole = record.make_record("load", seed, before, found)
    if out is not None:
        out.write_text(record.format_record(whole))
        console.print(f"results: {out}")
    if html is not None:
        html.write_text(render_page([whole], [found["title"]]))
        console.print(f"report: {html}")
    if keep:
        console.print(f"record: {record.save_record('load', seed, before, found)}")


if __name__ == "__main__":
    main()
