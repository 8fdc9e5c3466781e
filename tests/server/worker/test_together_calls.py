"""A call for many models in the worker: a job for each item, one response, bounded answers, cancelled as a whole."""

import json
from array import array
from collections.abc import Sequence
from typing import Any, cast

import pytest

from model_store.names import ModelName
from server.errors import Refused, Situation
from server.ipc.frames import CacheResult, Request, Tier, WireError
from server.ipc.packed import TableRow
from server.ipc.together import AskedTogether, read_answered, write_asked
from server.worker.scheduler import Job
from server.worker.together_calls import TogetherCall


class Steps:
    """Takes jobs, and refuses those of some models at once."""

    def __init__(self, refused: str = "", resident: str = "") -> None:
        self.jobs: list[Job] = []
        self._refused, self.resident = refused, resident

    def submit(self, request: Request, origin: Any) -> Job:
        """Accept or refuse a request, as the step loop does."""
        job = Job(request, ModelName(request.model), origin, request.arrived_ns / 1e9, request.deadline_ns / 1e9)
        if request.model == self._refused:
            job.done = True
            origin.refuse(job, Refused(Situation.OVERLOADED, "full"))
        else:
            self.jobs.append(job)
        return job

    def submit_resident(self, requests: Sequence[Request], origin: Any) -> list[Job | None]:
        """Accept those of the resident models."""
        return [self.submit(each, origin) if each.model in self.resident else None for each in requests]

    def cancel(self, job: Job) -> None:
        """Give a job up."""
        job.done = True


def make_call(
    most_bytes: int = 1000, has_room: Any = lambda: True
) -> tuple[TogetherCall, list[tuple[Situation, bytes]]]:
    """A call for three models, and where its response goes."""
    texts = [b'{"n":%d}' % i for i in range(3)]
    head = AskedTogether(["a", "b", "c"], [len(each) for each in texts], b'{"seed":1}', most_bytes)
    body = write_asked(head, texts)
    ended: list[tuple[Situation, bytes]] = []
    request = Request(7, 9 * 10**9, "", "together", "together", len(body), body, 5 * 10**9, client="desk")
    return TogetherCall(request, lambda situation, body: ended.append((situation, body)), has_room), ended


def answer(call: TogetherCall, job: Job, body: bytes) -> None:
    """A job is answered."""
    job.done = True
    call.answer(job, "text", body, queue_s=0.001, inference_s=0.002)


def test_items_are_jobs_of_their_own() -> None:
    """Each has the request that it would be alone, with the call's times and client; the last answer ends the call."""
    call, ended = make_call()
    steps = Steps(refused="b")
    call.submit(steps)
    assert [(job.model, json.loads(call.wrap_instance(job.instance))) for job in steps.jobs] == [
        (name, {"instances": [{"n": n}], "configuration": {"seed": 1}}) for name, n in (("a", 0), ("c", 2))
    ]
    assert {(job.arrived, job.deadline, job.request.client) for job in steps.jobs} == {(5.0, 9.0, "desk")}
    answer(call, steps.jobs[1], b"third")
    assert not ended
    answer(call, steps.jobs[0], b"first")
    ((situation, body),) = ended
    found = [(item.situation, bytes(cast("memoryview", told))) for item, told in read_answered(body, 3)]
    assert situation is Situation.OK
    assert found == [(0, b"first"), (Situation.OVERLOADED, b'{"message":"full"}'), (0, b"third")]


@pytest.mark.parametrize("has_room", [True, False])
def test_answers_are_bounded(has_room: bool) -> None:
    """Too many bytes for the call, or for the worker: the call ends at once, and further answers change nothing."""
    call, ended = make_call(100_000 if has_room else 10_000_000, lambda: has_room)
    steps = Steps()
    call.submit(steps)
    answer(call, steps.jobs[0], b"x" * 70_000)
    answer(call, steps.jobs[1], b"x" * 70_000)
    ((situation, body),) = ended
    assert situation is (Situation.TOO_LARGE if has_room else Situation.OVERLOADED)
    assert ("max_forecasts_bytes" if has_room else "max_inflight_bytes") in json.loads(body)["message"]
    answer(call, steps.jobs[2], b"")
    assert len(ended) == 1


