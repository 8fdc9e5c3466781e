"""An S3 server on loopback for benchmarks: moto in its own process, with a request log."""

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3

from loadtest.observe.processes import end_processes, find_free_port, is_reachable, wait_until

S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def serve_moto(folder: Path) -> Iterator[tuple[str, Callable[[], list[str]]]]:
    """Run an S3 server on loopback with a bucket `bench`; yields its endpoint and a reader of its request log."""
    port, log = find_free_port(), folder / "moto.log"
    with log.open("wb") as output:
        command = [sys.executable, "-P", "-m", "moto.server", "-p", str(port)]
        with end_processes([subprocess.Popen(command, stdout=output, stderr=output)]):
            wait_until(lambda: is_reachable(port))
            endpoint = f"http://127.0.0.1:{port}"
            keys = {"aws_access_key_id": "bench", "aws_secret_access_key": "bench", "region_name": "us-east-1"}
            boto3.client("s3", endpoint_url=endpoint, **keys).create_bucket(Bucket="bench")
            yield endpoint, lambda: re.findall(r"GET \S+\.mar", log.read_text())
