"""`fleetcast doctor` checks this machine and measures how fast it answers each kind of model; or what limits a server.

It imports torch when it runs. The facts come from `server.offline.host_checks`, the times from
`server.worker.engine.speed`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from server.cli.setting_flags import settings_from
from server.cli.terminal import BAD, one_line_errors, verbatim
from server.shell.progress import show_progress

if TYPE_CHECKING:
    from server.host import Host
    from server.offline.cache_sizing import Advice
    from server.offline.host_checks import HostFact
    from server.offline.store_families import Measurable
    from server.settings import Settings
    from server.worker.engine.speed import CoreRates, FamilySpeed

TAKEN = "*"


def doctor(
    *,
    store: Annotated[
        str, typer.Option(help="folder or store URL whose archives are measured; default: the store of `serve`")
    ] = "",
    access_log: Annotated[
        str, typer.Option(help="folder that `serve --access-log` wrote: advise on the cache size")
    ] = "",
    url: Annotated[
        str, typer.Option(metavar="URL", help="management address of a running server: say what limits it")
    ] = "",
    seconds: Annotated[
        float, typer.Option(min=1.0, metavar="SECONDS", help="how long the server at --url is watched")
    ] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="print the facts and times as JSON")] = False,
) -> None:
    """Check this machine and advise on changes; then measure how fast models answer on one of its cores.

    With --url it watches a running server for a minute instead, and says in words what limits it: each finding with its
    numbers, the threshold and what to do. The exit code is 1 when there are findings.

    \b
    fleetcast doctor --url http://127.0.0.1:8081  what limits that server
    fleetcast doctor                              without a store: the built-in architectures
    fleetcast doctor --store s3://models/prices   the families of up to 20 of its archives, each loaded once
    fleetcast doctor --access-log logs            the cache size that buys the next five points of hit ratio
    fleetcast doctor --json | jq .families

    Times are microseconds per answer, for up to 1024 models in turn, whose rows do not fit in the CPU's cache unless
    they are small. A batch of 1, 8 or 64 different models is gathered (rows copied side by side) or run in place; for
    many inputs of one model its row can be repeated. * marks the way that a worker chooses on this machine, - a way
    that takes too long to be measured while it serves. The floor is the time for the answer's arithmetic at the rate of
    a matrix product and for its row at the rate of a copy from memory (once for a repeated row). The exit code is 1
    when the store cannot be read or an archive does not load.
    """  # noqa: D301 -- click's mark for "do not wrap"
    if url:
        from server.cli.fleet.watch import watch_server  # noqa: PLC0415 -- what help need not import

        watch_server(url, seconds, as_json=as_json)
    else:
        _check_machine(store, access_log, as_json=as_json)


def _check_machine(store: str, access_log: str, *, as_json: bool) -> None:
    """Print the machine's facts, and the speed of the store's families or of the built-in ones."""
    from server.host import read_host  # noqa: PLC0415 -- what help need not import
    from server.offline import host_checks  # noqa: PLC0415 -- torch
    from server.offline.store_families import StoreFamilies, find_families, make_built_in_families  # noqa: PLC0415
    from server.worker.engine import speed  # noqa: PLC0415

    with one_line_errors():
        settings, given = _read_settings(store)
        host = read_host()
        facts = list(host_checks.check_machine(settings, host))
        advice = _advise_from_log(settings, host, access_log) if access_log else None
        if advice is not None:
            facts.append(host_checks.HostFact("access log", advice.now, advice.next))
        with show_progress("looking") as told:
            found = find_families(settings, told) if given else StoreFamilies()
        families = list(found.families.values()) or list(make_built_in_families())
        with show_progress("measuring") as told:
            told(0, len(families))
            rates, paces = speed.measure_core(), []
            for one in families:
                paces.append(speed.measure_family(one.family, one.row, rates))
                told(1, len(families))
    if as_json:
        print(json.dumps(_as_json([*facts, *found.facts], rates, families, paces, advice), indent=1))  # noqa: T201
    else:
        Console().print(_make_fact_table([*facts, *found.facts]), _make_speed_table(rates, families, paces))
    if found.bad:
        raise typer.Exit(BAD)


def _read_settings(store: str) -> tuple["Settings", bool]:
    """The settings that `serve` would use, and whether they name a store. Raises ValueError."""
    try:
        return settings_from({"store": store}), True
    except ValueError:
        if store:
            raise
        return settings_from({"store": "."}), False  # any other error is raised again by this call


def _advise_from_log(settings: "Settings", host: "Host", access_log: str) -> "Advice":
    """Advise on the cache size of `serve` by the requests in the log. Raises ValueError, OSError."""
    from server.access_log import read_rows  # noqa: PLC0415 -- what help need not import
    from server.offline.cache_sizing import advise_cache_size  # noqa: PLC0415
    from server.supervisor.worker_plan import plan_workers  # noqa: PLC0415

    budget = sum(plan.budget_bytes for plan in plan_workers(settings, host))
    if not budget:
        raise ValueError("the cache takes the free memory of the GPU: set its size with FLEETCAST_MODEL_CACHE_BYTES")
    return advise_cache_size(((row.model, row.bytes) for row in read_rows(FilePath(access_log))), budget)


# --- shown ----------------------------------------------------------------------------------------------------------


def _make_fact_table(facts: Sequence["HostFact"]) -> Table:
    """A table with a row for each fact, and its advice below it."""
    table = Table("", "", show_header=False, box=None, pad_edge=False)
    for fact in facts:
        table.add_row(verbatim(fact.name, "bold"), verbatim(fact.text))
        if fact.advice:
            table.add_row("", verbatim(f"! {fact.advice}", "yellow"))
    return table


def _make_speed_table(rates: "CoreRates", families: Sequence["Measurable"], paces: Sequence["FamilySpeed"]) -> Table:
    """A table with a row for each batch size of each family."""
    from server.settings import format_bytes  # noqa: PLC0415 -- what help need not import
    from server.worker.engine.execution_plan import SIZES  # noqa: PLC0415

    rate = f"{rates.flops / 1e9:.0f} GFLOP/s in a product, {rates.bytes / 1e9:.1f} GB/s in a copy"
    table = Table(
        "", "rows", "gather", "in place", "floor", "repeat", "floor", title="microseconds an answer, one core"
    )
    table.caption = f"{rate}; {TAKEN} is the way taken here"
    for column in table.columns[1:]:
        column.justify = "right"
    for one, pace in zip(families, paces, strict=True):
        size, seen = (
            f"{format_bytes(pace.row_bytes)}, {pace.flops / 1e6:.2f} MFLOP",
            f" x {one.archives}" * bool(one.archives),
        )
        labels = [f"[bold]{one.name}[/]{seen}", size, ""]
        for label, rows in zip(labels, SIZES, strict=True):
            table.add_row(label, str(rows), *_format_speeds(pace, rows), end_section=rows == SIZES[-1])
    return table


def _format_speeds(pace: "FamilySpeed", rows: int) -> Iterator[str]:
    """A batch of different models by its two ways and its floor; then one model's inputs, where there are several."""
    from server.worker.engine.execution_plan import Path  # noqa: PLC0415 -- what help need not import

    for path in (Path.GATHER, Path.IN_PLACE):
        yield _format_time(pace.answer_us(path, rows), taken=pace.chosen_path(rows, rows) is path)
    yield f"{pace.floor_us(rows, rows):.1f}"
    if rows > 1:
        yield _format_time(pace.answer_us(Path.REPEAT, rows), taken=pace.chosen_path(rows, 1) is Path.REPEAT)
        yield f"{pace.floor_us(rows, 1):.1f}"


