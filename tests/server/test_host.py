"""The resources of made-up machines: root folders with the files that a kernel would show."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from server.host import read_host
from server.settings import Settings
from server.supervisor.children import Child, child_environment
from server.supervisor.worker_plan import plan_workers

GIB = 1024**3
CORES = 16
V2 = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "36 31 0:33 {top} /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
)
UNIFIED = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
NO_LIMIT_V1 = "9223372036854771712\n"

Files = Mapping[str, str]


@pytest.fixture(autouse=True)
def _sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(CORES)))


def make_root(root: Path, files: Files) -> Path:
    """A root folder with 8 GiB of memory and these files (path -> text)."""
    for path, text in {"proc/meminfo": "MemTotal:  8388608 kB\nMemFree: 1 kB\n", **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def on_v2(cgroup: str, limits: Files, top: str = "/") -> Files:
    """A v2 machine with the process in this cgroup; `top` is what is mounted, and limits are below that."""
    files = {"proc/self/mountinfo": V2.format(top=top), "proc/self/cgroup": f"0::{cgroup}\n"}
    return files | {f"sys/fs/cgroup/{name}": text for name, text in limits.items()}


def on_v1(cgroup: str, limits: Files, top: str = "/", more_mounts: str = "") -> Files:
    """The same on a v1 machine."""
    own = "".join(f"{i}:{name}:{cgroup}\n" for i, name in enumerate(("memory", "pids", "cpu,cpuacct", "name=systemd")))
    files = {"proc/self/mountinfo": V1.format(top=top) + more_mounts, "proc/self/cgroup": f"{own}0::/\n"}
    return files | {f"sys/fs/cgroup/{name}": text for name, text in limits.items()}


SERVICE = "system.slice/fleetcast.service"
POD = "kubepods/pod1/c1"
MACHINES: dict[str, tuple[Files, float, int]] = {
    # name: (files, GiB of memory, cores)
    "no cgroups at all": ({}, 8, 16),
    "a service": (
        on_v2(f"/{SERVICE}", {f"{SERVICE}/memory.max": f"{4 * GIB}\n", f"{SERVICE}/cpu.max": "200000 100000\n"}),
        4,
        2,
    ),
    "a slice above the service is tighter": (
        on_v2(
            f"/{SERVICE}",
            {
                f"{SERVICE}/memory.max": f"{4 * GIB}\n",
                f"{SERVICE}/cpu.max": "max 100000\n",
                "system.slice/memory.max": f"{3 * GIB}\n",
                "system.slice/cpu.max": "300000 100000\n",
            },
        ),
        3,
        3,
    ),
    "another service's limit is not ours": (
        on_v2(f"/{SERVICE}", {"system.slice/other.service/memory.max": "1\n", "memory.max": "max\n"}),
        8,
        16,
    ),
    "memory.high slows down before memory.max kills": (
        on_v2("/a", {"a/memory.max": f"{4 * GIB}\n", "a/memory.high": f"{2 * GIB}\n"}),
        2,
        16,
    ),
    "no limit in words": (on_v2("/a", {"a/memory.max": "max\n", "a/cpu.max": "max 100000\n"}), 8, 16),
    "limits above what the machine has": (
        on_v2("/a", {"a/memory.max": f"{64 * GIB}\n", "a/cpu.max": "9900000 100000\n"}),
        8,
        16,
    ),
    "parts of a core are rounded up": (on_v2("/a", {"a/cpu.max": "150000 100000\n"}), 8, 2),
    "less than a core is one": (on_v2("/a", {"a/cpu.max": "5000 100000\n"}), 8, 1),
    "a file of nothing": (on_v2("/a", {"a/cpu.max": "", "a/memory.max": ""}), 8, 16),
    "a container with a namespace of its own": (
        on_v2("/", {"memory.max": f"{2 * GIB}\n", "cpu.max": "100000 100000\n"}),
        2,
        1,
    ),
    "a container that sees the machine's paths": (
        on_v2(f"/{POD}", {"memory.max": f"{2 * GIB}\n"}, top=f"/{POD}"),
        2,
        16,
    ),
    "a cgroup within such a container": (
        on_v2(f"/{POD}/in", {"memory.max": f"{2 * GIB}\n", "in/memory.max": f"{GIB}\n"}, top=f"/{POD}"),
        1,
        16,
    ),
    "a mount from outside of the namespace": (
        on_v2("/", {"memory.max": f"{2 * GIB}\n"}, top="/.."),
        2,
        16,
    ),
    "a process that was moved out of its namespace": (
        on_v2("/../else", {"memory.max": f"{2 * GIB}\n"}),
        2,
        16,
    ),
    "a name with a blank and a colon": (
        {
            "proc/self/mountinfo": "30 23 0:26 / /my\\040groups rw - cgroup2 cgroup2 rw\n",
            "proc/self/cgroup": "0::/a:b c\n",
            "my groups/a:b c/memory.max": f"{GIB}\n",
        },
        1,
        16,
    ),
    "v1": (
        on_v1(
            f"/{SERVICE}",
            {
                f"memory/{SERVICE}/memory.limit_in_bytes": f"{3 * GIB}\n",
                f"cpu,cpuacct/{SERVICE}/cpu.cfs_quota_us": "250000\n",
                f"cpu,cpuacct/{SERVICE}/cpu.cfs_period_us": "100000\n",
            },
        ),
        3,
        3,
    ),
    "v1, a parent is tighter": (
        on_v1(
            f"/{SERVICE}",
            {
                f"memory/{SERVICE}/memory.limit_in_bytes": NO_LIMIT_V1,
                "memory/system.slice/memory.limit_in_bytes": f"{2 * GIB}\n",
                f"cpu,cpuacct/{SERVICE}/cpu.cfs_quota_us": "-1\n",
                f"cpu,cpuacct/{SERVICE}/cpu.cfs_period_us": "100000\n",
                "cpu,cpuacct/system.slice/cpu.cfs_quota_us": "400000\n",
                "cpu,cpuacct/system.slice/cpu.cfs_period_us": "100000\n",
            },
        ),
        2,
        4,
    ),
    "v1, a parent that is not mounted": (
        on_v1(
            f"/{POD}",
            {
                "memory/memory.limit_in_bytes": f"{3 * GIB}\n",
                "memory/memory.stat": f"cache 1\nhierarchical_memory_limit {2 * GIB}\nrss 7\n",
            },
            top=f"/{POD}",
        ),
        2,
        16,
    ),
    "v1 without limits": (on_v1("/a", {"memory/a/memory.limit_in_bytes": NO_LIMIT_V1}), 8, 16),
    "both: v1's memory, v2 for systemd": (
        on_v1("/a", {"memory/a/memory.limit_in_bytes": f"{GIB}\n"}, more_mounts=UNIFIED),
        1,
        16,
    ),
    "both: v2's memory, v1 for others": (
        {
            "proc/self/mountinfo": "36 31 0:33 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n" + UNIFIED,
            "proc/self/cgroup": "8:pids:/b\n0::/a\n",
            "sys/fs/cgroup/unified/a/memory.max": f"{GIB}\n",
            "sys/fs/cgroup/unified/a/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/pids/b/memory.max": "1\n",
        },
        1,
        3,
    ),
    "mounts that cannot be read, v2": (
        {
            "proc/self/cgroup": f"0::/{SERVICE}\n",
            f"sys/fs/cgroup/{SERVICE}/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/system.slice/cpu.max": "200000 100000\n",
        },
        4,
        2,
    ),
    "mounts that cannot be read, v1": (
        {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        4,
        1,
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_the_least_limit_of_all_cgroups_holds(tmp_path: Path, name: str) -> None:
    """Memory and cores within the limits of the process's own cgroup and of its parents, v1, v2 and both."""
    files, memory_gib, cores = MACHINES[name]
    host = read_host(make_root(tmp_path, files))
    assert (host.memory_bytes / GIB, len(host.cores)) == (memory_gib, cores)


