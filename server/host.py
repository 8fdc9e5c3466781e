"""What this machine gives: memory and cores within cgroup limits, GPUs, and how workers share them. No torch here."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from server.contract import CACHE_SHARE
from server.settings import Settings

HOST_TIER_SHARE = 0.1
MIB = 1024 * 1024
HOST_TIER_BYTES = 4096 * MIB


@dataclass(frozen=True, slots=True)
class Host:
    """The cores this process may use, memory in bytes (cgroup limits known), and GPU indices."""

    cores: tuple[int, ...]
    memory_bytes: int
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """One worker's share: device (`cpu` or `cuda:N` as the operator sees it), cores, threads, cache budget in bytes.

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
    return Host(cores[: _cpu_quota(root, len(cores))], _memory(root), _gpus(root))


def plan_workers(settings: Settings, host: Host) -> list[WorkerPlan]:
    """Who runs where. Raises ValueError when CUDA is demanded or needed and absent, or a share is less than a slab."""
    if settings.device == "cuda" and not host.gpus:
        raise ValueError("device is cuda, but no GPU is visible here (/dev/nvidia*, CUDA_VISIBLE_DEVICES)")
    cuda = bool(host.gpus) and settings.device != "cpu"
    default = len(host.gpus) * settings.workers_per_device if cuda else max(1, len(host.cores) - 1)
    count = settings.workers or default
    if settings.precision != "float32" and not cuda:
        raise ValueError(f"precision is {settings.precision}, but models run on the CPU, in float32: leave it out")
    measured = cuda and not settings.model_cache_bytes  # by the workers: this process has no torch
    total = int(settings.model_cache_bytes) or int(host.memory_bytes * CACHE_SHARE)
    budget = 0 if measured else total // count
    if budget < settings.slab_bytes and not measured:
        raise ValueError(
            f"model_cache_bytes {total} divided among {count} workers is {budget} bytes each, less than one slab of "
            f"{int(settings.slab_bytes)} (slab_bytes)"
        )
    shares = share_cores(host.cores, count)
    gpus = [host.gpus[i % len(host.gpus)] if cuda else "" for i in range(count)]
    return [
        WorkerPlan(
            index=i,
            device=f"cuda:{gpus[i]}" if cuda else "cpu",
            cores=shares[i],
            threads=settings.threads or len(shares[i]),
            budget_bytes=budget,
            host_bytes=_host_tier(settings, host, cuda) // count,
            sharers=gpus.count(gpus[i]),
        )
        for i in range(count)
    ]


def _host_tier(settings: Settings, host: Host, cuda: bool) -> int:
    """Bytes of the host memory tier, all workers together."""
    if settings.host_cache_bytes is not None:
        return int(settings.host_cache_bytes)
    return min(HOST_TIER_BYTES, int(host.memory_bytes * HOST_TIER_SHARE)) if cuda else 0


def share_cores(cores: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Cores per worker: all but the first (the fronts') dealt out evenly; with too few, workers take turns on all."""
    own = cores[1:] if len(cores) > count else cores
    if len(own) < count:
        return [(own[i % len(own)],) for i in range(count)]
    size = len(own) // count
    return [tuple(own[i * size : (i + 1) * size]) for i in range(count)]


def front_cores(cores: Sequence[int], plans: Sequence[WorkerPlan]) -> tuple[int, ...]:
    """What the workers leave to the fronts; all cores when they leave nothing."""
    taken = {core for plan in plans for core in plan.cores}
    return tuple(core for core in cores if core not in taken) or tuple(cores)


def _memory(root: Path) -> int:
    limits = [
        _number(root / name) for name in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")
    ]
    meminfo = (root / "proc/meminfo").read_text().split()
    total = int(meminfo[meminfo.index("MemTotal:") + 1]) * 1024
    return min([total, *(limit for limit in limits if limit)])


def _cpu_quota(root: Path, cores: int) -> int:
    try:
        quota, period = (root / "sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, -(-int(quota) // int(period))))
    except (OSError, ValueError):  # no cgroup v2, or "max"
        return cores


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _gpus(root: Path) -> tuple[str, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = (gpu.strip() for gpu in visible.split(","))
        return tuple(takewhile(lambda gpu: gpu not in ("", "-1"), names))  # as CUDA reads it: the rest is hidden
    return tuple(str(i) for i in sorted(int(p.name[6:]) for p in (root / "dev").glob("nvidia[0-9]*")))
