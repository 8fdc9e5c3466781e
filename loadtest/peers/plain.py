"""Starts the plain two-process peer: see `plain_worker` and `plain_front`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from loadtest.observe.processes import end_processes, find_free_port, is_reachable, wait_until
from loadtest.peers.environments import HERE
from loadtest.peers.graphs import export_graph

FRONT = ["uvicorn", "--no-access-log", "--log-level", "warning", "loadtest.peers.plain_front:app"]


@contextmanager
def serve_plain(
    folder: Path,
    network: torch.nn.Module,
    count: int,
    engine: str = "onnxruntime",
    python: str = sys.executable,
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Run the plain path with `count` sessions of a network of x [1, 8, 168]; yields its address and processes.

    `engine`: what runs the network, see `plain_worker`; `python`: of the environment that has it.
    """
    graph = export_graph(network, folder / f"{engine}.onnx")
    path, port = str(folder / f"{engine}.sock"), find_free_port()
    environment = {**os.environ, "PLAIN_SOCKET": path, "OMP_NUM_THREADS": "1"}
    worker = [python, "-P", str(HERE / "plain_worker.py"), str(graph), str(count), path, engine]
    front = [sys.executable, "-P", "-m", *FRONT, "--port", str(port)]
    processes = [subprocess.Popen(worker, env=environment)]
    with end_processes(processes):
        wait_until(lambda: Path(path).exists() or processes[0].poll() is not None)
        if processes[0].poll() is not None:
            raise RuntimeError(f"the plain worker with {engine} ended with code {processes[0].returncode}")
        processes.append(subprocess.Popen(front, env=environment))
        wait_until(lambda: is_reachable(port))
        yield f"http://127.0.0.1:{port}", (processes[0].pid, processes[1].pid)
