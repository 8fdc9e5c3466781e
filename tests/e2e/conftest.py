"""Fixtures for a server per test, for buckets, and for enough file descriptors for many clients."""

import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.server import Server, run_server
from tests.s3 import S3Server

FILES = 8192

Serve = Callable[..., AbstractContextManager[Server]]


@pytest.fixture(scope="session", autouse=True)
def _many_files() -> Iterator[None]:
    """A thousand clients need a thousand sockets here, and as many in a front, which inherits the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, FILES)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def store(s3: S3Server) -> str:
    """A fresh bucket's name."""
    return s3.bucket()


@pytest.fixture
def serve(s3: S3Server, tmp_path: Path, store: str) -> Serve:
    """A server of the bucket `store`, its caches below this test's folder; settings by name, as of the command."""
    return partial(run_server, s3, tmp_path, f"s3://{store}")
