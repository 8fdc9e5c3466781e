"""Runs the requests for rows of one family: one forward for many models. On the step thread.

A batch takes as many rows as a slice of time has room for; what is left runs in a later step, after other groups. A
request that is long by itself runs apart, see `server.worker.long_jobs`: what is long is decided before it runs, by the
estimated work of a row (`handlers.work`), the pace that was measured, and the numbers that the request asks for.
"""

import math
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple

import msgspec
import numpy as np

from handlers.base import Float32
from handlers.codecs.codec import NUMBER_S, DecodedCall, Encoded
from handlers.codecs.deepar_schema import MAX_ROWS
from handlers.codecs.forecast_items import encode_groups
from handlers.codecs.tensors import count_up_to
from handlers.kinds import RowModel, run_row_on_cpu
from handlers.kinds.row_work import row_work
from handlers.work import CALL_S, Work
from server.worker.engine.accelerator import DeviceEngine
from server.worker.engine.batch_inputs import LaneInputs, ListedInputs, allocate_rows
from server.worker.engine.cpu import Engine
from server.worker.long_jobs import LONG_S, DeadlinePassed, LongJobs, RunCounts
from server.worker.replies import Replies, get_slot
from server.worker.resident_models import ResidentModels
from server.worker.scheduler import Job, Scheduler
from server.worker.together_batches import SHORT_NUMBERS, JobBlock, decode_calls

DECODE_NUMBERS = 500_000  #: inputs of more numbers are long to decode; so is a body of more than `quick_bytes`
MOST_SLICE_ROWS = 1 << 20  #: more than any request has
MOST_ROWS_AT_ONCE = 64  #: rows of a slice of one model: more of them are no faster
MOST_PACES = 1024  #: families whose pace is remembered: an archive's author chooses its family
KEPT = 0.7  #: weight of the pace that was measured before
LEAST_INSTANCE_BYTES = 16  #: of an instance in a body: `{"start":"2024"}`

Inputs = ListedInputs | LaneInputs
Encoder = Callable[[Float32], Encoded]


