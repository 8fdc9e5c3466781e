"""Starts Mosec: a Rust front and worker processes of one model, which is all that a Mosec service has."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loadtest.driver.dialects import ClientDialect
from loadtest.observe.processes import find_free_port
from loadtest.peers.environments import HERE, make_environment
from loadtest.peers.graphs import export_graph
from loadtest.peers.network import load_network
from loadtest.peers.peer_server import PeerServer, describe_settings, make_process_environment, wait_for_server
from loadtest.peers.process_tree import start_process

DIALECT = ClientDialect("mosec", "/inference", {}, ping="/")
WAIT_MS = 1  #: the shortest that Mosec knows; less means its default of 10


def write_variables(graph: Path, batch: int) -> dict[str, str]:
    """Write what `handler.py` reads."""
    return {
        "PEER_GRAPH": str(graph),
        "PEER_BATCH": str(batch),
        "PEER_WAIT_MS": str(WAIT_MS),
        "PEER_PROCESSES": str(count_workers(batch)),
    }


def count_workers(batch: int) -> int:
    """How many workers answered most: one a core, but with batches one, which then has all requests to batch."""
    return len(os.sched_getaffinity(0)) if batch == 1 else 1


@contextmanager
def start_mosec(models: Path, say: Callable[[str], None], batch: int) -> Iterator[PeerServer]:
    """Mosec with the model m0, in batches of at most `batch`."""
    binaries = make_environment("mosec", say) / "bin"
    with tempfile.TemporaryDirectory(prefix="peer-") as text:
        folder, port = Path(text), find_free_port()
        graph = export_graph(load_network(str(models / "m0")), folder / "model.onnx", any_rows=batch > 1)
        flags = {"address": "127.0.0.1", "port": port, "path": folder / "mosec", "log-level": "warning"}
        line = [str(binaries / "python"), str(HERE / "mosec" / "handler.py")]
        environment = make_process_environment(binaries, folder) | write_variables(graph, batch)
        command = [*line, *(part for flag, value in flags.items() for part in (f"--{flag}", str(value)))]
        with start_process(command, folder, environment) as (tree, log):
            wait_for_server("mosec", f"http://127.0.0.1:{port}/", tree, log)
            shown = [line[0], "handler.py", *command[len(line) :]]
            settings = describe_settings(folder, shown, environment)
            yield PeerServer("mosec", f"http://127.0.0.1:{port}", DIALECT, "", tree, fixed=True, settings=settings)
