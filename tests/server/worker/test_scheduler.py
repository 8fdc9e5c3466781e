"""The scheduler of a worker: bounds, turns, deadlines, and that no job is lost or run twice."""

import pytest
from hypothesis import settings, strategies
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from model_store.names import ModelName
from server.ipc.frames import CacheResult, Request
from server.worker.scheduler import Job, QueueFull, Scheduler

LARGE = 1_000_000


def make_job(model: str, deadline: float = 100.0, ident: int = 1, client: str = "") -> Job:
    """A request for the model."""
    return Job(Request(ident, 0, model, "", "", 0, b"", client=client), ModelName(model), None, 0.0, deadline)


def queue_ready(scheduler: Scheduler, group: str, *models: str) -> list[Job]:
    """Jobs that may run."""
    jobs = [make_job(model) for model in models]
    for one in jobs:
        scheduler.admit(one)
        scheduler.add_ready(group, one)
    return jobs


def list_models(batch: tuple[str, list[Job]]) -> tuple[str, str]:
    """The group and its jobs' one-letter models."""
    return batch[0], "".join(one.model for one in batch[1])


def test_a_model_and_a_worker_have_bounds() -> None:
    """The text names the setting; a refused job counts nowhere, a finished one makes room."""
    scheduler = Scheduler(per_model=2, per_worker=3)
    first, _, _ = (queue_ready(scheduler, "f", model)[0] for model in "aab")
    with pytest.raises(QueueFull, match=r"2 requests wait for a already \(queue_per_model\)"):
        scheduler.admit(make_job("a"))
    with pytest.raises(QueueFull, match=r"3 requests wait in this worker already \(queue_per_worker\)"):
        scheduler.admit(make_job("b"))
    assert len(scheduler) == 3
    assert scheduler.finish(first)
    scheduler.admit(make_job("a"))
    assert len(scheduler) == 3


def test_jobs_are_admitted_together_or_not_at_all() -> None:
    """A model or a worker without room for one of them: none is counted. What is admitted is finished once."""
    scheduler = Scheduler(per_model=2, per_worker=4)
    names = [ModelName(name) for name in "abca"]
    assert not scheduler.admit_all([*names, names[0]])
    assert not scheduler.admit_all([names[0]] * 3)
    assert (len(scheduler), scheduler.count(names[0])) == (0, 0)
    assert scheduler.admit_all(names)
    assert [scheduler.count(name) for name in names] == [2, 1, 1, 2]
    jobs = [make_job(name) for name in names]
    scheduler.finish_all(jobs[:3])
    assert [scheduler.count(name) for name in names] == [1, 0, 0, 1]
    assert (len(scheduler), scheduler.finish(jobs[0]), scheduler.finish(jobs[3])) == (1, False, True)
    assert len(scheduler) == 0


def test_jobs_that_are_queued_together_wait_behind_those_of_their_models() -> None:
    """The items of a call are all taken at once where the client has one for each model, else in turn."""
    scheduler = Scheduler(LARGE, LARGE)
    jobs = [make_job(name, client="desk") for name in "abc"]
    for each in jobs:
        each.together = jobs
    assert scheduler.admit_all([job.model for job in jobs])
    scheduler.add_all_ready("f", "desk", jobs)
    assert list_models(scheduler.next_batch(3)) == ("f", "abc")
    assert not scheduler.has_work
    scheduler.add_all_ready("f", "desk", [*jobs, jobs[0]])
    assert list_models(scheduler.next_batch(3)) == ("f", "abc")
    assert list_models(scheduler.next_batch(3)) == ("f", "a")
    assert not scheduler.has_work


def test_a_noisy_model_does_not_starve_another() -> None:
    """1,000 jobs of A came before the one of B: B is in the first batch."""
    scheduler = Scheduler(LARGE, LARGE)
    queue_ready(scheduler, "f", *"a" * 1000, "b")
    assert "b" in list_models(scheduler.next_batch(32))[1]


