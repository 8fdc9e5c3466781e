"""`fleetcast top` shows what a running server is doing, anew every few seconds."""

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live

from server.cli.fleet.management import DEFAULT_URL, Management, Url, make_table, open_management, print_wide
from server.cli.fleet.rates import Change, Reading
from server.cli.fleet.rows import BAD_STATES, Row, count_answers, find_reason, find_state, sum_usage
from server.cli.terminal import verbatim

SHOWN_MODELS, SHOWN_FAILURES = 10, 5
HEALTHY_NODES = ("here", "linked")
NOTHING = "-"  #: what stands where nothing was observed
MANY = 10  #: from here on numbers need no decimals


def top(
    *,
    url: Url = DEFAULT_URL,
    interval: Annotated[float, typer.Option(min=1.0, metavar="SECONDS", help="time between two readings")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="print one reading of one interval, and end")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print the server's counts as JSON, a line for each reading")
    ] = False,
    models: Annotated[
        bool, typer.Option("--models/--no-models", help="also ask which models are asked most, and which failed")
    ] = True,
) -> None:
    """Show what a running server is doing: requests, times, cache, loads, memory, workers, busiest and failed models.

    A node of a cluster also shows the others. Rates and times are those of the last interval. Ctrl-C ends it. Where
    standard output is no terminal, readings follow each other.

    \b
    fleetcast top
    fleetcast top --once
    fleetcast top --interval 10 --url https://fleet.example:8081
    fleetcast top --json --once | jq .cache_requests
    """  # noqa: D301
    with open_management(url) as management:
        try:
            if as_json:
                _print_json(management, interval, once=once)
            else:
                _show(_read_pages(management, interval, models=models, once=once))
        except KeyboardInterrupt:
            return


def _print_json(management: Management, interval: float, *, once: bool) -> None:
    while True:
        found = management.get("/fleet/overview")
        shown = {**found, "nodes": management.get("/fleet/nodes")["nodes"]} if found.get("node") else found
        print(json.dumps(shown), flush=True)  # noqa: T201 -- the answer
        if once:
            return
        time.sleep(interval)


def _read_pages(management: Management, interval: float, *, models: bool, once: bool) -> Iterator[RenderableType]:
    """A page for each interval that has passed."""
    before, earlier = management.get("/fleet/overview"), _list_by_name(management) if models else {}
    nodes_before = _list_nodes(management, before)
    for _ in range(1) if once else count():
        time.sleep(interval)
        now, rows = management.get("/fleet/overview"), _list_by_name(management) if models else {}
        nodes = _list_nodes(management, now)
        change = Change(before, now)
        parts = [make_summary(change), *([make_nodes(nodes_before, nodes)] if nodes else []), make_processes(now)]
        yield Group(*parts, *([make_busiest(earlier, rows, change.seconds), make_failed(rows)] if models else []))
        before, earlier, nodes_before = now, rows, nodes


def _show(pages: Iterator[RenderableType]) -> None:
    if not sys.stdout.isatty():
        for page in pages:
            print_wide(page)
        return
    with Live(screen=False, auto_refresh=False) as live:
        for page in pages:
            live.update(page, refresh=True)


def _list_by_name(management: Management) -> dict[str, Row]:
    return {row["model"]: row for row in management.list_models()}


def _list_nodes(management: Management, overview: Reading) -> list[Row]:
    """The cluster's nodes, where the server is one of them; an older server says nothing of it."""
    return management.get("/fleet/nodes")["nodes"] if overview.get("node") else []


def make_summary(change: Change) -> RenderableType:
    """Requests, times, cache, loads, batches and memory of the interval."""
    now = change.now
    table = make_table("", "", header=False)
    table.add_row("store", verbatim(f"{now['store']}, fleetcast {now['version']}"))
    table.add_row("requests", _describe_requests(change))
    table.add_row("times", _describe_times(change))
    table.add_row("cache", _describe_cache(change))
    table.add_row("loads", _describe_loads(change))
    table.add_row("batches", _describe_batches(change))
    table.add_row("memory", _describe_memory(now))
    return table


def _describe_requests(change: Change) -> str:
    failed = [f"{_number(change.rate('requests', code))}/s {code}" for code in change.list_failed()]
    under_way = _number(sum(change.now["under_way"].values()))
    return ", ".join([f"{_number(change.rate('requests'))}/s", *failed, f"{under_way} under way"])


def _describe_times(change: Change) -> str:
    request, queue = change.buckets("request_seconds"), change.buckets("queue_seconds")
    p50, p99 = _milliseconds(request.quantile(0.5)), _milliseconds(request.quantile(0.99))
    return f"p50 {p50}, p99 {p99}; of it in the queue p99 {_milliseconds(queue.quantile(0.99))}"


def _describe_cache(change: Change) -> str:
    resident = _number(sum(change.now["loaded_models"].values()))
    hits, evictions = _percent(change.share("cache_requests", "hit")), _number(change.rate("evictions"))
    return f"{hits} hits; {resident} models resident; {evictions} evictions/s"


def _describe_batches(change: Change) -> str:
    rows, models = _number(change.buckets("batch_rows").mean), _number(change.buckets("batch_models").mean)
    busy = _percent(change.rate("step_seconds"))
    return f"{rows} rows of {models} models in the mean; steps take {busy} of the time"


