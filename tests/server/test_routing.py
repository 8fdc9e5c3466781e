"""The choice of the worker of a request: rendezvous homes, bounded load, replicas."""

import pytest
from hypothesis import given, strategies

from server.routing import FREE_QUEUE, REPLICA_S, Router, WorkerLoad

MODELS = [f"au/m{i}.mar" for i in range(2000)]


def make_router(*workers: int) -> Router:
    """A router to these workers, all up and cold."""
    made = Router()
    for worker in workers:
        made.worker_up(worker)
    return made


def find_homes(made: Router) -> dict[str, int]:
    """The home of each model."""
    return {model: made.order(model)[0] for model in MODELS}


def run(made: Router, model: str, now: float = 0.0, *, times: int = 1) -> list[int]:
    """Requests that start and do not end; the workers they went to."""
    lanes = []
    for _ in range(times):
        lane = made.route(model, now)
        assert lane is not None
        made.count_start(lane, model)
        lanes.append(lane.worker)
    return lanes


def warm_up(made: Router, model: str, *workers: int) -> None:
    """These workers have answered for the model."""
    for worker in workers:
        made.count_end(made.lanes[worker], model, counted=False, held=True)


def slow_down(lane: WorkerLoad) -> None:
    """Queueing costs more than loading there."""
    lane.wait_s = 2 * lane.load_s


@given(strategies.lists(strategies.integers(0, 255), min_size=2, max_size=8, unique=True))
def test_fronts_agree_whatever_they_saw_first(workers: list[int]) -> None:
    """Two routers that learned of the same workers in different order put every model in the same order."""
    one, other = make_router(*workers), make_router(*sorted(workers))
    assert [one.order(model) for model in MODELS[:50]] == [other.order(model) for model in MODELS[:50]]


def test_a_lost_worker_moves_only_its_own_models() -> None:
    """Models of other homes stay; those of the lost one go to the next of their own order, and come back with it."""
    made = make_router(0, 1, 2, 3)
    before, orders = find_homes(made), {model: made.order(model) for model in MODELS}
    made.worker_down(2)
    after = find_homes(made)
    assert {model for model in MODELS if before[model] != after[model]} == {m for m in MODELS if before[m] == 2}
    assert all(after[model] == orders[model][1] for model in MODELS if before[model] == 2)
    made.worker_up(2)
    assert find_homes(made) == before


def test_homes_are_balanced() -> None:
    """2,000 models on 4 workers: each is home to 500, give or take four standard deviations (19.4)."""
    counts = [list(find_homes(make_router(0, 1, 2, 3)).values()).count(worker) for worker in range(4)]
    assert all(abs(count - 500) < 78 for count in counts), counts


def test_no_worker_no_lane() -> None:
    """None when nobody is up, and when the only worker up is the one to avoid."""
    assert make_router().route("m", 0) is None
    assert make_router(3).route("m", 0, avoid=3) is None
    lane = make_router(3).route("m", 0)
    assert lane is not None
    assert lane.worker == 3


def test_the_avoided_worker_is_passed_over() -> None:
    """A request whose worker died goes to the next in order, also when the dead one is a listed replica."""
    made = make_router(0, 1, 2)
    first, second, third = made.order("m")
    lane = made.route("m", 0, avoid=first)
    assert lane is not None
    assert lane.worker == second
    warm_up(made, "m", first, second)
    slow_down(made.lanes[first])
    run(made, "m", times=40)
    assert made.replicas("m") == [second]
    lane = made.route("m", 0, avoid=second)
    assert lane is not None
    assert lane.worker in (first, third)


def test_requests_for_a_loading_model_are_not_load() -> None:
    """They count nowhere and stay at the home however many they are, so that they share one load."""
    made = make_router(0, 1, 2)
    home = made.order("m")[0]
    assert set(run(made, "m", times=500)) == {home}
    assert made.lanes[home].running == 0


def test_a_short_queue_never_spills() -> None:
    """Up to the free queue and the fair share the home keeps its requests, however slow it is."""
    made = make_router(0, 1)
    home = made.order("m")[0]
    warm_up(made, "m", home)
    slow_down(made.lanes[home])
    assert set(run(made, "m", times=FREE_QUEUE + 1)) == {home}


