"""Starts the floor of code archives: see `code_floor_server`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from loadtest.driver.dialects import DIALECTS
from loadtest.observe.processes import find_free_port, is_reachable, wait_until
from loadtest.peers.peer_server import PeerServer
from loadtest.peers.process_tree import start_process

FLOOR = "floor"


@contextmanager
def start_code_floor(weights: Path, count: int) -> Iterator[PeerServer]:
    """Run the floor with the models m0, m1, ... of a folder of weights."""
    port = find_free_port()
    command = [sys.executable, "-P", "-m", "loadtest.peers.code_floor_server", str(port), str(weights), str(count)]
    with TemporaryDirectory(prefix="peer-") as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with start_process(command, Path(folder), environment) as (tree, _):
            wait_until(lambda: is_reachable(port))
            yield PeerServer(FLOOR, f"http://127.0.0.1:{port}", DIALECTS["sagemaker"], "", tree)
