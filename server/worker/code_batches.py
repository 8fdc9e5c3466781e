"""Runs the requests for code archives: a batch at a time for each child process of a model. On the step thread.

A child works while the step loop goes on: its group of jobs is parked while no other child of the model is idle, so
that a slow child costs only its own model. A batch is collected for at most the time that its archive says, unless it
is full before.
"""

import asyncio
import contextlib
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from weakref import WeakSet

from handlers.codecs.codec import JSON
from handlers.codecs.open_inference import DESCRIBE, INFER, Signature, describe_tensors
from model_store.cache.slots import Slot
from model_store.names import ModelName
from server.code_messages import CodeAnswer, CodeRequest
from server.errors import Refused, Situation
from server.ipc.handler_calls import AnswerHead, decode_call, encode_head
from server.worker.code_measures import CodeMeasures
from server.worker.code_replicas import CodeReplicas
from server.worker.replies import Replies, get_slot
from server.worker.resident_models import ResidentModels
from server.worker.sandbox.child_process import ChildEnded, ChildProcess, Outcome
from server.worker.sandbox.memory_use import MemorySampler, is_folder_larger
from server.worker.sandbox.replicas import Replicas
from server.worker.scheduler import Job, Scheduler

SAMPLE_S = 2.0  #: between two measurements of the children's memory
WORKER_DIED = 500  #: what TorchServe and Multi Model Server answer then, as "Worker died."
OK, MULTIPLE_CHOICES = 200, 300
BODILESS = (204, 205, 304)  #: statuses of answers that have no body
BYTES = "application/octet-stream"
_DESCRIPTION = describe_tensors(
    Signature({}, {}), code="the archive's code gets the request's JSON as it is, and its answer is sent as it is"
)
MAX_SAID = 8192  #: bytes of all that a handler sets in an answer's head
#: Fields that frame an answer or belong to its connection, and those that the server says of every answer: code's are
#: dropped. The content type travels apart.
SERVERS_OWN = frozenset(
    {
        "connection", "content-length", "content-type", "date", "keep-alive", "proxy-authenticate",
        "proxy-authorization", "proxy-connection", "server", "server-timing", "te", "trailer", "transfer-encoding",
        "upgrade", "x-request-id", "x-amzn-errortype", "x-amzn-invoked-production-variant",
    }
)  # fmt: skip
SERVERS_PREFIXES = ("x-fleetcast-",)
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,256}")  # RFC 9110, 5.6.2


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
        wake: Callable[[], None],
    ) -> None:
        """`most_bytes`: of a child and what it has started; `most_disk_bytes`: of its folder. A larger one is ended."""
        self._replies, self._residents, self._scheduler, self._scaling = replies, residents, scheduler, scaling
        scaling.note_free = self._free_groups
        self._most_bytes, self._most_disk_bytes, self._wake = most_bytes, most_disk_bytes, wake
        self.measures = CodeMeasures(residents.children, os.uname().nodename)
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
        began = time.perf_counter()
        jobs = [job for job in jobs if not self._describe(job, now)]
        if not jobs:
            return
        slot = get_slot(jobs[0])
        replicas = self._residents.children[slot]
        if replicas.is_short:
            self._scaling.grow(slot, replicas)
        child = replicas.find_idle()
        if child is None:  # the group's last jobs were of another version
            self._scheduler.put_back(group, jobs)
            self._park_full(group, replicas)
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
        self._running[child] = batch
        queued_s, started = batch[0].queued_s(now), time.perf_counter()

        def end(outcome: Outcome) -> None:
            del self._running[child]
            self._free_groups(replicas)
            ended = time.perf_counter()
            self._answer(batch, outcome, now, ended - started)
            own_s = started - began + time.perf_counter() - ended
            self._note_measures(slot.model, child, queued_s=queued_s, ran_s=ended - started, own_s=own_s)
            if len(replicas.children) > replicas.wanted and not child.ended:
                self._scaling.end_surplus(slot, replicas)

        child.run([_make_request(job) for job in batch], end, partial(self._answer_part, batch))
        if child.is_busy and replicas.find_idle() is None:
            self._park_full(group, replicas)

    def _note_measures(
        self, model: ModelName, child: ChildProcess, *, queued_s: float, ran_s: float, own_s: float
    ) -> None:
        """Show what the handler has measured, and the times of a batch that its process has answered."""
        if not child.ended:
            self.measures.note_batch(model, child.measures, queued_s=queued_s, ran_s=ran_s, own_s=own_s)

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
                message = f"Worker died: {job.model}: {outcome}"
                self._replies.refuse(job, Refused(Situation.MODEL_FAILED, message, status=WORKER_DIED))
            return
        self._replies.count_batch(len(batch), 1)
        self._replies.count_step(0.0, took, 0.0)
        for job, answer in zip(batch, outcome, strict=True):
            try:
                body, head = _make_body(answer), _make_head(answer)
            except Refused as refused:
                self._replies.refuse(job, refused)
                continue
            encoded = body, answer.content_type or answer.body_type or BYTES
            if job.request.call:
                self._replies.answer(job, encoded, began, took, encode_head(head))
            elif OK <= answer.status < MULTIPLE_CHOICES:
                self._replies.answer(job, encoded, began, took)
            else:  # who asks cannot say another status than that of a success
                self._replies.refuse(job, Refused(Situation.MODEL_FAILED, _explain(answer), status=answer.status))

    def _answer_part(self, batch: Sequence[Job], index: int, answer: CodeAnswer) -> None:
        """Pass on a part of an answer that the handler is still making."""
        job = batch[index]
        if job.done:
            return
        try:
            body, head = _make_body(answer), _make_head(answer)
        except Refused as refused:
            self._replies.tell_refused(job, refused)
            return
        self._replies.answer_part(job, (body, answer.content_type or answer.body_type or BYTES), encode_head(head))

    def advance_time(self, now: float) -> None:
        """Refuse late jobs, measure the children."""
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