def test_clients_take_turns_and_their_models_within() -> None:
    """A client with many jobs of many models gets every second place; jobs that are put back come first again."""
    scheduler = Scheduler(LARGE, LARGE)
    for client, names in (("greedy", "abcabcabc"), ("quiet", "aab")):
        for name in names:
            one = make_job(name, client=client)
            scheduler.admit(one)
            scheduler.add_ready("f", one)
    group, batch = scheduler.next_batch(5)
    assert [one.request.client[0] + one.model for one in batch] == ["ga", "qa", "gb", "qb", "gc"]
    scheduler.put_back(group, batch[2:])
    assert [one.request.client[0] + one.model for one in scheduler.next_batch(3)[1]] == ["gb", "qb", "gc"]


def test_models_take_turns_across_batches() -> None:
    """Within a group each batch goes on where the last one stopped; a model's own jobs stay in order."""
    scheduler = Scheduler(LARGE, LARGE)
    jobs = queue_ready(scheduler, "f", *"aaaabbcc")
    batches = [scheduler.next_batch(3)[1] for _ in range(3)]
    assert ["".join(one.model for one in batch) for batch in batches] == ["abc", "abc", "aa"]
    ran = [one for batch in batches for one in batch if one.model == "a"]
    assert ran == jobs[:4]
    assert not scheduler.has_work


def test_half_of_the_jobs_run_while_the_others_wait() -> None:
    """Halves down to a few, the limit before that; what comes meanwhile counts too."""
    scheduler = Scheduler(LARGE, LARGE, few=3)
    queue_ready(scheduler, "f", *"abcdefghij")
    assert list_models(scheduler.next_batch(100)) == ("f", "abcde")
    queue_ready(scheduler, "f", *"klmnopqrs")
    assert list_models(scheduler.next_batch(100)) == ("f", "fghijkl")
    assert [list_models(scheduler.next_batch(3)) for _ in range(3)] == [("f", "mno"), ("f", "pqr"), ("f", "s")]
    assert not scheduler.has_work


def test_waiting_jobs_are_counted_by_what_they_wait_for() -> None:
    """For a load, and for a step, parked or not, of any client; those of a batch that was taken wait no more."""
    scheduler = Scheduler(LARGE, LARGE)
    assert scheduler.count_queued() == (0, 0)
    for model in "xxy":
        scheduler.add_waiting(make_job(model))
    queue_ready(scheduler, "f", *"aab")
    queue_ready(scheduler, "g", *"c")
    scheduler.add_ready("g", make_job("c", client="desk"))
    scheduler.park("g")
    assert scheduler.count_queued() == (3, 5)
    scheduler.next_batch(100)
    scheduler.take_waiting(ModelName("x"))
    assert scheduler.count_queued() == (1, 2)


def test_a_parked_group_waits_and_then_runs_whole() -> None:
    """Its jobs are counted as far as is asked; the batch after it is of all of them, and the next of half again."""
    scheduler = Scheduler(LARGE, LARGE, few=1)
    queue_ready(scheduler, "f", *"aab")
    scheduler.park("f")
    queue_ready(scheduler, "f", *"bbbccc")
    assert not scheduler.has_work
    assert scheduler.count_parked("f", 4) >= 4
    assert scheduler.count_parked("f", 100) == 9
    assert scheduler.count_parked("g", 100) == 0
    scheduler.unpark("f", whole=True)
    assert len(scheduler.next_batch(100)[1]) == 9
    queue_ready(scheduler, "f", *"aaaa")
    assert len(scheduler.next_batch(100)[1]) == 2
    scheduler.park("g")
    scheduler.unpark("g", whole=True)
    queue_ready(scheduler, "g", *"aaaa")
    assert [len(scheduler.next_batch(100)[1]) for _ in range(2)] == [1, 2]


def test_groups_take_turns() -> None:
    """A family with much to do gives way after each batch; a group that is done is gone."""
    scheduler = Scheduler(LARGE, LARGE)
    queue_ready(scheduler, "f", *"aaaa")
    queue_ready(scheduler, "g", "b")
    assert [list_models(scheduler.next_batch(2)) for _ in range(3)] == [("f", "aa"), ("g", "b"), ("f", "aa")]
    assert not scheduler.has_work


