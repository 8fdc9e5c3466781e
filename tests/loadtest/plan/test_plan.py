"""The planner's simulation: caches, workers, nodes and miss-ratio curves. No server runs here."""

import math
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.driver.profiles import Profile, Schedule, Tick
from loadtest.driver.trace import Trace, write_trace
from loadtest.fleets.fleet import list_fleet_names
from loadtest.plan import simulated_worker as simulated
from loadtest.plan.costs import DEFAULT, Costs, draw_seconds, make_sample, subtract_samples
from loadtest.plan.demand import Demand, draw_charges, make_profile_demand, make_trace_demand, mix_keys
from loadtest.plan.miss_ratio_curves import compute_curve
from loadtest.plan.placement import Placement, choose_worker, rank_nodes
from loadtest.plan.simulate import Loss, Machines, simulate
from loadtest.plan.simulated_worker import COALESCED, HIT, MISS, REFUSED, SimulatedModel, SimulatedWorker
from model_store.cache.cache import Cache
from model_store.names import ModelName
from server.contract import ACCESS_LOG_OUTCOMES, QUEUE_PER_WORKER, REQUEST_TIMEOUT_S
from server.routing import Router

SLAB = 65_536
#: A hit takes 3 ms, a step 1 ms and 1 ms a request, a GET 100 ms, the rest of a load 10 ms.
PLAIN = Costs(said="round numbers", step_s=0.001, row_s=0.001, overhead=(0.001,), get=(0.1,), build=(0.01,))


def make_demand(at: list[float], asked: list[int], models: int, charge: int = SLAB) -> Demand:
    """Requests given one by one; a model fills a slab."""
    schedule = Schedule(np.array(at), np.array(asked), max(at) + 1)
    return Demand(schedule, None, list_fleet_names(models), np.full(models, charge), "by hand")


def make_room(models: int, **more: Any) -> Machines:
    """One worker with room for so many of them."""
    return Machines(models * SLAB, slab_bytes=SLAB, **more)


def ask(worker: SimulatedWorker, at: list[float], asked: list[int]) -> simulated.WorkerRun:
    """Requests for models of a slab each."""
    models = [SimulatedModel(ModelName(f"m{i}.mar"), SLAB, "family") for i in asked]
    return worker.run(np.array(at), models)


def make_worker(rows: int, threads: int = 4) -> SimulatedWorker:
    """With room for so many."""
    return SimulatedWorker(Cache(rows * SLAB, SLAB), PLAIN, np.random.default_rng(0), threads)


# --- one worker -----------------------------------------------------------------------------------------------------


def test_a_hit_and_a_miss_take_what_they_cost() -> None:
    """A first request waits for the GET, the build and its step; the next one for its step alone."""
    ran = ask(make_worker(2), [0.0, 1.0], [0, 0])
    assert ran.outcome.tolist() == [MISS, HIT]
    assert ran.wait.tolist() == pytest.approx([0.1 + 0.01 + 0.002, 0.002])
    assert ran.loads == 1
    assert ran.busy_s == pytest.approx(simulated.HELD * 0.01 + 2 * 0.002)


def test_who_comes_during_a_load_joins_it() -> None:
    """One load for all who wait; they run in one step when it ends, so the last waits least."""
    ran = ask(make_worker(2), [0.0, 0.05, 0.1], [0, 0, 0])
    assert ran.outcome.tolist() == [MISS, COALESCED, COALESCED]
    assert (ran.wait + np.array([0.0, 0.05, 0.1])).tolist() == pytest.approx([0.114] * 3)
    assert ran.loads == 1


def test_what_arrives_during_a_step_is_the_next_batch() -> None:
    """Five at once after a warm-up: the first alone, the other four together in 1 + 4 ms."""
    busy = make_worker(1)
    busy.fill([SimulatedModel(ModelName("m0.mar"), SLAB, "family")])
    ran = ask(busy, [0.0] * 5, [0] * 5)
    assert ran.wait.tolist() == pytest.approx([0.002] + [0.007] * 4)


