"""The files of a batch: requests and answers on disk or in S3, and a checkpoint in between. Imports torch.

Answers are collected in a local file, so that the same command continues a run that was killed.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from handlers.model import Model, open_model
from model_store.names import ModelName
from model_store.stores.object_store import InvalidStoreUrl
from server.offline.archive_location import ArchiveLocation
from server.offline.batch_inference import BatchJob, index_lines
from server.offline.checkpoint import Checkpoint
from server.offline.output_lock import Lease, LeaseLost, hold_file, hold_object
from server.settings import Settings, format_bytes
from server.worker.archive_store import open_store

#: Takes the description of a task, its total (None: not known) and the part that is done; returns a function that takes
#: how much more is done.
StartTask = Callable[[str, int | None, int], Callable[[int], None]]


class TransferFailed(Exception):
    """S3 refuses to send or take a file, or cannot be reached."""


def answer_file(
    settings: Settings, lines: str, out: str, configuration: bytes, start_task: StartTask
) -> tuple[int, int]:
    """Answer the requests of the file `lines` into `out`. Returns the number of requests, and of those with an error.

    Files are paths or `s3://bucket/key`. `configuration` (JSON) is used for lines that have none.

    Raises:
        LoadError: the store cannot be reached. TransferFailed. ValueError: a URL is wrong, the checkpoint belongs to
        another batch, or another run writes to the same output (OutputInUse). OSError.
    """
    whole = _find_local_output(settings, lines, out)
    with hold_file(whole), _hold_in_s3(settings, out, whole, start_task) as lease:
        counts = _answer(settings, lines, whole, configuration, start_task)
        if "://" in out:
            _upload(settings, whole, out, lease, start_task)
    return counts


def _answer(
    settings: Settings, lines: str, whole: Path, configuration: bytes, start_task: StartTask
) -> tuple[int, int]:
    """Answer the requests into the local file `whole`. See `answer_file`."""
    with _open_input(settings, lines, whole.parent, start_task) as path, path.open("rb") as file:
        longest = int(settings.max_body_bytes)
        found = index_lines(file, longest, start_task("reading", path.stat().st_size, 0))
        digest = hashlib.sha256(found.digest + settings.store.encode() + b"\0" + configuration).digest()
        source, limits = open_store(settings)

        def open_stored(name: ModelName) -> Model:
            return open_model(ArchiveLocation(source, name, limits).fetch()[0])

        batch = BatchJob(file, found, open_stored, configuration, longest, settings.loader_threads)
        with Checkpoint(whole, digest, len(found.start)) as journal:
            batch.run(journal, start_task("forecasting", len(found.start), journal.done))
            failed = sum(answer.startswith(b'{"error"') for answer in journal.in_order())
            journal.finish(whole)
    return len(found.start), failed


@contextmanager
def _hold_in_s3(settings: Settings, out: str, whole: Path, start_task: StartTask) -> Iterator[Lease | None]:
    """Hold an output in S3 for this run; None for a local one. Raises OutputInUse, TransferFailed."""
    if "://" not in out:
        yield None
        return
    bucket, key = _split_url(out)
    with ExitStack() as stack:
        with _connect_s3(settings, f"locking {out}", start_task) as (client, _):
            lease = stack.enter_context(hold_object(client, bucket, key, whole.with_name("lease")))
        yield lease


def _find_local_output(settings: Settings, lines: str, out: str) -> Path:
    """Return the local file that collects the answers; it is the same for the same command."""
    if "://" not in out:
        return Path(out)
    _split_url(out)
    folder = settings.disk_cache / "batch" / hashlib.sha256(f"{lines}\0{out}".encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "out.jsonl"


@contextmanager
def _open_input(settings: Settings, lines: str, folder: Path, start_task: StartTask) -> Iterator[Path]:
    """Yield the input as a local file; one in S3 is fetched into `folder` and deleted afterwards."""
    if "://" not in lines:
        yield Path(lines)
        return
    path = folder / "in.jsonl"
    bucket, key = _split_url(lines)
    with _connect_s3(settings, f"fetching {lines}", start_task) as (client, report):
        client.download_file(bucket, key, str(path), Callback=report)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _upload(settings: Settings, whole: Path, out: str, lease: Lease | None, start_task: StartTask) -> None:
    """Move the answers to S3; if that fails, or another run has the output by now, the local file is kept."""
    bucket, key = _split_url(out)
    if lease is not None:
        try:
            lease.require()
        except LeaseLost as error:
            raise TransferFailed(f"{error}; the answers are in {whole}") from error
    with _connect_s3(settings, f"storing {format_bytes(whole.stat().st_size)}", start_task) as (client, report):
        client.upload_file(str(whole), bucket, key, Callback=report)
    whole.unlink()


@contextmanager
def _connect_s3(
    settings: Settings, description: str, start_task: StartTask
) -> Iterator[tuple[Any, Callable[[int], None]]]:
    """Yield an S3 client by boto3's chain, and a callback that counts bytes. Raises TransferFailed if S3 refuses."""
    from boto3.exceptions import Boto3Error  # noqa: PLC0415 -- half a second that a local batch saves
    from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

    from model_store.stores.s3_store import make_session  # noqa: PLC0415

    try:
        session, trusted = make_session(settings.s3_profile, settings.s3_region)
        client = session.client("s3", endpoint_url=settings.s3_endpoint_url, verify=trusted.file)
        yield client, start_task(description, None, 0)
    except (BotoCoreError, ClientError, Boto3Error, InvalidStoreUrl) as error:
        raise TransferFailed(f"{description}: {error}") from error


def _split_url(url: str) -> tuple[str, str]:
    """Split a URL into bucket and key. Raises ValueError."""
    parts = urlsplit(url)
    key = parts.path.removeprefix("/")
    if parts.scheme != "s3" or not parts.netloc or not key:
        raise ValueError(f"{url!r}: give a path or s3://bucket/key")
    return parts.netloc, key
