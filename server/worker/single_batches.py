"""Runs the requests for one model that runs alone, together where the model allows it. On the step thread.

Requests that are long run apart, see `server.worker.long_jobs`. A model whose run overran is refused from then on.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from handlers.errors import Overran, RunFailed
from handlers.kinds import SingleModel
from model_store.names import ModelName
from server.errors import Refused, Situation
from server.metrics import WorkerMetrics
from server.worker.long_jobs import LongJobs, Outcome, RunCounts, answer_alone
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
        metrics: WorkerMetrics,
        *,
        quarantine: Callable[[ModelName, Overran], None],
        wake: Callable[[], None],
    ) -> None:
        self._replies, self._residents, self._scheduler = replies, residents, scheduler
        self._long, self._metrics = long, metrics
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
        asked = [(job, call) for job in jobs if (call := self._replies.decode(job, model.codec.decode)) is not None]
        if not asked:
            return
        calls = [call for _, call in asked]
        if self._long.is_long_alone(model, calls):
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
        self._long.ran_alone(model, calls, ended - started)
        self._metrics.count_batch(sum(call.n for call in calls), 1)
        for (job, call), outputs in zip(asked, answers, strict=True):
            if isinstance(outputs, RunFailed):
                self._replies.refuse(job, Refused(Situation.MODEL_FAILED, str(outputs)))
            else:
                self._replies.encode(job, call.encode, outputs, now, ended - started)
        self._metrics.count_step(started - began, ended - started, time.perf_counter() - ended)

    def _run_apart(self, group: str, model: SingleModel, asked: Sequence[tuple[Job, Any]], now: float) -> None:
        """Run long requests in slices; a call is None where it is not decoded yet."""
        jobs, calls = [job for job, _ in asked], [call for _, call in asked]
        loop, counts, started = asyncio.get_running_loop(), RunCounts(), time.perf_counter()

        def note(calls: Sequence[Any], seconds: float) -> None:
            loop.call_soon_threadsafe(self._long.ran_alone, model, calls, seconds)

        def end(outcomes: list[Outcome] | Exception) -> None:
            took = time.perf_counter() - started
            counts.count(self._metrics)
            self._scheduler.unpark(group)
            if isinstance(outcomes, Overran):
                self._quarantine(jobs[0].model, outcomes)
            for i, job in enumerate(jobs):
                outcome = outcomes if isinstance(outcomes, Exception) else outcomes[i]
                self._long.end_job(self._replies, job, outcome, now, took)
            if self._scheduler.has_work:
                self._wake()

        self._scheduler.park(group)  # a model that runs alone runs one batch at a time
        self._long.start(jobs, answer_alone(jobs, model, calls, note, counts), end)
