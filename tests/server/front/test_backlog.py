"""What is under way at a worker: bounds, room for other models, the expected wait, turns."""

from collections import Counter

import pytest
from hypothesis import given, settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from server.front.backlog import FEW, Backlog, Bounds, NoAdmission, Turns

WIDE = Bounds(100_000, 100_000)
FAR = 1e6


def check_admission(
    backlog: Backlog, model: str, client: str, now: float, left_s: float, bounds: Bounds, *, is_work: bool
) -> NoAdmission | None:
    """What the backlog says of one more request, of which as many are ahead as it counts."""
    return backlog.check(model, client, now, left_s, backlog.count_ahead(model, client), bounds, is_work=is_work)


def fill(backlog: Backlog, model: str, count: int, *, is_work: bool = True) -> None:
    """So many requests are under way."""
    for _ in range(count):
        backlog.start(model, "", 0.0, is_work=is_work)


def find_refusal(
    backlog: Backlog, model: str, left_s: float = FAR, bounds: Bounds = WIDE, *, is_work: bool = True
) -> str:
    """Why one more is not admitted; empty where it is."""
    found = check_admission(backlog, model, "", 0.0, left_s, bounds, is_work=is_work)
    return "" if found is None else found.reason


def test_a_worker_and_a_model_have_bounds() -> None:
    """The reason names the setting; an ended request makes room."""
    backlog = Backlog()
    fill(backlog, "a", 2)
    fill(backlog, "b", 2)
    assert "4 requests are under way at the worker already (queue_per_worker)" in find_refusal(
        backlog, "c", FAR, Bounds(4, 9)
    )
    assert "2 requests for a are under way already (queue_per_model)" in find_refusal(backlog, "a", FAR, Bounds(99, 2))
    backlog.end("a", "", was_work=True)
    assert not find_refusal(backlog, "c", FAR, Bounds(4, 9))
    assert not find_refusal(backlog, "a", FAR, Bounds(99, 2))


@pytest.mark.parametrize(("hot", "each"), [(1, 50), (2, 33), (3, 25)])
def test_hot_models_leave_room_for_others(hot: int, each: int) -> None:
    """Models that take all they get leave as much room as each of them has: a newcomer is always admitted."""
    backlog, bounds, asked = Backlog(), Bounds(100, 100), [f"m{i}" for i in range(hot)]
    for _ in range(200):
        for model in asked:
            if not find_refusal(backlog, model, FAR, bounds):
                backlog.start(model, "", 0.0, is_work=True)
    held = Counter({model: backlog._held[model] for model in asked})
    assert all(abs(count - each) <= 1 for count in held.values()), held
    assert not find_refusal(backlog, "other", FAR, bounds)


def test_a_prober_waits_for_its_turn_and_not_for_the_hot_model() -> None:
    """A hot model's request waits for all of its own; that of another for one of each model."""
    backlog = Backlog()
    fill(backlog, "hot", 1000)
    fill(backlog, "warm", 5)
    assert backlog.count_ahead("hot") == 1006
    assert backlog.count_ahead("warm") == 5 + 6 + 1
    assert backlog.count_ahead("prober") == 3


def test_what_cannot_make_its_deadline_is_refused_with_the_time() -> None:
    """10 ms a request and 100 ahead: about a second, which 0.5 s do not reach; a prober is admitted."""
    backlog = Backlog()
    fill(backlog, "hot", 100)
    assert not find_refusal(backlog, "hot", 0.5), "nothing is known yet"
    for _ in range(100):
        backlog.learn(100, -1.0, 0.0)
    found = check_admission(backlog, "hot", "", 0.0, 0.5, WIDE, is_work=True)
    assert found is not None
    assert "expected in 1010 ms, the deadline is in 500 ms: 100 requests are ahead" in found.reason
    assert found.retry_s == pytest.approx(1.01)
    assert not find_refusal(backlog, "hot", 3.0)
    assert not find_refusal(backlog, "prober", 0.5)
    assert not find_refusal(backlog, "hot", 0.5, is_work=False), "of loads the worker decides"


