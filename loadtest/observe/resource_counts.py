"""Counts the resources of a running server from outside: memory, descriptors, threads, CPU time, files, series."""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loadtest.observe.local_server import LocalServer
from loadtest.observe.processes import read_pss
from server.contract import METRICS_PATH

PLACES = ("blobs", "index", "locks", "temp")  #: folders of the disk cache
SAME_S, PATIENCE_S = 0.2, 4.0  #: seconds without change until counts are at rest, and longest wait for that
_OF_A_PROCESS = 2  #: kernel: CPUCLOCK_SCHED


@dataclass(frozen=True, slots=True)
class ResourceCounts:
    """Counts that must not grow: descriptors and threads by process, files by place, series of /metrics by kind."""

    descriptors: Mapping[str, int]
    threads: Mapping[str, int]
    files: Mapping[str, int]
    series: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Census:
    """The counts at rest, the memory (PSS, bytes) and CPU time (s) by process, and the resident models."""

    counts: ResourceCounts
    memory: Mapping[str, int]
    cpu_s: Mapping[str, float]
    resident: int

    def numbers(self) -> Iterator[tuple[str, float]]:
        """Return every count by its own name."""
        for what in ("descriptors", "threads"):
            yield from ((f"{what} of {name}", n) for name, n in getattr(self.counts, what).items())
        yield from ((f"files in {place}", n) for place, n in self.counts.files.items())
        yield from ((f"series {kind}", n) for kind, n in self.counts.series.items())


def take_census(server: LocalServer, disk: Path, temp: Path) -> Census:
    """Count when the counts are at rest. `disk` is the disk cache of the server, `temp` its TMPDIR.

    Raises RuntimeError or an error of urllib3 if the server does not answer, OSError if one of its processes is gone.
    """
    pids = list_pids(server)
    counts, since = _count_resources(server, pids, disk, temp), time.monotonic()
    start = since
    while time.monotonic() - since < SAME_S and time.monotonic() - start < PATIENCE_S:
        time.sleep(SAME_S / 3)
        again = _count_resources(server, pids, disk, temp)
        if again != counts:
            counts, since = again, time.monotonic()
    memory = {name: read_pss(pid) for name, pid in pids.items()}
    resident = server.loaded_models()
    return Census(counts, memory, {name: read_cpu_seconds(pid) for name, pid in pids.items()}, resident)


def list_pids(server: LocalServer) -> dict[str, int]:
    """Return name (`worker 0`, `front 0`, ..., `supervisor`) -> pid."""
    found = {f"{each['kind']} {each['index']}": int(each["pid"]) for each in server.processes()}
    return {**found, "supervisor": server.process.pid}


def read_cpu_seconds(pid: int) -> float:
    """Read the CPU time of a process, to the nanosecond, by the clock of clock_getcpuclockid(3), which Python lacks."""
    return time.clock_gettime(~pid << 3 | _OF_A_PROCESS)


def _count_resources(server: LocalServer, pids: Mapping[str, int], disk: Path, temp: Path) -> ResourceCounts:
    places = {f"disk cache/{name}": disk / name for name in PLACES} | {"TMPDIR": temp}
    lines = server.get(f"{server.metrics}{METRICS_PATH}").data.decode().splitlines()
    series = [line for line in lines if not line.startswith("#")]
    by_model = sum('model="' in line for line in series)
    return ResourceCounts(
        descriptors={name: _count_entries(f"/proc/{pid}/fd") for name, pid in pids.items()},
        threads={name: _count_entries(f"/proc/{pid}/task") for name, pid in pids.items()},
        files={name: sum(len(files) for _, _, files in os.walk(place)) for name, place in places.items()},
        series={"of models": by_model, "of all else": len(series) - by_model},
    )


def _count_entries(folder: str) -> int:
    return sum(1 for _ in Path(folder).iterdir())
