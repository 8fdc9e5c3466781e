"""How many files, and so clients, the processes of a server may open."""

import resource
from pathlib import Path

import pytest

from tests.e2e.conftest import Serve

pytestmark = pytest.mark.e2e
SOFT = 1024  #: what most systems give to a process


def test_every_process_may_open_as_many_files_as_the_hard_limit_allows(serve: Serve) -> None:
    """A server that is started with the usual soft limit raises it for itself, its fronts and its workers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard > SOFT
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, hard))
    try:
        with serve(fronts=2, workers=1) as server:
            children = [row["pid"] for kind in ("front", "worker") for row in server.processes(kind)]
            found = [_open_files_limits(pid) for pid in (server.process.pid, *children)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == [[str(hard), str(hard)]] * 4


def _open_files_limits(pid: int) -> list[str]:
    """The soft and the hard limit."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    (limits,) = (line for line in lines if line.startswith("Max open files"))
    return limits.split()[3:5]
