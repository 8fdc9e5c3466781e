"""One warm template for the tests of a file."""

from collections.abc import Iterator

import pytest

from server.worker.sandbox.code_host import EVERY_KEY, CodeHost, CodePolicy
from tests.patience import wait_until

MIB = 1024 * 1024
TIMEOUT_S = 4.0
PROCESSES = 12  #: a fork bomb shall not weigh on the tests beside it


@pytest.fixture(scope="module")
def host() -> Iterator[CodeHost]:
    """Children have 256 MiB, 4 seconds and few processes; when it is closed, nothing of it is left."""
    yield from run_host(TIMEOUT_S)


def run_host(timeout_s: float) -> Iterator[CodeHost]:
    """The same, with so much time for a batch."""
    host = CodeHost(CodePolicy((EVERY_KEY,), 256 * MIB, timeout_s, processes=PROCESSES))
    host.warm()
    yield host
    folder = host._folder
    host.close()
    assert folder is not None
    wait_until(lambda: not folder.exists(), "the template has removed its folder")
