"""How the workers share the machine: a device, cores, threads and memory for each. No torch here."""

from collections.abc import Sequence

from server.contract import CACHE_SHARE
from server.host import Host, WorkerPlan
from server.settings import Settings

HOST_TIER_SHARE = 0.1  #: of the memory, for the host tier in front of GPUs
HOST_TIER_BYTES = 4096 * 1024 * 1024  #: the most that the host tier has unless a setting says otherwise


def plan_workers(settings: Settings, host: Host) -> list[WorkerPlan]:
    """A plan for each worker, in order of index.

    Where archives' code runs, no process keeps to cores of its own: the children run on all cores, so that a worker
    which may not leave its core waits behind them while another core is idle. Its threads are its share all the same.
    Raises ValueError when CUDA is demanded or needed and absent, or a worker's memory is less than a slab.
    """
    cuda = _uses_cuda(settings, host)
    default = len(host.gpus) * settings.workers_per_device if cuda else max(1, len(host.cores) - 1)
    count = settings.workers or default
    budget = _compute_budget(settings, host, count, cuda=cuda)
    shares = share_cores(host.cores, count)
    gpus = [host.gpus[i % len(host.gpus)] if cuda else "" for i in range(count)]
    return [
        WorkerPlan(
            index=i,
            device=f"cuda:{gpus[i]}" if cuda else "cpu",
            cores=host.cores if settings.allow_code else shares[i],
            threads=settings.threads or len(shares[i]),
            budget_bytes=budget,
            host_bytes=_share_host_tier(settings, host, count, cuda=cuda),
            sharers=gpus.count(gpus[i]),
        )
        for i in range(count)
    ]


def _uses_cuda(settings: Settings, host: Host) -> bool:
    if settings.device == "cuda" and not host.gpus:
        raise ValueError(
            "device is cuda, but no GPU is visible here (/dev/nvidia* that this user may open, CUDA_VISIBLE_DEVICES): "
            "install the NVIDIA driver, start the container with --gpus, or serve with --device cpu"
        )
    cuda = bool(host.gpus) and settings.device != "cpu"
    if settings.precision != "float32" and not cuda:
        raise ValueError(f"precision is {settings.precision}, but models run on the CPU, in float32: leave it out")
    return cuda


def _compute_budget(settings: Settings, host: Host, count: int, *, cuda: bool) -> int:
    """Bytes of a worker's cache. 0 when the workers measure their GPU: this process has no torch."""
    if cuda and not settings.model_cache_bytes:
        return 0
    total = int(settings.model_cache_bytes) or int(host.memory_bytes * CACHE_SHARE)
    budget = total // count
    if budget < settings.slab_bytes:
        raise ValueError(
            f"model_cache_bytes {total} divided among {count} workers is {budget} bytes each, less than one slab of "
            f"{int(settings.slab_bytes)} (slab_bytes)"
        )
    return budget


def _share_host_tier(settings: Settings, host: Host, count: int, *, cuda: bool) -> int:
    """Bytes of a worker's part of the host memory tier.

    Beside a GPU it is page-locked, which torch rounds up to a power of two: so that all workers together take no more
    than they were given, a part is rounded down to one.
    """
    if settings.host_cache_bytes is not None:
        total = int(settings.host_cache_bytes)
    else:
        total = default_host_tier(host.memory_bytes) if cuda else 0
    share = total // count
    return 1 << share.bit_length() - 1 if cuda and share else share


def default_host_tier(memory_bytes: int) -> int:
    """Bytes of the host memory tier in front of GPUs, where no setting says otherwise."""
    return min(HOST_TIER_BYTES, int(memory_bytes * HOST_TIER_SHARE))


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