def _make_request(job: Job) -> CodeRequest:
    """What the handler gets. A request of the Open Inference Protocol comes as the client has sent it."""
    request = job.request
    content_type, accept, body = request.content_type, request.accept, bytes(request.body)
    if content_type.startswith(INFER):
        content_type, accept = (JSON if content_type == f"{INFER};json={len(body)}" else BYTES), JSON
    if not request.call:
        return CodeRequest(str(request.id), content_type, accept, body)
    call = decode_call(request.call)
    told = (call.headers, call.parts, call.properties, call.streams)
    return CodeRequest(call.request_id, content_type, accept, body, *told)


def _make_body(answer: CodeAnswer) -> bytes:
    """The handler's body, unless its status has none. Raises Refused for an answer that is none."""
    if answer.failed:
        raise Refused(Situation.MODEL_FAILED, answer.message, status=answer.status)
    return b"" if answer.status in BODILESS else answer.body


def _make_head(answer: CodeAnswer) -> AnswerHead:
    """What the handler has set, without what the server alone says. Raises Refused for what no head may hold.

    INVARIANT: nothing that code sets ends a header's line, or says where the answer ends.
    """
    if not _is_value(answer.content_type):
        raise _refuse_head(f"content type {answer.content_type[:80]!r} is no value of a header")
    if not _is_value(answer.reason):
        raise _refuse_head(f"reason {answer.reason[:80]!r} cannot stand in a status line")
    kept, size = list[tuple[str, str]](), len(answer.content_type) + len(answer.reason)
    for name, value in answer.headers.items():
        if name.lower() in SERVERS_OWN or name.lower().startswith(SERVERS_PREFIXES):
            continue
        if _NAME.fullmatch(name) is None or not _is_value(value):
            raise _refuse_head(f"header {name[:80]!r}: {value[:80]!r} is no header")
        kept.append((name, value))
        size += len(name) + len(value)
    if size > MAX_SAID:
        raise _refuse_head(f"headers have {size} bytes, {MAX_SAID} are allowed")
    return AnswerHead(answer.status, answer.reason, answer.content_type, kept)


def _refuse_head(what: str) -> Refused:
    return Refused(Situation.MODEL_FAILED, f"the handler's {what}")


def _is_value(value: str) -> bool:
    """Whether code may put this into a header of ours: it can neither end the line nor fail to be encoded."""
    return value.isascii() and (value.isprintable() or not value)


def _explain(answer: CodeAnswer) -> str:
    """What an answer that is no success says: the handler's own body, where it has written one."""
    text = answer.body[:2000].decode(errors="replace")
    return text or answer.reason or f"the handler answered with status {answer.status}"
