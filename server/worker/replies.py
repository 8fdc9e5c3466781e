"""Answers and refuses a worker's jobs, each of them once, and ends their leases. On the step thread."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from handlers.codecs.codec import Encoded
from handlers.errors import RequestError, RunFailed
from model_store.cache.slots import Slot
from model_store.names import split_version
from server.access_log import LOST, REFUSED, ArrivalBuffer
from server.errors import Refused, Situation
from server.ipc.lends import Turn
from server.ipc.packed import BlockRows
from server.metrics import WorkerMetrics
from server.worker.resident_models import ResidentModels
from server.worker.scheduler import Job, Scheduler

LATE = "the deadline passed while the request ran"


class Origin(Protocol):
    """The front connection that a job's response is sent to."""

    def answer(
        self, job: Job, content_type: str, body: bytes, *, queue_s: float, inference_s: float, head: bytes = b""
    ) -> None:
        """Send the job's answer. `queue_s` and `inference_s`: seconds in the queue and in the forward.

        `head`: what an archive's code has said of it.
        """

    def answer_part(self, job: Job, content_type: str, body: bytes, head: bytes) -> bool:
        """Send a part of the answer before its end. False where slow clients hold too many bytes already."""

    def refuse(self, job: Job, refused: Refused) -> None:
        """Send the reason why there is no answer."""


