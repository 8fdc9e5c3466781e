"""The commands `fleetcast-load run` and `fleetcast-load report`."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from loadtest import record
from loadtest.driver import summary
from loadtest.driver.dialects import DIALECTS
from loadtest.driver.open_loop import LoadTarget, check_listener
from loadtest.driver.profiles import Load, list_ramp_rates, make_profile
from loadtest.driver.run import (
    EXPECTED,
    RequestSource,
    RunPlan,
    ServerUnderLoad,
    climb_rates,
    connect_server,
    measure_run,
    serve_fleet,
    serve_store,
)
from loadtest.driver.run_result import Run
from loadtest.driver.trace import Trace, make_trace, write_trace
from loadtest.flags import with_flags
from loadtest.report import render_page, write_report
from loadtest.run_flags import RunFlags
from model_store.names import ModelName
from server.shell.errors import describe_error

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


@with_flags(RunFlags)
def run(asked: RunFlags) -> None:
    """Load a fleet on a schedule that is drawn beforehand. The exit code is 1 for an invalid run or a missed SLO.

    Latency is measured from the intended time, so that a stall counts for every request that is due during it.

    \b
    fleetcast-load run                                            a fleet and a server that it makes
    fleetcast-load run --store s3://bucket/models --cache 256MiB --html report.html
    fleetcast-load run --url http://127.0.0.1:8080 --store s3://bucket/models
    fleetcast-load run --protocol forecasts --profile tick --every-s 0.5 --spread-s 0

    With --protocol forecasts a request is a call of POST /v1/forecasts for --per-call models, or for all, as a market's
    tick is, as JSON or, by --encoding, as a table. A call is a hit if all its models were resident; failed items are
    counted.
    """  # noqa: D301 -- click's mark for "do not wrap"
    before = record.describe_machine()
    try:
        asked.check()
        found, ran, names = _load_server(asked)
    except EXPECTED as error:
        raise SystemExit(f"no load: {describe_error(error)}") from error
    _show_results(found)
    if asked.trace_out is not None:
        write_trace(asked.trace_out, make_trace(ran, names))
        console.print(f"trace: {asked.trace_out}")
    _keep_record(found, asked, before)
    if not _has_passed(found):
        raise SystemExit(1)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN.json [OTHER.json]", exists=True, dir_okay=False)],
    html: Annotated[Path, typer.Option(help="file of the report")] = Path("report.html"),
) -> None:
    """Write a report of one run, or of two side by side, from files of `run --out` or records."""
    try:
        write_report(runs, html)
    except (ValueError, OSError) as error:
        raise SystemExit(f"no report: {describe_error(error)}") from error
    console.print(f"report: {html}")


# --- parts of a run -------------------------------------------------------------------------------------------------


def _load_server(asked: RunFlags) -> tuple[summary.Results, Run, list[ModelName]]:
    """Open the server and load it as asked: the results, each request's outcome, and the models. Raises EXPECTED."""
    recorded = asked.read_recording()
    with _open_subject(asked, asked.make_source(recorded)) as opened:
        # INVARIANT: an address that may not be loaded gets no request at all
        to, load = _make_requests(asked, recorded, opened)
        if ping := DIALECTS[asked.dialect].ping:  # an unreachable server is reported once, not for every request
            opened.access.request("GET", f"{opened.inference.rstrip('/')}{ping}")
        elif asked.is_grpc:
            check_listener(to)
        subject = opened.register(asked.dialect, versions=asked.versions, allow_remote=asked.allow_remote)
        if subject is not opened:
            to, load = _make_requests(asked, recorded, subject)
        plan = RunPlan(
            load, asked.seconds, asked.warmup_seconds, asked.connections, asked.processes, asked.slo, asked.dialect
        )
        title = asked.describe()
        if asked.many:
            title += f", calls for {max(to.forecasts)} models as {asked.encoding.upper()}"
        console.print(f"{title}; {subject.what}")
        if asked.ramp_to is None:
            found, ran = measure_run(subject, plan, to, console)
        else:
            rates = list_ramp_rates(asked.rate or 200.0, asked.ramp_to, factor=asked.ramp_factor)
            found, ran = climb_rates(subject, plan, to, rates, console)
    found.update(_describe_run(asked, subject, title, load.models))
    if asked.many:
        found["body_bytes"] = sum(len(each.partition(b"\r\n\r\n")[2]) for each in to.requests) // len(to.requests)
    return found, ran, list(subject.questions)