class Pace:
    """How long a row of one family takes on this machine: the estimate at first, then what was measured."""

    def __init__(self, work: Work, slice_s: float, long_s: float = LONG_S) -> None:
        self.work, self._slice_s = work, slice_s
        self._fixed_s = work.calls * CALL_S / 2
        self._row_s = max(1e-6, work.seconds - work.calls * CALL_S)
        #: Bodies up to so many bytes have too few instances to be long to decode.
        self.quick_bytes: float = math.inf
        if work.given * MAX_ROWS > DECODE_NUMBERS:
            self.quick_bytes = LEAST_INSTANCE_BYTES * DECODE_NUMBERS // work.given
        self._has_short_slices = self._fixed_s + slice_s + SHORT_NUMBERS * NUMBER_S <= long_s
        self._follow()

    def __repr__(self) -> str:
        """For example `<Pace 0.120 ms a row>`."""
        return f"<Pace {self._row_s * 1e3:.3f} ms a row>"

    def seconds(self, rows: int) -> float:
        """What so many rows are expected to take."""
        return self._fixed_s * -(-rows // self.slice_rows) + rows * self._row_s

    def ran(self, rows: int, seconds: float) -> None:
        """Learn from a forward of so many rows."""
        measured = max(1e-6, seconds - self._fixed_s) / rows
        self._row_s = KEPT * self._row_s + (1 - KEPT) * measured
        self._follow()

    def _follow(self) -> None:
        """What follows from the time of a row; read for each request, so kept."""
        #: Rows of a slice: calls of torch are shared by them, so these do not count.
        self.slice_rows = max(1, int(min(self._slice_s / self._row_s, MOST_SLICE_ROWS)))
        #: So many rows and fewer are not long to run, with an answer of SHORT_NUMBERS.
        self.short_rows = self.slice_rows if self._has_short_slices else 0


class RowBatches:
    """See the module."""

    def __init__(
        self,
        replies: Replies,
        residents: ResidentModels,
        scheduler: Scheduler,
        engine: Engine | DeviceEngine,
        long: LongJobs,
    ) -> None:
        self._replies, self._residents, self._scheduler = replies, residents, scheduler
        self._engine, self._long = engine, long
        self._noted = long.pulse.batch
        self._paces: dict[str, Pace] = {}

    def __repr__(self) -> str:
        """For example `<RowBatches on <Engine ...>>`."""
        return f"<RowBatches on {self._engine!r}>"

    def run(self, group: str, jobs: list[Job], now: float) -> None:
        """Answer the jobs, or queue those again that the slice has no room for.

        Jobs that are dealt with leave `jobs`, so that they do not fail with the rest. Raises whatever a forward raises.
        """
        began = time.perf_counter()
        model = self._residents.rows[get_slot(jobs[0])]
        pace, family = self.pace(model), model.family
        inputs: Any = self._engine.open_batch(family)  # either engine takes what it gave
        taken = self._take(group, jobs, pace, inputs, now)
        jobs[:] = taken.list_jobs()
        if not jobs:
            return
        started = time.perf_counter()
        offsets = taken.list_offsets()
        models = {job.model for job in jobs}
        self._note_batch(models)
        try:
            answers = self._residents.with_memory(lambda: self._engine.run(family, offsets, inputs))
        finally:  # a worker that ends inside leaves the names for the supervisor
            self._noted[0] = 0
        ended = time.perf_counter()
        rows = inputs.rows
        pace.ran(rows, ended - started)
        for job in taken.alone:  # items of calls are not traced
            if job.times is not None:
                job.times.note_batch(began, started, ended, (rows, len(models)))
        self._answer(taken, answers, now, ended - started)
        self._replies.count_batch(rows, len(models))
        self._replies.count_step(started - began, ended - started, time.perf_counter() - ended)

    def _answer(self, taken: "_Taken", answers: Sequence[Float32], now: float, run_s: float) -> None:
        """Answer the jobs of a batch; those of calls for many models group by group."""
        alone, encoders = taken.alone, taken.encoders
        if not _has_items(alone):
            for job, encode, outputs in zip(alone, encoders, answers, strict=False):
                self._replies.encode(job, encode, outputs, now, run_s)
        else:
            left = dict.fromkeys(range(len(alone)))
            for places, encoded, media in encode_groups(encoders, answers):
                self._replies.answer_items([alone[i] for i in places], encoded, media, now, run_s)
                for i in places:
                    del left[i]
            for i in left:
                self._replies.encode(alone[i], encoders[i], answers[i], now, run_s)
        if not taken.blocks:
            return
        for (jobs, items), outputs in zip(taken.blocks, answers[len(alone) :], strict=True):
            encoded = items.encode(outputs)
            if items.keeps_levels:
                for i, job in enumerate(jobs):
                    job.answered = items.take_levels(i)
            self._replies.answer_items(jobs, encoded, items.form.media, now, run_s)

    def _note_batch(self, models: Iterable[str]) -> None:
        """Write down what runs now: should the process die of it, the supervisor reads it."""
        names = "\n".join(models).encode()[: len(self._noted) - 1]
        self._noted[: len(names) + 1] = names + b"\0"

    def _take(self, group: str, jobs: Sequence[Job], pace: Pace, inputs: Inputs, now: float) -> "_Taken":
        """What one slice has room for, decoded into `inputs`.

        Nothing else keeps its rows: on a device these lie in memory that the next batch uses. Items of calls are taken
        as blocks where there is room for all jobs; requests of their own come first in that, and leave it to them.
        """
        taken, room = _Taken([], [], [], []), pace.slice_rows
        if _has_items(jobs):
            family = self._residents.rows[get_slot(jobs[0])].family
            place = partial(allocate_rows, family.read_shape) if pace.short_rows and len(jobs) <= room else None
            rows, quick_bytes = self._residents.rows, pace.quick_bytes
            jobs, taken.blocks[:] = decode_calls(jobs, rows, quick_bytes, self._replies, place)
            room -= sum(len(block.jobs) for block in taken.blocks)
        self._take_alone(group, jobs, pace, inputs, now, taken, room)
        for block in taken.blocks:
            inputs.keep_block(block.items.rows)
        return taken

    def _take_alone(
        self,
        group: str,
        jobs: Sequence[Job],
        pace: Pace,
        inputs: Inputs,
        now: float,
        taken: "_Taken",
        room: int,
    ) -> None:
        """Take jobs that run by themselves, of which the slice has room for so many rows; one of more has it alone."""
        for at, job in enumerate(jobs):
            call = job.call
            if call is None:
                model, size = self._residents.rows[get_slot(job)], len(job.request.body)
                may_be_long = size > model.codec.quick_bytes or size > pace.quick_bytes
                if may_be_long and self._is_long_to_decode(job, pace, model.codec.quick_bytes):
                    self._run_apart(job, model, None, pace, now)
                    continue
                call = self._replies.decode(job, model.codec.decode, inputs.place)
                if call is None:
                    continue
            job.marks, rows = call.marks, len(call.rows)
            may_be_long = rows > pace.short_rows or call.numbers > SHORT_NUMBERS
            if may_be_long and self._is_long_to_run(call, pace):
                self._run_apart(job, self._residents.rows[get_slot(job)], _detach(call, inputs), pace, now)
                continue
            if taken.alone and rows > room:
                job.call = _detach(call, inputs)
                self._scheduler.put_back(group, jobs[at:])
                break
            room -= rows
            if not rows:  # JSON Lines of which none is valid
                self._replies.encode(job, call.encode, call.rows, now, 0.0)
                continue
            inputs.keep(call.rows)
            taken.add(job, call)

    def pace(self, model: RowModel) -> Pace:
        """The pace of the model's family."""
        pace = self._paces.get(model.family.key)
        if pace is None:
            if len(self._paces) >= MOST_PACES:
                del self._paces[next(iter(self._paces))]  # the oldest; should it run again it is estimated anew
            pace = self._paces[model.family.key] = Pace(row_work(model.family), self._long.slice_s, self._long.long_s)
        return pace

    def _is_long_to_decode(self, job: Job, pace: Pace, quick_bytes: int) -> bool:
        """Whether reading a request for rows may take long. Every instance needs an object of its own: a brace."""
        body = job.request.body
        if len(body) > quick_bytes:
            return True
        most = min(MAX_ROWS, DECODE_NUMBERS // pace.work.given)
        return most < MAX_ROWS and count_up_to(bytes(body), b"{", most + 1) > most

    def _is_long_to_run(self, call: Any, pace: Pace) -> bool:
        """Whether a request for rows may take long to run and to answer."""
        return bool(pace.seconds(len(call.rows)) + call.seconds > self._long.long_s)

    # --- long requests ----------------------------------------------------------------------------------------------

    def _run_apart(self, job: Job, model: RowModel, call: Any, pace: Pace, now: float) -> None:
        """Run one long request in slices; `call` is None where it is not decoded yet."""
        counts, started = RunCounts(), time.perf_counter()

        def end(outcome: Any) -> None:
            ended = time.perf_counter()
            if job.times is not None:
                job.times.note_apart(started, ended, counts.decode_s, counts.encode_s)
            self._long.end_job(self._replies, job, outcome, now, ended - started)
            counts.count(self._replies)

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


class _Taken(NamedTuple):
    """The jobs of a batch: those that run by themselves with the encoders of their answers, then blocks of others."""

    alone: list[Job]
    encoders: list[Encoder]
    rows: list[int]
    blocks: list[JobBlock]

    def add(self, job: Job, call: DecodedCall) -> None:
        """Add a job that is decoded."""
        self.alone.append(job)
        self.encoders.append(call.encode)
        self.rows.append(len(call.rows))
        job.call, job.answered = None, call.answered

    def list_jobs(self) -> list[Job]:
        """All jobs."""
        if not self.blocks:
            return self.alone
        return [*self.alone, *(job for block in self.blocks for job in block.jobs)]

    def list_offsets(self) -> list[int]:
        """The offset of each request's model; of each row where there are blocks."""
        offsets = [get_slot(job).offset for job in self.alone]
        if not self.blocks:
            return offsets
        alone = [offset for offset, rows in zip(offsets, self.rows, strict=True) for _ in range(rows)]
        return [*alone, *(get_slot(job).offset for block in self.blocks for job in block.jobs)]


def _has_items(jobs: Sequence[Job]) -> bool:
    """Whether some are items of calls for many models, which are decoded and answered together."""
    return any(job.together is not None for job in jobs)


def _detach(call: DecodedCall, inputs: Inputs) -> DecodedCall:
    """The call of a request that does not run with this batch."""
    return msgspec.structs.replace(call, rows=inputs.detach(call.rows))


def answer_rows(
    job: Job, model: RowModel, run: Callable[[Float32], Float32], call: Any, pace: Pace, counts: RunCounts
) -> Generator[None, None, Encoded]:
    """Slices that answer one request for rows; `call` is None where it is not decoded yet.

    `run`: some rows' inputs [n, *input_shape] -> their answers [n, *output_shape]. Raises RequestError, RunFailed,
    DeadlinePassed, and whatever `run` raises.
    """
    if call is None:
        with counts.timing("decode_s"):
            call = model.codec.decode(job.request.body, job.request.content_type, job.request.accept)
            job.marks = call.marks
        yield
    job.answered = call.answered
    found, at = [np.empty((0, *model.family.output_shape), np.float32)], 0
    while at < len(call.rows):
        if job.done or time.monotonic() > job.deadline:
            raise DeadlinePassed
        some = call.rows[at : at + min(MOST_ROWS_AT_ONCE, pace.slice_rows)]
        started = time.perf_counter()
        with counts.timing("forward_s"):
            found.append(run(some))
        pace.ran(len(some), time.perf_counter() - started)
        at += len(some)
        counts.rows += len(some)
        yield
    with counts.timing("encode_s"):
        encoded: Encoded = call.encode(np.concatenate(found))
    return encoded
