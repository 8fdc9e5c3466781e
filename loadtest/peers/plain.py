"""Starts the plain two-process peer: see `plain_worker` and `plain_front`."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from loadtest.observe.processes import end_processes, find_free_port, is_reachable, wait_until


@contextmanager
def serve_plain(folder: Path, network: torch.nn.Module, count: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Run the plain path with `count` sessions of a network of x [1, 8, 168]; yields its address and processes."""
    graph = folder / "tcn.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # the old exporter, whose graph ONNX Runtime runs fastest, warns that it is deprecated
        torch.onnx.export(network, (torch.zeros(1, 8, 168),), graph, dynamo=False, input_names=["x"], verbose=False)
    path, port = str(folder / "plain.sock"), find_free_port()
    environment = {**os.environ, "PLAIN_SOCKET": path, "OMP_NUM_THREADS": "1"}
    worker = [sys.executable, "-P", "-m", "loadtest.peers.plain_worker", str(graph), str(count), path]
    front = [sys.executable, "-P", "-m", "uvicorn", "--port", str(port), "--no-access-log", "--log-level", "warning"]
    processes = [subprocess.Popen(worker, env=environment)]
    with end_processes(processes):
        wait_until(lambda: Path(path).exists())
        processes.append(subprocess.Popen([*front, "loadtest.peers.plain_front:app"], env=environment))
        wait_until(lambda: is_reachable(port))
        yield f"http://127.0.0.1:{port}", (processes[0].pid, processes[1].pid)
