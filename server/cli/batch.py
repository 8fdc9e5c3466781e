"""`fleetcast batch` answers a file of requests, in a folder or in S3. It imports torch when it runs."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import typer

from server.cli.setting_flags import settings_from
from server.cli.terminal import BAD, one_line_errors
from server.shell.progress import follow_tasks


def batch(
    lines: Annotated[
        str, typer.Argument(metavar="IN.jsonl", help="file of requests, one per line: a path or s3://bucket/key")
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT.jsonl", help="file of the answers in order: a path or s3://bucket/key")
    ],
    *,
    models: Annotated[
        str, typer.Option(metavar="PREFIX", help="folder or store URL of the models; default: the store of `serve`")
    ] = "",
    configuration: Annotated[
        str, typer.Option(metavar="JSON", help="configuration of the lines that have none")
    ] = "{}",
) -> None:
    """Answer a file of requests, one forecast per line, in this process. The exit code is 1 when some lines failed.

    \b
    fleetcast batch tonight.jsonl answers.jsonl --models s3://models/prices
    a line: {"target_model": "au/nsw1.mar", "start": "2026-01-01 00:00:00", "target": [41.5, 39.2, ...]}

    Lines may name models in any order: each model is loaded once. The answer of a line that fails is an error. Finished
    lines are kept in OUT.part and OUT.index (for an OUT in S3 below the disk cache), so that the same command continues
    a run that was killed; with the same archives it ends with the same bytes as one that was never interrupted.

    Only one run writes an OUT at a time: it holds OUT.lock, in S3 for another minute where it was killed (the same
    command need not wait). A store without conditional writes, or that forbids OUT.lock, is not locked, with a warning.
    """  # noqa: D301
    from server.offline.batch_files import TransferFailed, answer_file  # noqa: PLC0415 -- torch

    with one_line_errors(TransferFailed):
        settings = settings_from({"store": models} if models else {})
        default = msgspec.json.encode(msgspec.json.decode(configuration, type=dict[str, Any]))
        with follow_tasks() as tasks:

            def start_task(description: str, total: int | None, done: int) -> Callable[[int], None]:
                return tasks.start_task(description, total, done).advance

            done, failed = answer_file(settings, lines, out, default, start_task)
    print(f"{done} lines answered, {failed} of them with an error: {out}", file=sys.stderr)  # noqa: T201
    if failed:
        raise typer.Exit(BAD)
