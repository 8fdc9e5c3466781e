"""Runs the requests for rows of one family: one forward for many models. On the step thread.

A batch takes as many rows as a slice of time has room for; what is left runs in a later step, after other groups. A
request that is long by itself runs apart, see `server.worker.long_jobs`.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from handlers.base import Float32
from handlers.kinds import RowModel, run_row_on_cpu
from server.metrics import WorkerMetrics
from server.worker.engine.accelerator import DeviceEngine
from server.worker.engine.cpu import Engine
from server.worker.long_jobs import LongJobs, Pace, RunCounts, answer_rows
from server.worker.replies import Replies, get_slot
from server.worker.resident_models import ResidentModels
from server.worker.scheduler import Job, Scheduler


class RowBatches:
    """See the module."""

    def __init__(
        self,
        replies: Replies,
        residents: ResidentModels,
        scheduler: Scheduler,
        engine: Engine | DeviceEngine,
        long: LongJobs,
        metrics: WorkerMetrics,
    ) -> None:
        self._replies, self._residents, self._scheduler = replies, residents, scheduler
        self._engine, self._long, self._metrics = engine, long, metrics

    def __repr__(self) -> str:
        """For example `<RowBatches on <Engine ...>>`."""
        return f"<RowBatches on {self._engine!r}>"

    def run(self, group: str, jobs: list[Job], now: float) -> None:
        """Answer the jobs, or queue those again that the slice has no room for.

        Jobs that are dealt with leave `jobs`, so that they do not fail with the rest. Raises whatever a forward raises.
        """
        began = time.perf_counter()
        pace = self._long.pace(self._residents.rows[get_slot(jobs[0])])
        running, calls = self._take(group, jobs, pace, now)
        jobs[:] = running
        if not running:
            return
        family, parts = self._residents.rows[get_slot(running[0])].family, [call.rows for call in calls]
        started = time.perf_counter()
        offsets = [get_slot(job).offset for job in running]
        models = {job.model for job in running}
        self._long.pulse.begin_batch(models)
        try:
            answers = self._residents.with_memory(lambda: self._engine.run(family, offsets, parts))
        finally:
            self._long.pulse.end_batch()
        ended = time.perf_counter()
        rows = sum(map(len, parts))
        pace.ran(rows, ended - started)
        for job, call, answer in zip(running, calls, answers, strict=True):
            self._replies.encode(job, call.encode, answer, now, ended - started)
        self._metrics.count_batch(rows, len(models))
        self._metrics.count_step(started - began, ended - started, time.perf_counter() - ended)

    def _take(self, group: str, jobs: Sequence[Job], pace: Pace, now: float) -> tuple[list[Job], list[Any]]:
        """The jobs that one slice has room for, and their decoded requests."""
        running, calls, room = list[Job](), list[Any](), pace.slice_rows
        for at, job in enumerate(jobs):
            model = self._residents.rows[get_slot(job)]
            if job.call is None and self._long.is_long_to_decode(job, pace, model.codec.quick_bytes):
                self._run_apart(job, model, None, pace, now)
                continue
            call = job.call or self._replies.decode(job, model.codec.decode)
            if call is None:
                continue
            if self._long.is_long_to_run(call, pace):
                self._run_apart(job, model, call, pace, now)
                continue
            if running and len(call.rows) > room:
                job.call = call
                self._scheduler.put_back(group, jobs[at:])
                break
            room -= len(call.rows)
            if not len(call.rows):  # JSON Lines of which none is valid
                self._replies.encode(job, call.encode, call.rows, now, 0.0)
                continue
            running.append(job)
            calls.append(call)
        return running, calls

    # --- long requests ----------------------------------------------------------------------------------------------

    def _run_apart(self, job: Job, model: RowModel, call: Any, pace: Pace, now: float) -> None:
        """Run one long request in slices; `call` is None where it is not decoded yet."""
        counts, started = RunCounts(), time.perf_counter()

        def end(outcome: Any) -> None:
            self._long.end_job(self._replies, job, outcome, now, time.perf_counter() - started)
            counts.count(self._metrics)

        self._long.start([job], answer_rows(job, model, self._make_run(job, model), call, pace, counts), end)

    def _make_run(self, job: Job, model: RowModel) -> Callable[[Float32], Float32]:
        """What runs a slice of a long request's rows, called on a thread of `long_jobs`.

        On the CPU it is that thread, with a copy of the row, because a slot may move. On a device it is the step
        thread, between two steps: only that thread may use the device.
        """
        family = model.family
        if isinstance(self._engine, Engine):
            row = self._engine.pool.read(get_slot(job).offset, family.row_floats * 4)
            return lambda x: run_row_on_cpu(family, row, x)

        def run(x: Float32) -> Float32:
            found: Future[Float32] = Future()
            self._long.call_on_step_thread(lambda: self._fulfil(found, job, model, x))
            return found.result(max(0.0, job.deadline - time.monotonic()))

        return run

    def _fulfil(self, found: "Future[Float32]", job: Job, model: RowModel, x: Float32) -> None:
        """Run a slice of a leased model's rows on the device."""
        if job.slot is None:  # the worker has given the job up
            found.set_exception(TimeoutError())
            return
        offset = job.slot.offset
        try:
            (answer,) = self._residents.with_memory(lambda: self._engine.run(model.family, [offset], [x]))
        except Exception as error:  # whatever a forward raises is the outcome of the job
            found.set_exception(error)
        else:
            found.set_result(answer)