def test_cores_are_those_of_the_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota takes the first of the cores that the process may run on, whatever their numbers."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {9, 4, 7})
    assert read_host(make_root(tmp_path, on_v2("/", {"cpu.max": "200000 100000\n"}))).cores == (4, 7)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ("0", "1", "2", "3")),
        ("", ()),
        ("-1", ()),
        ("1", ("1",)),
        ("2, 0", ("2", "0")),
        ("1,-1,2", ("1",)),
        ("GPU-5a1b,GPU-77", ("GPU-5a1b", "GPU-77")),
        ("MIG-41b3-9d", ("MIG-41b3-9d",)),
    ],
)
def test_gpus_are_numbered_as_cuda_does_or_named_as_the_operator_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: tuple[str, ...]
) -> None:
    """From 0 without a gap; other nvidia files are no GPUs; CUDA_VISIBLE_DEVICES decides where set, as CUDA does."""
    root = make_root(tmp_path, dict.fromkeys([f"dev/nvidia{i}" for i in ("0", "10", "2", "1", "ctl", "-uvm")], ""))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert read_host(root).gpus == expected


def test_a_container_with_gpu_5_alone_has_gpu_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its only node is /dev/nvidia5, and CUDA in it knows one GPU: number 0, which is what its worker is shown."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    host = read_host(make_root(tmp_path, dict.fromkeys(["dev/nvidia5", "dev/nvidiactl", "dev/nvidia-uvm"], "")))
    (plan,) = plan_workers(Settings.model_validate({"store": "archives"}), host)
    assert plan.device == "cuda:0"
    assert child_environment(Child("worker", 0, plan))["CUDA_VISIBLE_DEVICES"] == "0"


def test_a_mig_instance_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the operator shows by a name that is no number reaches the worker as it is."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-41b3-9d,GPU-77")
    plans = plan_workers(
        Settings.model_validate({"store": "archives"}), read_host(make_root(tmp_path, {"dev/nvidia5": ""}))
    )
    shown = [child_environment(Child("worker", plan.index, plan))["CUDA_VISIBLE_DEVICES"] for plan in plans]
    assert shown == ["MIG-41b3-9d", "GPU-77"]


def test_a_gpu_that_may_not_be_opened_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA numbers what it may open: of two nodes that is one."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    root = make_root(tmp_path, {"dev/nvidia0": "", "dev/nvidia1": ""})
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "nvidia0" and real(path, mode))  # root may
    assert read_host(root).gpus == ("0",)


def test_this_machine_can_be_read() -> None:
    """The real root gives at least a core and some memory."""
    host = read_host()
    assert host.cores
    assert host.memory_bytes > GIB // 16


def test_the_limit_of_open_files_becomes_the_hard_one() -> None:
    """In a process that starts with fewer, and in the children that it starts afterwards."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    script = (
        "import resource, subprocess, sys\n"
        "from server.host import raise_open_files_limit\n"
        "raise_open_files_limit()\n"
        "print(list(resource.getrlimit(resource.RLIMIT_NOFILE)))\n"
        "child = 'import resource; print(list(resource.getrlimit(resource.RLIMIT_NOFILE)))'\n"
        "sys.stdout.flush()\n"
        "subprocess.run([sys.executable, '-c', child], check=True)\n"
    )
    found = subprocess.run(
        ["prlimit", f"--nofile=256:{hard}", sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert [json.loads(line) for line in found.stdout.splitlines()] == [[hard, hard]] * 2
