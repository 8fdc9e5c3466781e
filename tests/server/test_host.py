"""What a machine gives and how workers share it, on made-up machines."""

import os
from pathlib import Path

import pytest
from hypothesis import given, strategies

from server.host import Host, WorkerPlan, front_cores, plan_workers, read_host, share_cores
from server.settings import MIB, Settings

GIB = 1024 * MIB
CORES = strategies.lists(strategies.integers(0, 200), min_size=1, max_size=40, unique=True).map(sorted)


@pytest.fixture(autouse=True)
def _cuda_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def machine(root: Path, **files: str) -> Path:
    """A root folder with 8 GiB of memory and these files (path -> text)."""
    files["proc/meminfo"] = "MemTotal:  8388608 kB\nMemFree: 1 kB\n"
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def settings(**values: object) -> Settings:
    """Settings with these values."""
    return Settings.model_validate({"store": "archives", **values})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8 * GIB),
        ({"sys/fs/cgroup/memory.max": f"{2 * GIB}\n"}, 2 * GIB),
        ({"sys/fs/cgroup/memory.max": "max\n"}, 8 * GIB),
        ({"sys/fs/cgroup/memory.max": f"{64 * GIB}\n"}, 8 * GIB),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GIB}\n"}, 3 * GIB),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, 8 * GIB),
    ],
)
def test_memory_is_the_least_of_machine_and_limits(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    """Limits of cgroup v2 and v1: with a limit, without one, and with one above what the machine has."""
    assert read_host(machine(tmp_path, **files)).memory_bytes == expected


@pytest.mark.parametrize(
    ("cpu_max", "expected"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1), ("9900000 100000", 8), ("", 8)],
)
def test_a_cpu_quota_bounds_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_max: str, expected: int
) -> None:
    """Quota over period, rounded up, at least one, at most what affinity allows."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert len(read_host(machine(tmp_path, **{"sys/fs/cgroup/cpu.max": cpu_max})).cores) == expected


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ("0", "1", "2", "10")),
        ("", ()),
        ("-1", ()),
        ("1", ("1",)),
        ("2, 0", ("2", "0")),
        ("1,-1,2", ("1",)),
        ("GPU-5a1b,GPU-77", ("GPU-5a1b", "GPU-77")),
    ],
)
def test_gpus_are_device_files_or_what_the_operator_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: tuple[str, ...]
) -> None:
    """Sorted by number; other nvidia files are no GPUs; CUDA_VISIBLE_DEVICES decides where set, as CUDA reads it."""
    root = machine(tmp_path, **dict.fromkeys([f"dev/nvidia{i}" for i in ("0", "10", "2", "1", "ctl", "-uvm")], ""))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert read_host(root).gpus == expected


def test_this_machine_can_be_read() -> None:
    """The real root gives at least a core and some memory."""
    host = read_host()
    assert host.cores
    assert host.memory_bytes > 64 * MIB


@given(CORES, strategies.integers(1, 50))
def test_shares_are_even_and_apart_where_cores_suffice(cores: list[int], count: int) -> None:
    """Every worker has the same number of cores, all real; no core has two workers unless there are too few; one is
    left to the fronts as soon as there are more cores than workers.
    """
    shares = share_cores(cores, count)
    assert len(shares) == count
    assert len({len(share) for share in shares}) == 1
    dealt = [core for share in shares for core in share]
    assert dealt
    assert set(dealt) <= set(cores)
    if len(cores) >= count:
        assert len(dealt) == len(set(dealt))
    else:
        assert max(map(dealt.count, cores)) - min(map(dealt.count, cores)) <= 1
    if len(cores) > count:
        assert cores[0] not in dealt


@given(CORES, strategies.integers(1, 50))
def test_fronts_get_what_is_left(cores: list[int], count: int) -> None:
    """Never nothing: what no worker has, or all cores."""
    plans = [WorkerPlan(i, "cpu", share, 1, 0) for i, share in enumerate(share_cores(cores, count))]
    left = front_cores(cores, plans)
    assert left
    assert set(left) <= set(cores)
    if len(cores) > count:
        assert not set(left) & {core for plan in plans for core in plan.cores}
    else:
        assert list(left) == cores


def test_cpu_workers_by_default() -> None:
    """One per core but one, 40 % of the memory divided, the first core left to the fronts."""
    plans = plan_workers(settings(), Host((0, 1, 2, 3), 10 * GIB, ()))
    assert [plan.cores for plan in plans] == [(1,), (2,), (3,)]
    assert {(plan.device, plan.threads, plan.budget_bytes) for plan in plans} == {("cpu", 1, 4 * GIB // 3)}
    assert len(plan_workers(settings(), Host((5,), 10 * GIB, ()))) == 1


def test_gpu_workers_by_default() -> None:
    """One per GPU, or as many as asked, dealt out in turn; `device=cpu` leaves GPUs alone."""
    host = Host(tuple(range(9)), 10 * GIB, ("0", "1"))
    assert [plan.device for plan in plan_workers(settings(), host)] == ["cuda:0", "cuda:1"]
    two = plan_workers(settings(workers_per_device=2, device="cuda"), host)
    assert [plan.device for plan in two] == ["cuda:0", "cuda:1"] * 2
    assert [plan.cores for plan in two] == [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert [plan.device for plan in plan_workers(settings(workers=3), host)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert {plan.device for plan in plan_workers(settings(device="cpu"), host)} == {"cpu"}


def test_what_is_asked_for_is_given() -> None:
    """Workers, threads and bytes as set."""
    plans = plan_workers(settings(workers=2, threads=3, model_cache_bytes="64MiB"), Host(tuple(range(8)), 10 * GIB, ()))
    assert [(plan.index, plan.threads, plan.budget_bytes) for plan in plans] == [(0, 3, 32 * MIB), (1, 3, 32 * MIB)]


def test_impossible_plans_say_why() -> None:
    """CUDA without a GPU; a share below one slab, with the numbers and the settings to change."""
    host = Host((0, 1), GIB, ())
    with pytest.raises(ValueError, match="no GPU is visible"):
        plan_workers(settings(device="cuda"), host)
    with pytest.raises(ValueError, match=r"model_cache_bytes 8388608 divided among 4 workers is 2097152 .*slab_bytes"):
        plan_workers(settings(workers=4, model_cache_bytes="8MiB"), host)


def test_gpu_memory_is_measured_by_the_workers() -> None:
    """Without model_cache_bytes a GPU's worker is told with how many it shares; with it, how much it gets."""
    host = Host(tuple(range(9)), 10 * GIB, ("0", "1"))
    plans = plan_workers(settings(workers=3), host)
    assert [(plan.device, plan.budget_bytes, plan.sharers) for plan in plans] == [
        ("cuda:0", 0, 2),
        ("cuda:1", 0, 1),
        ("cuda:0", 0, 2),
    ]
    assert {plan.budget_bytes for plan in plan_workers(settings(model_cache_bytes="8GiB"), host)} == {4 * GIB}


