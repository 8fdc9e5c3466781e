"""Runs requests that would hold the step thread for long on threads of their own, so that other models are served.

What is long is decided before it runs: by the estimated work of a row (`handlers.work`) and the pace that was measured,
by the numbers that a request asks for, and for models that run alone by the largest input that was quick before. A long
request of rows is cut into slices, between which other long requests take their turns and its deadline is checked.

Everything here is called on the step thread but for the slices themselves. A slice works on copies and on objects that
nothing changes: never on the pool or the cache.
"""

import asyncio
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import structlog

from handlers.base import Float32, Single
from handlers.codecs.codec import Encoded
from handlers.codecs.deepar_schema import MAX_ROWS
from handlers.codecs.joint import JointModel
from handlers.errors import RequestError, RunFailed
from handlers.kinds import RowModel, SingleModel
from handlers.kinds.row_work import row_work
from handlers.work import CALL_S, Work
from server.errors import Refused, Situation
from server.ipc.pulse import Pulse
from server.metrics import WorkerMetrics
from server.worker.replies import Replies
from server.worker.scheduler import Job

SLICE_S = 0.03  #: about how long a batch of rows holds the step thread, or a slice its thread
LONG_S = 0.06  #: a request that is expected to take longer than this does not run on the step thread
DECODE_NUMBERS = 500_000  #: inputs of more numbers are long to decode; so is a body of more than `quick_bytes`
THREADS = 2
MOST_SLICE_ROWS = 1 << 20  #: more than any request has
MOST_ROWS_AT_ONCE = 64  #: rows of a slice of one model: more of them are no faster
MOST_PACES = 1024  #: families whose pace is remembered: an archive's author chooses its family
KEPT = 0.7  #: weight of the pace that was measured before

Outcome = Encoded | Exception
T = TypeVar("T")

log = structlog.get_logger()


class DeadlinePassed(Exception):
    """The request's deadline passed while it ran, or its client left."""


