"""Runs the requests for one model that runs alone, together where the model allows it. On the step thread.

Requests that are long run apart, see `server.worker.long_jobs`: those that say so themselves, and those with more
numbers than were quick before. A model whose run overran is refused from then on.
"""

import asyncio
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from handlers.base import Single
from handlers.codecs.codec import Encoded
from handlers.codecs.joint import JointModel
from handlers.errors import Overran, RequestError, RunFailed
from handlers.kinds import SingleModel
from model_store.names import ModelName
from server.errors import Refused, Situation
from server.worker.engine.device_errors import ending_if_lost
from server.worker.long_jobs import LongJobs, Outcome, RunCounts
from server.worker.replies import Replies, get_slot
from server.worker.resident_models import ResidentModels
from server.worker.scheduler import Job, Scheduler


class SingleBatches:
    """See the module. `quarantine` is told of a model that overran; `wake` schedules a step."""

    def __init__(
        self,
        replies: Replies,
        residents: ResidentModels,
        scheduler: Scheduler,
        long: LongJobs,
        *,
        quarantine: Callable[[ModelName, Overran], None],
        wake: Callable[[], None],
    ) -> None:
        self._replies, self._residents, self._scheduler = replies, residents, scheduler
        self._long = long
        self._quick: WeakKeyDictionary[Single | JointModel, int] = WeakKeyDictionary()  # numbers that took < `long_s`
        self._quarantine, self._wake = quarantine, wake

    def __repr__(self) -> str:
        """For example `<SingleBatches of <ResidentModels ...>>`."""
        return f"<SingleBatches of {self._residents!r}>"

    def run(self, group: str, jobs: Sequence[Job], now: float) -> None:
        """Answer the jobs, or start a long run of them. Raises Overran, and whatever a model raises."""
        model = self._residents.singles[get_slot(jobs[0])]
        if any(len(job.request.body) > model.codec.quick_bytes for job in jobs):
            self._run_apart(group, model, [(job, None) for job in jobs], now)
            return
        began = time.perf_counter()
        asked = list[tuple[Job, Any]]()
        for job in jobs:
            call = self._replies.decode(job, model.codec.decode)
            if call is not None and call.n:
                asked.append((job, call))
            elif call is not None:  # what the model takes is asked, for which it need not run
                self._replies.encode(job, call.encode, {}, now, 0.0)
        if not asked:
            return
        calls = [call for _, call in asked]
        if self._is_long(model, calls):
            self._run_apart(group, model, asked, now)
            return
        started = time.perf_counter()
        name = asked[0][0].model
        try:
            with self._long.pulse.noting(name, "alone"):
                answers = self._residents.with_memory(lambda: model.single.run_all([call.feeds for call in calls]))
        except Overran as overran:
            self._quarantine(name, overran)
            raise
        ended = time.perf_counter()
        self._learn(model, calls, ended - started)
        self._replies.count_batch(sum(call.n for call in calls), 1)
        self._answer(asked, answers, (began, started, ended), now)
        self._replies.count_step(started - began, ended - started, time.perf_counter() - ended)

    def _answer(
        self, asked: Sequence[tuple[Job, Any]], answers: Iterable[Any], times: tuple[float, float, float], now: float
    ) -> None:
        """Answer the jobs of a batch. `times`: when it began, was decoded and had run."""
        _, started, ended = times
        for (job, call), outputs in zip(asked, answers, strict=True):
            if job.times is not None:
                job.times.note_batch(*times, (sum(each.n for _, each in asked), 1))
            if isinstance(outputs, RunFailed):
                self._replies.refuse(job, Refused(Situation.MODEL_FAILED, str(outputs)))
            else:
                self._replies.encode(job, call.encode, outputs, now, ended - started)

    def _is_long(self, model: SingleModel, calls: Sequence[Any]) -> bool:
        """Whether these requests for a model that runs alone may take long together; so does what is not known."""
        if model.unbounded:
            return True
        known = [call.seconds for call in calls if call.seconds is not None]
        return sum(known) > self._long.long_s if known else _count_numbers(calls) > self._quick.get(model.single, 0)

    def _learn(self, model: SingleModel, calls: Sequence[Any], seconds: float) -> None:
        """Learn from a run of these requests."""
        numbers, quick = _count_numbers(calls), self._quick.get(model.single, 0)
        self._quick[model.single] = max(quick, numbers) if seconds < self._long.long_s else min(quick, numbers // 2)

    def _run_apart(
        self, group: str, model: SingleModel, asked: Sequence[tuple[Job, Any]], now: float, *, again: bool = False
    ) -> None:
        """Run long requests in slices; a call is None where it is not decoded yet.

        If the device is out of memory it is freed as for other steps, and they run once more: `again`.
        """
        jobs, calls = [job for job, _ in asked], [call for _, call in asked]
        loop, counts, started = asyncio.get_running_loop(), RunCounts(), time.perf_counter()

        def note(calls: Sequence[Any], seconds: float) -> None:
            loop.call_soon_threadsafe(self._learn, model, calls, seconds)

        def end(outcomes: list[Outcome] | Exception) -> None:
            took = time.perf_counter() - started
            counts.count(self._replies)
            self._scheduler.unpark(group)
            if isinstance(outcomes, torch.OutOfMemoryError) and not again:
                self._residents.free_memory(str(outcomes))
                self._run_apart(group, model, asked, now, again=True)
                return
            if isinstance(outcomes, Overran):
                self._quarantine(jobs[0].model, outcomes)
            for i, job in enumerate(jobs):
                outcome = outcomes if isinstance(outcomes, Exception) else outcomes[i]
                if job.times is not None:
                    job.times.note_apart(started, started + took, counts.decode_s, counts.encode_s)
                self._long.end_job(self._replies, job, outcome, now, took)
            if self._scheduler.has_work:
                self._wake()

        self._scheduler.park(group)  # a model that runs alone runs one batch at a time
        self._long.start(jobs, answer_alone(jobs, model, calls, note, counts), end)


def answer_alone(
    jobs: Sequence[Job],
    model: SingleModel,
    calls: Sequence[Any],
    note: Callable[[Sequence[Any], float], None],
    counts: RunCounts,
) -> Generator[None, None, list[Outcome]]:
    """Slices that answer requests for a model that runs alone; a call is None where it is not decoded yet.

    `note` learns what the run took. Raises Overran, which is the outcome of all.
    """
    outcomes: list[Any] = []
    for job, call in zip(jobs, calls, strict=True):
        try:
            with counts.timing("decode_s"):
                outcomes.append(_decode(job, model) if call is None else call)
        except RequestError as error:
            outcomes.append(error)
        yield
    asked = [call for call in outcomes if not isinstance(call, Exception) and call.n]
    started = time.perf_counter()
    with counts.timing("forward_s"), ending_if_lost():
        answers = iter(model.single.run_all([call.feeds for call in asked]) if asked else ())
    note(asked, time.perf_counter() - started)
    counts.rows += sum(call.n for call in asked)
    yield
    ended: list[Outcome] = []
    for each in outcomes:
        with counts.timing("encode_s"):
            ended.append(each if isinstance(each, Exception) else _encode(each, next(answers) if each.n else {}))
        yield
    return ended


def _decode(job: Job, model: SingleModel) -> Any:
    request = job.request
    return model.codec.decode(request.body, request.content_type, request.accept)


def _count_numbers(calls: Sequence[Any]) -> int:
    return sum(int(call.numbers) for call in calls)


def _encode(call: Any, answer: Any) -> Outcome:
    if isinstance(answer, RunFailed):
        return answer
    try:
        encoded: Encoded = call.encode(answer)
    except RunFailed as failed:
        return failed
    return encoded