def test_an_archive_fetched_a_short_while_ago_comes_from_disk() -> None:
    """Evicted and asked again within a minute: no GET. Later: one, since the server asks whether it has changed."""
    ran = ask(make_worker(1), [0.0, 1.0, 2.0, 100.0, 101.0], [0, 1, 0, 1, 0])
    from_disk, from_store = 0.012, 0.112
    assert ran.wait.tolist() == pytest.approx([from_store, from_store, from_disk, from_store, from_store])


def test_loader_threads_bound_the_loads_at_a_time() -> None:
    """Four loads by two threads take two GETs, by four threads one; builds take turns on the interpreter in part."""
    slow, fast = ask(make_worker(4, threads=2), [0.0] * 4, [0, 1, 2, 3]), ask(make_worker(4), [0.0] * 4, [0, 1, 2, 3])
    held = simulated.HELD * 0.01
    assert slow.wait.max() == pytest.approx(2 * (0.1 + 0.01 + held) + 0.004, abs=0.006)
    assert fast.wait.max() == pytest.approx(0.1 + 0.01 + 3 * held + 0.008, abs=0.006)


def test_a_model_larger_than_the_cache_is_refused_and_remembered() -> None:
    """It evicts nobody, and requests within the back-off are refused at once."""
    small = make_worker(1)
    small.fill([SimulatedModel(ModelName("m0.mar"), SLAB, "family")])
    big = SimulatedModel(ModelName("big.mar"), 2 * SLAB, "big")
    ran = small.run(np.array([0.0, 0.2]), [big, big])
    assert ran.outcome.tolist() == [REFUSED, REFUSED]
    assert ran.wait.tolist() == pytest.approx([0.11, 0.0])
    assert ModelName("m0.mar") in small.cache


def test_a_worker_refuses_what_its_queue_cannot_hold() -> None:
    """As many as the server's queue_per_worker wait; the next is refused at once."""
    count = QUEUE_PER_WORKER + 1
    ran = ask(make_worker(1), [0.0] * count, [0] * count)
    assert np.flatnonzero(ran.outcome == REFUSED).tolist() == [count - 1]
    assert ran.wait[-1] == 0


def test_nobody_waits_longer_than_the_deadline() -> None:
    """More loads than can be made: whoever has waited for the server's request_timeout_s is refused then."""
    n = 3000
    ran = ask(make_worker(10, threads=1), [i * 0.01 for i in range(n)], list(range(n)))
    assert ran.wait.max() == REQUEST_TIMEOUT_S
    assert (ran.outcome[ran.wait == REQUEST_TIMEOUT_S] == REFUSED).all()
    assert 0.5 < (ran.outcome == REFUSED).mean() < 1


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 6),
    asked=st.lists(st.integers(0, 8), min_size=1, max_size=60),
    gap_s=st.sampled_from([0.0, 0.003, 0.05]),
    policy=st.sampled_from(["lru", "sieve", "s3fifo", "lfu", "due"]),
)
def test_every_request_ends_under_every_policy(rows: int, asked: list[int], gap_s: float, policy: str) -> None:
    """Whatever is asked how fast: all are answered, misses are loads, and time only goes forward."""
    machines = Machines(rows * SLAB, slab_bytes=SLAB, policy=policy)
    busy = SimulatedWorker(machines.cache(), PLAIN, np.random.default_rng(0))
    ran = ask(busy, [i * gap_s for i in range(len(asked))], asked)
    assert {*ran.outcome.tolist()} <= {HIT, MISS, COALESCED}
    assert (ran.wait >= PLAIN.step_s + PLAIN.row_s - 1e-9).all()
    assert ran.loads == (ran.outcome == MISS).sum() >= len({*asked})
    assert len(busy.cache) <= rows
    assert not list(busy.cache.loads)


# --- hit ratios that are known --------------------------------------------------------------------------------------


def test_a_cycle_over_one_model_too_many_is_the_end_of_lru() -> None:
    """The market clock's worst case: no hit at all; with room for all of them, every request but the first."""
    asked = [*range(10)] * 20
    cycle = make_demand([i * 1.0 for i in range(200)], asked, 10)
    assert simulate(Placement(cycle), make_room(9), PLAIN).hit_ratio == 0
    assert simulate(Placement(cycle), make_room(10), PLAIN).hit_ratio == 190 / 200


