"""How workers share a machine, on made-up machines."""

import pytest
from hypothesis import given, strategies

from server.host import Host, WorkerPlan
from server.settings import MIB, Settings
from server.supervisor.worker_plan import front_cores, plan_workers, share_cores

GIB = 1024 * MIB
CORES = strategies.lists(strategies.integers(0, 200), min_size=1, max_size=40, unique=True).map(sorted)


def make_settings(**values: object) -> Settings:
    """Settings with these values."""
    return Settings.model_validate({"store": "archives", **values})


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
    plans = plan_workers(make_settings(), Host((0, 1, 2, 3), 10 * GIB, ()))
    assert [plan.cores for plan in plans] == [(1,), (2,), (3,)]
    assert {(plan.device, plan.threads, plan.budget_bytes) for plan in plans} == {("cpu", 1, 4 * GIB // 3)}
    assert len(plan_workers(make_settings(), Host((5,), 10 * GIB, ()))) == 1


def test_gpu_workers_by_default() -> None:
    """One per GPU, or as many as asked, dealt out in turn; `device=cpu` leaves GPUs alone."""
    host = Host(tuple(range(9)), 10 * GIB, ("0", "1"))
    assert [plan.device for plan in plan_workers(make_settings(), host)] == ["cuda:0", "cuda:1"]
    two = plan_workers(make_settings(workers_per_device=2, device="cuda"), host)
    assert [plan.device for plan in two] == ["cuda:0", "cuda:1"] * 2
    assert [plan.cores for plan in two] == [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert [plan.device for plan in plan_workers(make_settings(workers=3), host)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert {plan.device for plan in plan_workers(make_settings(device="cpu"), host)} == {"cpu"}


def test_what_is_asked_for_is_given() -> None:
    """Workers, threads and bytes as set."""
    plans = plan_workers(
        make_settings(workers=2, threads=3, model_cache_bytes="64MiB"), Host(tuple(range(8)), 10 * GIB, ())
    )
    assert [(plan.index, plan.threads, plan.budget_bytes) for plan in plans] == [(0, 3, 32 * MIB), (1, 3, 32 * MIB)]


def test_no_process_keeps_to_a_core_where_code_runs() -> None:
    """Children run on all cores: a worker or front that may not leave its own would wait behind them."""
    cores = (0, 1, 2, 3, 4)
    plans = plan_workers(make_settings(workers=2, allow_code=["*"]), Host(cores, 10 * GIB, ()))
    assert [plan.cores for plan in plans] == [cores, cores]
    assert {plan.threads for plan in plans} == {2}, "they share the cores as ever"
    assert front_cores(cores, plans) == cores


def test_impossible_plans_say_why() -> None:
    """CUDA without a GPU; a share below one slab, with the numbers and the settings to change."""
    host = Host((0, 1), GIB, ())
    with pytest.raises(ValueError, match="no GPU is visible"):
        plan_workers(make_settings(device="cuda"), host)
    with pytest.raises(ValueError, match=r"model_cache_bytes 8388608 divided among 4 workers is 2097152 .*slab_bytes"):
        plan_workers(make_settings(workers=4, model_cache_bytes="8MiB"), host)


def test_gpu_memory_is_measured_by_the_workers() -> None:
    """Without model_cache_bytes a GPU's worker is told with how many it shares; with it, how much it gets."""
    host = Host(tuple(range(9)), 10 * GIB, ("0", "1"))
    plans = plan_workers(make_settings(workers=3), host)
    assert [(plan.device, plan.budget_bytes, plan.sharers) for plan in plans] == [
        ("cuda:0", 0, 2),
        ("cuda:1", 0, 1),
        ("cuda:0", 0, 2),
    ]
    assert {plan.budget_bytes for plan in plan_workers(make_settings(model_cache_bytes="8GiB"), host)} == {4 * GIB}


def test_the_host_tier_is_for_gpus_unless_asked_for() -> None:
    """A tenth of the memory up to 4 GiB, divided among the workers; nothing on CPU; what is set is given, also 0."""
    host = Host(tuple(range(9)), 20 * GIB, ("0", "1"))
    assert {plan.host_bytes for plan in plan_workers(make_settings(), host)} == {GIB}
    assert {plan.host_bytes for plan in plan_workers(make_settings(), Host((0, 1, 2), 200 * GIB, ("0",)))} == {4 * GIB}
    assert {plan.host_bytes for plan in plan_workers(make_settings(device="cpu"), host)} == {0}
    assert {plan.host_bytes for plan in plan_workers(make_settings(host_cache_bytes=0), host)} == {0}
    cpu = make_settings(device="cpu", workers=2, host_cache_bytes="64MiB")
    assert {plan.host_bytes for plan in plan_workers(cpu, host)} == {32 * MIB}


def test_page_locked_memory_is_no_more_than_was_given() -> None:
    """It comes in powers of two: a worker beside a GPU gets the next one below its part, one on the CPU its part."""
    host = Host(tuple(range(9)), 30 * GIB, ("0",))
    assert {plan.host_bytes for plan in plan_workers(make_settings(), host)} == {2 * GIB}
    three = plan_workers(make_settings(workers=3, host_cache_bytes="1GiB"), host)
    assert {plan.host_bytes for plan in three} == {256 * MIB}
    cpu = make_settings(device="cpu", workers=3, host_cache_bytes="48MiB")
    assert {plan.host_bytes for plan in plan_workers(cpu, host)} == {16 * MIB}


def test_precision_is_for_gpus() -> None:
    """On the CPU another precision than float32 would be a promise that is not kept: refused, with what to do."""
    host = Host((0, 1), 10 * GIB, ("0",))
    assert plan_workers(make_settings(precision="bf16"), host)
    with pytest.raises(ValueError, match="precision is tf32, but models run on the CPU"):
        plan_workers(make_settings(precision="tf32", device="cpu"), host)
