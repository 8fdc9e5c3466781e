"""`fleetcast doctor`: what this machine gives a server, and how fast it answers each kind of model. No server runs.

Torch when it runs: the facts are `server.offline.host_checks`, the times `server.worker.engine.speed`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Annotated, Any

import rich
import typer
from rich.table import Table

from server.access_log import read_rows
from server.cli.setting_flags import settings_from
from server.cli.terminal import BAD, one_line_errors, show_progress, verbatim
from server.host import Host, read_host
from server.offline.cache_sizing import Advice, advise_cache_size
from server.settings import Settings, format_bytes
from server.supervisor.worker_plan import plan_workers
from server.worker.engine.execution_plan import SIZES, Path

if TYPE_CHECKING:
    from server.offline.host_checks import HostFact
    from server.offline.store_families import Measurable
    from server.worker.engine.speed import CoreRates, FamilySpeed

TAKEN = "*"


def doctor(
    *,
    store: Annotated[str, typer.Option(help="look into this store too; else into the one that `serve` finds")] = "",
    access_log: Annotated[
        str, typer.Option(help="what `serve --access-log` has written: what would more memory buy?")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="for programs, on standard output")] = False,
) -> None:
    """Look at this machine and say what to change; then measure how fast models answer here, on one core.

    \b
    fleetcast doctor                              before there is a store: the built-in architectures
    fleetcast doctor --store s3://models/prices   the families of up to 20 of its archives, each loaded once
    fleetcast doctor --access-log logs            the cache size that buys the next five points of hit ratio
    fleetcast doctor --json | jq .families

    Times are microseconds an answer, of up to 1024 models that were asked in turn: rows that the CPU's cache does not
    hold, unless they are small. A batch of 1, 8 or 64 different models is gathered (rows copied side by side) or run in
    place; many inputs of one model can repeat its row. * is the way that a worker would take here, - what takes too
    long to be measured while it serves. The floor is the answer's arithmetic at the rate of a matrix product and its
    row at the rate of a copy from memory, once for a repeated one. Ends with 1 when the store cannot be read or an
    archive would not load.
    """  # noqa: D301 -- click's mark for "do not wrap"
    from server.offline import host_checks  # noqa: PLC0415 -- torch
    from server.offline.store_families import StoreFamilies, built_in_families, find_families  # noqa: PLC0415
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
        families = list(found.families.values()) or list(built_in_families())
        with show_progress("measuring") as told:
            told(0, len(families))
            rates, paces = speed.measure_core(), []
            for one in families:
                paces.append(speed.measure_family(one.family, one.row, rates))
                told(1, len(families))
    if as_json:
        print(json.dumps(_as_json([*facts, *found.facts], rates, families, paces, advice), indent=1))  # noqa: T201
    else:
        rich.print(_make_fact_table([*facts, *found.facts]), _make_speed_table(rates, families, paces))
    if found.bad:
        raise typer.Exit(BAD)


def _read_settings(store: str) -> tuple[Settings, bool]:
    """The settings as `serve` would have them, and whether they name a store. Raises ValueError."""
    try:
        return settings_from({"store": store}), True
    except ValueError:
        if store:
            raise
        return settings_from({"store": "."}), False  # anything else that is wrong is wrong here too


def _advise_from_log(settings: Settings, host: Host, access_log: str) -> Advice:
    """What the log's requests say of the cache that `serve` would have. Raises ValueError, OSError."""
    budget = sum(plan.budget_bytes for plan in plan_workers(settings, host))
    if not budget:
        raise ValueError("the cache is what is free on the GPU: say how much with FLEETCAST_MODEL_CACHE_BYTES")
    return advise_cache_size(((row.model, row.bytes) for row in read_rows(FilePath(access_log))), budget)


# --- shown ----------------------------------------------------------------------------------------------------------


def _make_fact_table(facts: Sequence["HostFact"]) -> Table:
    """A fact a row, and what to do below it."""
    table = Table("", "", show_header=False, box=None, pad_edge=False)
    for fact in facts:
        table.add_row(verbatim(fact.name, "bold"), verbatim(fact.text))
        if fact.advice:
            table.add_row("", verbatim(f"! {fact.advice}", "yellow"))
    return table


def _make_speed_table(rates: "CoreRates", families: Sequence["Measurable"], paces: Sequence["FamilySpeed"]) -> Table:
    """A batch size of a family a row."""
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
    advice: Advice | None,
) -> Mapping[str, Any]:
    """For programs."""
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
    return {
        **{f"{path}_us": pace.answer_us(path, rows) for path in Path},
        "of_different_models": {"taken": pace.chosen_path(rows, rows), "floor_us": pace.floor_us(rows, rows)},
        "of_one_model": {"taken": pace.chosen_path(rows, 1), "floor_us": pace.floor_us(rows, 1)},
    }