@pytest.mark.slow
def test_ches_approximation_of_lru_under_zipf() -> None:
    """Independent requests: LRU's hit ratio is what Che, Tung and Wang (2002) calculate for it, within 2 points."""
    profile = Profile(500, 50.0, zipf=0.9)
    asked = make_profile_demand(profile, 400, 100, str(SLAB))
    found = simulate(Placement(asked), make_room(100), PLAIN.faster(1e6)).hit_ratio
    share = profile.popularity()
    low, high = 0.0, 1e9
    for _ in range(100):  # the time in which as many models are asked as there is room for
        t = (low + high) / 2
        low, high = (low, t) if (1 - np.exp(-share * t)).sum() > 100 else (t, high)
    assert found == pytest.approx(float((share * (1 - np.exp(-share * high))).sum()), abs=0.02)


@pytest.mark.slow
def test_more_cache_is_never_worse_for_lru() -> None:
    """Its miss ratio falls with the cache, down to the models that were never asked before."""
    asked = make_profile_demand(Profile(300, 100.0), 60, 20, str(SLAB))
    ratios = compute_curve(asked, "lru").miss_ratio
    assert all(b <= a for a, b in pairwise(ratios))
    assert ratios[0] > 0.3
    new = {*asked.schedule.model.tolist()} - {*(asked.warm.model.tolist() if asked.warm else [])}
    assert ratios[-1] == pytest.approx(len(new) / len(asked.schedule.at))


@pytest.mark.slow
def test_policies_differ_where_they_should() -> None:
    """A tick in fixed order with room for 90 %: LRU misses all, the policy that knows the tick about a tenth."""
    tick = make_profile_demand(Tick(500, every_s=10.0, spread_s=1.0), 200, 60, "8KB")
    lru, due = (compute_curve(tick, policy, (0.92,)).miss_ratio[0] for policy in ("lru", "due"))
    assert lru > 0.99
    assert due < 0.2


@pytest.mark.slow
def test_a_sample_of_the_models_gives_the_same_curve() -> None:
    """A quarter of 2,000 models, three times: within 3 points of the whole, and of what it says of its own error."""
    asked = make_profile_demand(Profile(2_000, 200.0, zipf=0.8), 100, 50, "8KB")
    sizes = (0.1, 0.3, 0.6)
    whole, part = compute_curve(asked, "lru", sizes), compute_curve(asked, "lru", sizes, most_models=500)
    assert (whole.rate, max(whole.error)) == (1.0, 0.0)
    assert part.rate == pytest.approx(0.25, rel=0.2)
    for one, other, error in zip(whole.miss_ratio, part.miss_ratio, part.error, strict=True):
        assert other == pytest.approx(one, abs=min(0.03, 4 * error + 0.005))


# --- many workers, many nodes ---------------------------------------------------------------------------------------


def test_a_models_home_is_where_the_servers_router_sends_it() -> None:
    """The planner and the server choose the same worker, for every number of workers tried."""
    for workers in (1, 2, 3, 7):
        router = Router()
        for index in range(workers):
            router.worker_up(index)
        names = list_fleet_names(300)
        assert [choose_worker(name, workers) for name in names] == [router.order(name)[0] for name in names]


def test_a_lost_node_moves_only_its_own_models() -> None:
    """The first in line stays the first unless it is lost; lines are evenly dealt, and each node is in them once."""
    keys = mix_keys(np.arange(20_000, dtype=np.uint64), 7)
    line, smaller = rank_nodes(keys, 5, 3), rank_nodes(keys, 4, 1)
    assert all(len({*row}) == 3 for row in line[:200].tolist())
    assert np.bincount(line[:, 0]).tolist() == pytest.approx([4000] * 5, rel=0.1)
    stays = line[:, 0] != 4
    assert (smaller[stays, 0] == line[stays, 0]).all()
    assert (smaller[~stays, 0] == line[~stays, 1]).all()


