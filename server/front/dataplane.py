"""The data plane: infer one model on a worker, and once more on another when that worker dies. Runs in a front.

It knows no transport and no dialect: an `InferRequest` comes in, an `InferResponse` or a `Refused` comes out.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Protocol, cast

import msgspec
import structlog

from model_store.names import ModelName
from server.errors import Detail, Refused, Situation
from server.front.worker_client import WorkerCall, WorkerLink, WorkerLost
from server.ipc.frames import CacheResult, Tier
from server.ipc.pulse import SILENT_S, PulseReader
from server.routing import Router, WorkerLoad

WATCH_AFTER_S = 0.5

log = structlog.get_logger()

HALF_ANSWER = "the worker died with half of the answer; try again"
_CACHE: Mapping[int, str | None] = {
    CacheResult.NONE: None,
    CacheResult.HIT: "hit",
    CacheResult.MISS: "miss",
    CacheResult.COALESCED: "coalesced",
}
_TIER: Mapping[int, str] = {Tier.NONE: "", Tier.HOST: "host", Tier.DISK: "disk", Tier.STORE: "store"}

#: Returns an awaitable that is done once the client has left; one wait at a time.
ClientWatch = Callable[[], Awaitable[object]]


class ClientGone(Exception):
    """The connection ends before the answer: the client left or does not read, or only half an answer is there."""


class InferRequest(msgspec.Struct, frozen=True):
    """A request to one model. `deadline`, and `arrived` (0: now), are on the monotonic clock (s)."""

    model: ModelName
    body: bytes
    content_type: str
    accept: str
    deadline: float
    client_gone: ClientWatch | None = None  #: None: the caller watches its client itself
    arrived: float = 0.0


class InferStats(msgspec.Struct, frozen=True, gc=False):
    """What happened to a request, for the headers of its answer. Times in microseconds.

    `queue_us` counts from the request's arrival at the front, without the time in which its model was loaded.
    """

    cache: str | None  #: hit, miss or coalesced; None when the request was refused before the cache was asked
    queue_us: int
    load_us: int | None
    inference_us: int
    tier: str = ""
    version: str = ""


class InferResponse(msgspec.Struct, frozen=True):
    """A model's answer: `body` is all of its `body_bytes` or the first part; `parts` yields the others."""

    content_type: str
    body: bytes
    body_bytes: int
    stats: InferStats
    link: WorkerLink
    call: WorkerCall

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

    def cancel(self) -> None:
        """Give up what has not been read; nothing to do when all has."""
        if self.call.unread:
            self.link.cancel(self.call)


class RefusedByWorker(Refused):
    """The worker's refusal, with what happened until then."""

    def __init__(self, situation: Situation, detail: Detail, stats: InferStats) -> None:
        super().__init__(situation, detail.message, detail.instance, detail.field)
        self.stats = stats


class HeldBytes:
    """The bytes of request bodies and answers that a front holds, at most `limit`.

    Whatever receives or builds a body adds to `size` for as long as it is there.
    """

    def __init__(self, limit: int) -> None:
        self.size = 0
        self._limit = limit

    def __repr__(self) -> str:
        """For example `<HeldBytes 12000 of 1000000>`."""
        return f"<HeldBytes {self.size} of {self._limit}>"

    def check(self) -> None:
        """Raises Refused while there are too many."""
        if self.size > self._limit:
            raise Refused(Situation.OVERLOADED, "this front holds max_inflight_bytes of requests and answers already")

    @contextlib.contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Count a body as held in a `with` block. Raises Refused when there is no room for it."""
        self.size += size
        try:
            self.check()
            yield
        finally:
            self.size -= size


class InferencePlane(Protocol):
    """What a dialect has of the data plane: the models that its client may ask, and the bytes that are held."""

    held: HeldBytes

    @property
    def expected(self) -> int:
        """How many workers the server has, up or not."""

    @property
    def workers(self) -> Mapping[int, PulseReader | None]:
        """The workers that are up, and what is seen of each."""

    async def infer(self, request: InferRequest) -> InferResponse:
        """The model's answer. Raises Refused, and ClientGone when the client is watched and leaves."""


