"""A worker client that answers as a test defines, and a caller of the app that behaves like uvicorn."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from server.errors import Situation
from server.front.app import App
from server.front.backlog import Backlog
from server.front.dataplane import DataPlane
from server.front.tracing.request_trace import Question
from server.front.worker_client import WorkerCall, WorkerLink, WorkerLost
from server.ipc.frames import CacheResult, Response, Stage, Tier

JSON = "application/json"


@dataclass(frozen=True)
class Asked:
    """A request that reached the worker."""

    model: str
    content_type: str
    accept: str
    body: bytes
    arrived: float = 0.0
    alone: bool = False
    client: str = ""
    handler_call: bytes = b""


@dataclass
class Worker:
    """`answer` gives a body, or a situation and a body, or None to die with the request, or leaves it waiting (...)."""

    answer: Callable[[Asked], Any]
    asked: list[Asked] = field(default_factory=list)
    cancelled: int = 0
    given_up: int = 0
    waiting: list[WorkerCall] = field(default_factory=list)
    rest_of: dict[int, list[bytes]] = field(default_factory=dict)
    backlog: Backlog = field(default_factory=Backlog)
    stages: Sequence[Stage] = ()
    lent: None = None

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
        """A link's: the answer comes in a later pass of the loop, and what it says of a traced request is `stages`."""
        if question is not None:
            question.stages = self.stages
        request = Asked(model, content_type, accept, bytes(body), arrived, alone, client, handler_call)
        self.asked.append(request)
        call = WorkerCall(len(self.asked), asyncio.get_running_loop().create_future(), deadline)
        asyncio.get_running_loop().call_soon(self._reply, call, request)
        return call

    def cancel(self, call: WorkerCall) -> None:
        """A link's."""
        del call
        self.cancelled += 1

    def sweep(self, now: float) -> None:
        """A link's: nothing is late here."""

    def give_up(self) -> None:
        """A link's: what waits for an answer ends."""
        self.given_up += 1
        for call in self.waiting:
            if not call.reply.done():
                call.reply.set_exception(WorkerLost("silent"))

    async def rest(self, call: WorkerCall) -> AsyncIterator[bytes]:
        """A link's: the parts after the first; an empty one is the worker's death."""
        for part in self.rest_of.pop(call.id):
            if not part:
                raise WorkerLost("dead")
            call.unread -= len(part)
            yield part

    def _reply(self, call: WorkerCall, request: Asked) -> None:
        answer = self.answer(request)
        if answer is ... or call.reply.done():
            self.waiting.append(call)
            return
        if answer is None:
            call.reply.set_exception(WorkerLost("dead"))
            return
        situation, parts = answer if isinstance(answer, tuple) else (Situation.OK, answer)
        first, *rest = parts if isinstance(parts, list) else [parts]
        self.rest_of[call.id], call.unread = rest, sum(map(len, rest))
        size = len(first) + max(1, call.unread) if rest else len(first)
        call.unread = size - len(first)
        stats = (situation, CacheResult.HIT, Tier.DISK, "v1", JSON, 1500, 0, 20)
        call.reply.set_result(Response(call.id, *stats, size, first))


def attach(plane: DataPlane, *workers: Worker) -> None:
    """The workers are up, each by its number."""
    for number, worker in enumerate(workers):
        plane.links[number] = cast("WorkerLink", worker)
        plane.router.worker_up(number)


@dataclass(frozen=True)
class Answered:
    """What the app sent."""

    status: int
    headers: Mapping[str, str]
    body: bytes


async def ask(
    app: App, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> Answered:
    """One request through the app, over ASGI; the client stays until it is answered. `path` may have a query."""
    path, _, query = path.partition("?")
    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": raw}
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return incoming.pop() if incoming else await asyncio.get_running_loop().create_future()

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    names = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return Answered(sent[0]["status"], names, b"".join(message["body"] for message in sent[1:]))


async def stay_connected() -> None:
    """A client that stays."""
    await asyncio.get_running_loop().create_future()