def test_overflow_makes_a_replica_only_where_queueing_costs_more_than_loading() -> None:
    """Fast home: everything stays. Slow home: the next worker in the model's own order gets the overflow, no other."""
    made = make_router(0, 1, 2, 3)
    home, second = made.order("m")[:2]
    warm_up(made, "m", home)
    assert set(run(made, "m", times=200)) == {home}
    assert made.replicas("m") == []
    slow_down(made.lanes[home])
    assert set(run(made, "m", times=50)) == {second}
    assert made.replicas("m") == [second]


def test_the_home_and_its_replica_share_the_load() -> None:
    """A warm replica takes what is above the bound while it has less to do, without a further load."""
    made = make_router(0, 1, 2, 3)
    home, second = made.order("m")[:2]
    warm_up(made, "m", home)
    slow_down(made.lanes[home])
    run(made, "m", times=40)
    warm_up(made, "m", second)
    made.lanes[home].wait_s = 0.0
    assert set(run(made, "m", times=300)) == {home, second}
    assert abs(made.lanes[home].running - made.lanes[second].running) <= FREE_QUEUE + 1


def test_a_replica_that_lost_the_model_is_used_only_if_a_load_is_worth_it() -> None:
    """Once the replica's worker has evicted the model, requests return to a home that is fast enough again."""
    made = make_router(0, 1, 2)
    home, second = made.order("m")[:2]
    warm_up(made, "m", home)
    slow_down(made.lanes[home])
    run(made, "m", times=40)
    warm_up(made, "m", second)
    made.count_end(made.lanes[second], "m", counted=False, held=False)
    made.lanes[home].wait_s = 0.0
    assert set(run(made, "m", times=20)) == {home}


def test_replicas_expire() -> None:
    """A replica is listed while it is used and for a time after; then its overflow starts anew."""
    made = make_router(0, 1, 2)
    home, second = made.order("m")[:2]
    warm_up(made, "m", home, second)
    slow_down(made.lanes[home])
    run(made, "m", now=0.0, times=40)
    run(made, "m", now=50.0)
    run(made, "m", now=50.0 + REPLICA_S - 1)  # the use at 50 s renewed it
    assert made.replicas("m") == [second]
    other = next(model for model in MODELS if made.order(model)[0] == home)
    warm_up(made, other, home)
    run(made, other, now=50.0 + 3 * REPLICA_S)  # any overflow cleans up
    assert made.replicas("m") == []


def test_down_and_up_start_cold() -> None:
    """A restarted worker has no load, no warm models and no replicas; late answers of its past do not count."""
    made = make_router(0, 1)
    home, second = made.order("m")
    warm_up(made, "m", home, second)
    slow_down(made.lanes[home])
    run(made, "m", times=50)
    assert made.replicas("m") == [second]
    past = made.lanes[second]
    made.worker_down(second)
    assert made.replicas("m") == []
    assert set(run(made, "m", times=5)) == {home}
    made.worker_up(second)
    made.count_end(past, "m", counted=True, held=True)
    fresh = made.lanes[second]
    assert (fresh.running, len(fresh.warm)) == (0, 0)
    made.worker_down(7)  # never up: nothing


@given(
    strategies.lists(
        strategies.tuples(strategies.sampled_from(["a", "b", "c"]), strategies.booleans(), strategies.booleans()),
        max_size=80,
    )
)
def test_what_started_and_ended_leaves_no_load(requests: list[tuple[str, bool, bool]]) -> None:
    """However requests interleave and end, the running count returns to zero and never falls below."""
    made = make_router(0, 1, 2)
    open_requests: list[tuple[WorkerLoad, str, bool]] = []
    for model, ends, held in requests:
        lane = made.route(model, 0.0)
        assert lane is not None
        open_requests.append((lane, model, made.count_start(lane, model)))
        if ends:
            made.count_end(*open_requests.pop(0), held=held, wait_s=0.01, load_s=0.02)
        assert all(lane.running >= 0 for lane in made.lanes.values())
    for request in open_requests:
        made.count_end(*request, held=True)
    assert all(lane.running == 0 for lane in made.lanes.values())