class DataPlane:
    """One front's requests to the workers. `links` are the connections to the workers that are up, by worker."""

    def __init__(self, max_held_bytes: int) -> None:
        self.router = Router()
        self.expected = 0  #: how many workers the server has, up or not
        self.links: dict[int, WorkerLink] = {}
        self.pulses: dict[int, PulseReader] = {}  #: of the same workers
        self.held = HeldBytes(max_held_bytes)
        self._watched: dict[WorkerCall, tuple[float, ClientWatch | None, WorkerLink]] = {}
        self._watchers: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        """For example `<DataPlane 2 links, 12 under way, 12000 bytes held>`."""
        return f"<DataPlane {len(self.links)} links, {len(self._watched)} under way, {self.held.size} bytes held>"

    @property
    def workers(self) -> Mapping[int, PulseReader | None]:
        """The workers that are up, and what is seen of each."""
        return {worker: self.pulses.get(worker) for worker in self.router.lanes}

    async def infer(self, request: InferRequest) -> InferResponse:
        """The model's answer. A worker that dies costs one more try: a forecast has no side effects.

        Raises Refused, RefusedByWorker, and ClientGone when the client is watched and leaves.
        """
        size = len(request.body)
        self.held.size += size
        try:
            self.held.check()
            now = time.monotonic()
            lane = self.router.route(request.model, now)
            if lane is None or lane.worker not in self.links:
                raise Refused(Situation.NOT_READY, "no worker is up yet; try again")
            try:
                return await self._ask(lane, request, now)
            except WorkerLost:
                return await self._ask_another(lane.worker, request)
        finally:
            self.held.size -= size

    def sweep(self) -> None:
        """Called every 0.1 s.

        Refuse requests whose deadline has passed, route around silent workers, watch the clients of slow requests.
        """
        now = time.monotonic()
        self._route_around_silence(now)
        for link in self.links.values():
            link.sweep(now)
        for call, (since, client_gone, link) in list(self._watched.items()):
            if client_gone is not None and now - since > WATCH_AFTER_S and not call.reply.done():
                self._watched[call] = (since, None, link)
                task = asyncio.create_task(_cancel_when_gone(call, client_gone, link))
                self._watchers.add(task)
                task.add_done_callback(self._watchers.discard)

    def _route_around_silence(self, now: float) -> None:
        """Requests go to workers whose step loops turn, as long as there is one; so do those that silent ones have."""
        silent = frozenset(worker for worker, pulse in self.pulses.items() if pulse.observe(now) >= SILENT_S)
        if silent != self.router.silent:
            log.warning("silent_workers", workers=sorted(silent), were=sorted(self.router.silent))
            self.router.silent = silent
        if len(silent) < len(self.links):
            for worker in silent:
                self.links[worker].give_up()

    async def _ask_another(self, dead: int, request: InferRequest) -> InferResponse:
        """The second try, on a worker that is not the `dead` one."""
        now = time.monotonic()
        lane = self.router.route(request.model, now, dead)
        if lane is None or lane.worker not in self.links:
            message = "the worker died with this request, and no other is up; try again"
            raise Refused(Situation.WORKER_LOST, message) from None
        try:
            return await self._ask(lane, request, now)
        except WorkerLost:
            message = "two workers died with this request; it is not tried again"
            raise Refused(Situation.WORKER_LOST, message) from None

    async def _ask(self, lane: WorkerLoad, request: InferRequest, now: float) -> InferResponse:
        """One try, which begins `now`. Raises WorkerLost, Refused, ClientGone."""
        model, link = request.model, self.links[lane.worker]
        counted = self.router.count_start(lane, model)
        arrived = request.arrived or now
        call = link.call(model, request.content_type, request.accept, request.deadline, request.body, arrived)
        self._watched[call] = (now, request.client_gone, link)
        try:
            head = await call.reply
        except BaseException as error:
            if not isinstance(error, WorkerLost):
                link.cancel(call)
            self.router.count_end(lane, model, counted, held=False)
            raise
        finally:
            del self._watched[call]
        held = not head.situation or head.situation in (Situation.BAD_REQUEST, Situation.MODEL_FAILED)
        wait_s = (head.queue_us + head.inference_us) / 1e6
        load_s = head.load_us / 1e6 if head.cache == CacheResult.MISS and held else 0.0
        self.router.count_end(lane, model, counted, held=held, wait_s=wait_s, load_s=load_s)
        cache, tier, load_us = _CACHE[head.cache], _TIER[head.tier], head.load_us or None
        stats = InferStats(cache, head.queue_us, load_us, head.inference_us, tier, head.version)
        response = InferResponse(head.content_type, head.body, head.body_bytes, stats, link, call)
        if head.situation:
            detail = msgspec.json.decode(await response.read(), type=Detail)
            raise RefusedByWorker(Situation(head.situation), detail, stats)
        return response


async def _cancel_when_gone(call: WorkerCall, client_gone: ClientWatch, link: WorkerLink) -> None:
    """Cancel the call when its client leaves."""
    await client_gone()
    if not call.reply.done():
        link.cancel(call)
        call.reply.set_exception(ClientGone())
