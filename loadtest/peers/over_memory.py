"""Measures what servers do when models exceed memory. Every trial is bounded in bytes and in models.

TorchServe and Multi Model Server have neither a limit nor eviction: they get models until their processes hold a stated
budget more. MLServer is one process, whose data segment is limited (prlimit) a little above what it holds. Ray Serve
and Fleetcast evict: they get room for about half of the models, which are then requested in turn.
"""

import re
import resource
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtest.observe.local_server import run_local_server
from loadtest.peers.peer_server import PeerServer
from loadtest.peers.servers import start_ray, wrap_server

MB = 1e6
SCANS = 3
HEADROOM = 4 * 2**20  #: bytes that the data segment of MLServer may grow
ROOM = "8MiB"  #: two slabs of Fleetcast
TROUBLE = (RuntimeError, OSError)


@dataclass(frozen=True, slots=True)
class Growth:
    """The memory in MB of additional models; `refused` is the error for the next one."""

    models: int
    mb: float
    refused: str = ""

    def __str__(self) -> str:
        said = f"then refused: {self.refused}" if self.refused else "nothing was refused or evicted"
        return f"{self.models} more models took {self.mb:.0f} MB more; {said}"


def grow_past_memory(server: PeerServer, names: Sequence[str], body: bytes, budget_mb: float) -> Growth:
    """Load models until all are loaded, the processes hold `budget_mb` more, or one is refused."""
    before, grown = server.tree.memory() / MB, 0.0
    for done, name in enumerate(names):
        if grown > budget_mb:
            return Growth(done, grown)
        try:
            server.load(name, body)
        except TROUBLE as error:
            return Growth(done, grown, str(error))
        grown = server.tree.memory() / MB - before
    return Growth(len(names), grown)


def measure_limited(server: PeerServer, loaded: Sequence[str], names: Sequence[str], body: bytes) -> str:
    """Measure MLServer with HEADROOM: the models that it loads, its error, and which loaded models still answer."""
    (pid,) = server.tree.pids()
    data = int(re.findall(r"^VmData:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[0]) * 1024
    resource.prlimit(pid, resource.RLIMIT_DATA, (data + HEADROOM, data + HEADROOM))
    growth = grow_past_memory(server, names, body, float("inf"))
    answered = 0
    for name in loaded:
        try:
            server.ask(name, body)
        except TROUBLE:
            continue
        answered += 1
    after = f"{answered} of the {len(loaded)} loaded ones still answer" if server.tree.pids() else "the server died"
    return f"with {HEADROOM >> 20} MiB left: {growth}; {after}"


def scan_models(server: PeerServer, names: Sequence[str], body: bytes) -> str:
    """Request all models in turn, SCANS times, and measure results, times and memory."""
    took, failed = [], 0
    server.ask(names[0], body)
    before = server.tree.memory() / MB
    for name in [*names] * SCANS:
        begin = time.perf_counter()
        try:
            server.ask(name, body)
        except TROUBLE:
            failed += 1
        took.append((time.perf_counter() - begin) * 1e3)
    grown = server.tree.memory() / MB - before
    times = f"median {statistics.median(took):.1f} ms, worst {max(took):.0f} ms"
    return f"asked in turn {SCANS} times, {failed} of {len(took)} failed, {times}, {grown:+.1f} MB"


def measure_ours(store: Path, names: Sequence[str], body: bytes) -> str:
    """Measure Fleetcast with ROOM for resident models."""
    with run_local_server(str(store), ["--workers", "1", "--model-cache-bytes", ROOM]) as local:
        told = scan_models(wrap_server("fleetcast", local), names, body)
        resident = local.loaded_models()
    return f"room for {resident:.0f} of {len(names)} ({ROOM}), evicts: {told}"


def measure_ray(models: Path, names: Sequence[str], body: bytes) -> str:
    """Measure Ray Serve with room for half of the models in its replica."""
    room = len(names) // 2
    with start_ray(models, lambda _: None, room) as server:
        return (
            f"room for {room} of {len(names)} (max_num_models_per_replica), evicts: {scan_models(server, names, body)}"
        )