def test_times_teach_the_pace() -> None:
    """Waits and loads move a lane's pace towards themselves; answers without a load leave its load time."""
    made = make_router(0)
    lane = made.lanes[0]
    made.count_end(lane, "m", counted=False, held=True, wait_s=1.6, load_s=0.45)
    assert (lane.wait_s, round(lane.load_s, 6)) == (0.1, 0.1)
    made.count_end(lane, "m", counted=False, held=True, wait_s=0.1)
    assert (lane.wait_s, round(lane.load_s, 6)) == (0.1, 0.1)
    assert repr(lane) == "<WorkerLoad 0: 0 running, 1 warm, 100.0 ms a request, 100 ms a load>"
    assert repr(made) == "<Router 1 workers, 0 running, 0 replicated models>"


@given(
    strategies.lists(strategies.tuples(strategies.sampled_from("abcd"), strategies.booleans()), max_size=30),
    strategies.booleans(),
    strategies.sampled_from([0.0, 0.2]),
)
def test_alike_requests_are_counted_at_once(asked: list[tuple[str, bool]], held: bool, load_s: float) -> None:
    """As one by one: load, what is warm and the pace, whatever was warm before."""
    routers = make_router(0), make_router(0)
    models = [model for model, _ in asked]
    for router in routers:
        for model, is_warm in asked:
            if is_warm:
                router.count_end(router.lanes[0], model, counted=False, held=True, wait_s=0.3)
    together, alone = (router.lanes[0] for router in routers)
    counted = routers[0].count_starts(together, models)
    assert counted == [routers[1].count_start(alone, model) for model in models]
    assert together.running == alone.running == sum(counted)
    routers[0].count_ends(together, models, counted, held=held, wait_s=0.1, load_s=load_s)
    for model, counts in zip(models, counted, strict=True):
        routers[1].count_end(alone, model, counts, held=held, wait_s=0.1, load_s=load_s)
    assert together.running == alone.running == 0
    assert [*together.warm] == [*alone.warm]
    assert (together.wait_s, together.load_s) == pytest.approx((alone.wait_s, alone.load_s))


@given(
    strategies.integers(1, 4),
    strategies.lists(strategies.tuples(strategies.integers(0, 99), strategies.booleans()), max_size=150),
    strategies.lists(strategies.integers(0, 40), min_size=4, max_size=4),
)
def test_many_are_routed_as_one_by_one(workers: int, asked: list[tuple[int, bool]], running: list[int]) -> None:
    """Whatever runs and is warm: where all get their homes at once, each does after those before it were started."""
    made = make_router(*range(workers))
    for lane, count in zip(made.lanes.values(), running, strict=False):
        lane.running = count
    models = [MODELS[at] for at, _ in asked]
    for model, (_, is_warm) in zip(models, asked, strict=True):
        if is_warm:
            warm_up(made, model, *range(workers))
    placed = made.route_all(models)
    assert [lane.running for lane in made.lanes.values()] == running[:workers]
    if placed is not None:
        lanes = {place: lane.worker for lane, places in placed.items() for place in places}
        assert [lanes[place] for place in range(len(models))] == [run(made, model)[0] for model in models]
        assert all(places == sorted(places) for places in placed.values())


def test_homes_that_are_even_take_all_at_once() -> None:
    """A tick of warm models over two workers is placed at once; none is where a worker is silent, or where none is."""
    made = make_router(0, 1)
    for model in MODELS:
        warm_up(made, model, made.order(model)[0])
    placed = made.route_all(MODELS)
    assert placed is not None
    assert {lane.worker: [MODELS[at] for at in places] for lane, places in placed.items()} == {
        worker: [model for model in MODELS if made.order(model)[0] == worker] for worker in (0, 1)
    }
    made.silent = frozenset({1})
    assert made.route_all(MODELS) is None
    assert make_router().route_all(MODELS) is None