def test_an_idle_worker_admits_whatever_was_learnt() -> None:
    """The slowest past refuses nothing that has few ahead, and quick answers correct it."""
    backlog = Backlog()
    for _ in range(100):
        backlog.learn(50, -500.0, 0.0)
    fill(backlog, "a", FEW - 1)
    assert not find_refusal(backlog, "a", 0.001)
    fill(backlog, "a", 10)
    assert find_refusal(backlog, "a", 0.5)
    for _ in range(200):
        backlog.learn(1, -0.002, 0.0)
    assert not find_refusal(backlog, "a", 0.5)


def test_a_request_that_is_long_by_itself_says_little_of_others() -> None:
    """One of 10 s among many of 1 ms raises what is expected by an eighth at most, however many were ahead of it."""
    for ahead in (1, 20):
        backlog = Backlog()
        for _ in range(100):
            backlog.learn(ahead, -0.001 * ahead, 0.0)
        before = backlog.expected_s(20, 0.0)
        backlog.learn(ahead, -10.0, 0.0)
        assert before < backlog.expected_s(20, 0.0) <= before * 1.125


def test_silence_is_added_to_the_wait() -> None:
    """A worker that has not answered for 0.4 s is expected to need as long again; one that had nothing to do is not."""
    backlog = Backlog()
    fill(backlog, "a", 10)
    backlog.learn(10, 0.0, 0.1)
    assert backlog.expected_s(11, 0.1) == pytest.approx(0.11)
    assert backlog.expected_s(11, 0.5) == pytest.approx(0.51)
    assert check_admission(backlog, "a", "", 0.1, 0.4, WIDE, is_work=True) is None
    assert check_admission(backlog, "a", "", 0.5, 0.4, WIDE, is_work=True) is not None
    for _ in range(10):
        backlog.end("a", "", was_work=True)
    assert backlog.expected_s(11, 9.0) == pytest.approx(0.11)
    backlog.start("a", "", 9.0, is_work=True)
    assert backlog.expected_s(11, 9.0) == pytest.approx(0.11)


@pytest.mark.slow
@given(
    each_s=strategies.floats(1e-5, 0.1),
    deadline_s=strategies.floats(0.05, 5.0),
    models=strategies.integers(1, 20),
)
@settings(max_examples=50, deadline=None)
def test_the_admitted_are_answered_in_time(each_s: float, deadline_s: float, models: int) -> None:
    """A worker that takes `each_s` a request, its models in turns, at three times its rate, once the pace is learnt.

    Every admitted request is answered before its deadline, and the worker never stands still.
    """
    backlog, waiting, now, idle, late = Backlog(), Turns[tuple[str, int, float]](), 0.0, 0, 0
    warm_up = 400
    for ident in range(3 * warm_up, 3 * warm_up + 3000):
        model = f"m{ident % models}"
        if check_admission(backlog, model, "", now, deadline_s, Bounds(2000, 2000), is_work=True) is None:
            waiting.put(model, ident, (model, backlog.count_ahead(model), now))
            backlog.start(model, "", now, is_work=True)
        if ident % 3:
            continue
        now += each_s
        if not waiting:
            idle += 1
            continue
        done, ahead, began = waiting.take()
        backlog.end(done, "", was_work=True)
        backlog.learn(ahead, began, now)
        late += now - began > max(deadline_s, (FEW + 1) * models * each_s) and ident > 4 * warm_up
    assert (idle, late) == (0, 0)


def count_served(before: Counter[tuple[str, str]], client: str, model: str) -> int:
    """Requests that are taken until one more of this client and model is, as `Turns` takes them, itself included.

    Which client and which model have the first turn is not known: the one more is the last in every round.
    """
    turns, at = Turns[int](), 0
    order = sorted(before.elements(), key=lambda each: (each[0] == client, each[1] == model))
    for at, (owner, name) in enumerate(order, 1):
        turns.put(name, at, at, owner)
    turns.put(model, 0, 0, client)
    served = 1
    while turns.take():
        served += 1
    return served