def test_a_cancelled_call_is_not_worked_for() -> None:
    """Its jobs are given up, and nothing is sent."""
    call, ended = make_call()
    steps = Steps()
    call.submit(steps)
    answer(call, steps.jobs[0], b"x")
    call.cancel(steps)
    assert [job.done for job in steps.jobs] == [True, True, True]
    call.refuse(steps.jobs[1], Refused(Situation.DEADLINE, "late"))
    assert not ended


def test_a_body_that_is_none_breaks_the_wire() -> None:
    """Only a front of this version speaks this."""
    with pytest.raises(WireError):
        TogetherCall(Request(1, 0, "", "", "", 3, b"abc"), lambda *_: None)


def test_items_of_resident_models_are_taken_at_once() -> None:
    """They are jobs before the first slice of time is over; the others follow in slices, each in its own place."""
    call, ended = make_call()
    steps = Steps(resident="ac")
    assert not call.submit(steps, lambda: True)
    assert [(job.model, job.request.id) for job in steps.jobs] == [("a", 0), ("c", 2), ("b", 1)]
    for job in steps.jobs:
        answer(call, job, job.model.encode())
    ((_, body),) = ended
    assert [bytes(cast("memoryview", told)) for _, told in read_answered(body, 3)] == [b"a", b"b", b"c"]


def test_items_that_ran_together_say_what_happened_to_each() -> None:
    """Between two hits one whose model was loaded: it has its own cache result and times, and the hits share theirs."""
    call, ended = make_call()
    steps = Steps()
    call.submit(steps)
    for job in steps.jobs:
        job.done, job.cache = True, CacheResult.HIT
    steps.jobs[1].cache, steps.jobs[1].tier, steps.jobs[1].load_s = CacheResult.MISS, Tier.STORE, 0.25
    call.answer_items(steps.jobs, "text", [b"1", b"2", b"3"], 6.0, 0.001)
    ((_, body),) = ended
    found = [shared for shared, _ in read_answered(body, 3)]
    assert [(each.cache, each.tier, each.queue_us, each.load_us, each.inference_us) for each in found] == [
        (CacheResult.HIT, Tier.NONE, 1_000_000, 0, 1000),
        (CacheResult.MISS, Tier.STORE, 750_000, 250_000, 1000),
        (CacheResult.HIT, Tier.NONE, 1_000_000, 0, 1000),
    ]
    assert found[0] is found[2]


@pytest.mark.parametrize("lengths", [(2, 2, 2), (1, 3, 2)])
def test_rows_of_a_table_are_read_when_they_are_wanted(lengths: tuple[int, ...]) -> None:
    """In any order, whether they are of one length or not; a row that is asked for twice is the same."""
    rows = [TableRow("s", None, "f", (), [array("f", [i] * n).tobytes()]) for i, n in enumerate(lengths)]
    body = write_asked(AskedTogether(["a", "b", "c"], [], b"{}", 1000), rows)
    call = TogetherCall(Request(7, 0, "", "", "", len(body), body), lambda *_: None)
    steps = Steps()
    call.submit(steps)
    for job in [*reversed(steps.jobs), steps.jobs[1]]:
        row = call.get_instance(job)
        assert isinstance(row, TableRow)
        assert [bytes(each) for each in row.series] == rows[job.request.id].series


def test_items_are_taken_in_slices_of_time() -> None:
    """One item for each slice where time is always over; a call that is cancelled in between takes no more."""
    call, ended = make_call()
    steps = Steps()
    assert [call.submit(steps, lambda: True) for _ in range(3)] == [True, True, False]
    assert [job.model for job in steps.jobs] == ["a", "b", "c"]
    for job in steps.jobs:
        answer(call, job, b"x")
    assert len(ended) == 1
    other, _ = make_call()
    steps = Steps()
    assert other.submit(steps, lambda: True)
    other.cancel(steps)
    assert not other.submit(steps)
    assert [job.done for job in steps.jobs] == [True]
