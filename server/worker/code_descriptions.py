"""Asks the code of an archive what it says of itself, for TorchServe's `GET /models/{name}?customized=true`."""

import asyncio
import itertools
import time

from model_store.names import ModelName
from server.errors import Refused
from server.ipc.frames import Request
from server.ipc.handler_calls import HandlerCall, Pairs, encode_call
from server.worker.scheduler import Job
from server.worker.step_loop import StepLoop

DESCRIBE = {"describe": "True"}  #: the property by which a handler knows the question


class Asker:
    """Where the answer to one question arrives: what a front's connection is to clients' requests."""

    def __init__(self) -> None:
        self.answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        """For example `<Asker, waiting>`."""
        return f"<Asker, {'answered' if self.answered.done() else 'waiting'}>"

    def answer(
        self, job: Job, content_type: str, body: bytes, *, queue_s: float, inference_s: float, head: bytes = b""
    ) -> None:
        """The handler's body, whatever status it has set."""
        del job, content_type, queue_s, inference_s, head
        if not self.answered.done():
            self.answered.set_result(bytes(body))

    def answer_part(self, job: Job, content_type: str, body: bytes, head: bytes) -> bool:
        """A description comes in one piece: the call does not ask for parts."""
        del job, content_type, body, head
        return False

    def refuse(self, job: Job, refused: Refused) -> None:
        """Why there is none."""
        del job
        if not self.answered.done():
            self.answered.set_exception(refused)


class CodeDescriptions:
    """See the module. Questions take turns with clients' requests, and count in the same queues."""

    def __init__(self, steps: StepLoop, patience_s: float) -> None:
        self._steps, self._patience_s = steps, patience_s
        self._ids = itertools.count(1)

    def __repr__(self) -> str:
        """For example `<CodeDescriptions of <StepLoop ...>>`."""
        return f"<CodeDescriptions of {self._steps!r}>"

    async def ask(self, model: ModelName, headers: Pairs) -> bytes:
        """What the handler says. Raises Refused."""
        number, asker = next(self._ids), Asker()
        call = encode_call(HandlerCall(f"describe-{number}", headers, [], DESCRIBE))
        deadline = time.monotonic() + self._patience_s
        request = Request(number, int(deadline * 1e9), model, "", "", 0, b"", call=call)
        job = self._steps.submit(request, asker)
        try:
            return await asker.answered
        except asyncio.CancelledError:
            self._steps.cancel(job)
            raise
