"""Runs requests that would hold the step thread for long on threads of their own, so that other models are served.

`server.worker.row_batches` and `single_batches` decide what is long, and cut it into slices: between two slices other
long requests take their turns, and the deadline is checked.

Everything here is called on the step thread but for the slices themselves. A slice works on copies and on objects that
nothing changes: never on the pool or the cache.
"""

import asyncio
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog
import torch

from handlers.codecs.codec import Encoded
from handlers.errors import RequestError, RunFailed
from server.errors import Refused, Situation
from server.ipc.pulse import Pulse
from server.worker.replies import Replies
from server.worker.scheduler import Job

SLICE_S = 0.03  #: about how long a batch of rows holds the step thread, or a slice its thread
LONG_S = 0.06  #: a request that is expected to take longer than this does not run on the step thread
THREADS = 2

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

    def count(self, replies: Replies) -> None:
        """Record them as those of one batch."""
        replies.count_step(self.decode_s, self.forward_s, self.encode_s)
        if self.rows:
            replies.count_batch(self.rows, 1)


class LongJobs:
    """The threads, and the jobs that they run."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, pulse: Pulse, *, slice_s: float = SLICE_S, long_s: float = LONG_S
    ) -> None:
        """`pulse`: names what runs. `slice_s`, `long_s`: see SLICE_S and LONG_S; tests choose others."""
        self.pulse, self.slice_s, self.long_s = pulse, slice_s, long_s
        self.running: set[Job] = set()
        self._loop = loop
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="long-job")

    def __repr__(self) -> str:
        """For example `<LongJobs 2 running>`."""
        return f"<LongJobs {len(self.running)} running>"

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
        elif isinstance(outcome, torch.OutOfMemoryError):
            log.error("out_of_memory", model=job.model, error=str(outcome))
            replies.refuse(job, Refused(Situation.NO_ROOM, f"the device is out of memory: {outcome}"))
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
