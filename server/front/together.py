"""Asks many models in one request to each worker that has some of them: the data plane of a call for many models.

Every item is routed, admitted and counted by itself; only its bytes travel with the others'. What cannot go with others
is left to `infer`, one by one: models that ran when a worker died, those that a child lent to this front answers, and
whatever was lost with a worker.
"""

import asyncio
import time
from collections.abc import MutableSequence, Sequence
from itertools import groupby
from typing import cast

import msgspec

from model_store.names import ModelName
from server.errors import Detail, Refused, Situation
from server.front.call_items import Instances, select_rows
from server.front.dataplane import CACHE_NAMES, HOLDS, TIER_NAMES, DataPlane, explain_overload
from server.front.inference import InferResponse, InferStats, TogetherAnswer, TogetherRequest
from server.front.worker_client import WorkerLost
from server.ipc.frames import CacheResult, Response
from server.ipc.packed import Instance, NumbersBlock, TableRow, measure_instance
from server.ipc.together import TOGETHER, AskedTogether, RowColumns, SharedAnswer, read_answered, write_asked
from server.routing import WorkerLoad

NOTHING = InferStats(None, 0, None, 0)  #: happened to a call as a whole


class _Lane(msgspec.Struct, frozen=True, gc=False):
    """The items under way at one worker: their places in the call, in order, whether each counts as load, and how many
    were ahead of each.
    """

    places: MutableSequence[int]
    counted: MutableSequence[bool]
    aheads: MutableSequence[int]


Found = list[TogetherAnswer | Refused | None]
Answers = Sequence[tuple[SharedAnswer, memoryview | NumbersBlock]]


