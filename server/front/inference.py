"""What a model is asked, what it answers, and the worker's reasons for giving no answer. Runs in a front."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import cast

import msgspec

from model_store.names import ModelName
from server.errors import Detail, Refused, Situation
from server.front.handler_calls import CallDetails
from server.front.tracing.request_trace import Question
from server.front.worker_client import WorkerCall, WorkerLink, WorkerLost
from server.ipc.frames import Response
from server.ipc.handler_calls import AnswerHead
from server.ipc.packed import Instance, NumbersBlock
from server.ipc.together import RowColumns

HALF_ANSWER = "the worker died with half of the answer; try again"
#: Returns an awaitable that is done once the client has left; one wait at a time.
ClientWatch = Callable[[], Awaitable[object]]


class ClientGone(Exception):
    """The connection ends before the answer: the client left or does not read, or only half an answer is there."""


class InferRequest(msgspec.Struct, frozen=True):
    """A request to one model. `deadline`, and `arrived` (0: now), are on the monotonic clock (s).

    `client`: the name of its token, access key or certificate. Clients take turns where they are known. Empty where the
    server is open to all: then there is one.
    `call`: what an archive's code is told of it; None where the server runs no code, or the dialect tells nothing.
    `question`: of a traced request; None for all others.
    """

    model: ModelName
    body: bytes
    content_type: str
    accept: str
    deadline: float
    client_gone: ClientWatch | None = None  #: None: the caller watches its client itself
    arrived: float = 0.0
    request_id: bytes = b""  #: as its client knows it
    client: str = ""
    call: CallDetails | None = None
    told: bytes = b""  #: the same as another node's front has encoded it
    question: Question | None = None


class InferStats(msgspec.Struct, frozen=True, gc=False):
    """What happened to a request, for the headers of its answer. Times in microseconds.

    `queue_us` counts from the request's arrival at the front, without the time in which its model was loaded.
    `quality` and `warnings` are header values as `handlers.codecs.marks` has them. `archive`: what has answered for an
    alias; empty where the request has named it.
    """

    cache: str | None  #: hit, miss or coalesced; None when the request was refused before the cache was asked
    queue_us: int
    load_us: int | None
    inference_us: int
    tier: str = ""
    version: str = ""
    quality: str = ""
    warnings: str = ""
    archive: str = ""


class InferResponse(msgspec.Struct, frozen=True):
    """A model's answer: `body` is all of its `body_bytes` or the first part; `parts` yields the others.

    `head`: what an archive's code said of it, for a request with a `call`. Its status may be any from 200 to 599; the
    body is the handler's own.
    A handler may send its answer while it makes it, for a request whose `call` says that this is wanted: then `body` is
    the first part, and `stream` yields all of them.
    """

    content_type: str
    body: bytes
    body_bytes: int
    stats: InferStats
    link: WorkerLink
    call: WorkerCall
    head: AnswerHead | None = None

    @property
    def unread(self) -> int:
        """Bytes of the answer that `parts` has not yielded yet."""
        return self.call.unread

    def parts(self) -> AsyncIterator[bytes]:
        """The parts after the first, as fast as they are taken. Raises WorkerLost."""
        return self.link.rest(self.call)

    async def read(self) -> bytes:
        """The body to its end. Raises Refused when the worker dies before."""
        if not self.call.unread:
            return self.body
        try:
            body = bytearray(self.body)  # it grows: to make a large one from its parts takes the loop's time
            async for part in self.parts():
                body += part
        except WorkerLost:
            raise Refused(Situation.WORKER_LOST, HALF_ANSWER) from None
        finally:
            self.cancel()
        return cast("bytes", body)  # not copied: all that read it take any buffer

    @property
    def is_streamed(self) -> bool:
        """Whether the answer is sent while it is made: `stream` yields all of it."""
        return self.call.later is not None

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """The parts of a streamed answer, the first of them too, each when it is there. Raises Refused."""
        later, part = self.call.later, self.body
        assert later is not None, "the answer has parts"
        try:
            while True:
                if part:
                    yield part
                    self.link.note_taken(self.call, len(part))
                found = await later.get()
                if found is None:
                    raise Refused(Situation.WORKER_LOST, HALF_ANSWER)
                part = found.body
                if isinstance(found, Response):
                    break
            async for each in self._end_stream(found):
                yield each
        finally:
            self.link.cancel(self.call)

    async def _end_stream(self, last: Response) -> AsyncIterator[bytes]:
        """The last part, or why there is none."""
        if last.situation:
            whole = last.body + b"".join([part async for part in self.parts()])
            raise refuse_by_worker(Situation(last.situation), whole, self.stats, 0.0)
        if last.body:
            yield last.body
        try:
            async for part in self.parts():
                yield part
        except WorkerLost:
            raise Refused(Situation.WORKER_LOST, HALF_ANSWER) from None

    def cancel(self) -> None:
        """Give up what has not been read; nothing to do when all has."""
        if self.call.unread or self.call.later is not None:
            self.link.cancel(self.call)


class TogetherRequest(msgspec.Struct, frozen=True):
    """Items that may be asked together: the model of each, and what it is asked with.

    `hold` is told of each answer before it is read; it may raise Refused.
    `most_bytes`: of all answers together. `numbers`: predictions are wanted as rows of blocks. `deadline` and `arrived`
    are on the monotonic clock (s).
    """

    models: Sequence[ModelName]
    instances: Sequence[Instance] | RowColumns
    configuration: bytes
    most_bytes: int
    deadline: float
    arrived: float
    client: str
    hold: Callable[[InferResponse], None]
    numbers: bool = False


class TogetherAnswer(msgspec.Struct, frozen=True, gc=False):
    """One item's answer: its bytes, which type they have, and what happened on the way.

    Items that a block answers are its rows in their order, and may share one of these.
    """

    content_type: str
    body: memoryview | NumbersBlock
    stats: InferStats


class RefusedByWorker(Refused):
    """The worker's refusal, with what happened until then."""

    def __init__(self, situation: Situation, detail: Detail, stats: InferStats) -> None:
        super().__init__(situation, *msgspec.structs.astuple(detail))
        self.stats = stats


def refuse_by_worker(situation: Situation, body: bytes, stats: InferStats, expected_s: float) -> RefusedByWorker:
    """The worker's refusal. `expected_s`: in how many seconds another try may succeed, where load is the reason."""
    refused = RefusedByWorker(situation, msgspec.json.decode(body, type=Detail), stats)
    if situation in (Situation.OVERLOADED, Situation.DEADLINE):
        refused.advise(expected_s)
    return refused
