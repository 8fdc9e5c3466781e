"""`fleetcast verify` loads archives as a worker does. It imports torch when it runs."""

from typing import Annotated

import typer

from model_store.errors import LoadError
from server.cli.setting_flags import settings_from
from server.cli.terminal import BAD
from server.shell.escaping import escape_text


def verify(
    archives: Annotated[list[str], typer.Argument(metavar="ARCHIVE", help="paths or store URLs (s3://bucket/key)")],
) -> None:
    """Load archives as a worker does and run their golden samples. The exit code is 1 when one of them is bad.

    \b
    fleetcast verify models/au/*.mar
    fleetcast verify s3://models/prices/au/nsw1.mar
    """  # noqa: D301
    from server.offline.archive_location import locate_archive, split_location  # noqa: PLC0415 -- torch
    from server.offline.archive_tools import verify_archive  # noqa: PLC0415

    bad = 0
    for archive in archives:
        try:
            store, name = split_location(archive)
            proof = verify_archive(locate_archive(settings_from({"store": store}), name))
            print(escape_text(f"ok   {archive}: {proof}"))  # noqa: T201
        except (LoadError, ValueError, OSError) as error:
            bad += 1
            print(escape_text(f"BAD  {archive}: {error}"))  # noqa: T201
        except Exception as error:  # a bug that one archive triggers must not hide the results of the others
            bad += 1
            print(escape_text(f"BAD  {archive}: it cannot be verified, by a fault of this program: {error!r}"))  # noqa: T201
    if bad:
        raise typer.Exit(BAD)
