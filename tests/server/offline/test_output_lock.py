"""One run at a time writes an output: here and in S3, told who it is, and nothing of a dead run stays in the way."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.cli.setting_flags import settings_from
from server.offline.batch_files import TransferFailed, _upload, answer_file
from server.offline.output_lock import Lease, LeaseLost, OutputInUse, hold_file, hold_object
from tests.patience import wait_until
from tests.s3 import S3Server

pytestmark = pytest.mark.slow

HOLD = """if True:
    import pathlib, signal, sys
    from server.offline.output_lock import hold_file
    with hold_file(pathlib.Path(sys.argv[1])):
        print("held", flush=True)
        signal.pause()
"""
SHORT_S = 2.0  #: a lease whose end a test can await


def test_a_local_output_is_held_by_one_process(tmp_path: Path) -> None:
    """The second one is told who writes; after SIGKILL of the first it may at once, and leaves no lock behind."""
    out = tmp_path / "out.jsonl"
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(OutputInUse, match=rf"out.jsonl is being written by process {holder.pid} on .* since"):
            hold_file(out).__enter__()
        settings = settings_from({"store": str(tmp_path)})
        (tmp_path / "in.jsonl").write_text("{}\n")
        with pytest.raises(OutputInUse):
            answer_file(settings, str(tmp_path / "in.jsonl"), str(out), b"{}", lambda *_: lambda _: None)
        assert not out.exists()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with hold_file(out):
        assert (tmp_path / "out.jsonl.lock").exists()
    assert not (tmp_path / "out.jsonl.lock").exists()


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """A fresh one."""
    return s3.bucket()


@pytest.fixture
def client(s3: S3Server) -> Any:
    """Of boto3."""
    return s3.client()


def test_an_output_in_s3_is_held_by_one_run(bucket: str, client: Any, tmp_path: Path) -> None:
    """Wherever the second one runs, it is told who writes. Released, the output is free and no object is left."""
    with hold_object(client, bucket, "a/out.jsonl", tmp_path / "one") as lease:
        with pytest.raises(
            OutputInUse, match=rf"s3://{bucket}/a/out.jsonl is being written by process {os.getpid()} on"
        ):
            Lease(client, bucket, "a/out.jsonl", tmp_path / "two").take()
        lease.require()
    with hold_object(client, bucket, "a/out.jsonl", tmp_path / "two"):
        assert [each["Key"] for each in client.list_objects_v2(Bucket=bucket)["Contents"]] == ["a/out.jsonl.lock"]
    assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 0
    assert list(tmp_path.iterdir()) == []


def test_a_dead_runs_lease_is_its_commands_at_once_and_others_later(bucket: str, client: Any, tmp_path: Path) -> None:
    """The same command continues without waiting; another run waits until the lease is over. Whoever lost it is told,
    before anything is uploaded.
    """
    dead = Lease(client, bucket, "out", tmp_path / "own")
    dead.take()
    dead._ended.set()  # as SIGKILL ends its thread
    again = Lease(client, bucket, "out", tmp_path / "own")
    again.take()
    again._ended.set()
    with pytest.raises(LeaseLost, match="another may write there now"):
        dead.require()
    with pytest.raises(OutputInUse):
        Lease(client, bucket, "out", tmp_path / "other").take()
    other = Lease(client, bucket, "out", tmp_path / "other", SHORT_S)
    wait_until(lambda: _is_taken(other), "the lease is over")
    (whole := tmp_path / "out.jsonl").touch()
    with pytest.raises(TransferFailed, match=f"another may write there now.*the answers are in {whole}"):
        _upload(settings_from({"store": str(tmp_path)}), whole, f"s3://{bucket}/out", again, lambda *_: lambda _: None)
    other.release()
    assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 0


def _is_taken(lease: Lease) -> bool:
    try:
        lease.take()
    except OutputInUse:
        return False
    return True


def test_a_lease_is_renewed_for_as_long_as_its_run_lasts(bucket: str, client: Any, tmp_path: Path) -> None:
    """Its object becomes newer without anything that the run does."""
    with hold_object(client, bucket, "out", tmp_path / "one", SHORT_S):
        first = _written_at(client, bucket)
        wait_until(lambda: _written_at(client, bucket) > first, "it is renewed")
        with pytest.raises(OutputInUse):
            Lease(client, bucket, "out", tmp_path / "two").take()


def _written_at(client: Any, bucket: str) -> Any:
    return client.head_object(Bucket=bucket, Key="out.lock")["LastModified"]


def test_a_bucket_that_is_not_there_is_said(client: Any, tmp_path: Path) -> None:
    """It is no other run's fault."""
    with pytest.raises(client.exceptions.NoSuchBucket):
        Lease(client, "no-such-bucket", "out", tmp_path / "own").take()
