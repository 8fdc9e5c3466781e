"""The data plane: infer one model on a worker, and once more on another when that worker dies. Runs in a front.

It knows no transport and no dialect: an `InferRequest` comes in, an `InferResponse` or a `Refused` comes out.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest

import structlog

from model_store.names import ModelName
from server.contract import QUEUE_PER_MODEL, QUEUE_PER_WORKER
from server.errors import Refused, Situation
from server.front.background import BackgroundJobs
from server.front.backlog import Bounds, NoAdmission
from server.front.finished_jobs import FinishedJobs
from server.front.handler_calls import CodeCalls
from server.front.inference import (
    ClientGone,
    ClientWatch,
    InferRequest,
    InferResponse,
    InferStats,
    TogetherAnswer,
    TogetherRequest,
    refuse_by_worker,
)
from server.front.inference_plane import HeldBytes
from server.front.near_names import find_near_names
from server.front.registrations import Registrations
from server.front.suspects import Suspects
from server.front.worker_client import WorkerCall, WorkerLink, WorkerLost
from server.ipc.control import ChannelClosed, ControlChannel, ControlError
from server.ipc.frames import CacheResult, Partial, Tier
from server.ipc.handler_calls import decode_head
from server.ipc.operations import (
    ActualsReply,
    DescribeNode,
    KnownModel,
    ListKnownModels,
    LoadForClient,
    ManagementReply,
    ManageModels,
    ObservedPrices,
    Operation,
    RecordActuals,
    Reply,
    UnloadForClient,
)
from server.ipc.pulse import SILENT_S, PulseReader
from server.routing import Router, WorkerLoad

WATCH_AFTER_S = 0.5
BOUNDS = Bounds(QUEUE_PER_WORKER, QUEUE_PER_MODEL)  #: those of the settings' defaults

log = structlog.get_logger()

LOOK_S = 0.05  #: between two looks for names that a client may have meant
MOST_TRIES = 4  #: of one request, each on a worker that died or fell silent with it
RESTART_S = 20.0  #: how long a request waits for a worker to come up again, where all have died
MOST_WAITING = 1024  #: requests that wait for one
MOST_RECORDING = 4  #: calls with prices, each 10,000 objects in this process and in the supervisor
MOST_MANAGED = 256  #: management requests that the supervisor is asked at a time
CONTROL_REFUSED = (
    "clients of this listener may not load or unload models: the operator allows it by repository_control, or by a "
    "token with the scopes invoke and manage"
)
CACHE_NAMES: Mapping[int, str | None] = {
    CacheResult.NONE: None,
    CacheResult.HIT: "hit",
    CacheResult.MISS: "miss",
    CacheResult.COALESCED: "coalesced",
}
#: Situations of answers that only a worker that holds the model can give.
HOLDS = (Situation.OK, Situation.BAD_REQUEST, Situation.MODEL_FAILED)
TIER_NAMES: Mapping[int, str] = {Tier.NONE: "", Tier.HOST: "host", Tier.DISK: "disk", Tier.STORE: "store"}


class DataPlane:
    """One front's requests to the workers. `links` are the connections to the workers that are up, by worker.

    `bounds` are those of the requests under way at one worker; `code`: what archives' code is told, None for nothing.
    """

    def __init__(self, max_held_bytes: int, bounds: Bounds = BOUNDS, code: CodeCalls | None = None) -> None:
        self.router, self._code = Router(), code
        self._bounds = bounds
        self.expected = 0  #: how many workers the server has, up or not
        self.links: dict[int, WorkerLink] = {}
        self.pulses: dict[int, PulseReader] = {}  #: of the same workers
        self.suspects = Suspects()
        self.supervisor: ControlChannel | None = None  #: None: a front of its own, in tests
        self._managing = 0
        self._recording = 0
        self._look_after = 0.0  # when near names are looked for again
        self.clients_control = False  #: whether any client may load and unload models
        self.held, self.registrations = HeldBytes(max_held_bytes), Registrations()
        self.forecasters: dict[ModelName, None] = {}
        self.background, self.finished_jobs, self.token_name = BackgroundJobs(), FinishedJobs(None), ""
        self._was_up, self._up = False, asyncio.Event()  # whether a worker ever was up; set when the next comes up
        self._waiting = 0  # requests that wait for a worker to come up
        self.is_abandoned = False  #: whether no worker will come up any more
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
        """The model's answer. A worker that is lost costs one more try: a forecast has no side effects.

        Raises Refused, RefusedByWorker, and ClientGone when the client is watched and leaves.
        """
        size = len(request.body)
        self.held.size += size
        try:
            self.held.check()
            if self.suspects.has(request.model):
                return await self._ask_again(request, None)
            now = time.monotonic()
            lane = self.router.route(request.model, now) or await self._wait_for_lane(request, None)
            try:
                return await self._ask(lane, request, now)
            except WorkerLost:
                return await self._ask_again(request, lane.worker)
        finally:
            self.held.size -= size

    def select_together(self, models: Sequence[ModelName]) -> list[bool]:
        """Say which models can be asked together: none, where the workers take no calls for many."""
        return [False] * len(models)

    async def infer_together(self, request: TogetherRequest) -> list[TogetherAnswer | Refused | None]:
        """Leave all items to `infer`; `server.front.together.TogetherPlane` asks them together."""
        return [None] * len(request.models)

    def permits(self, model: ModelName) -> bool:
        """All models: a client with a token has a plane in front of this one."""
        del model
        return True

    def list_near(self, model: ModelName) -> list[str]:
        """Names that answered here before and are like this one. It is looked for only now and then."""
        now = time.monotonic()
        if now < self._look_after:
            return []
        self._look_after = now + LOOK_S
        newest = chain.from_iterable(zip_longest(*(reversed(lane.warm) for lane in self.router.lanes.values())))
        return find_near_names(model, (str(name) for name in newest if name is not None))

    async def list_known(self, asked: ListKnownModels, deadline: float) -> list[KnownModel]:
        """The models that the workers know. Raises Refused."""
        return await self._ask_supervisor(asked, deadline)

    async def control(self, asked: LoadForClient | UnloadForClient, deadline: float, *, permitted: bool = False) -> str:
        """Load or unload a model. Raises Refused, of the situation FORBIDDEN where nobody has allowed it."""
        if not (permitted or self.clients_control):
            raise Refused(Situation.FORBIDDEN, CONTROL_REFUSED)
        return await self._ask_supervisor(asked, deadline)

    async def manage(self, request: ManageModels, deadline: float) -> ManagementReply:
        """The supervisor's answer. Raises Refused."""
        return await self._ask_supervisor(request, deadline)

    async def record_actuals(self, items: Sequence[ObservedPrices], deadline: float) -> ActualsReply:
        """Record observed prices. Raises Refused."""
        if self._recording >= MOST_RECORDING:
            message = f"{MOST_RECORDING} calls with prices are under way here; try again"
            raise Refused(Situation.OVERLOADED, message, retry_ms=1000)
        self._recording += 1
        try:
            return await self._ask_supervisor(RecordActuals(list(items)), deadline)
        finally:
            self._recording -= 1

    async def describe_node(self, deadline: float) -> bytes:
        """What this server does, for another node's viewers. Raises Refused."""
        return await self._ask_supervisor(DescribeNode(), deadline)

    async def _ask_supervisor(self, asked: Operation[Reply], deadline: float) -> Reply:
        """The supervisor's reply. Raises Refused."""
        if self.supervisor is None:
            raise Refused(Situation.NOT_READY, "this front has no supervisor to ask; try again")
        if self._managing >= MOST_MANAGED:
            raise Refused(Situation.OVERLOADED, f"{MOST_MANAGED} management requests are under way here; try again")
        self._managing += 1
        try:
            return await self.supervisor.ask(asked, max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise Refused(Situation.DEADLINE, "the deadline passed before it was done; it may still be") from None
        except ChannelClosed:
            raise Refused(Situation.NOT_READY, "the server is stopping; try again") from None
        except ControlError as error:
            raise Refused(Situation(error.situation or Situation.INTERNAL), str(error)) from None
        finally:
            self._managing -= 1

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
            for worker in silent - self.router.silent:
                self.note_loss(worker)
            log.warning("silent_workers", workers=sorted(silent), were=sorted(self.router.silent))
            self.router.silent = silent
        if len(silent) < len(self.links):
            for worker in silent:
                self.links[worker].give_up()

    def note_up(self, worker: int) -> None:
        """The worker is connected."""
        self.router.worker_up(worker)
        self._was_up = True
        self._up.set()
        self._up = asyncio.Event()

    def abandon(self) -> None:
        """The supervisor has died: requests that wait for a worker are refused now, or asked of another node."""
        self.is_abandoned = True
        self._up.set()

    def note_loss(self, worker: int) -> None:
        """The worker has died or fallen silent: the models that it runs are suspects.

        INVARIANT: it is called before a request that was lost is tried again.
        """
        self.suspects.add({each.model for each in self.pulses[worker].running()}, worker)

    async def _ask_again(self, request: InferRequest, lost: int | None) -> InferResponse:
        """Try on other workers than the `lost` one: alone while the model is a suspect, at once while it is not."""
        for _ in range(MOST_TRIES - 1):
            try:
                if self.suspects.has(request.model):
                    return await self._ask_alone(request, lost)
                lane = await self._wait_for_lane(request, lost)
                return await self._ask(lane, request, time.monotonic())
            except WorkerLost as error:
                lost = error.worker
        message = f"{MOST_TRIES} workers were lost with this request; it is not tried again"
        raise Refused(Situation.WORKER_LOST, message)

    async def _ask_alone(self, request: InferRequest, lost: int | None) -> InferResponse:
        """Run a suspect once the supervisor permits it. Its answer clears the model. Raises WorkerLost, Refused."""
        model = request.model
        log.warning("suspect_request", model=model, request_id=request.request_id.decode("latin-1"), lost_with=lost)
        async with self.suspects.trying(model, request.deadline, lost) as trial:
            if self.suspects.has(model):
                lane = await self._wait_for_lane(request, lost)
                try:
                    response = await self._ask(lane, request, time.monotonic(), alone=True)
                except WorkerLost as error:
                    trial.lost = error.worker
                    raise
                self.suspects.clear(model)
                return response
        lane = await self._wait_for_lane(request, lost)  # another request has cleared the model meanwhile
        return await self._ask(lane, request, time.monotonic())

    async def _wait_for_lane(self, request: InferRequest, lost: int | None) -> WorkerLoad:
        """The lane for a request. Where all workers have died, some requests wait for one to come up again."""
        until = min(request.deadline, time.monotonic() + RESTART_S)
        while (lane := self._find_lane(request.model, lost)) is None:
            if self.is_abandoned:
                raise Refused(Situation.NOT_READY, "the server is stopping; try again")
            if not self._was_up:
                raise Refused(Situation.NOT_READY, "no worker is up yet; try again")
            if self._waiting >= MOST_WAITING:
                raise Refused(
                    Situation.NOT_READY, f"no worker is up, and {MOST_WAITING} requests wait for one; try again"
                )
            self._waiting += 1
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await self._up.wait()
            except TimeoutError:
                raise Refused(Situation.NOT_READY, "all workers have died, and none came up in time") from None
            finally:
                self._waiting -= 1
        return lane

    def _find_lane(self, model: ModelName, lost: int | None) -> WorkerLoad | None:
        now = time.monotonic()
        lane = self.router.route(model, now, lost)
        return self.router.route(model, now) if lane is None else lane

    async def _ask(self, lane: WorkerLoad, request: InferRequest, now: float, *, alone: bool = False) -> InferResponse:
        """One try, which begins `now`. Raises WorkerLost, Refused, ClientGone."""
        model, client, link = request.model, request.client, self.links[lane.worker]
        backlog = link.backlog
        is_work, left_s, ahead = lane.warm.has(model), request.deadline - now, backlog.count_ahead(model, client)
        refusal = backlog.check(model, client, now, left_s, ahead, self._bounds, is_work=is_work)
        if refusal is not None:
            raise explain_overload(refusal)
        told = request.told
        if request.call is not None and self._code is not None:
            told = self._code.encode(model, request.request_id, request.call)
        counted = self.router.count_start(lane, model)
        backlog.start(model, client, now, is_work=counted)
        call = link.call(
            model,
            request.content_type,
            request.accept,
            request.deadline,
            request.body,
            request.arrived or now,
            alone,
            client,
            told,
            request.question,
        )
        self._watched[call] = (now, request.client_gone, link)
        try:
            head = await call.reply
        except BaseException as error:
            if isinstance(error, WorkerLost):
                error.worker = lane.worker
            else:
                link.cancel(call)
            self.router.count_end(lane, model, counted, held=False)
            if isinstance(error, Refused):
                error.advise(backlog.expected_s(ahead, time.monotonic()))
            raise
        finally:
            del self._watched[call]
            backlog.end(model, client, was_work=counted)
        if isinstance(head, Partial):
            return self._begin_stream(lane, request, head, link, call, counted=counted)
        held = head.situation in HOLDS
        ended = time.monotonic()
        wait_s = max(0.0, ended - now - head.load_us / 1e6)
        if counted and held and head.cache == CacheResult.HIT:
            backlog.learn(ahead, now, ended)
        load_s = head.load_us / 1e6 if head.cache == CacheResult.MISS and held else 0.0
        self.router.count_end(lane, model, counted, held=held, wait_s=wait_s, load_s=load_s)
        cache, tier, load_us = CACHE_NAMES[head.cache], TIER_NAMES[head.tier], head.load_us or None
        times = (head.queue_us, load_us, head.inference_us)
        stats = InferStats(cache, *times, tier, head.version, head.quality, head.warnings)
        said = decode_head(head.head) if head.head else None
        response = InferResponse(head.content_type, head.body, head.body_bytes, stats, link, call, said)
        if head.situation:
            # A variable here would be held by the exception's own traceback, and with it the request's body, until the
            # collector's next full run.
            raise refuse_by_worker(
                Situation(head.situation), await response.read(), stats, backlog.expected_s(ahead, ended)
            )
        if ended > request.deadline:
            response.cancel()
            raise Refused(Situation.DEADLINE, "the answer was ready after the deadline")
        return response

    def _begin_stream(
        self,
        lane: WorkerLoad,
        request: InferRequest,
        first: Partial,
        link: WorkerLink,
        call: WorkerCall,
        *,
        counted: bool,
    ) -> InferResponse:
        """The response of which the first part is there. Its worker is free for others: the archive's process works."""
        self.router.count_end(lane, request.model, counted, held=True)
        stats = InferStats(None, int((time.monotonic() - (request.arrived or time.monotonic())) * 1e6), None, 0)
        said = decode_head(first.head) if first.head else None
        return InferResponse(first.content_type, first.body, len(first.body), stats, link, call, said)


def holds_model(situation: Situation) -> bool:
    """Whether only a worker that holds the model answers so."""
    return situation in HOLDS


def explain_overload(refusal: NoAdmission) -> Refused:
    """The refusal of a request that its worker has no room for, or would not answer in time."""
    refused = Refused(Situation.OVERLOADED, refusal.reason)
    refused.advise(refusal.retry_s)
    return refused


async def _cancel_when_gone(call: WorkerCall, client_gone: ClientWatch, link: WorkerLink) -> None:
    """Cancel the call when its client leaves."""
    await client_gone()
    if not call.reply.done():
        link.cancel(call)
        call.reply.set_exception(ClientGone())