def test_a_node_is_lost() -> None:
    """A third of the models move and are cold once; of two replicas each, two thirds do: each gets its second again."""
    asked = make_profile_demand(Profile(400, 100.0, zipf=0.0), 60, 60, str(SLAB))
    for replicas in (1, 2):
        machines = make_room(400, nodes=3, replicas=replicas)
        found = simulate(Placement(asked), replace(machines, loss=Loss(0, 30.0)), PLAIN)
        assert found.after is not None
        assert simulate(Placement(asked), machines, PLAIN).hit_ratio > 0.99
        assert found.after.cold * found.after.requests == pytest.approx(replicas * 400 / 3, rel=0.2)


@pytest.mark.slow
def test_regions_are_machines_of_their_own() -> None:
    """Three regions with three times the requests do as one alone: no region has another's models for it. When one is
    lost, its clients' requests are in the others, which hold these models: none is cold, and none is lost.
    """
    for room in (400, 150):
        one, three = (
            simulate(Placement(make_profile_demand(Profile(400, rate), 60, 60, str(SLAB))), machines, PLAIN)
            for rate, machines in ((100.0, make_room(room)), (300.0, replace(make_room(room), regions=3)))
        )
        assert three.simulated == 3
        assert three.hit_ratio == pytest.approx(one.hit_ratio, abs=0.02)
    asked = make_profile_demand(Profile(400, 300.0, zipf=0.0), 60, 60, str(SLAB))
    found = simulate(Placement(asked), replace(make_room(400), regions=3, loss=Loss(-1, 30.0)), PLAIN)
    assert found.after is not None
    assert found.after.requests == int((asked.schedule.at >= 30.0).sum())
    assert found.after.hit_ratio > 0.999
    assert found.requests == pytest.approx(len(asked.schedule.at) * (1 / 2 * 2 / 3 + 1 / 2), rel=0.05)


@pytest.mark.slow
def test_some_workers_speak_for_the_rest() -> None:
    """Three of sixteen workers simulated: the hit ratio is that of all within what the plan says it is off by."""
    asked = make_profile_demand(Profile(4_000, 800.0, zipf=0.6), 60, 30, str(SLAB))
    machines = make_room(2_000, workers=8, nodes=2)
    whole, part = (simulate(Placement(asked), machines, PLAIN, most=most) for most in (10**9, 100))
    assert (whole.simulated, whole.error) == (16, 0.0)
    assert 3 <= part.simulated < 6
    assert part.requests == pytest.approx(whole.requests, rel=0.1)
    assert part.hit_ratio == pytest.approx(whole.hit_ratio, abs=max(0.01, 4 * part.error))


@pytest.mark.slow
def test_a_popular_model_is_counted_once() -> None:
    """Every fifth request is for one model: the workers that speak for others do not speak of it, nor it for them."""
    asked = make_profile_demand(Profile(4_000, 800.0, zipf=1.2), 60, 30, str(SLAB))
    machines = make_room(1_000, workers=8, nodes=2)
    whole, part = (simulate(Placement(asked), machines, PLAIN, most=most) for most in (10**9, 100))
    assert part.simulated < 6
    assert part.requests == whole.requests == len(asked.schedule.at)
    assert part.hit_ratio == pytest.approx(whole.hit_ratio, abs=0.01)
    for level in ("p50", "p90"):
        assert part.ms[level] == pytest.approx(whole.ms[level], rel=0.2)


def test_loader_threads_are_what_it_waits_for() -> None:
    """Every request loads, each for 0.11 s: 30 a second take four threads for 82 % of the time, two for all of it."""
    asked = make_demand([i / 30 for i in range(300)], list(range(300)), 300)
    ample, scarce = (simulate(Placement(asked), make_room(10, loader_threads=n), PLAIN) for n in (4, 2))
    assert ample.loading == pytest.approx(300 * 0.11 / 4 / asked.schedule.seconds, rel=0.05)
    assert scarce.loading == 1.0
    assert scarce.ms["p99"] > 10 * ample.ms["p99"]