class Replies:
    """See the module. `arrivals`: rows of the access log, None without one. `now`: the monotonic clock in seconds."""

    def __init__(
        self,
        scheduler: Scheduler,
        residents: ResidentModels,
        metrics: WorkerMetrics,
        arrivals: ArrivalBuffer | None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler, self._residents, self._metrics = scheduler, residents, metrics
        self._arrivals, self._now = arrivals, now

    def __repr__(self) -> str:
        """For example `<Replies of <Scheduler ...>>`."""
        return f"<Replies of {self._scheduler!r}>"

    def answer(self, job: Job, encoded: Encoded, began: float, run_s: float, head: bytes = b"") -> None:
        """Send the answer, unless the job is done already. `began`: when its batch did; `run_s`: the forward's time.

        INVARIANT: no answer is sent after its deadline.
        """
        body, content_type = encoded
        now = self._now()
        if job.deadline < now:
            self.refuse(job, Refused(Situation.DEADLINE, LATE))
            return
        if self._scheduler.finish(job):
            self._record(job, job.cache)
            queued_s = job.queued_s(began)
            if run_s and job.slot is not None:  # else nothing has run: a description was asked
                job.slot.usage.note_answer(began, now - job.arrived, queued_s, run_s)
            if job.marks.quality:
                self._metrics.count_doubts(job.marks.quality)
            job.origin.answer(job, content_type, body, queue_s=queued_s, inference_s=run_s, head=head)
            if job.answered and job.slot is not None and self._residents.bands is not None:
                self._residents.bands.keep(job.slot, job.request.client, job.answered)
        self._release(job)

    def answer_items(self, jobs: Sequence[Job], found: Sequence[Any], media: str, began: float, run_s: float) -> None:
        """Answer items of one call for many models that were encoded together, as `answer` does each of them.

        `found`: the answer of each, or RunFailed.
        """
        now = self._now()
        if isinstance(found, BlockRows) and not [job for job in jobs if job.done or job.deadline < now]:
            self._answer_all(jobs, found, media, now, began, run_s)
            return
        done, bodies, refused = list[Job](), list[Any](), list[tuple[Job, Refused]]()
        for job, body in zip(jobs, found, strict=True):
            if job.done:
                self._release(job)
            elif isinstance(body, RunFailed):
                refused.append((job, Refused(Situation.MODEL_FAILED, str(body))))
            elif job.deadline < now:
                refused.append((job, Refused(Situation.DEADLINE, LATE)))
            else:
                done.append(job)
                bodies.append(body)
        if done:
            self._answer_all(done, bodies, media, now, began, run_s)
        for job, why in refused:  # at last: a refusal can end the call, which gives up what is not finished
            self.refuse(job, why)

    def _answer_all(
        self, jobs: Sequence[Job], bodies: Sequence[Any], media: str, now: float, began: float, run_s: float
    ) -> None:
        """Send the answers of items of one call, none of which was done before."""
        self._scheduler.finish_all(jobs)
        slots = [get_slot(job) for job in jobs]
        self._note_answers(jobs, slots, now, began, run_s)
        jobs[0].origin.answer_items(jobs, media, bodies, began, run_s)
        for job in jobs:
            job.slot = None
        for slot in self._residents.cache.release_all(slots):
            self._residents.retire(slot)

    def _note_answers(self, done: Sequence[Job], slots: Sequence[Slot], now: float, began: float, run_s: float) -> None:
        """Count items that are answered, and keep their rows of the access log and their bands' levels."""
        bands, first, answered_s, queued_s = self._residents.bands, None, 0.0, 0.0
        for job, slot in zip(done, slots, strict=True):
            if first is None or job.arrived != first.arrived or job.load_s != first.load_s:  # most came together
                first, answered_s, queued_s = job, now - job.arrived, job.queued_s(began)
            slot.usage.note_answer(began, answered_s, queued_s, run_s)
            if bands is not None and job.answered:
                bands.keep(slot, job.request.client, job.answered)
        if self._arrivals is not None:
            for job in done:
                self._record(job, job.cache)

    def answer_part(self, job: Job, encoded: Encoded, head: bytes) -> None:
        """Send a part of an answer that an archive's code is still making, unless nobody waits for it any more."""
        body, content_type = encoded
        if not job.done and not job.origin.answer_part(job, content_type, body, head):
            message = "bytes of answers wait for slow clients already, as many as max_inflight_bytes allows"
            self.tell_refused(job, Refused(Situation.OVERLOADED, message))

    def encode(self, job: Job, encode: Callable[[Any], Encoded], outputs: Any, began: float, run_s: float) -> None:
        """Answer with what `encode` makes of a forward's outputs; refuse where these are not finite."""
        try:
            encoded = encode(outputs)
        except RunFailed as failed:
            self.refuse(job, Refused(Situation.MODEL_FAILED, str(failed)))
            return
        self.answer(job, encoded, began, run_s)

    def decode(self, job: Job, decode: Callable[..., Any], *place: Any) -> Any:
        """The request as arrays, at their `place` if it says one; None if it was refused, because it is wrong."""
        try:
            return decode(job.request.body, job.request.content_type, job.request.accept, *place)
        except RequestError as bad:
            self.refuse_request(job, bad)
            return None

    def refuse_request(self, job: Job, bad: RequestError) -> None:
        """Refuse a job whose request is wrong."""
        self.refuse(job, Refused(Situation.BAD_REQUEST, bad.message, bad.instance, bad.field))

    def refuse(self, job: Job, refused: Refused) -> None:
        """Send the reason, unless the job is done already, and end its lease."""
        self.tell_refused(job, refused)
        self._release(job)

    def tell_refused(self, job: Job, refused: Refused) -> None:
        """Send the reason of a job whose model is still in use: its lease ends later."""
        if self._scheduler.finish(job):
            self._record(job, REFUSED)
            if job.slot is not None:
                job.slot.usage.failures += 1
                job.slot.usage.failed_s += self._now() - job.arrived
            job.origin.refuse(job, refused)

    def refuse_unadmitted(self, job: Job, refused: Refused) -> None:
        """Send the reason to a job that the scheduler has not admitted."""
        job.done = True
        self._record(job, REFUSED)
        job.origin.refuse(job, refused)

    def cancel(self, job: Job) -> None:
        """Give up a job whose client has left. Its lease ends where its batch would run it."""
        if self._scheduler.finish(job):
            self._record(job, LOST)

    def keep_live(self, jobs: Sequence[Job], now: float) -> Iterator[Job]:
        """The jobs that are to be run; the leases of the others end."""
        live = [job for job in jobs if not job.done and job.deadline > now]
        if len(live) == len(jobs):
            yield from live
            return
        for job in jobs:
            if job.done:
                self._release(job)
            elif job.deadline <= now:
                self.refuse(job, Refused(Situation.DEADLINE, "the deadline passed while the request was queued"))
            else:
                yield job

    def drop_done(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs that are not done; the leases of the others end. A refusal can end a call, and so all its items."""
        for job in jobs:
            if job.done:
                self._release(job)
        return [job for job in jobs if not job.done]

    def count_lent(self, slot: Slot, turn: Turn) -> None:
        """Count a request that a front had a lent child answer, as if it had gone through this worker."""
        queued_s, run_s = max(0.0, turn.began - turn.arrived), turn.ended - turn.began
        self._metrics.hits.inc()
        self._metrics.queue.observe(queued_s)
        if self._metrics.per_model:
            self._metrics.model_request(slot.model)
        if self._arrivals is not None:
            self._arrivals.note(split_version(slot.model)[0], turn.arrived, slot.charge, turn.outcome, turn.trace_id)
        if turn.outcome == REFUSED:
            slot.usage.failures += 1
            slot.usage.failed_s += turn.ended - turn.arrived
        elif turn.outcome != LOST:
            slot.usage.note_answer(turn.began, turn.ended - turn.arrived, queued_s, run_s)
        self.count_batch(1, 1)
        self.count_step(0.0, run_s, 0.0)

    def count_batch(self, rows: int, models: int) -> None:
        """Record a forward of so many rows of so many models."""
        self._metrics.batch_rows.observe(rows)
        self._metrics.batch_models.observe(models)

    def count_step(self, decode_s: float, forward_s: float, encode_s: float) -> None:
        """Record where a step's seconds went."""
        self._metrics.decode_s.inc(decode_s)
        self._metrics.forward_s.inc(forward_s)
        self._metrics.encode_s.inc(encode_s)

    def _record(self, job: Job, outcome: int) -> None:
        """Add a row to the access log."""
        if self._arrivals is not None:
            size = 0 if job.slot is None else job.slot.charge
            trace_id = "" if job.times is None else job.times.trace_id
            self._arrivals.note(split_version(job.model)[0], job.arrived, size, outcome, trace_id)

    def _release(self, job: Job) -> None:
        slot, job.slot = job.slot, None
        if slot is not None and self._residents.cache.release(slot):
            self._residents.retire(slot)


def get_slot(job: Job) -> Slot:
    """The slot that the job has leased. A job in a batch has one."""
    assert job.slot is not None, "a job in a batch holds a lease"
    return job.slot
