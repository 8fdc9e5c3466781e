"""A front's connection to one worker: requests out, answers in, deadlines, and what happens when the worker dies.

Runs on the front's event loop.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from msgspec.structs import asdict

from server.access_log import REFUSED
from server.errors import Refused, Situation
from server.front.backlog import Backlog, Turns
from server.front.lent_child import AnswerRoom, LentChild
from server.front.lent_children import LentChildren
from server.front.tracing.request_trace import Question
from server.ipc.connection import FrameConnection
from server.ipc.frames import (
    CHUNK,
    Cancel,
    Credit,
    Data,
    Held,
    Partial,
    Request,
    Response,
    Stages,
    TracedRequest,
    WireError,
)
from server.ipc.lends import connect_for_lends

#: A worker answers a passed deadline itself and says more about it. The front does so when the worker stays silent.
GRACE_S = 0.25


class WorkerLost(Exception):
    """The worker's connection ended with this call under way, or the worker fell silent."""

    worker = -1  #: which one, where it is known


class WorkerCall(msgspec.Struct, eq=False):
    """A request at the worker. `reply` resolves with the response's head and first part.

    Of an answer that is sent while it is made it resolves with the first part, and `later` has what follows: parts, the
    response, or None where the worker has died.
    """

    id: int
    reply: asyncio.Future[Response | Partial]
    deadline: float
    uploads: bool = False  #: its body did not fit one frame: parts of it may still have to be sent
    missing: int = 0  #: bytes of the answer that have not come from the worker
    unread: int = 0  #: bytes of it that the client has not been given
    parts: asyncio.Queue[bytes | None] | None = None
    lent: "LentChild | None" = None  #: the child that it is left to
    later: asyncio.Queue[Partial | Response | None] | None = None
    question: Question | None = None  #: of a traced request


