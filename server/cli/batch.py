"""`fleetcast batch`: a file of requests in, a file of answers out, from and to a folder or S3. Torch when it runs."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import typer

from server.cli.setting_flags import settings_from
from server.cli.terminal import BAD, make_progress_bar, one_line_errors


def batch(
    lines: Annotated[str, typer.Argument(metavar="IN.jsonl", help="requests, one a line: a path or s3://bucket/key")],
    out: Annotated[str, typer.Argument(metavar="OUT.jsonl", help="their answers in order: a path or s3://bucket/key")],
    *,
    models: Annotated[str, typer.Option(metavar="PREFIX", help="store of the models; else as `serve` finds it")] = "",
    configuration: Annotated[str, typer.Option(metavar="JSON", help="for lines that have none of their own")] = "{}",
) -> None:
    """Answer a file of requests, each line one forecast, in this process; ends with 1 when some lines failed.

    \b
    fleetcast batch tonight.jsonl answers.jsonl --models s3://models/prices
    a line: {"target_model": "au/nsw1.mar", "start": "2026-01-01 00:00:00", "target": [41.5, 39.2, ...]}

    Lines may name models in any order: each model is loaded once. A line that fails has an error for its answer. What
    is done is kept in OUT.part and OUT.index (for an OUT in S3 below the disk cache), so that the same command goes on
    where a killed run has stopped.
    """  # noqa: D301
    from server.offline.batch_files import TransferFailed, answer_file  # noqa: PLC0415 -- torch

    with one_line_errors(TransferFailed):
        settings = settings_from({"store": models} if models else {})
        default = msgspec.json.encode(msgspec.json.decode(configuration, type=dict[str, Any]))
        with make_progress_bar() as progress:

            def start_task(description: str, total: int | None, done: int) -> Callable[[int], None]:
                task = progress.add_task(description, total=total, completed=done)
                return lambda count: progress.advance(task, count)

            done, failed = answer_file(settings, lines, out, default, start_task)
    print(f"{done} lines answered, {failed} of them by an error: {out}", file=sys.stderr)  # noqa: T201
    if failed:
        raise typer.Exit(BAD)
