"""A worker's connection to one front: requests in, jobs to the step loop, answers out.

Runs on the worker's event loop.
"""

import asyncio
import time

import msgspec

from server.errors import Detail, Refused, Situation
from server.ipc.frames import (
    CHUNK,
    CacheResult,
    Cancel,
    Data,
    Held,
    Partial,
    Request,
    Response,
    Stages,
    Tier,
    WireError,
)
from server.ipc.lends import find_peer
from server.ipc.request_connection import RequestConnection
from server.ipc.together import TOGETHER
from server.worker.lent_children import LentChildren
from server.worker.scheduler import Job
from server.worker.stage_times import StageTimes
from server.worker.step_loop import StepLoop
from server.worker.together_calls import TogetherCall

SUBMIT_S = 0.03  #: of the step thread that a call for many models takes at once to make its items jobs


class FrontConnection(RequestConnection):
    """See the module. Answers beyond `max_unsent_bytes` that wait for slow clients are refused as overload.

    `lent`: lends children of code archives to the front; None where none are.
    """

    def __init__(
        self, steps: StepLoop, max_body_bytes: int, max_unsent_bytes: int, lent: LentChildren | None = None
    ) -> None:
        super().__init__(max_body_bytes, max_unsent_bytes)
        self._lent = lent
        self._steps = steps
        self._jobs: dict[int, Job] = {}
        self._together: dict[int, TogetherCall] = {}

    def __repr__(self) -> str:
        """For example `<FrontConnection 12 jobs, 1 bodies in, <Outbox 0 bodies, 0 bytes>>`."""
        return f"<FrontConnection {len(self._jobs)} jobs, {len(self._inbox)} bodies in, {self._outbox!r}>"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Both ends are connected."""
        super().connection_made(transport)
        if self._lent is not None:
            self._lent.note_front(self, find_peer(transport.get_extra_info("socket")))

    def handle_frame(self, frame: Request | Data | Response | Cancel | Held | Partial | Stages) -> None:
        """A request, a part of its body, or its end."""
        if isinstance(frame, Request):
            self.receive_request(frame)
        elif isinstance(frame, Data):
            self.receive_part(frame)
        elif isinstance(frame, Cancel):
            self._cancel(frame.id)
        elif isinstance(frame, Held) and self._lent is not None:
            self._lent.note_held(self, frame.id)
        else:
            raise WireError(f"a front sends no {type(frame).__name__}")

    def handle_end(self) -> None:
        """The front is gone, and every client that waits through it."""
        if self._lent is not None:
            self._lent.forget_front(self)
        for job in self._jobs.values():
            self._steps.cancel(job)
        self._jobs.clear()
        for call in self._together.values():
            call.cancel(self._steps)
        self._together.clear()

    def begin_request(self, request: Request) -> None:
        """Make a job of a request, or jobs of a call for many models."""
        if request.content_type == TOGETHER:
            self._submit_together(request)
            return
        job = self._steps.submit(request, self)
        if not job.done:
            self._jobs[request.id] = job

    def _submit_together(self, request: Request) -> None:
        """Take a call for many models. Raises WireError for one that no front sends."""
        ident = request.id
        end = lambda situation, body: self._end_together(ident, situation, body)  # noqa: E731
        call = TogetherCall(request, end, self._has_room)
        self._together[ident] = call
        self._submit_items(call)

    def _submit_items(self, call: TogetherCall) -> None:
        """Take the call's items for a slice of time, and the others after the step loop has had its turn.

        A thousand loads that begin at once take so long that the worker would be taken for silent.
        """
        until = time.perf_counter() + SUBMIT_S
        if call.submit(self._steps, lambda: time.perf_counter() > until):
            self._loop.call_soon(self._submit_items, call)

    def _end_together(self, ident: int, situation: Situation, body: bytes) -> None:
        """Send the response to a call for many models; items that are not answered are given up."""
        self._together.pop(ident).cancel(self._steps)
        if len(body) > CHUNK and self.unsent_bytes + len(body) > self._max_unsent_bytes:
            situation, body = Situation.OVERLOADED, msgspec.json.encode(Detail(self._describe_unsent()))
        nothing = (CacheResult.NONE, Tier.NONE, "", TOGETHER, 0, 0, 0)
        self.send(Response(ident, situation, *nothing, len(body), body))

    def _has_room(self) -> bool:
        """Whether more answers of calls for many models may be kept here."""
        kept = sum(call.kept_bytes for call in self._together.values())
        return self.unsent_bytes + kept <= self._max_unsent_bytes

    def _describe_unsent(self) -> str:
        return f"{self.unsent_bytes} bytes of answers wait for slow clients already (max_inflight_bytes)"

    def _cancel(self, ident: int) -> None:
        self.forget_request(ident)
        call = self._together.pop(ident, None)
        if call is not None:
            call.cancel(self._steps)
        job = self._jobs.pop(ident, None)
        if job is not None:
            self._steps.cancel(job)

    # --- answers (step_loop.Origin) ---------------------------------------------------------------------------------

    def answer(
        self, job: Job, content_type: str, body: bytes, *, queue_s: float, inference_s: float, head: bytes = b""
    ) -> None:
        """Send a job's answer, or refuse it where slow clients hold too many bytes of others."""
        if len(body) > CHUNK and self.unsent_bytes + len(body) > self._max_unsent_bytes:
            self.refuse(job, Refused(Situation.OVERLOADED, self._describe_unsent()))
            return
        self._respond(job, Situation.OK, content_type, body, queue_s, inference_s, head)

    def answer_part(self, job: Job, content_type: str, body: bytes, head: bytes) -> bool:
        """Send a part of an answer that is not complete yet. False where slow clients hold too many bytes."""
        return self.send_part(Partial(job.request.id, content_type, body, head))

    def refuse(self, job: Job, refused: Refused) -> None:
        """Send why there is no answer, and how long the request waited for that."""
        queue_s = job.queued_s(time.monotonic())
        self._respond(job, refused.situation, "application/json", msgspec.json.encode(refused.detail), queue_s, 0.0)

    def _respond(
        self,
        job: Job,
        situation: Situation,
        content_type: str,
        body: bytes,
        queue_s: float,
        inference_s: float,
        head: bytes = b"",
    ) -> None:
        ident = job.request.id
        self._jobs.pop(ident, None)
        version = job.slot.version if job.slot is not None else ""
        times = (int(queue_s * 1e6), int(job.load_s * 1e6), int(inference_s * 1e6))
        said = (job.cache, job.tier, version, content_type, *times, len(body), body, head, *job.marks)
        response = Response(ident, situation, *said)
        if job.times is not None:
            self._tell_stages(job, job.times)
        self.send_response(response)

    def _tell_stages(self, job: Job, times: StageTimes) -> None:
        """Say how long the stages of a traced request took, before its response."""
        has_waited = job.cache in (CacheResult.MISS, CacheResult.COALESCED)
        now = time.monotonic()
        self.send(Stages(job.request.id, times.list_stages(job.arrived, job.accepted, now, has_waited=has_waited)))
