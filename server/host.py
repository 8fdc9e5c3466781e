"""What this machine gives a server: cores and memory within the limits of its cgroups, GPUs, open files. No torch.

Limits are those of the process's own cgroup and of each of its parents that can be seen from here, in cgroup v2, v1
and where both are mounted: containers, nested containers, systemd services and slices. The least one holds.
"""

import os
import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

V2 = ""  #: the name of the v2 hierarchy where v1 has a controller's
#: Where hierarchies are mounted if /proc/self/mountinfo does not say.
USUAL_MOUNTS = {V2: "sys/fs/cgroup", "memory": "sys/fs/cgroup/memory", "cpu": "sys/fs/cgroup/cpu"}


@dataclass(frozen=True, slots=True)
class Host:
    """The cores this process may use, memory in bytes (cgroup limits known), and CUDA's names of the GPUs."""

    cores: tuple[int, ...]
    memory_bytes: int
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker's share: device, cores, threads, cache budget in bytes.

    The device is `cpu`, or `cuda:` and what CUDA_VISIBLE_DEVICES names the GPU: `cuda:0`, `cuda:MIG-41b3`.
    A budget of 0: the worker takes its part of what its GPU has, of which there are `sharers`. `host_bytes` are for the
    host memory tier.
    """

    index: int
    device: str
    cores: tuple[int, ...]
    threads: int
    budget_bytes: int
    host_bytes: int = 0
    sharers: int = 1


def read_host(root: Path = Path("/")) -> Host:
    """The machine as it is now. `root` is for tests."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    folders = [*_cgroup_folders(root)]
    quotas = [quota for hierarchy, folder in folders if (quota := _cpu_quota(hierarchy, folder))]
    limits = [limit for hierarchy, folder in folders for limit in _memory_limits(hierarchy, folder)]
    return Host(cores[: min(quotas, default=None)], min([_memory_total(root), *limits]), _list_gpus(root))


def raise_open_files_limit() -> None:
    """Let this process and its future children open as many files as the hard limit allows: a client needs one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # refused, as a sandbox may: the present limit stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# --- cgroups --------------------------------------------------------------------------------------------------------


class _Mount(NamedTuple):
    """Where a part of a hierarchy can be seen: `top`, a cgroup's path, is mounted at `point`."""

    hierarchy: str
    top: str
    point: str


def _cgroup_folders(root: Path) -> Iterator[tuple[str, Path]]:
    """The hierarchy's name and folder of the process's cgroup and its parents, of every hierarchy with limits."""
    own = dict(_own_cgroups(root))
    mounts = list(_cgroup_mounts(root)) or [_Mount(name, "/", point) for name, point in USUAL_MOUNTS.items()]
    for hierarchy, top, point in mounts:
        mounted = root / point.lstrip("/")
        below = _path_below(top, own.get(hierarchy, "/"))
        for path in (below, *below.parents):
            yield hierarchy, mounted / path


def _path_below(top: str, path: str) -> PurePosixPath:
    """A cgroup's path relative to the mounted one.

    Empty when it is not below that: the mount of another cgroup namespace. What a container has mounted is then its
    own cgroup or a parent of it.
    """
    cgroup = PurePosixPath(path)
    if ".." in cgroup.parts or not cgroup.is_relative_to(top):
        return PurePosixPath()
    return cgroup.relative_to(top)


def _own_cgroups(root: Path) -> Iterator[tuple[str, str]]:
    """Hierarchy and path of this process's cgroups: lines as `4:cpu,cpuacct:/a/b` (v1) and `0::/a/b` (v2)."""
    for line in _read_lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            yield name, path


def _cgroup_mounts(root: Path) -> Iterator[_Mount]:
    """The mounted hierarchies that have limits of memory or CPU (proc_pid_mountinfo(5))."""
    for line in _read_lines(root / "proc/self/mountinfo"):
        fields, _, rest = line.partition(" - ")
        top, point = map(_unescape_octal, fields.split()[3:5])
        kind, _, options = rest.split(maxsplit=2)
        if kind == "cgroup2":
            yield _Mount(V2, top, point)
        elif kind == "cgroup":
            for name in {"memory", "cpu"}.intersection(options.split(",")):
                yield _Mount(name, top, point)


def _unescape_octal(text: str) -> str:
    r"""Blanks and backslashes stand in mountinfo as `\040` and the like."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _memory_limits(hierarchy: str, folder: Path) -> Iterator[int]:
    """Limits in bytes that one cgroup has, without those that say there is none.

    `memory.high` counts: above it the kernel slows a process down until it hardly moves. v1's `memory.stat` knows the
    limits of parents that are not mounted here too.
    """
    if hierarchy == V2:
        names = ["memory.max", "memory.high"]
    elif hierarchy == "memory":
        names = ["memory.limit_in_bytes"]
        for line in _read_lines(folder / "memory.stat"):
            if line.startswith("hierarchical_memory_limit "):
                yield int(line.split()[1])
    else:
        return
    for name in names:
        if limit := _read_number(folder / name):
            yield limit


def _cpu_quota(hierarchy: str, folder: Path) -> int | None:
    """How many cores' time one cgroup has, rounded up. None where there is no limit."""
    if hierarchy == V2:
        quota, _, period = _first_line(folder / "cpu.max").partition(" ")
    elif hierarchy == "cpu":
        quota, period = _first_line(folder / "cpu.cfs_quota_us"), _first_line(folder / "cpu.cfs_period_us")
    else:
        return None
    if not quota.isdecimal() or not period.isdecimal():  # no such file, "max", or v1's -1
        return None
    return max(1, -(-int(quota) // int(period)))


# --- files ----------------------------------------------------------------------------------------------------------


def _memory_total(root: Path) -> int:
    meminfo = (root / "proc/meminfo").read_text().split()
    return int(meminfo[meminfo.index("MemTotal:") + 1]) * 1024


def _read_lines(path: Path) -> list[str]:
    """A file's lines; none where it cannot be read."""
    try:
        return path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _first_line(path: Path) -> str:
    return next(iter(_read_lines(path)), "")


def _read_number(path: Path) -> int | None:
    text = _first_line(path)
    return int(text) if text.isdecimal() else None  # else absent, or "max"


def _list_gpus(root: Path) -> tuple[str, ...]:
    """What CUDA_VISIBLE_DEVICES may have to show one GPU each.

    Its names (numbers, UUIDs, MIG instances) where it is set. Else ordinals: CUDA numbers the GPUs that it may open
    from 0, whatever the numbers of their device nodes. A container that was given /dev/nvidia5 alone has GPU 0.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = (gpu.strip() for gpu in visible.split(","))
        return tuple(takewhile(lambda gpu: gpu not in ("", "-1"), names))  # as CUDA reads it: the rest is hidden
    nodes = [each for each in (root / "dev").glob("nvidia[0-9]*") if each.name[6:].isdecimal()]
    return tuple(str(i) for i in range(sum(os.access(each, os.R_OK | os.W_OK) for each in nodes)))
