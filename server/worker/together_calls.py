"""A call for many models in a worker: its items become jobs of their own, and their answers one response.

Runs on the step thread. An item is admitted, leased, queued, counted and logged like any other request; only its bytes
come and go with those of the others.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import msgspec

from handlers.codecs.deepar_schema import Configuration
from handlers.codecs.forecast_texts import read_configuration
from server.errors import Detail, Refused, Situation
from server.ipc.frames import CHUNK, Request
from server.ipc.packed import BlockRow, BlockRows, NumbersBlock, TableRow
from server.ipc.together import Answer, SharedAnswer, read_asked, write_answered
from server.worker.scheduler import Job

JSON = "application/json"
NOTHING = memoryview(b"")
TOO_LARGE = "the answers of this call have more than {} bytes together (max_forecasts_bytes); ask for less in one call"

NO_ROOM = "bytes of answers wait in the worker already, as many as max_inflight_bytes allows"


class Submits(Protocol):
    """What a call needs of the step loop."""

    def submit(self, request: Request, origin: Any) -> Job:
        """Accept a request."""

    def submit_resident(self, requests: Sequence[Request], origin: Any) -> list[Job | None]:
        """Accept those whose models are resident, all at once; None for those that `submit` shall accept."""

    def cancel(self, job: Job) -> None:
        """Give up a job."""


class TogetherCall:
    """See the module. `end` gets the request's situation and the body of its response, once.

    It is the origin of its jobs (`server.worker.replies.Origin`). INVARIANT: each item is answered or refused once, or
    the whole call is cancelled.
    """

    def __init__(
        self, request: Request, end: Callable[[Situation, bytes], None], has_room: Callable[[], bool] = lambda: True
    ) -> None:
        """`has_room`: whether the worker may keep more bytes of answers. Raises WireError for a body that is none."""
        self._request, self._end, self._has_room = request, end, has_room
        self._head, self._instances, self.columns = read_asked(request.body)
        count = len(self._head.models)
        self._left = deque[int]()  # items that are no jobs yet
        self._begun = False
        self._jobs: list[Job] = []
        self._shared: dict[SharedAnswer, int] = {}
        self._of = [0] * count  # for each item its answer in those
        self._bodies: list[Answer] = [b""] * count
        self._blocks: list[tuple[NumbersBlock, Sequence[int]]] = []  # of answers, each with all its items' places
        self._missing, self._checked = count, 0
        self.kept_bytes = 0  #: of its items' answers
        self._ended = False
        self.configuration: Configuration | None = read_configuration(self._head.configuration)

    def __repr__(self) -> str:
        """For example `<TogetherCall 7: 12 of 1000 items are not answered>`."""
        return f"<TogetherCall {self._request.id}: {self._missing} of {len(self._of)} items are not answered>"

    @property
    def jobs(self) -> Iterator[Job]:
        """The jobs of its items that are not done."""
        return (job for job in self._jobs if not job.done)

    def submit(self, steps: Submits, is_over: Callable[[], bool] = lambda: False) -> bool:
        """Make a job of each item, until time is over. Returns whether some are left: then it is to be called again.

        Items of resident models are jobs at once, which takes microseconds each; a load that begins takes far longer.
        """
        if not self._begun:
            self._begun, self._left = True, self._submit_resident(steps)
        while self._has_more():
            place = self._left.popleft()
            (request,) = self._make_requests([self._head.models[place]], place)
            job = steps.submit(request, self)
            if self._ended:
                steps.cancel(job)
            elif not job.done:
                self._keep_job(job, place)
            if is_over():
                break
        return self._has_more()

    def _has_more(self) -> bool:
        """Whether items are left that shall become jobs."""
        return bool(self._left) and not self._ended

    def _submit_resident(self, steps: Submits) -> deque[int]:
        """Make jobs of the items of resident models. Returns the places of the others."""
        found = steps.submit_resident(self._make_requests(self._head.models), self)
        for place, job in enumerate(found):
            if job is not None:
                self._keep_job(job, place)
        return deque(place for place, job in enumerate(found) if job is None)

    def _keep_job(self, job: Job, place: int) -> None:
        job.together = self
        if self.columns is None:
            job.instance, self._instances[place] = self._instances[place], NOTHING  # the job has it now
        self._jobs.append(job)

    def get_instance(self, job: Job) -> memoryview | TableRow:
        """The instance of one of its jobs."""
        instance: memoryview | TableRow = job.instance if self.columns is None else self.columns.cut(job.request.id)
        return instance

    def cancel(self, steps: Submits) -> None:
        """Give up all items that are not answered; there is no response then."""
        self._ended = True
        self._drop_jobs(steps)

    def _drop_jobs(self, steps: Submits) -> None:
        if self._missing:
            for job in self.jobs:
                steps.cancel(job)
        self._jobs.clear()

    @property
    def wants_numbers(self) -> bool:
        """Whether predictions are wanted as rows of blocks."""
        return self._head.numbers

    def wrap_instance(self, instance: bytes | memoryview) -> bytes:
        """The body of a request for one instance in JSON."""
        return b"".join((b'{"instances":[', instance, b'],"configuration":', self._head.configuration, b"}"))

    def _make_requests(self, models: Sequence[str], first: int = 0) -> list[Request]:
        """The requests that these items would be alone; they get their bodies when these are needed."""
        whole = self._request
        deadline, arrived, alone, client = whole.deadline_ns, whole.arrived_ns, whole.alone, whole.client
        return [
            Request(place, deadline, model, JSON, JSON, 0, b"", arrived, alone, client)
            for place, model in enumerate(models, first)
        ]

    # --- answers (step_loop.Origin) ---------------------------------------------------------------------------------

    def answer(
        self, job: Job, content_type: str, body: Answer, *, queue_s: float, inference_s: float, head: bytes = b""
    ) -> None:
        """Keep an item's answer until all are there."""
        del head
        self._take(job, Situation.OK, content_type, body, queue_s, inference_s)

    def answer_items(
        self, jobs: Sequence[Job], content_type: str, bodies: Sequence[Answer], began: float, inference_s: float
    ) -> None:
        """Keep the answers of several items that ran together in a batch, which began then."""
        if self._ended:
            return
        if isinstance(bodies, BlockRows):
            size = len(jobs) * bodies.block.row_bytes
            self._blocks.append((bodies.block, [job.request.id for job in jobs]))
        else:
            size = _measure_answers(bodies)
            for job, body in zip(jobs, bodies, strict=True):
                self._bodies[job.request.id] = body
        inference_us, of = int(inference_s * 1e6), self._of
        first, shared = None, 0
        for job in jobs:
            if first is None or job.load_s != first.load_s or job.cache != first.cache or job.tier != first.tier:
                times = (int(job.queued_s(began) * 1e6), int(job.load_s * 1e6), inference_us)  # all came with the call
                answer = SharedAnswer(Situation.OK, job.cache, job.tier, content_type, *times)
                first, shared = job, self._shared.setdefault(answer, len(self._shared))
            of[job.request.id] = shared
        self._count(len(jobs), size)

    def answer_part(self, job: Job, content_type: str, body: bytes, head: bytes) -> bool:
        """No item asks for an answer in parts."""
        del job, content_type, body, head
        return False

    def refuse(self, job: Job, refused: Refused) -> None:
        """Keep why an item has no answer."""
        detail = msgspec.json.encode(refused.detail)
        self._take(job, refused.situation, JSON, detail, job.queued_s(time.monotonic()), 0.0)

    def _take(
        self, job: Job, situation: Situation, content_type: str, body: Answer, queue_s: float, inference_s: float
    ) -> None:
        if self._ended:
            return
        place = job.request.id
        times = (int(queue_s * 1e6), int(job.load_s * 1e6), int(inference_s * 1e6))
        answer = SharedAnswer(situation, job.cache, job.tier, content_type, *times, *job.marks)
        self._of[place] = self._shared.setdefault(answer, len(self._shared))
        self._bodies[place] = body
        self._count(1, _measure_answers([body]))

    def _count(self, items: int, size: int) -> None:
        """Count so many items as answered; the last ends the call, and so do too many bytes."""
        self._missing -= items
        self.kept_bytes += size
        if self.kept_bytes > self._head.most_bytes:
            self._fail(Situation.TOO_LARGE, TOO_LARGE.format(self._head.most_bytes))
        elif self.kept_bytes - self._checked > CHUNK and not self._has_room():
            self._fail(Situation.OVERLOADED, NO_ROOM)
        elif not self._missing:
            self._ended = True
            self._end(Situation.OK, write_answered(list(self._shared), self._of, self._bodies, self._blocks))
        self._checked = self.kept_bytes - self.kept_bytes % CHUNK

    def _fail(self, situation: Situation, message: str) -> None:
        """Refuse the whole call."""
        self._ended, self._bodies, self._blocks = True, [], []
        self._end(situation, msgspec.json.encode(Detail(message)))


def _measure_answers(bodies: Sequence[Answer]) -> int:
    """The bytes of answers. Those that were computed together are rows of one block, which are of one size."""
    size, block, row_bytes = 0, None, 0
    for body in bodies:
        if isinstance(body, BlockRow):
            if body.block is not block:
                block = body.block
                row_bytes = block.row_bytes
            size += row_bytes
        else:
            size += len(body)
    return size