def _make_requests(asked: RunFlags, recorded: Trace | None, subject: ServerUnderLoad) -> tuple[LoadTarget, Load]:
    """The requests, and when each of them is sent. Raises EXPECTED."""
    to = subject.target(
        asked.dialect, allow_remote=asked.allow_remote, per_call=asked.per_call, encoding=asked.encoding
    )
    return to, _make_load(asked, recorded, subject, len(to.requests))


def _describe_run(asked: RunFlags, subject: ServerUnderLoad, title: str, models: int) -> Mapping[str, Any]:
    """What the results say of the run beside its numbers."""
    size = sum(len(each.body) for each in subject.questions.values()) // len(subject.questions)
    profile = {"shape": asked.profile, "seconds": asked.seconds, "warmup": asked.warmup_seconds, "models": models}
    return {
        "title": title,
        "subject": subject.what,
        "dialect": asked.dialect,
        "body": asked.body_kind or "golden",
        "encoding": asked.encoding,
        "body_bytes": size,
        "profile": {**profile, **asked.profile_settings},
    }


@contextmanager
def _open_subject(asked: RunFlags, source: RequestSource) -> Iterator[ServerUnderLoad]:
    """Open the server to load: the one at `url`, else one started for `store`, else one started for a made fleet."""
    if asked.url is not None:
        access = asked.open_access()
        yield connect_server(asked.url, asked.metrics_url, asked.store, source, console, access, asked.management_url)
    elif asked.metrics_url or (source.names is not None and asked.store is None):
        raise ValueError("--metrics-url and --names are for the server at --url")
    elif asked.store is not None:
        more = [part for prefix in asked.allow_code or () for part in ("--allow-code", prefix)]
        with serve_store(asked.store, asked.cache, asked.workers, source, console, more) as subject:
            yield subject
    elif asked.cache is not None:
        raise ValueError("--cache goes with --store; the cache of a made fleet is given in models, by --resident")
    else:
        with serve_fleet(asked.models, asked.resident, asked.workers, source, console) as subject:
            yield subject


def _make_load(asked: RunFlags, recorded: Trace | None, subject: ServerUnderLoad, requests: int) -> Load:
    """Make the load of a profile over `requests` different requests, or the replay of a recording."""
    if recorded is None:
        return make_profile(asked.profile, requests, asked.seed, **asked.profile_settings)
    names = list(subject.questions)
    recording = recorded.recording(names)
    return make_profile(asked.profile, len(names), asked.seed, recording=recording, **asked.profile_settings)


def _has_passed(found: summary.Results) -> bool:
    """Whether the run is valid, was answered at all, and reached what it must."""
    has_forecasts = (found["forecasts"] or {"per_s": True})["per_s"] != 0
    is_sound = not found["invalid"] and not found["unsound"] and bool(found["answered_per_s"])
    return is_sound and has_forecasts and bool((found["slo"] or {"met": True})["met"])


def _show_results(found: summary.Results) -> None:
    console.print(summary.build_latency_table(found), summary.build_facts_table(found))
    slots = found["worst_ms"]
    console.print(f"slowest over time  {summary.draw_sparkline(slots)}  up to {max(slots):.1f} ms")
    for status, words in found["said"].items():
        console.print(f"[red]status {status}[/] said {escape(words)}")
    for why in found["unsound"][:3]:
        console.print(f"[red]wrong[/] {why}")
    for why in found["invalid"]:
        console.print(f"[red]invalid[/] {why}")
    if not found["invalid"]:
        console.print("[green]valid[/] the driver kept its schedule")


def _keep_record(found: summary.Results, asked: RunFlags, before: Mapping[str, Any]) -> None:
    whole = record.make_record("load", asked.seed, before, found)
    if asked.out is not None:
        asked.out.write_text(record.format_record(whole))
        console.print(f"results: {asked.out}")
    if asked.html is not None:
        asked.html.write_text(render_page([whole], [found["title"]]))
        console.print(f"report: {asked.html}")
    if asked.keep:
        console.print(f"record: {record.save_record('load', asked.seed, before, found)}")