class TogetherPlane(DataPlane):
    """The data plane of a front whose workers take calls for many models. See the module."""

    def select_together(self, models: Sequence[ModelName]) -> list[bool]:
        """Say which of these models can be asked together with others."""
        if not len(self.suspects):
            return [True] * len(models)
        return [not self.suspects.has(model) for model in models]

    async def infer_together(self, request: TogetherRequest) -> Found:
        """What came of each item; None for one that has to be asked alone. Raises Refused for the whole call."""
        found: Found = [None] * len(request.models)
        now = time.monotonic()
        lanes = self._start_all(request, now) or self._start_each(request, found, now)
        if len(lanes) == 1:
            ((worker, lane),) = lanes.items()
            await self._ask_lane(worker, lane, request, found, now)
        elif lanes:
            try:
                async with asyncio.TaskGroup() as group:
                    for worker, lane in lanes.items():
                        group.create_task(self._ask_lane(worker, lane, request, found, now))
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from None
        return found

    def _start_all(self, request: TogetherRequest, now: float) -> dict[WorkerLoad, _Lane] | None:
        """Count all items as under way, each at its model's home; None where they must be looked at one by one.

        INVARIANT: what is counted then is what `_start_each` counts.
        """
        models, client, left_s = request.models, request.client, request.deadline - now
        placed, lanes = self.router.route_all(models), dict[WorkerLoad, _Lane]()
        for worker, places in (placed or {}).items():
            its, link = _pick(models, places), self.links[worker.worker]
            works = [*map(worker.warm.has, its)]
            aheads = link.backlog.count_all_ahead(its, client, now, left_s, self._bounds, works)
            if aheads is None or (link.lent is not None and any(map(link.lent.has, its))):
                return None
            lanes[worker] = _Lane(places, works, aheads)
        for worker, lane in lanes.items():
            its = _pick(models, lane.places)
            self.router.count_starts(worker, its)
            self.links[worker.worker].backlog.start_all(its, client, now, lane.counted)
        return lanes

    def _start_each(self, request: TogetherRequest, found: Found, now: float) -> dict[WorkerLoad, _Lane]:
        """Route items, and count each as under way or say why it is not."""
        lanes: dict[WorkerLoad, _Lane] = {}
        for i, model in enumerate(request.models):
            worker = self.router.route(model, now)
            if worker is None or self._is_lent(worker, model):
                continue
            refused = self._admit(worker, lanes, i, model, request, now)
            if refused is not None:
                found[i] = refused
        return lanes

    def _is_lent(self, worker: WorkerLoad, model: ModelName) -> bool:
        lent = self.links[worker.worker].lent
        return lent is not None and lent.has(model)

    def _admit(
        self,
        worker: WorkerLoad,
        lanes: dict[WorkerLoad, _Lane],
        place: int,
        model: ModelName,
        request: TogetherRequest,
        now: float,
    ) -> Refused | None:
        """Count an item as under way, or say why it is not."""
        backlog, client = self.links[worker.worker].backlog, request.client
        is_work, left_s = worker.warm.has(model), request.deadline - now
        ahead = backlog.count_ahead(model, client)
        refusal = backlog.check(model, client, now, left_s, ahead, self._bounds, is_work=is_work)
        if refusal is not None:
            return explain_overload(refusal)
        counted = self.router.count_start(worker, model)
        backlog.start(model, client, now, is_work=counted)
        lane = lanes.setdefault(worker, _Lane([], [], []))
        lane.places.append(place)
        lane.counted.append(counted)
        lane.aheads.append(ahead)
        return None

    async def _ask_lane(
        self, worker: WorkerLoad, lane: _Lane, request: TogetherRequest, found: Found, now: float
    ) -> None:
        """Ask one worker for its items, and put what comes of them into their places."""
        models = _pick(request.models, lane.places)
        answers: Answers | None = None
        try:
            body = _write_body(models, select_rows(request.instances, lane.places), request)
            with self.held.hold(len(body)):
                answers = await self._exchange(worker, body, request, len(models))
        except WorkerLost:
            return
        except Refused as refused:
            if refused.situation is Situation.TOO_LARGE:
                raise
            for place in lane.places:
                found[place] = refused
        finally:
            self._end_items(worker, lane, models, answers, request.client, now)
        last, taken = None, None
        for i, (place, answer) in enumerate(zip(lane.places, answers or (), strict=False)):
            shared, told = answer
            if shared.situation:
                found[place] = self._read_refusal(worker, lane.aheads[i], shared, cast("memoryview", told))
                continue
            if taken is None or last is None or shared is not last[0]:
                taken = TogetherAnswer(shared.content_type, told, _describe_answer(shared))
            elif told is not last[1]:
                taken = TogetherAnswer(shared.content_type, told, taken.stats)
            last, found[place] = answer, taken

    async def _exchange(self, worker: WorkerLoad, body: bytes, request: TogetherRequest, count: int) -> Answers:
        """Send the call and read its response. Raises WorkerLost, Refused.

        It may come a little after the deadline: an item was answered before, or is refused for that.
        """
        link = self.links[worker.worker]
        call = link.call("", TOGETHER, TOGETHER, request.deadline, body, request.arrived, False, request.client)
        try:
            head = await call.reply
        except BaseException as error:
            if not isinstance(error, WorkerLost):
                link.cancel(call)
            raise
        assert isinstance(head, Response), "a call for many models is answered at once"
        response = InferResponse(head.content_type, head.body, head.body_bytes, NOTHING, link, call)
        if head.situation:
            said = msgspec.json.decode(await response.read(), type=Detail)
            raise Refused(Situation(head.situation), *msgspec.structs.astuple(said))
        request.hold(response)
        try:
            whole = await response.read()
        except Refused as refused:
            if refused.situation is Situation.WORKER_LOST:
                raise WorkerLost from None
            raise
        return read_answered(whole, count)

    def _end_items(
        self,
        worker: WorkerLoad,
        lane: _Lane,
        models: Sequence[ModelName],
        answers: Answers | None,
        client: str,
        now: float,
    ) -> None:
        """Count the items as done, and learn from their times."""
        backlog = self.links[worker.worker].backlog if worker.worker in self.links else None
        if backlog is not None:
            backlog.end_all(models, client, lane.counted)
        if answers is None:
            self.router.count_ends(worker, models, lane.counted, held=False)
            return
        at = 0
        for head, alike in groupby([head for head, _ in answers]):
            end = at + sum(1 for _ in alike)
            is_held = head.situation in HOLDS
            load_s = head.load_us / 1e6 if head.cache == CacheResult.MISS and is_held else 0.0
            wait_s = (head.queue_us + head.inference_us) / 1e6
            ended, counted = models[at:end], lane.counted[at:end]
            self.router.count_ends(worker, ended, counted, held=is_held, wait_s=wait_s, load_s=load_s)
            at = end
        if backlog is not None and lane.counted[-1] and answers[-1][0].cache == CacheResult.HIT:
            backlog.learn(lane.aheads[-1], now, time.monotonic())

    def _read_refusal(self, worker: WorkerLoad, ahead: int, head: SharedAnswer, body: memoryview) -> Refused:
        detail = msgspec.json.decode(body, type=Detail)
        refused = Refused(Situation(head.situation), *msgspec.structs.astuple(detail))
        if refused.situation in (Situation.OVERLOADED, Situation.DEADLINE) and worker.worker in self.links:
            refused.advise(self.links[worker.worker].backlog.expected_s(ahead, time.monotonic()))
        return refused


def _pick(models: Sequence[ModelName], places: Sequence[int]) -> Sequence[ModelName]:
    """The models at these places, which ascend."""
    return models if len(places) == len(models) else [models[at] for at in places]


def _write_body(models: Sequence[ModelName], instances: Instances, request: TogetherRequest) -> bytes:
    """The body of the request to one worker."""
    is_table = isinstance(instances, RowColumns) or isinstance(instances[0], TableRow)
    sizes = [] if is_table else [measure_instance(each) for each in cast("Sequence[Instance]", instances)]
    head = AskedTogether(cast("list[str]", models), sizes, request.configuration, request.most_bytes)
    head.numbers = request.numbers
    return write_asked(head, instances)


def _describe_answer(head: SharedAnswer) -> InferStats:
    times = (head.queue_us, head.load_us or None, head.inference_us)
    return InferStats(CACHE_NAMES[head.cache], *times, TIER_NAMES[head.tier], "", head.quality, head.warnings)
