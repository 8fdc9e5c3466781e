"""Helpers for child processes: end them, find free ports, wait until a port accepts, read memory."""

import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def end_processes(processes: list["subprocess.Popen[bytes]"], *, gently: bool = False) -> Iterator[None]:
    """End child processes in any case; `gently` sends SIGTERM first, for processes that have children."""
    try:
        yield
    finally:
        for process in processes:
            (process.terminate if gently else process.kill)()
            process.wait()


def find_free_port() -> int:
    """Return a port that no process listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def is_reachable(port: int) -> bool:
    """Return whether the port accepts connections."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], bool], patience_s: float = 60.0) -> None:
    """Poll until the condition holds. Raises RuntimeError if it stays false."""
    until = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError(f"a peer was not ready within {patience_s:g} s")
        time.sleep(0.02)


def read_pss(pid: int) -> int:
    """Read the proportional set size in bytes: private memory and a proportional share of shared memory."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(re.findall(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)[0]) * 1024
