"""Runs the requests for code archives: a batch at a time for each child process of a model. On the step thread.

A child works while the step loop goes on: its group of jobs is parked while no other child of the model is idle, so
that a slow child costs only its own model. A batch is collected for at most the time that its archive says, unless it
is full before.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from weakref import WeakSet

from handlers.codecs.codec import JSON
from handlers.codecs.open_inference import DESCRIBE, Signature, describe_tensors
from model_store.cache.slots import Slot
from model_store.names import ModelName
from server.code_messages import CodeAnswer, Measure
from server.errors import Refused, Situation
from server.ipc.code_answers import make_request, read_answer, read_part, refuse_ended
from server.ipc.lends import Turn
from server.worker.code_measures import CodeMeasures
from server.worker.code_replicas import CodeReplicas
from server.worker.lent_children import LentChildren
from server.worker.quarantine import Quarantine
from server.worker.replies import Replies, get_slot
from server.worker.resident_models import ResidentModels
from server.worker.sandbox.child_process import ChildEnded, ChildProcess, Outcome
from server.worker.sandbox.memory_use import MemorySampler, is_folder_larger
from server.worker.sandbox.replicas import Replicas
from server.worker.scheduler import Job, Scheduler

SAMPLE_S = 2.0  #: between two measurements of the children's memory
_DESCRIPTION = describe_tensors(
    Signature({}, {}), code="the archive's code gets the request's JSON as it is, and its answer is sent as it is"
)


class CodeBatches:
    """See the module. `wake` schedules a step."""

    def __init__(
        self,
        replies: Replies,
        residents: ResidentModels,
        scheduler: Scheduler,
        scaling: CodeReplicas,
        *,
        most_bytes: int,
        most_disk_bytes: int,
        quarantine: Quarantine,
        wake: Callable[[], None],
        now: Callable[[], float],
    ) -> None:
        """`most_bytes`: of a child and what it has started; `most_disk_bytes`: of its folder. A larger one is ended."""
        self._replies, self._residents, self._scheduler, self._scaling = replies, residents, scheduler, scaling
        scaling.note_free = self._free_groups
        self._most_bytes, self._most_disk_bytes, self._wake = most_bytes, most_disk_bytes, wake
        self.measures = CodeMeasures(residents.children, os.uname().nodename)
        self.lent = LentChildren(
            residents,
            scheduler,
            replies,
            quarantine,
            freed=self._free_groups,
            wake=wake,
            now=now,
            note_turn=self._note_turn,
        )
        self._running: dict[ChildProcess, Sequence[Job]] = {}
        self._full: dict[str, Replicas] = {}  # groups that are parked because no child of theirs is idle
        self._collecting: dict[str, tuple[Replicas, float]] = {}  # group -> its children, and when it runs anyhow
        self._due: WeakSet[Replicas] = WeakSet()  # whose next batch has waited, or is full
        self._loop = asyncio.get_running_loop()
        self._sampler, self._memory = ThreadPoolExecutor(1, thread_name_prefix="code-memory"), MemorySampler()
        self._sampled_at, self._sampling = 0.0, False

    def __repr__(self) -> str:
        """For example `<CodeBatches 2 running>`."""
        return f"<CodeBatches {len(self._running)} running>"

    def run(self, group: str, jobs: Sequence[Job], now: float) -> None:
        """Send jobs to an idle child, or collect more of them first."""
        jobs = [job for job in jobs if not self._describe(job, now)]
        if not jobs:
            return
        slot = get_slot(jobs[0])
        replicas = self._residents.children[slot]
        if replicas.is_short:
            self._scaling.grow(slot, replicas)
        child = replicas.find_idle()
        if child is None:  # the group's last jobs were of another version, or a front has the child
            self._scheduler.put_back(group, jobs)
            self._park_full(group, replicas)
            self.lent.recall(slot)
            return
        batch, rest = list[Job](), list[Job]()
        for job in jobs:  # those of a replaced version are for that one
            (batch if job.slot is slot and len(batch) < replicas.loaded.batch_size else rest).append(job)
        if self._collects(replicas, len(batch)):
            self._scheduler.put_back(group, jobs)
            self._scheduler.park(group)
            self._collecting[group] = (replicas, now + replicas.loaded.max_batch_delay_s)
            self._loop.call_later(replicas.loaded.max_batch_delay_s, self._wake)
            return
        if rest:
            self._scheduler.put_back(group, rest)
        self._have_answered(slot, child, batch, now)
        if child.is_busy and replicas.find_idle() is None:
            self._park_full(group, replicas)

    def _have_answered(self, slot: Slot, child: ChildProcess, batch: Sequence[Job], now: float) -> None:
        """Give the child a batch of its slot's jobs, and answer these when it has."""
        replicas, began = self._residents.children[slot], time.perf_counter()
        self._running[child] = batch
        queued_s, started = batch[0].queued_s(now), time.perf_counter()

        def end(outcome: Outcome) -> None:
            del self._running[child]
            self._free_groups(replicas)
            ended = time.perf_counter()
            for job in batch:
                if job.times is not None:
                    job.times.note_batch(began, began, ended, (len(batch), 1))
            self._answer(batch, outcome, now, ended - started)
            own_s = started - began + time.perf_counter() - ended
            self._note_measures(slot.model, child, queued_s=queued_s, ran_s=ended - started, own_s=own_s)
            if len(replicas.children) > replicas.wanted and not child.ended:
                self._scaling.end_surplus(slot, replicas)
            if not batch[-1].request.alone:
                self.lent.note_answer(slot, replicas, child, batch[-1].origin)

        child.run([make_request(job.request) for job in batch], end, partial(self._answer_part, batch))

    def _note_measures(
        self, model: ModelName, child: ChildProcess, *, queued_s: float, ran_s: float, own_s: float
    ) -> None:
        """Show what the handler has measured, and the times of a batch that its process has answered."""
        if not child.ended:
            self.measures.note_batch(model, child.measures, queued_s=queued_s, ran_s=ran_s, own_s=own_s)

    def _note_turn(self, model: ModelName, turn: Turn, measures: Sequence[Measure]) -> None:
        """The same of a request that a front had a lent child answer; nothing of it was this worker's."""
        times = {"queued_s": max(0.0, turn.began - turn.arrived), "ran_s": turn.ended - turn.began}
        self.measures.note_batch(model, measures, **times, own_s=0.0)

    def _park_full(self, group: str, replicas: Replicas) -> None:
        """Make no batches of the group until one of these has answered."""
        self._scheduler.park(group)
        self._full[group] = replicas

    def _free_groups(self, replicas: Replicas) -> None:
        """One of these is idle: whoever waits for one may run."""
        for group in [group for group, awaited in self._full.items() if awaited is replicas]:
            del self._full[group]
            self._scheduler.unpark(group, whole=True)
        if self._scheduler.has_work:
            self._wake()

    def _describe(self, job: Job, now: float) -> bool:
        """Answer a request for the model's tensors, of which code says none. False for any other request."""
        if job.request.content_type != DESCRIBE:
            return False
        self._replies.answer(job, (_DESCRIPTION, JSON), now, 0.0)
        return True

    def _collects(self, replicas: Replicas, count: int) -> bool:
        """Whether a batch that is not full waits for more jobs."""
        if replicas in self._due:
            self._due.discard(replicas)
            return False
        loaded = replicas.loaded
        return loaded.max_batch_delay_s > 0 and count < loaded.batch_size and not replicas.ended

    def _answer(self, batch: Sequence[Job], outcome: Outcome, began: float, took: float) -> None:
        if isinstance(outcome, ChildEnded):
            for job in batch:
                self._replies.refuse(job, refuse_ended(job.model, outcome))
            return
        self._replies.count_batch(len(batch), 1)
        self._replies.count_step(0.0, took, 0.0)
        for job, answer in zip(batch, outcome, strict=True):
            try:
                content_type, body, head = read_answer(answer, is_told=bool(job.request.call))
            except Refused as refused:
                self._replies.refuse(job, refused)
            else:
                self._replies.answer(job, (body, content_type), began, took, head)

    def _answer_part(self, batch: Sequence[Job], index: int, answer: CodeAnswer) -> None:
        """Pass on a part of an answer that the handler is still making."""
        job = batch[index]
        if job.done:
            return
        try:
            content_type, body, head = read_part(answer)
        except Refused as refused:
            self._replies.tell_refused(job, refused)
            return
        self._replies.answer_part(job, (body, content_type), head)

    def advance_time(self, now: float) -> None:
        """Refuse late jobs, look after what is lent, measure the children."""
        self.lent.advance_time(now)
        for jobs in self._running.values():
            for job in jobs:
                if job.deadline <= now and not job.done:
                    message = "the deadline passed while the archive's code ran"
                    self._replies.tell_refused(job, Refused(Situation.DEADLINE, message))
        if self._residents.children and now - self._sampled_at >= SAMPLE_S and not self._sampling:
            self._sampled_at, self._sampling = now, True
            children = [
                (slot, child) for slot, replicas in self._residents.children.items() for child in replicas.children
            ]
            self._sampler.submit(self._measure, children)

    def end_collections(self, now: float) -> None:
        """Let the batches run that are full or have waited for long enough. In each step."""
        for group, (replicas, until) in list(self._collecting.items()):
            size = replicas.loaded.batch_size
            if now >= until or replicas.ended or self._scheduler.count_parked(group, size) >= size:
                del self._collecting[group]
                self._due.add(replicas)
                self._scheduler.unpark(group, whole=True)

    def close(self) -> None:
        """Measure no more."""
        self._sampler.shutdown(wait=False, cancel_futures=True)

    def _measure(self, children: Sequence[tuple[Slot, ChildProcess]]) -> None:
        """On the sampler's thread."""
        sizes = self._memory.measure([child.pid for _, child in children], time.monotonic())
        found = [
            (slot, child, sizes[child.pid], is_folder_larger(child.folder, self._most_disk_bytes, child.pid))
            for slot, child in children
        ]
        with contextlib.suppress(RuntimeError):  # the worker has ended meanwhile
            self._loop.call_soon_threadsafe(self._note_sizes, found)

    def _note_sizes(self, found: Sequence[tuple[Slot, ChildProcess, int, bool]]) -> None:
        self._sampling = False
        for slot, child, size, fills_disk in found:
            replicas = self._residents.children.get(slot)
            if replicas is None or child not in replicas.children or not size:
                continue
            if fills_disk:
                child.end(f"its folder takes more than {self._most_disk_bytes} bytes (code_disk_bytes)")
            elif size > self._most_bytes:
                child.end(f"its processes take {size} bytes, {self._most_bytes} are allowed (code_memory_bytes)")
            else:
                child.charge = size
                self._residents.recharge(slot, replicas.charge)
        if self._residents.cache.used_bytes > self._residents.cache.budget_bytes:
            self.lent.make_room()