def test_who_waited_for_a_model_is_handed_out_once_without_the_done() -> None:
    """A loaded model's jobs leave the waiting room together; those cancelled meanwhile are not among them."""
    scheduler = Scheduler(LARGE, LARGE)
    jobs = [make_job("a"), make_job("a"), make_job("b")]
    for one in jobs:
        scheduler.admit(one)
        scheduler.add_waiting(one)
    scheduler.finish(jobs[0])
    assert not scheduler.has_work
    assert scheduler.take_waiting(ModelName("a")) == [jobs[1]]
    assert scheduler.take_waiting(ModelName("a")) == []
    assert list(scheduler.open_jobs()) == [jobs[2]]


def test_done_ready_jobs_are_handed_out_so_that_their_leases_end() -> None:
    """A cancelled job comes out in its turn, marked done; finishing it again changes nothing."""
    scheduler = Scheduler(LARGE, LARGE)
    first, second = queue_ready(scheduler, "f", "a", "b")
    assert scheduler.finish(first)
    assert list(scheduler.open_jobs()) == [second]
    assert scheduler.next_batch(8) == ("f", [first, second])
    assert scheduler.finish(first) is False
    assert len(scheduler) == 1


def test_late_waiting_jobs_are_named_once() -> None:
    """Deadlines at or before now have passed; the others wait on, and ready jobs are not looked at."""
    scheduler = Scheduler(LARGE, LARGE)
    jobs = [make_job("a", 1.0), make_job("a", 3.0), make_job("b", 2.0), make_job("c", 1.0)]
    for one in jobs:
        scheduler.admit(one)
    for one in jobs[:3]:
        scheduler.add_waiting(one)
    scheduler.add_ready("f", jobs[3])
    assert scheduler.take_expired(0.5) == []
    assert scheduler.take_expired(2.0) == [jobs[0], jobs[2]]
    assert scheduler.take_expired(2.0) == []
    assert scheduler.take_waiting(ModelName("a")) == [jobs[1]]


def test_cancelled_jobs_do_not_pile_up_behind_a_slow_load() -> None:
    """Clients that give up and ask again leave nothing in memory once the deadlines have been looked at."""
    scheduler = Scheduler(LARGE, LARGE)
    for _ in range(100):
        one = make_job("a")
        scheduler.admit(one)
        scheduler.add_waiting(one)
        scheduler.finish(one)
    assert scheduler.take_expired(0.0) == []
    assert repr(scheduler) == "<Scheduler 0 jobs, 0 models awaited, 0 groups ready>"


def test_a_job_says_what_it_is() -> None:
    """The picture of a job in logs."""
    one = make_job("au/NSW1.mar", ident=17)
    one.cache = CacheResult.MISS
    assert repr(one) == "<Job 17 au/NSW1.mar miss>"


