"""Requests of the server's own, such as an operator's trial, which take their turns with those of clients."""

import asyncio
import itertools
import time

from model_store.names import ModelName
from server.errors import Refused
from server.ipc.frames import Request
from server.worker.scheduler import Job
from server.worker.step_loop import StepLoop


class InnerAnswer:
    """Where the answer to one request arrives: what a front's connection is to clients' requests."""

    def __init__(self) -> None:
        self.answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        """For example `<InnerAnswer, waiting>`."""
        return f"<InnerAnswer, {'answered' if self.answered.done() else 'waiting'}>"

    def answer(
        self, job: Job, content_type: str, body: bytes, *, queue_s: float, inference_s: float, head: bytes = b""
    ) -> None:
        """The body; of code, whatever status its handler has set."""
        del job, content_type, queue_s, inference_s, head
        if not self.answered.done():
            self.answered.set_result(bytes(body))

    def answer_part(self, job: Job, content_type: str, body: bytes, head: bytes) -> bool:
        """An answer comes in one piece: the request does not ask for parts."""
        del job, content_type, body, head
        return False

    def refuse(self, job: Job, refused: Refused) -> None:
        """Why there is none."""
        del job
        if not self.answered.done():
            self.answered.set_exception(refused)


class InnerRequests:
    """See the module. They count in the same queues and limits as those of clients."""

    def __init__(self, steps: StepLoop, patience_s: float) -> None:
        """A request is waited for `patience_s` seconds."""
        self._steps, self._patience_s = steps, patience_s
        self._ids = itertools.count(1)

    def __repr__(self) -> str:
        """For example `<InnerRequests of <StepLoop ...>>`."""
        return f"<InnerRequests of {self._steps!r}>"

    async def ask(self, model: ModelName, body: bytes, content_type: str = "", call: bytes = b"") -> bytes:
        """The body of the answer. `call`: what a handler is told beside the body. Raises Refused."""
        answer, deadline = InnerAnswer(), time.monotonic() + self._patience_s
        request = Request(next(self._ids), int(deadline * 1e9), model, content_type, "", len(body), body, call=call)
        job = self._steps.submit(request, answer)
        try:
            return await answer.answered
        except asyncio.CancelledError:
            self._steps.cancel(job)
            raise