class BacklogMachine(RuleBasedStateMachine):
    """Any order of starts and ends agrees with counting anew."""

    def __init__(self) -> None:
        super().__init__()
        self.backlog = Backlog()
        self.open: list[tuple[str, str, bool]] = []

    @rule(model=strategies.sampled_from("abc"), client=strategies.sampled_from("xyz"), is_work=strategies.booleans())
    def start(self, model: str, client: str, *, is_work: bool) -> None:
        """One more."""
        self.backlog.start(model, client, 0.0, is_work=is_work)
        self.open.append((model, client, is_work))

    @rule(which=strategies.integers(0, 1000))
    def end(self, which: int) -> None:
        """One less."""
        if self.open:
            model, client, was_work = self.open.pop(which % len(self.open))
            self.backlog.end(model, client, was_work=was_work)

    @invariant()
    def agrees(self) -> None:
        """What is ahead is what turns would take before, and nothing is left behind."""
        assert len(self.backlog) == len(self.open)
        work = Counter((client, model) for model, client, is_work in self.open if is_work)
        for model in "abcd":
            for client in "wxyz":
                assert self.backlog.count_ahead(model, client) == count_served(work, client, model)
        assert set(self.backlog._held) == {model for model, _, _ in self.open}
        assert set(self.backlog._held_by) == {client for _, client, _ in self.open}
        assert set(self.backlog._work) == {"", *(client for client, _ in work)}


TestBacklogMachine = BacklogMachine.TestCase
TestBacklogMachine.settings = settings(max_examples=50, stateful_step_count=50, deadline=None)


def test_models_take_turns_and_keep_their_order() -> None:
    """One of each in turn; what is dropped is not taken."""
    turns = Turns[str]()
    for ident, model in enumerate("aaaabbc"):
        turns.put(model, ident, f"{model}{ident}")
    assert (turns.drop(1), turns.drop(1), turns.drop(6), 6 in turns, 4 in turns) == (True, False, True, False, True)
    assert [turns.take() for _ in range(len(turns))] == ["a0", "b4", "a2", "b5", "a3"]
    with pytest.raises(KeyError):
        turns.take()


def test_clients_take_turns_and_their_models_within() -> None:
    """A client with many requests of many models gets one turn of two."""
    turns = Turns[str]()
    for ident, key in enumerate(["xa", "xa", "xb", "xc", "ya", "ya"]):
        turns.put(key[1], ident, f"{key}{ident}", key[0])
    assert [turns.take() for _ in range(len(turns))] == ["xa0", "ya4", "xb2", "ya5", "xc3", "xa1"]


def test_a_client_leaves_room_for_others() -> None:
    """With one request for each of many models it gets half of the room; another one gets in, and waits little."""
    backlog, bounds = Backlog(), Bounds(100, 100)
    for i in range(200):
        if check_admission(backlog, f"m{i}", "greedy", 0.0, 60.0, bounds, is_work=True) is None:
            backlog.start(f"m{i}", "greedy", 0.0, is_work=True)
    refused = check_admission(backlog, "new", "greedy", 0.0, 60.0, bounds, is_work=True)
    assert refused is not None
    assert refused.reason.startswith(
        "51 requests of greedy are under way already; the rest of 100 is for other clients"
    )
    assert check_admission(backlog, "m0", "quiet", 0.0, 60.0, bounds, is_work=True) is None
    assert backlog.count_ahead("m0", "quiet") == 2
    assert backlog.count_ahead("m0", "greedy") == 51 + 1