def _describe_loads(change: Change) -> str:
    now = change.now
    found = ((tier, change.buckets("load_seconds", tier)) for tier in sorted(now["load_seconds"]))
    tiers = [
        f"{_number(seen.count / change.seconds)}/s from {tier} (p50 {_milliseconds(seen.quantile(0.5))}, p99 "
        f"{_milliseconds(seen.quantile(0.99))})"
        for tier, seen in found
        if seen.count
    ]
    waiting = _number(now["loads_under_way"].get("waiting", 0.0))
    return f"{', '.join(tiers) or 'none'}; {waiting} waiting; {_number(change.count('load_failures'))} failed"


def _describe_memory(now: Reading) -> str:
    from server.settings import format_bytes  # noqa: PLC0415 -- pydantic, which help need not import

    used, capacity = now["cache_bytes"], now["cache_capacity_bytes"]
    parts = [
        f"{tier} {format_bytes(int(used.get(tier, 0)))} of {format_bytes(int(capacity[tier]))}"
        for tier in ("device", "host", "disk")
        if capacity.get(tier)
    ]
    return ", ".join(parts) or NOTHING


def make_processes(now: Reading) -> RenderableType:
    """Fronts and workers; what is not up is red."""
    table = make_table("process", ">pid", "state", "device", ">under way", ">restarts")
    for each in now["processes"]:
        is_worker, index = each["kind"] == "worker", str(each["index"])
        table.add_row(
            f"{each['kind']} {index}",
            str(each["pid"] or NOTHING),
            verbatim("up" if each["up"] else "down", "" if each["up"] else "red"),
            verbatim(str(each.get("device", ""))),
            _number(now["under_way"].get(index, 0.0)) if is_worker else "",
            str(each["incarnation"] - 1),
        )
    return table


def make_nodes(before: Sequence[Row], nodes: Sequence[Row]) -> RenderableType:
    """The nodes of the cluster; one that does not answer, is not ready or misses a worker is red."""
    table = make_table("node", "state", ">answers/s", ">failed/s", ">hits", ">p99", ">models", "memory", "management")
    earlier = {row["name"]: row["does"] for row in before}
    for row in nodes:
        does = row["does"]
        state = describe_node_state(row)
        shown = verbatim(state, "" if state in HEALTHY_NODES else "red")
        if does is None:
            table.add_row(verbatim(row["name"]), shown, *[""] * 6, verbatim(row["management"]))
            continue
        change = Change(earlier.get(row["name"]) or does, does)
        failed = sum(change.list_failed().values())
        numbers = [
            _number((change.count("requests") - failed) / change.seconds),
            _number(failed / change.seconds),
            _percent(change.share("cache_requests", "hit")),
            _milliseconds(change.buckets("request_seconds").quantile(0.99)),
            _number(sum(does["loaded_models"].values())),
            _describe_memory(does),
        ]
        table.add_row(verbatim(row["name"]), shown, *numbers, verbatim(row["management"]))
    return table


def describe_node_state(row: Row) -> str:
    """In words: how this node's front sees the other one, and what that says of its workers."""
    does = row["does"]
    if row["state"] not in HEALTHY_NODES or does is None:
        return f"{row['state']}: {row['why']}" if row["why"] else str(row["state"])
    if not does["ready"]:
        return "not ready"
    if does["workers_up"] < does["workers"]:
        return f"{does['workers_up']} of {does['workers']} workers"
    return str(row["state"])


def make_busiest(earlier: Mapping[str, Row], rows: Mapping[str, Row], seconds: float) -> RenderableType:
    """The models that were asked most in the interval."""
    asked = count_answers(earlier, rows)
    most = sorted((name for name in asked if asked[name] > 0), key=lambda name: (-asked[name], name))[:SHOWN_MODELS]
    table = make_table("busiest model", ">answers/s", ">batches", ">failures")
    for name in most:
        usage = [str(sum_usage(rows[name], counted)) for counted in ("batches", "failures")]
        table.add_row(verbatim(name), _number(asked[name] / seconds), *usage)
    return table


def make_failed(rows: Mapping[str, Row]) -> RenderableType:
    """Models that failed or are in quarantine, with the reason."""
    bad = [row for row in rows.values() if find_state(row) in BAD_STATES]
    if not bad:
        return verbatim("no model has failed")
    table = make_table("failed model", "why")
    for row in bad[:SHOWN_FAILURES]:
        table.add_row(verbatim(row["model"], "red"), verbatim(find_reason(row)))
    if len(bad) > SHOWN_FAILURES:
        table.add_row(f"and {len(bad) - SHOWN_FAILURES} more", "fleetcast ls --failed")
    return table


def _number(value: float) -> str:
    """A count or rate: whole where it is large, with one decimal where it is small."""
    if math.isnan(value):
        return NOTHING
    return f"{value:.0f}" if value >= MANY or value == int(value) else f"{value:.1f}"


def _milliseconds(seconds: float) -> str:
    if math.isnan(seconds):
        return NOTHING
    return f"{seconds * 1e3:.0f} ms" if seconds * 1e3 >= MANY else f"{seconds * 1e3:.2g} ms"


def _percent(share: float) -> str:
    return NOTHING if math.isnan(share) else f"{share * 100:.3g} %"