@pytest.mark.slow
def test_many_models_take_little_memory() -> None:
    """200,000 models on 28 workers, of which some are simulated: 300 bytes a model, half of that for its name."""
    models = 200_000
    tracemalloc.start()
    asked = make_profile_demand(Profile(models, 2_000.0), 2, 1, "70KB")
    found = simulate(Placement(asked), Machines(8 * 2**30, workers=7, nodes=4, loader_threads=64), DEFAULT, most=600)
    compute_curve(asked, "lru", (0.01, 0.1), most_models=4_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.simulated < 28
    assert peak < 300 * models


def test_machines_that_cannot_be() -> None:
    """Each is refused with what is wrong."""
    with pytest.raises(ValueError, match="less than a slab each"):
        Machines(SLAB, workers=2, slab_bytes=SLAB).cache()
    with pytest.raises(ValueError, match="3 replicas of each model need as many nodes, not 2"):
        Machines(SLAB, nodes=2, replicas=3)
    with pytest.raises(ValueError, match="only where others stay"):
        Machines(SLAB, loss=Loss(0, 1.0))
    with pytest.raises(ValueError, match="only where others stay"):
        Machines(SLAB, nodes=2, loss=Loss(-1, 1.0))
    with pytest.raises(ValueError, match="no eviction policy 'fifo'"):
        Machines(8 * SLAB, slab_bytes=SLAB, policy="fifo").cache()


# --- what is asked, and what it costs -------------------------------------------------------------------------------


def test_a_trace_is_a_demand(tmp_path: Path) -> None:
    """Its first fifth fills the caches; a model has the size of the trace, or else the given one."""
    names = list_fleet_names(3)
    outcome = np.full(10, ACCESS_LOG_OUTCOMES.index("hit"), np.uint8)
    model, size = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0], np.int32), np.zeros(10, np.int64)
    size[[0, 4]] = 500, 700
    write_trace(tmp_path / "t.csv", Trace(np.arange(10.0), model, size, outcome, names))
    found = make_trace_demand(tmp_path / "t.csv", "1KB")
    assert found.charge.tolist() == [500, 700, 1000]
    assert found.warm is not None
    assert (len(found.warm.at), len(found.schedule.at), found.schedule.at[0]) == (2, 8, 0.0)
    with pytest.raises(ValueError, match=f"has no size of 1 models, such as {names[2]}"):
        make_trace_demand(tmp_path / "t.csv", None)


def test_sizes() -> None:
    """One size for all; or five around a median, as far apart as sigma says; or what is wrong with the text."""
    assert draw_charges("70KB", 3).tolist() == [70_000] * 3
    spread = draw_charges("70KB:1", 1000)
    assert np.median(spread) == 70_000
    assert np.log(spread).std() == pytest.approx(0.9, abs=0.1)
    assert len({*spread.tolist()}) == 5
    for bad in ("", "0", "70KB:", "much"):
        with pytest.raises(ValueError, match="size"):
            draw_charges(bad, 3)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=500))
def test_a_distribution_draws_what_was_seen(seen: list[float]) -> None:
    """Between the smallest and the largest, to four digits."""
    kept = make_sample(seen)
    values = draw_seconds(kept, 50, np.random.default_rng(1))
    assert min(seen) * 0.999 <= values.min()
    assert values.max() <= max(seen) * 1.001
    assert list(kept) == sorted(kept)


def test_what_takes_longer_by_a_constant() -> None:
    """The difference of two distributions that differ by 2 s, and no less than nothing the other way round."""
    short = make_sample([1.0, 2.0, 3.0])
    assert subtract_samples(make_sample([3.0, 4.0, 5.0]), short) == pytest.approx([2.0] * 201)
    assert max(subtract_samples(short, make_sample([3.0, 4.0, 5.0]))) == 0


def test_costs_that_cannot_be() -> None:
    """Negative, unsorted or missing times are refused by name."""
    whole: dict[str, Any] = {
        "said": "",
        "step_s": 0.0,
        "row_s": 1.0,
        "overhead": (0.0,),
        "get": (0.0,),
        "build": (0.0,),
    }
    for name, seconds in (("get", (0.2, 0.1)), ("build", ()), ("overhead", (-1.0,))):
        with pytest.raises(ValueError, match=f"`{name}`"):
            Costs(**whole | {name: seconds})
    with pytest.raises(ValueError, match="row_s"):
        Costs(**whole | {"row_s": 0.0})
    assert math.isclose(DEFAULT.faster(2).row_s, DEFAULT.row_s / 2)
    assert DEFAULT.faster(2).get == DEFAULT.get