def start_each(
    backlog: Backlog, models: list[str], client: str, now: float, left_s: float, bounds: Bounds, works: list[bool]
) -> list[int] | None:
    """What `count_all_ahead` and `start_all` do, one by one; None, and half of it done, where one is not admitted."""
    aheads = []
    for model, is_work in zip(models, works, strict=True):
        aheads.append(backlog.count_ahead(model, client))
        if backlog.check(model, client, now, left_s, aheads[-1], bounds, is_work=is_work) is not None:
            return None
        backlog.start(model, client, now, is_work=is_work)
    return aheads


def list_counts(backlog: Backlog) -> dict[str, object]:
    """All that a backlog counts."""
    counts = {name: (turns.counts, turns._deeper) for name, turns in backlog._work.items() if turns.counts}
    clients = (backlog._clients.counts, backlog._clients._deeper)
    return {**vars(backlog), "_work": counts, "_clients": clients}


REQUESTS = strategies.lists(
    strategies.tuples(
        strategies.sampled_from("abcdef"), strategies.sampled_from(["", "x", "y"]), strategies.booleans()
    ),
    max_size=4,
)


@given(
    REQUESTS,
    strategies.lists(strategies.tuples(strategies.sampled_from("defghijk"), strategies.booleans()), min_size=1),
    strategies.sampled_from(["", "x"]),
    strategies.sampled_from([Bounds(3, 1), Bounds(6, 2), Bounds(12, 3), WIDE]),
    strategies.sampled_from([0.01, 0.05, 1.0, FAR]),
    strategies.booleans(),
)
def test_many_at_once_are_as_one_by_one(
    before: list[tuple[str, str, bool]],
    asked: list[tuple[str, bool]],
    client: str,
    bounds: Bounds,
    left_s: float,
    has_learnt: bool,
) -> None:
    """Whatever is under way: where all can be started at once, each would have been, with as many ahead and all counts
    alike, then and at their ends.
    """
    backlogs = Backlog(), Backlog()
    models, works = [model for model, _ in asked], [is_work for _, is_work in asked]
    for backlog in backlogs:
        if has_learnt:
            backlog.learn(1, 0.0, 0.001)
            backlog.learn(10, 0.0, 0.05)
        for model, other, is_work in before:
            backlog.start(model, other, 1.0, is_work=is_work)
    together, alone = backlogs
    unchanged = repr(list_counts(together))
    aheads = together.count_all_ahead(models, client, 2.0, left_s, bounds, works)
    assert repr(list_counts(together)) == unchanged
    if aheads is None:
        return
    together.start_all(models, client, 2.0, works)
    assert start_each(alone, models, client, 2.0, left_s, bounds, works) == aheads
    assert list_counts(together) == list_counts(alone)
    together.end_all(models, client, works)
    for model, was_work in zip(models, works, strict=True):
        alone.end(model, client, was_work=was_work)
    assert list_counts(together) == list_counts(alone)
    assert repr(list_counts(together)["_held"]) == repr(list_counts(alone)["_held"])


@pytest.mark.parametrize("client", ["", "x"])
def test_new_models_are_started_at_once(client: str) -> None:
    """The usual call, of models of which nothing is under way, beside other work: it is not looked at one by one."""
    backlog = Backlog()
    backlog.start("a", client, 0.0, is_work=True)
    models, works = ["b", "c", "d"], [True, False, True]
    assert backlog.count_all_ahead(models, client, 0.0, FAR, Bounds(8, 1), works) == [2, 3, 3]
    backlog.start_all(models, client, 0.0, works)
    assert backlog.count_all_ahead(["e"], client, 0.0, FAR, Bounds(4, 1), [True]) is None
    assert backlog.count_all_ahead(["b", "e"], client, 0.0, FAR, Bounds(8, 9), [True, True]) is None
    backlog.start("b", client, 0.0, is_work=True)  # another call's, while these are under way
    backlog.end_all(models, client, works)
    assert (len(backlog), backlog.count_ahead("b", client)) == (2, 3)