def test_the_host_tier_is_for_gpus_unless_asked_for() -> None:
    """A tenth of the memory up to 4 GiB, divided among the workers; nothing on CPU; what is set is given, also 0."""
    host = Host(tuple(range(9)), 20 * GIB, ("0", "1"))
    assert {plan.host_bytes for plan in plan_workers(settings(), host)} == {GIB}
    assert {plan.host_bytes for plan in plan_workers(settings(), Host((0, 1, 2), 200 * GIB, ("0",)))} == {4 * GIB}
    assert {plan.host_bytes for plan in plan_workers(settings(device="cpu"), host)} == {0}
    assert {plan.host_bytes for plan in plan_workers(settings(host_cache_bytes=0), host)} == {0}
    cpu = settings(device="cpu", workers=2, host_cache_bytes="64MiB")
    assert {plan.host_bytes for plan in plan_workers(cpu, host)} == {32 * MIB}


def test_precision_is_for_gpus() -> None:
    """On the CPU another precision than float32 would be a promise that is not kept: refused, with what to do."""
    host = Host((0, 1), 10 * GIB, ("0",))
    assert plan_workers(settings(precision="bf16"), host)
    with pytest.raises(ValueError, match="precision is tf32, but models run on the CPU"):
        plan_workers(settings(precision="tf32", device="cpu"), host)
