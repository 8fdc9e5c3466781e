"""`fleetcast ls` lists what a running server holds, or all that it says about one model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import quote

import typer

from model_store.names import VERSION_MARK
from server.cli.fleet.management import (
    DEFAULT_URL,
    Management,
    Url,
    make_table,
    open_management,
    print_wide,
    shorten_version,
)
from server.cli.fleet.rows import BAD_STATES, find_reason, find_state, sum_usage
from server.cli.terminal import fail, verbatim

_UNITS = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def ls(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="show one model: each holder, or with --versions its versions")
    ] = "",
    *,
    prefix: Annotated[str, typer.Option(metavar="TEXT", help="only models whose names begin so")] = "",
    failed: Annotated[bool, typer.Option("--failed", help="only models that failed or are in quarantine")] = False,
    pinned: Annotated[bool, typer.Option("--pinned", help="only pinned models")] = False,
    versions: Annotated[
        bool, typer.Option("--versions", help="versions of MODEL that the disk tier keeps, for `fleetcast rollback`")
    ] = False,
    names: Annotated[bool, typer.Option("--names", help="print names alone, one per line, for other commands")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON for programs: one object per line")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """List the models that a running server holds in memory, loads, or could not load.

    Other archives of the store are not listed: they are loaded when they are first asked for.

    \b
    fleetcast ls
    fleetcast ls --failed
    fleetcast ls --prefix au/ --json | jq -r 'select(.pinned) | .model'
    fleetcast ls au/nsw1.mar
    fleetcast ls au/nsw1.mar --versions
    """  # noqa: D301
    if versions and not model:
        fail("--versions needs a model: fleetcast ls au/nsw1.mar --versions")
    with open_management(url) as management:
        if versions:
            _print_versions(management.get(f"/fleet/versions/{quote(model)}"), as_json)
        elif model:
            _print_model(management.get(f"/fleet/models/{quote(model)}"), as_json)
        else:
            rows = _select_rows(management, prefix, failed=failed, pinned=pinned)
            _print_models(rows, names=names, as_json=as_json)


def format_age(seconds: float) -> str:
    """A time span in its largest unit, for example `3 min`."""
    unit, name = next(((unit, name) for unit, name in _UNITS if seconds >= unit), (1, "s"))
    return f"{int(seconds // unit)} {name}"


def _select_rows(management: Management, prefix: str, *, failed: bool, pinned: bool) -> Iterator[Mapping[str, Any]]:
    for row in management.list_models(prefix):
        if (not failed or find_state(row) in BAD_STATES) and (not pinned or row["pinned"]):
            yield row


def _print_models(rows: Iterator[Mapping[str, Any]], *, names: bool, as_json: bool) -> None:
    if names or as_json:
        for row in rows:
            # A version that an alias or a rollback holds has a row of its own, but no command takes its name.
            if not (names and VERSION_MARK in row["model"]):
                print(row["model"] if names else json.dumps(row))  # noqa: T201 -- the answer
        return
    table = make_table("model", "state", "workers", ">size", "version", ">answers", ">used", ">loaded")
    reasons = make_table("failed model", "why")
    for row in rows:
        table.add_row(*_describe_row(row))
        if reason := find_reason(row):
            reasons.add_row(verbatim(row["model"]), verbatim(reason))
    if not table.row_count:
        print("no model is loaded, loading or failed")  # noqa: T201
        return
    print_wide(table)
    if reasons.row_count:
        print_wide("")
        print_wide(reasons)


def _describe_row(row: Mapping[str, Any]) -> Iterator[Any]:
    """The cells of one model."""
    from server.settings import format_bytes  # noqa: PLC0415 -- pydantic, which help need not import

    state, held = find_state(row), [holder for holder in row["holders"] if "bytes" in holder]
    yield verbatim(row["model"])
    yield verbatim(state + (", pinned" if row["pinned"] else ""), "red" if state in BAD_STATES else "")
    yield ",".join(str(holder["worker"]) for holder in row["holders"])
    yield format_bytes(sum(holder["bytes"] for holder in held)) if held else ""
    yield verbatim(shorten_version(held[0]["version"]) if held else "")
    yield str(sum_usage(row, "answers")) if held else ""
    yield _format_least(held, "used_s_ago")
    yield _format_least(held, "loaded_s_ago")


def _format_least(held: Sequence[Mapping[str, Any]], key: str) -> str:
    ages = [holder[key] for holder in held if key in holder]
    return f"{format_age(min(ages))} ago" if ages else ""


def _print_model(row: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(row))  # noqa: T201
        return
    lines = make_table("", "", header=False)
    lines.add_row(verbatim("model", "bold"), verbatim(row["model"]))
    lines.add_row(verbatim("state", "bold"), verbatim(find_state(row) + (", pinned" if row["pinned"] else "")))
    if reason := find_reason(row):
        lines.add_row(verbatim("why", "bold"), verbatim(reason))
    for holder in row["holders"]:
        for key, value in holder.items():
            if key not in ("worker", "forecast", "usage", "error", "reason"):
                lines.add_row(verbatim(f"worker {holder['worker']} {key}", "bold"), verbatim(str(value)))
        for key, value in holder.get("usage", {}).items():
            lines.add_row(verbatim(f"worker {holder['worker']} {key}", "bold"), verbatim(str(value)))
    forecast: Mapping[str, Any] = next((holder["forecast"] for holder in row["holders"] if "forecast" in holder), {})
    for key, value in forecast.items():
        lines.add_row(verbatim(key, "bold"), verbatim(json.dumps(value)))
    print_wide(lines)


def _print_versions(found: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        for each in found["versions"]:
            print(json.dumps(each))  # noqa: T201
        return
    if not found["versions"]:
        print_wide("this host keeps no version: the model has not been served since the disk tier was made")
        return
    from server.settings import format_bytes  # noqa: PLC0415 -- pydantic, which help need not import

    table = make_table("version", ">size", "served at", "")
    for each in found["versions"]:
        at = datetime.fromtimestamp(each["served_at"], UTC).isoformat(sep=" ", timespec="seconds")
        held = "held by a rollback" if each["held"] else ""
        table.add_row(verbatim(each["version"]), format_bytes(each["bytes"]), at, held)
    print_wide(table)