class WorkerLink(FrameConnection):
    """One front-worker socket. `on_lost` is called once when it ends.

    While the worker does not read, requests wait here and not in the socket's buffers, where they would be in the order
    of their arrival and could not be taken back: clients and models take turns, and what has expired is not sent.
    """

    def __init__(self, worker: int, on_lost: Callable[["WorkerLink"], None]) -> None:
        super().__init__()
        self.worker = worker
        self.backlog = Backlog()
        self._on_lost = on_lost
        self._calls: dict[int, WorkerCall] = {}
        self._unsent: Turns[Request] = Turns()
        self.lent: LentChildren | None = None  #: None where the worker lends nothing
        self._bodies_first = False  # whether large bodies or requests leave first: they take turns
        self._next_id = 0

    def __repr__(self) -> str:
        """For example `<WorkerLink to worker 0: 12 calls, 3 of them not sent>`."""
        unsent = f", {len(self._unsent)} of them not sent" if self._unsent else ""
        return f"<WorkerLink to worker {self.worker}: {len(self._calls)} calls{unsent}>"

    def call(
        self,
        model: str,
        content_type: str,
        accept: str,
        deadline: float,
        body: bytes,
        arrived: float = 0.0,
        alone: bool = False,
        client: str = "",
        handler_call: bytes = b"",
        question: Question | None = None,
    ) -> WorkerCall:
        """Send a request that came to the front at `arrived` (monotonic, s; 0: now).

        `alone`, `client`, `handler_call`: see `Request`. `question`: see `InferRequest`. The `reply` raises WorkerLost,
        or Refused when the deadline (monotonic, s) passes.
        """
        self._next_id = ident = self._next_id + 1
        times = (int(deadline * 1e9), int(arrived * 1e9))
        request = Request(
            ident, times[0], model, content_type, accept, len(body), body, times[1], alone, client, handler_call
        )
        call = self._calls[ident] = WorkerCall(ident, self._loop.create_future(), deadline, len(body) > CHUNK)
        if question is not None:
            request = self._trace(call, request, question)
        if self.lent is not None and (child := self.lent.find(request)) is not None:
            call.lent = child
            child.put(request)
        else:
            self._hand_over(request)
        return call

    def _trace(self, call: WorkerCall, request: Request, question: Question) -> Request:
        """The request as one of which the worker says how long its stages took."""
        call.question = question
        question.workers.append(self.worker)
        return TracedRequest(**asdict(request), trace_id=question.trace_id)

    def _hand_over(self, request: Request) -> None:
        """To the worker, now or when it reads again."""
        if self.is_paused or self._unsent:
            self._unsent.put(request.model, request.id, request, request.client)
        else:
            self.send(request)

    def hand_back(self, request: Request) -> None:
        """A lent child has not begun the request: it is the worker's."""
        call = self._calls.get(request.id)
        if call is not None:
            call.lent = None
            self._hand_over(request)

    def answer(self, response: Response | Partial) -> None:
        """A lent child's answer, or a part of one."""
        call = self._calls.get(response.id)
        if call is None:
            return
        if isinstance(response, Response):
            self._begin_answer(call, response)
        else:
            _add_partial(call, response)

    def cancel(self, call: WorkerCall) -> None:
        """Give the call up: the worker need not answer it."""
        if self._calls.pop(call.id, None) is None:
            return
        if call.lent is not None:
            call.lent.drop(call.id)
        elif not self._unsent.drop(call.id):
            self.drop_body(call.id)
            self.send(Cancel(call.id))

    async def rest(self, call: WorkerCall) -> AsyncIterator[bytes]:
        """The parts of a large answer after the first. Credit follows consumption: a slow client holds a window."""
        while call.parts is not None and call.unread:
            part = await call.parts.get()
            if part is None:
                raise WorkerLost(f"worker {self.worker} died while its answer was on the way")
            call.unread -= len(part)
            if call.missing:
                self.send(Credit(call.id, len(part)))
            yield part

    def note_taken(self, call: WorkerCall, size: int) -> None:
        """The client of an answer that is sent while it is made has been given so many bytes."""
        if call.lent is not None and self.lent is not None:
            self.lent.add_credit(call.id, size)
        else:
            self.send(Credit(call.id, size))

    def sweep(self, now: float) -> None:
        """Refuse the calls whose deadline has passed without a word from the worker."""
        for call in [call for call in self._calls.values() if call.deadline <= now and not call.reply.done()]:
            if call.lent is not None or call.id in self._unsent or call.deadline + GRACE_S <= now:
                self._refuse_late(call)
        if self.lent is not None:
            self.lent.sweep(now)

    def resume_writing(self) -> None:
        """The worker reads again: requests that wait leave, and parts of large bodies, either first in turn."""
        self._bodies_first = not self._bodies_first
        if self._bodies_first:
            super().resume_writing()
            self._send_waiting()
        else:
            self.is_paused = False
            self._send_waiting()
            if not self.is_paused:
                super().resume_writing()

    def _send_waiting(self) -> None:
        now = time.monotonic()
        while self._unsent and not self.is_paused:
            request = self._unsent.take()
            call = self._calls[request.id]
            if call.deadline <= now:
                self._refuse_late(call)
            else:
                self.send(request)

    def _refuse_late(self, call: WorkerCall) -> None:
        if call.lent is not None:
            message = "the deadline passed while the archive's code ran"
            call.lent.drop(call.id, REFUSED)
            del self._calls[call.id]
        else:
            was = "was not read by the worker" if call.id in self._unsent else "was not answered by the worker"
            message = f"the request {was} before the deadline"
            self.cancel(call)
        call.reply.set_exception(Refused(Situation.DEADLINE, message))

    def give_up(self) -> None:
        """The worker is silent: every call that it has not begun to answer ends as if the worker had died.

        A child that is here answers all the same.
        """
        for call in [call for call in self._calls.values() if not call.reply.done()]:
            if call.lent is not None and call.lent.is_here:
                continue
            self.cancel(call)
            call.reply.set_exception(WorkerLost(f"worker {self.worker} is silent"))

    def handle_frame(self, frame: Request | Data | Response | Cancel | Held | Partial | Stages) -> None:
        """The head of an answer or a part of its body, or what is said of a traced one before."""
        call = self._calls.get(frame.id)
        if isinstance(frame, Response):
            if call is not None:
                self._begin_answer(call, frame)
        elif isinstance(frame, Partial):
            if call is not None:
                _add_partial(call, frame)
        elif isinstance(frame, Data):
            if call is not None and call.parts is not None:
                self._add_part(call, call.parts, frame.body)
        elif isinstance(frame, Stages):
            if call is not None and call.question is not None:
                call.question.stages = frame.stages
        else:
            raise WireError(f"a worker sends no {type(frame).__name__}")

    def handle_end(self) -> None:
        """The worker is gone: every call learns it now."""
        if self.lent is not None:
            self.lent.close()
        for call in self._calls.values():
            if call.parts is not None:
                call.parts.put_nowait(None)
            elif call.later is not None:
                call.later.put_nowait(None)
            elif not call.reply.done():
                call.reply.set_exception(WorkerLost(f"worker {self.worker} died"))
        self._calls.clear()
        self._unsent.clear()
        self._on_lost(self)

    def _begin_answer(self, call: WorkerCall, response: Response) -> None:
        if call.uploads:
            self.drop_body(response.id)  # an early refusal ends the upload
        call.missing = call.unread = response.body_bytes - len(response.body)
        if call.missing:
            call.parts = asyncio.Queue()
        else:
            del self._calls[response.id]
        if call.later is not None:
            call.later.put_nowait(response)
        elif not call.reply.done():
            call.reply.set_result(response)

    def _add_part(self, call: WorkerCall, parts: asyncio.Queue[bytes | None], part: bytes) -> None:
        call.missing -= len(part)
        if call.missing < 0:
            raise WireError(f"response {call.id} has more body than it announced")
        parts.put_nowait(part)
        if not call.missing:
            del self._calls[call.id]


def _add_partial(call: WorkerCall, part: Partial) -> None:
    """The next part of an answer that is not complete."""
    if call.later is not None:
        call.later.put_nowait(part)
        return
    call.later = asyncio.Queue()
    if not call.reply.done():
        call.reply.set_result(part)


async def connect_to_worker(
    path: str, worker: int, on_lost: Callable[[WorkerLink], None], room: AnswerRoom | None = None
) -> WorkerLink:
    """A link to the worker that listens at `path`. Raises OSError when none listens there.

    `room`: for the answers of children that it lends; None: it need lend none.
    """
    loop = asyncio.get_running_loop()
    make: Awaitable[tuple[Any, WorkerLink]] = loop.create_unix_connection(lambda: WorkerLink(worker, on_lost), path)
    _, link = await make
    channel = None if room is None else connect_for_lends(path)
    if channel is not None and room is not None:
        link.lent = LentChildren(link, channel, room)
    return link