def _format_time(us: float | None, *, taken: bool) -> str:
    """For example `9.6*`, or `-` for what is not measured."""
    shown = "-" if us is None else f"{us:.1f}"
    return f"[bold green]{shown}{TAKEN}[/]" if taken else f"{shown} "


def _as_json(
    facts: Sequence["HostFact"],
    rates: "CoreRates",
    families: Sequence["Measurable"],
    paces: Sequence["FamilySpeed"],
    advice: "Advice | None",
) -> Mapping[str, Any]:
    """For programs."""
    from server.worker.engine.execution_plan import SIZES  # noqa: PLC0415 -- what help need not import

    return {
        "facts": [asdict(fact) for fact in facts],
        "access_log": advice and asdict(advice),
        "rates": {"flops_per_s": rates.flops, "copied_bytes_per_s": rates.bytes},
        "families": [
            {
                "name": one.name,
                "family": pace.family,
                "archives": one.archives,
                "models": pace.rows,
                "row_bytes": pace.row_bytes,
                "flops": pace.flops,
                "batches": {str(rows): _batch_as_json(pace, rows) for rows in SIZES},
            }
            for one, pace in zip(families, paces, strict=True)
        ],
    }


def _batch_as_json(pace: "FamilySpeed", rows: int) -> dict[str, Any]:
    """Microseconds an answer, null where it was not measured."""
    from server.worker.engine.execution_plan import Path  # noqa: PLC0415 -- what help need not import

    return {
        **{f"{path}_us": pace.answer_us(path, rows) for path in Path},
        "of_different_models": {"taken": pace.chosen_path(rows, rows), "floor_us": pace.floor_us(rows, rows)},
        "of_one_model": {"taken": pace.chosen_path(rows, 1), "floor_us": pace.floor_us(rows, 1)},
    }