class SchedulerMachine(RuleBasedStateMachine):
    """A worker at random: every admitted job is waited for or handed out, and finished, exactly once."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(per_model=5, per_worker=12)
        self.waiting: list[Job] = []
        self.queued: list[Job] = []
        self.running: list[Job] = []
        self.handed: set[int] = set()
        self.now = 0.0

    @property
    def unfinished(self) -> list[Job]:
        """Everyone who has no answer yet."""
        return [one for one in (*self.waiting, *self.queued, *self.running) if not one.done]

    @rule(model=strategies.sampled_from("abcd"), patience=strategies.integers(1, 5), hit=strategies.booleans())
    def arrive(self, model: str, patience: int, hit: bool) -> None:
        """Refused exactly when a bound is reached."""
        one = make_job(model, self.now + patience)
        same = sum(other.model == model for other in self.unfinished)
        full = same >= 5 or len(self.unfinished) >= 12
        try:
            self.scheduler.admit(one)
        except QueueFull:
            assert full
            return
        assert not full
        if hit:
            self._queue(one)
        else:
            self.scheduler.add_waiting(one)
            self.waiting.append(one)

    def _queue(self, one: Job) -> None:
        self.scheduler.add_ready("f" if one.model in "ab" else "g", one)
        self.queued.append(one)

    @rule(model=strategies.sampled_from("abcd"))
    def load(self, model: str) -> None:
        """The load ends: all that waited and are not done may run."""
        expected = [one for one in self.waiting if one.model == model and not one.done]
        assert self.scheduler.take_waiting(ModelName(model)) == expected
        self.waiting = [one for one in self.waiting if one.model != model]
        for one in expected:
            self._queue(one)

    @precondition(lambda self: self.queued)
    @rule(limit=strategies.integers(1, 6))
    def step(self, limit: int) -> None:
        """A batch has one group, at most `limit` jobs, and none that was handed out before."""
        group, batch = self.scheduler.next_batch(limit)
        assert 0 < len(batch) <= limit
        assert {("f" if one.model in "ab" else "g") for one in batch} == {group}
        for one in batch:
            self.queued.remove(one)
            assert id(one) not in self.handed
            self.handed.add(id(one))
            self.running.append(one)

    @precondition(lambda self: self.waiting or self.queued or self.running)
    @rule(pick=strategies.integers(0, 100))
    def end(self, pick: int) -> None:
        """An answer, or a client that left: the first end counts."""
        everyone = [*self.waiting, *self.queued, *self.running]
        one = everyone[pick % len(everyone)]
        was_done = one.done
        assert self.scheduler.finish(one) is not was_done
        assert one.done

    @rule(seconds=strategies.integers(1, 3))
    def later(self, seconds: int) -> None:
        """Late ones are named, to be refused."""
        self.now += seconds
        late = self.scheduler.take_expired(self.now)
        assert sorted(map(id, late)) == sorted(
            id(one) for one in self.waiting if one.deadline <= self.now and not one.done
        )
        for one in late:
            assert self.scheduler.finish(one)
        self.waiting = [one for one in self.waiting if not one.done]

    @invariant()
    def counts_agree(self) -> None:
        """The total is everyone without an answer; there is work exactly when jobs are queued."""
        assert len(self.scheduler) == len(self.unfinished)
        assert self.scheduler.has_work == bool(self.queued)
        listed = [one for one in (*self.waiting, *self.queued) if not one.done]
        assert sorted(map(id, self.scheduler.open_jobs())) == sorted(map(id, listed))

    def teardown(self) -> None:
        """When all have ended, all counts are back at zero."""
        while self.scheduler.has_work:
            self.scheduler.next_batch(6)
        for one in self.unfinished:
            self.scheduler.finish(one)
        assert (len(self.scheduler), self.scheduler._counts) == (0, {})


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=50, stateful_step_count=50, deadline=None)


def test_jobs_that_are_put_back_run_before_others_of_their_models_and_after_other_groups() -> None:
    """Their batch had no time for them: they keep their order."""
    scheduler = Scheduler(LARGE, LARGE, few=8)
    queue_ready(scheduler, "f", *"abc")
    group, batch = scheduler.next_batch(8)
    later = queue_ready(scheduler, "f", "a")
    queue_ready(scheduler, "g", "x")
    scheduler.put_back(group, batch[1:])
    assert list_models(scheduler.next_batch(8)) == ("f", "bca")
    assert later[0] not in batch
    assert list_models(scheduler.next_batch(8)) == ("g", "x")
    empty = Scheduler(LARGE, LARGE, few=8)
    queue_ready(empty, "f", *"ab")
    group, batch = empty.next_batch(8)
    queue_ready(empty, "g", "x")
    empty.put_back(group, batch)
    assert [list_models(empty.next_batch(8)) for _ in range(2)] == [("g", "x"), ("f", "ab")]


def test_a_parked_group_keeps_its_jobs_and_makes_no_batch() -> None:
    """Those that come meanwhile wait with the others; a group that has none left is forgotten."""
    scheduler = Scheduler(LARGE, LARGE, few=8)
    jobs = queue_ready(scheduler, "f", *"ab")
    scheduler.park("f")
    assert not scheduler.has_work
    jobs += queue_ready(scheduler, "f", "c")
    assert not scheduler.has_work
    assert list(scheduler.open_jobs()) == jobs
    scheduler.unpark("f")
    assert list_models(scheduler.next_batch(8)) == ("f", "abc")
    scheduler.park("f")
    scheduler.unpark("f")
    assert not scheduler.has_work
