"""`fleetcast batch`: a file of requests in, a file of answers out, from and to a folder or S3. A process of its own."""

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
import typer
from rich.progress import Progress

from model_store.names import ModelName
from server.cli.setting_flags import settings_from
from server.cli.terminal import BAD, bar, one_line_errors
from server.settings import Settings, format_bytes


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
    with one_line_errors(_Elsewhere):
        settings = settings_from({"store": models} if models else {})
        asked = msgspec.json.encode(msgspec.json.decode(configuration, type=dict[str, Any]))
        with bar() as progress:
            done, failed = _run(settings, lines, out, asked, progress)
    print(f"{done} lines answered, {failed} of them by an error: {out}", file=sys.stderr)  # noqa: T201
    if failed:
        raise typer.Exit(BAD)


class _Elsewhere(Exception):
    """S3 said no."""


def _run(settings: Settings, lines: str, out: str, configuration: bytes, progress: Progress) -> tuple[int, int]:
    """Lines, and how many of them have an error."""
    from handlers.model import Model, open_model  # noqa: PLC0415 -- torch
    from server.offline.archive_location import ArchiveLocation  # noqa: PLC0415
    from server.offline.batch_inference import Batch, index  # noqa: PLC0415
    from server.offline.checkpoint import Journal  # noqa: PLC0415
    from server.worker.model_loader import open_store  # noqa: PLC0415

    place = _place_of_work(settings, lines, out)
    with _local(settings, lines, place.parent, progress) as path, path.open("rb") as file:
        longest, size = int(settings.max_body_bytes), path.stat().st_size
        reading = progress.add_task("reading", total=size)
        found = index(file, longest, lambda read: progress.advance(reading, read))
        progress.remove_task(reading)
        digest = hashlib.sha256(found.digest + settings.store.encode() + b"\0" + configuration).digest()
        source, limits = open_store(settings)
        threads = settings.loader_threads

        def open_stored(name: ModelName) -> Model:
            return open_model(ArchiveLocation(source, name, limits).fetch()[0])

        whole = Batch(file, found, open_stored, configuration, longest, threads)
        with Journal(place, digest, len(found.start)) as journal:
            task = progress.add_task("forecasting", total=len(found.start), completed=journal.done)
            whole.run(journal, lambda count: progress.advance(task, count))
            failed = sum(answer.startswith(b'{"error"') for answer in journal.in_order())
            journal.finish(place)
    if "://" in out:
        _store(settings, place, out, progress)
    return len(found.start), failed


def _place_of_work(settings: Settings, lines: str, out: str) -> Path:
    """Where the answers are put together: the same file for the same command."""
    if "://" not in out:
        return Path(out)
    _bucket_and_key(out)
    folder = settings.disk_cache / "batch" / hashlib.sha256(f"{lines}\0{out}".encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "out.jsonl"


@contextmanager
def _local(settings: Settings, lines: str, folder: Path, progress: Progress) -> Iterator[Path]:
    """The input as a file of this machine."""
    if "://" not in lines:
        yield Path(lines)
        return
    path = folder / "in.jsonl"
    bucket, key = _bucket_and_key(lines)
    with _moving(settings, f"fetching {lines}", progress) as (client, told):
        client.download_file(bucket, key, str(path), Callback=told)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _store(settings: Settings, place: Path, out: str, progress: Progress) -> None:
    """The answers to S3; they stay here when that fails."""
    bucket, key = _bucket_and_key(out)
    with _moving(settings, f"storing {format_bytes(place.stat().st_size)}", progress) as (client, told):
        client.upload_file(str(place), bucket, key, Callback=told)
    place.unlink()


@contextmanager
def _moving(settings: Settings, what: str, progress: Progress) -> Iterator[tuple[Any, Callable[[int], None]]]:
    """An S3 client by boto3's chain, and what counts the bytes. Raises _Elsewhere for what S3 refuses."""
    import boto3  # noqa: PLC0415 -- half a second that a local batch saves
    from boto3.exceptions import Boto3Error  # noqa: PLC0415
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

    task = progress.add_task(what, total=None)
    try:
        session = boto3.Session(profile_name=settings.s3_profile, region_name=settings.s3_region)
        yield session.client("s3", endpoint_url=settings.s3_endpoint_url), lambda size: progress.advance(task, size)
    except (BotoCoreError, ClientError, Boto3Error) as error:
        raise _Elsewhere(f"{what}: {error}") from error
    finally:
        progress.remove_task(task)


def _bucket_and_key(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    key = parts.path.removeprefix("/")
    if parts.scheme != "s3" or not parts.netloc or not key:
        raise ValueError(f"{url!r}: give a path or s3://bucket/key")
    return parts.netloc, key