@dataclass(slots=True)
class RunCounts:
    """What a long run took: seconds of its parts, rows of its forwards and of how many models. One thread at a time."""

    decode_s: float = 0.0
    forward_s: float = 0.0
    encode_s: float = 0.0
    rows: int = 0

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add the seconds that are spent inside to one of the parts."""
        started = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, part, getattr(self, part) + time.perf_counter() - started)

    def count(self, metrics: WorkerMetrics) -> None:
        """Record them as those of one batch."""
        metrics.count_step(self.decode_s, self.forward_s, self.encode_s)
        if self.rows:
            metrics.count_batch(self.rows, 1)


class Pace:
    """How long a row of one family takes on this machine: the estimate at first, then what was measured."""

    def __init__(self, work: Work, slice_s: float = SLICE_S) -> None:
        self.work, self._slice_s = work, slice_s
        self._fixed_s = work.calls * CALL_S / 2
        self._row_s = max(1e-6, work.seconds - work.calls * CALL_S)

    def __repr__(self) -> str:
        """For example `<Pace 0.120 ms a row>`."""
        return f"<Pace {self._row_s * 1e3:.3f} ms a row>"

    @property
    def slice_rows(self) -> int:
        """Rows of a slice: calls of torch are shared by them, so these do not count."""
        return max(1, int(min(self._slice_s / self._row_s, MOST_SLICE_ROWS)))

    def seconds(self, rows: int) -> float:
        """What so many rows are expected to take."""
        return self._fixed_s * -(-rows // self.slice_rows) + rows * self._row_s

    def ran(self, rows: int, seconds: float) -> None:
        """Learn from a forward of so many rows."""
        measured = max(1e-6, seconds - self._fixed_s) / rows
        self._row_s = KEPT * self._row_s + (1 - KEPT) * measured


class LongJobs:
    """The threads, and what is known of the pace of models."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, pulse: Pulse, *, slice_s: float = SLICE_S, long_s: float = LONG_S
    ) -> None:
        """`pulse`: names what runs. `slice_s`, `long_s`: see SLICE_S and LONG_S; tests choose others."""
        self.pulse, self._slice_s, self._long_s = pulse, slice_s, long_s
        self.running: set[Job] = set()
        self._loop = loop
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="long-job")
        self._paces: dict[str, Pace] = {}
        self._quick: WeakKeyDictionary[Single | JointModel, int] = (
            WeakKeyDictionary()
        )  # numbers of inputs that took < LONG_S

    def __repr__(self) -> str:
        """For example `<LongJobs 2 running>`."""
        return f"<LongJobs {len(self.running)} running>"

    def pace(self, model: RowModel) -> Pace:
        """The pace of the model's family."""
        pace = self._paces.get(model.family.key)
        if pace is None:
            if len(self._paces) >= MOST_PACES:
                del self._paces[next(iter(self._paces))]  # the oldest; should it run again it is estimated anew
            pace = self._paces[model.family.key] = Pace(row_work(model.family), self._slice_s)
        return pace

    def is_long_to_decode(self, job: Job, pace: Pace, quick_bytes: int) -> bool:
        """Whether reading a request for rows may take long. Every instance needs an object of its own: a brace."""
        body, given = job.request.body, pace.work.given
        if len(body) > quick_bytes:
            return True
        return given * MAX_ROWS > DECODE_NUMBERS and given * min(MAX_ROWS, bytes(body).count(b"{")) > DECODE_NUMBERS

    def is_long_to_run(self, call: Any, pace: Pace) -> bool:
        """Whether a request for rows may take long to run and to answer."""
        return bool(pace.seconds(len(call.rows)) + call.seconds > self._long_s)

    def is_long_alone(self, model: SingleModel, calls: Sequence[Any]) -> bool:
        """Whether these requests for a model that runs alone may take long together; so does what is not known."""
        if model.unbounded:
            return True
        known = [call.seconds for call in calls if call.seconds is not None]
        return sum(known) > self._long_s if known else _numbers(calls) > self._quick.get(model.single, 0)

    def ran_alone(self, model: SingleModel, calls: Sequence[Any], seconds: float) -> None:
        """Learn from a run of these requests."""
        numbers, quick = _numbers(calls), self._quick.get(model.single, 0)
        self._quick[model.single] = max(quick, numbers) if seconds < self._long_s else min(quick, numbers // 2)

    def call_on_step_thread(self, call: Callable[[], object]) -> None:
        """Call it between two steps."""
        self._loop.call_soon_threadsafe(call)

    def end_job(self, replies: Replies, job: Job, outcome: Outcome, began: float, took: float) -> None:
        """Answer or refuse a request that ran here, and end its lease."""
        if not isinstance(outcome, Exception):
            replies.answer(job, outcome, began, took)
        elif isinstance(outcome, RequestError):
            replies.refuse_request(job, outcome)
        elif isinstance(outcome, (DeadlinePassed, TimeoutError)):
            replies.refuse(job, Refused(Situation.DEADLINE, "the deadline passed while the request ran"))
        else:
            if not isinstance(outcome, RunFailed):
                log.error("long_job_failed", model=job.model, error=repr(outcome))
            replies.refuse(job, Refused(Situation.MODEL_FAILED, f"the model failed: {outcome}"))

    def tell_late(self, replies: Replies, now: float) -> None:
        """Refuse the requests whose deadline has passed. Their leases end with their slices."""
        for job in [job for job in self.running if job.deadline <= now]:
            replies.tell_refused(job, Refused(Situation.DEADLINE, "the deadline passed while the request ran"))

    def start(
        self, jobs: Sequence[Job], slices: Generator[None, None, T], done: "Callable[[T | Exception], None]"
    ) -> None:
        """Run the slices; then call `done` on the step thread with what they return or raise."""
        self.running.update(jobs)
        _Run(self, self._loop, self._threads, jobs, slices, done).submit()

    def close(self) -> None:
        """Start no more slices."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Run(Generic[T]):
    """The slices of some jobs: one at a time, each behind the slices of others that wait."""

    def __init__(
        self,
        owner: LongJobs,
        loop: asyncio.AbstractEventLoop,
        threads: ThreadPoolExecutor,
        jobs: Sequence[Job],
        slices: Generator[None, None, T],
        done: Callable[[T | Exception], None],
    ) -> None:
        self._owner, self._loop, self._threads = owner, loop, threads
        self._jobs, self._slices, self._done = jobs, slices, done

    def submit(self) -> None:
        """Queue the next slice."""
        self._threads.submit(self._advance)

    def _advance(self) -> None:
        try:
            with self._owner.pulse.noting(self._jobs[0].model, "alone"):
                next(self._slices)
        except StopIteration as end:
            self._loop.call_soon_threadsafe(self._end, end.value)
        except Exception as error:  # whatever a model raises is the outcome of its jobs
            self._loop.call_soon_threadsafe(self._end, error)
        else:
            self._loop.call_soon_threadsafe(self.submit)  # not from here: the pool may be closed meanwhile

    def _end(self, outcome: "T | Exception") -> None:
        self._owner.running.difference_update(self._jobs)
        self._done(outcome)


def answer_rows(
    job: Job, model: RowModel, run: Callable[[Float32], Float32], call: Any, pace: Pace, counts: RunCounts
) -> Generator[None, None, Encoded]:
    """Slices that answer one request for rows; `call` is None where it is not decoded yet.

    `run`: some rows' inputs [n, *input_shape] -> their answers [n, *output_shape]. Raises RequestError, RunFailed,
    DeadlinePassed, and whatever `run` raises.
    """
    if call is None:
        with counts.timing("decode_s"):
            call = _decode(job, model)
        yield
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
    asked = [call for call in outcomes if not isinstance(call, Exception)]
    started = time.perf_counter()
    with counts.timing("forward_s"):
        answers = iter(model.single.run_all([call.feeds for call in asked]) if asked else ())
    note(asked, time.perf_counter() - started)
    counts.rows += sum(call.n for call in asked)
    yield
    ended: list[Outcome] = []
    for each in outcomes:
        with counts.timing("encode_s"):
            ended.append(each if isinstance(each, Exception) else _encode(each, next(answers)))
        yield
    return ended


def _numbers(calls: Sequence[Any]) -> int:
    return sum(int(call.numbers) for call in calls)


def _decode(job: Job, model: RowModel | SingleModel) -> Any:
    request = job.request
    return model.codec.decode(request.body, request.content_type, request.accept)


def _encode(call: Any, answer: Any) -> Outcome:
    if isinstance(answer, RunFailed):
        return answer
    try:
        encoded: Encoded = call.encode(answer)
    except RunFailed as failed:
        return failed
    return encoded
