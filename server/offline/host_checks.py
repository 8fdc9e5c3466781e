"""Checks of this machine for `fleetcast doctor`: facts that matter to a server, and advice where they are insufficient.

Each check is a function of values that `check_machine` reads. Torch only reports its build, threads and devices.
"""

import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from handlers.codecs.quick_numbers import IS_COMPILED
from server.host import Host, WorkerPlan
from server.settings import MIB, Settings, format_bytes
from server.supervisor.worker_plan import plan_workers

WORKER_BYTES = 250 * MIB  #: bytes of a worker before its first model: Python, torch, staging (215 MB measured)
FRONT_BYTES = 100 * MIB  #: bytes of a front or the supervisor
FILES = 4096  #: descriptors; a front has one for each connection, and a lower hard limit leads to advice
ENOUGH_FILES = 65536
SLOW_CPUS = ("DEFAULT", "NO AVX")  #: torch's name for a CPU without AVX2


@dataclass(frozen=True, slots=True)
class HostFact:
    """A fact about the machine. `advice` says what is wrong and what to do; empty if nothing is wrong."""

    name: str
    text: str
    advice: str = ""


def check_machine(settings: Settings, host: Host) -> Iterator[HostFact]:
    """Run every check that needs no store."""
    yield check_cores(host, os.cpu_count() or 1, os.getloadavg()[0])
    yield check_number_reader(compiled=IS_COMPILED)
    yield check_torch_build(torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
    yield check_accelerator(host, torch.version.cuda, torch.cuda.device_count())
    try:
        plans = plan_workers(settings, host)
    except ValueError as error:
        yield HostFact("workers", "none can be planned", str(error))
    else:
        yield check_workers(plans)
        yield check_memory(host, plans, settings.fronts)
    yield check_disk_cache(settings.disk_cache, int(settings.disk_cache_bytes))
    yield check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))


def check_cores(host: Host, physical: int, load: float) -> HostFact:
    """Check the number of cores and the `load` of the last minute."""
    count, advice = len(host.cores), ""
    if count == 1:
        advice = "fronts and worker share one core: give the server two or more for its full speed"
    elif load > count / 2:
        advice = "the machine is busy, so times below are too long: run this again when it is quiet"
    return HostFact("cores", f"{count} of {physical} for this process (affinity and cgroup), load {load:.1f}", advice)


def check_number_reader(*, compiled: bool) -> HostFact:
    """Whether tensors in JSON are read by the compiled reader."""
    if compiled:
        return HostFact("numbers", "JSON tensors are read by the compiled reader")
    advice = (
        "they take twice the time to read: install a C compiler (apt-get install gcc libc6-dev), then Fleetcast again"
    )
    return HostFact("numbers", "JSON tensors are read by simdjson: nothing compiled the reader of Fleetcast", advice)


def check_torch_build(version: str, capability: str, threads: int) -> HostFact:
    """`capability`: the CPU instructions that torch uses here; `threads`: of a process that sets none."""
    advice = ""
    if capability in SLOW_CPUS:
        advice = "products run without AVX2, several times slower: choose a CPU, or a CPU model of the VM, that has it"
    text = f"{version}, {capability}, {threads} threads by default; a worker sets its own"
    return HostFact("torch", text, advice)


def check_accelerator(host: Host, cuda: str | None, devices: int) -> HostFact:
    """`cuda`: what torch was built for; `devices`: how many it can use."""
    if not host.gpus and not devices:
        return HostFact("accelerator", "none: models run on the CPU")
    text = f"{len(host.gpus)} GPUs are here, torch can use {devices}"
    if cuda is None:
        return HostFact(
            "accelerator", text, "torch is a build for the CPU: install one for CUDA, or serve with --device cpu"
        )
    if devices < len(host.gpus):
        advice = f"is the driver there, and new enough for CUDA {cuda} (CUDA 13 needs 580)? See nvidia-smi"
        return HostFact("accelerator", text, advice)
    return HostFact("accelerator", text + "; paths below are the CPU's, `fleetcast-load bench gpu` measures a GPU")


def check_workers(plans: Sequence[WorkerPlan]) -> HostFact:
    """Check the workers as `serve` would start them."""
    first = plans[0]
    room = format_bytes(first.budget_bytes) if first.budget_bytes else "their part of the GPU"
    each = "1 thread" if first.threads == 1 else f"{first.threads} threads"
    return HostFact("workers", f"{len(plans)} on {first.device.partition(':')[0]}, each {each} and {room} for models")


def check_memory(host: Host, plans: Sequence[WorkerPlan], fronts: int) -> HostFact:
    """Check whether models and processes fit in memory together."""
    models = sum(plan.budget_bytes + plan.host_bytes for plan in plans)
    processes = len(plans) * WORKER_BYTES + (fronts + 1) * FRONT_BYTES
    text = f"{format_bytes(host.memory_bytes)} within the cgroup's limit: {format_bytes(models)} for models"
    if models + processes <= host.memory_bytes:
        return HostFact("memory", text)
    left = host.memory_bytes - processes
    much = f"set --model-cache-bytes {left // MIB}MiB or less" if left > 0 else "give it more memory or fewer --workers"
    return HostFact("memory", text, f"{len(plans)} workers need {format_bytes(processes)} beside the models: {much}")


def check_disk_cache(folder: Path, limit: int) -> HostFact:
    """The folder or, where it is not made yet, the place where it would be."""
    if not limit:
        return HostFact("disk cache", "off", "each restart fetches every archive anew: set --disk-cache-bytes")
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    held = sum(file.stat().st_size for file in folder.glob("blobs/*"))
    text = f"{folder}: {format_bytes(held)} held, at most {format_bytes(limit)}, {format_bytes(free)} free on the disk"
    if not os.access(place, os.W_OK):
        return HostFact("disk cache", text, f"{place} cannot be written: choose another folder with --disk-cache")
    if held + free < limit:
        most = f"{(held + free) // MIB}MiB"
        advice = f"the disk is full before the cache is: set --disk-cache-bytes below {most}, or --disk-cache elsewhere"
        return HostFact("disk cache", text, advice)
    return HostFact("disk cache", text)


def check_open_files(soft: int, hard: int) -> HostFact:
    """The limits of descriptors of this process, as those of `serve` would be in its place: a client needs one."""
    shown = [("none" if limit == resource.RLIM_INFINITY else str(limit)) for limit in (soft, hard)]
    text = f"soft limit {shown[0]}, hard limit {shown[1]}: serve raises the soft limit to the hard one"
    if hard == resource.RLIM_INFINITY or hard >= FILES:
        return HostFact("open files", text)
    advice = (
        f"a front needs one for each connection: raise the hard limit to {ENOUGH_FILES} "
        f"(systemd: LimitNOFILE={ENOUGH_FILES}, docker run --ulimit nofile={ENOUGH_FILES}, /etc/security/limits.conf)"
    )
    return HostFact("open files", text, advice)
