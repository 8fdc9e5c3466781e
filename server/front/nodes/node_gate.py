"""What another node's front asks of this one: requests in, the local data plane's answers out. Runs in a front.

INVARIANT: a gate asks the plane of this node's own workers, never that of the cluster, so that no request goes in
circles while two nodes know different tables. What its client may do was checked by the front that it came to.
"""

import asyncio
import contextlib
import time
from functools import partial
from typing import Final

import msgspec
import structlog

from model_store.names import ModelName
from server.errors import Detail, Refused, Situation
from server.front.dataplane import DataPlane
from server.front.inference import ClientGone, InferRequest, InferResponse, InferStats, RefusedByWorker
from server.front.nodes.node_link import BEAT, DESCRIBE, LOAD, UNLOAD, set_socket_options
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
from server.ipc.handler_calls import encode_head
from server.ipc.operations import LoadForClient, UnloadForClient
from server.ipc.request_connection import RequestConnection

SLOW_CLIENTS = "answers wait for slow clients already, as many bytes as max_inflight_bytes allows"
_NO_STATS = InferStats(None, 0, None, 0)
_CACHE: Final[dict[str | None, CacheResult]] = {
    None: CacheResult.NONE,
    **{each.name.lower(): each for each in CacheResult if each},
}
_TIER: Final[dict[str, Tier]] = {"": Tier.NONE, **{each.name.lower(): each for each in Tier if each}}

log = structlog.get_logger()


class NodeGate(RequestConnection):
    """See the module. One for each front that has connected."""

    def __init__(self, plane: DataPlane, max_body_bytes: int, max_unsent_bytes: int) -> None:
        super().__init__(max_body_bytes, max_unsent_bytes)
        self._plane = plane
        self._asked: dict[int, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        """For example `<NodeGate 12 requests>`."""
        return f"<NodeGate {len(self._asked)} requests>"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Both nodes have proven themselves."""
        super().connection_made(transport)
        set_socket_options(transport)

    def handle_frame(self, frame: Request | Data | Response | Cancel | Held | Partial | Stages) -> None:
        """A request, a part of its body, or its end."""
        if isinstance(frame, Request):
            self._receive(frame)
        elif isinstance(frame, Data):
            self.receive_part(frame)
        elif isinstance(frame, Cancel):
            self._cancel(frame.id)
        else:
            raise WireError(f"a node's front sends no {type(frame).__name__}")

    def handle_end(self) -> None:
        """The other front is gone, and with it all who wait through it."""
        for task in list(self._asked.values()):
            task.cancel()

    def _receive(self, request: Request) -> None:
        now_ns = time.monotonic_ns()
        times = {"deadline_ns": now_ns + request.deadline_ns, "arrived_ns": max(1, now_ns - request.arrived_ns)}
        request = msgspec.structs.replace(request, **times)
        if request.content_type == BEAT:
            self._respond(request.id, _NO_STATS, "", b"")
        else:
            self.receive_request(request)

    def begin_request(self, request: Request) -> None:
        """Ask the local plane."""
        task = self._asked[request.id] = asyncio.create_task(self._answer(request))
        task.add_done_callback(partial(self._forget, request.id))

    def _forget(self, ident: int, task: "asyncio.Task[None]") -> None:
        self._asked.pop(ident, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("node_request_failed", exc_info=error)

    def _cancel(self, ident: int) -> None:
        self.forget_request(ident)
        if (task := self._asked.get(ident)) is not None:
            task.cancel()

    async def _answer(self, request: Request) -> None:
        """Ask the local plane, and send what it says, whatever that is."""
        try:
            if request.content_type in (LOAD, UNLOAD):
                version = await self._control(request)
                self._respond(request.id, _NO_STATS, "", version.encode())
                return
            if request.content_type == DESCRIBE:
                said = await self._plane.describe_node(request.deadline_ns / 1e9)
                self._respond(request.id, _NO_STATS, "application/json", said)
                return
            response = await self._plane.infer(_make_request(request))
            if response.is_streamed:
                await self._stream(request.id, response)
            else:
                body = await response.read()
                if len(body) > CHUNK and self.unsent_bytes + len(body) > self._max_unsent_bytes:
                    message = f"{self.unsent_bytes} bytes of answers wait for slow clients (max_inflight_bytes)"
                    self._refuse(request.id, Situation.OVERLOADED, message)
                    return
                head = b"" if response.head is None else encode_head(response.head)
                self._respond(request.id, response.stats, response.content_type, body, head=head)
        except Refused as why:
            stats = why.stats if isinstance(why, RefusedByWorker) else _NO_STATS
            said = msgspec.json.encode(why.detail)
            self._respond(request.id, stats, "application/json", said, situation=why.situation)
        except ClientGone:  # only half of the answer is there
            self._refuse(request.id, Situation.WORKER_LOST, "the worker died with half of the answer; try again")
        except Exception:
            log.exception("node_request_failed", model=request.model)
            self._refuse(request.id, Situation.INTERNAL, "the server failed; its log says why")

    async def _control(self, request: Request) -> str:
        asked = (LoadForClient if request.content_type == LOAD else UnloadForClient)(request.model)
        return await self._plane.control(asked, request.deadline_ns / 1e9, permitted=True)

    async def _stream(self, ident: int, response: InferResponse) -> None:
        """Parts as the archive's code makes them; `PartStreams` keeps what the other front has no room for."""
        head = b"" if response.head is None else encode_head(response.head)
        async with contextlib.aclosing(response.stream()) as parts:
            async for part in parts:
                if not self.send_part(Partial(ident, response.content_type, part, head)):
                    raise Refused(Situation.OVERLOADED, SLOW_CLIENTS)
                head = b""
        self.send_response(_make_response(ident, Situation.OK, response.stats, response.content_type, b"", b""))

    def _refuse(self, ident: int, situation: Situation, message: str) -> None:
        detail = msgspec.json.encode(Detail(message))
        self._respond(ident, _NO_STATS, "application/json", detail, situation=situation)

    def _respond(
        self,
        ident: int,
        stats: InferStats,
        content_type: str,
        body: bytes,
        *,
        situation: Situation = Situation.OK,
        head: bytes = b"",
    ) -> None:
        response = _make_response(ident, situation, stats, content_type, body, head)
        self.send_response(response)


def _make_request(request: Request) -> InferRequest:
    return InferRequest(
        ModelName(request.model),
        request.body,
        request.content_type,
        request.accept,
        request.deadline_ns / 1e9,
        arrived=request.arrived_ns / 1e9,
        client=request.client,
        told=request.call,
    )


def _make_response(
    ident: int, situation: Situation, stats: InferStats, content_type: str, body: bytes, head: bytes
) -> Response:
    times = (stats.queue_us, stats.load_us or 0, stats.inference_us)
    marks = (stats.quality, stats.warnings)
    said = (_CACHE[stats.cache], _TIER[stats.tier], stats.version, content_type, *times, len(body), body, head, *marks)
    return Response(ident, situation, *said)
