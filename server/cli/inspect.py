"""`fleetcast inspect` shows the contents of an archive. It imports torch when it runs."""

import json
from typing import Annotated

import rich
import typer
from rich.table import Table

from server.cli.setting_flags import settings_from
from server.cli.terminal import one_line_errors, verbatim


def inspect(
    archive: Annotated[str, typer.Argument(metavar="ARCHIVE", help="path or store URL (s3://bucket/key)")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="print the description as JSON")] = False,
) -> None:
    """Show the kind, configuration, members, tensors and hash of an archive, and for a graph how its models run.

    Of an archive with code it says whose it is (TorchServe, Multi Model Server, SageMaker), what would run, what it
    needs that is not installed here, and how to serve it. The code is read and not imported.

    \b
    fleetcast inspect au/nsw1.mar
    fleetcast inspect s3://models/prices/au/nsw1.mar --json | jq .spec.forecast
    """  # noqa: D301
    from server.offline.archive_location import locate_archive, split_location  # noqa: PLC0415 -- torch
    from server.offline.archive_tools import describe_archive, format_description  # noqa: PLC0415

    with one_line_errors():
        store, name = split_location(archive)
        found = describe_archive(*locate_archive(settings_from({"store": store}), name).fetch())
        if "flags" in found.get("code", {}):
            found["code"]["flags"] = ["--store", store, *found["code"]["flags"]]
    if as_json:
        print(json.dumps(found, indent=1))  # noqa: T201
        return
    rows = Table("", "", show_header=False, box=None, pad_edge=False)
    for label, text in format_description(found):
        rows.add_row(verbatim(label, "bold"), verbatim(text))
    rich.print(rows)
