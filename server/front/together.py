"""Asks many models in one request to each worker that has some of them: the data plane of a call for many models.

Every item is routed, admitted and counted by itself; only its bytes travel with the others'. What cannot go with others
is left to `infer`, one by one: models that ran when a worker died, those that a child lent to this front answers, and
whatever was lost with a worker.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import cast

import msgspec

from model_store.names import ModelName
from server.errors import Detail, Refused, Situation
from server.front.dataplane import CACHE_NAMES, HOLDS, TIER_NAMES, DataPlane, explain_overload
from server.front.inference import InferResponse, InferStats, TogetherAnswer, TogetherItem, TogetherRequest
from server.front.worker_client import WorkerLost
from server.ipc.frames import CacheResult, Response
from server.ipc.packed import BlockRow, TableRow, measure_instance
from server.ipc.together import TOGETHER, AskedTogether, SharedAnswer, read_answered, write_asked
from server.routing import WorkerLoad

NOTHING = InferStats(None, 0, None, 0)  #: happened to a call as a whole


class _Started(msgspec.Struct, frozen=True, gc=False):
    """An item under way: its place in the call, whether it counts as load, and how many were ahead of it."""

    place: int
    counted: bool
    ahead: int


Found = list[TogetherAnswer | Refused | None]
Answers = Sequence[tuple[SharedAnswer, memoryview | BlockRow]]


class TogetherPlane(DataPlane):
    """The data plane of a front whose workers take calls for many models. See the module."""

    def select_together(self, models: Sequence[ModelName]) -> list[bool]:
        """Say which of these models can be asked together with others."""
        return [not self.suspects.has(model) for model in models]

    async def infer_together(self, request: TogetherRequest) -> Found:
        """What came of each item; None for one that has to be asked alone. Raises Refused for the whole call."""
        found: Found = [None] * len(request.items)
        now = time.monotonic()
        lanes: dict[WorkerLoad, list[_Started]] = {}
        for i, item in enumerate(request.items):
            lane = self.router.route(item.model, now)
            if lane is None or self._is_lent(lane, item.model):
                continue
            started = self._admit(lane, i, item.model, request, now)
            if isinstance(started, Refused):
                found[i] = started
            else:
                lanes.setdefault(lane, []).append(started)
        if len(lanes) == 1:
            ((lane, items),) = lanes.items()
            await self._ask_lane(lane, items, request, found, now)
        elif lanes:
            try:
                async with asyncio.TaskGroup() as group:
                    for lane, items in lanes.items():
                        group.create_task(self._ask_lane(lane, items, request, found, now))
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from None
        return found

    def _is_lent(self, lane: WorkerLoad, model: ModelName) -> bool:
        lent = self.links[lane.worker].lent
        return lent is not None and lent.has(model)

    def _admit(
        self, lane: WorkerLoad, place: int, model: ModelName, request: TogetherRequest, now: float
    ) -> _Started | Refused:
        """Count an item as under way, or say why it is not."""
        backlog, client = self.links[lane.worker].backlog, request.client
        is_work, left_s = lane.warm.has(model), request.deadline - now
        ahead = backlog.count_ahead(model, client)
        refusal = backlog.check(model, client, now, left_s, ahead, self._bounds, is_work=is_work)
        if refusal is not None:
            return explain_overload(refusal)
        counted = self.router.count_start(lane, model)
        backlog.start(model, client, now, is_work=counted)
        return _Started(place, counted, ahead)

    async def _ask_lane(
        self, lane: WorkerLoad, items: Sequence[_Started], request: TogetherRequest, found: Found, now: float
    ) -> None:
        """Ask one worker for its items, and put what comes of them into their places."""
        asked = [request.items[each.place] for each in items]
        is_table = isinstance(asked[0].instance, TableRow)
        sizes = [] if is_table else [measure_instance(item.instance) for item in asked]
        head = AskedTogether([item.model for item in asked], sizes, request.configuration, request.most_bytes)
        head.numbers = request.numbers
        body = write_asked(head, [item.instance for item in asked])
        answers: Answers | None = None
        try:
            with self.held.hold(len(body)):
                answers = await self._exchange(lane, body, request, len(items))
        except WorkerLost:
            return
        except Refused as refused:
            if refused.situation is Situation.TOO_LARGE:
                raise
            for each in items:
                found[each.place] = refused
        finally:
            self._end_items(lane, items, asked, answers, request.client, now)
        known: dict[int, InferStats] = {}  # by answer: items alike share one
        for each, (shared, told) in zip(items, answers or (), strict=False):
            if shared.situation:
                found[each.place] = self._read_refusal(lane, each, shared, cast("memoryview", told))
                continue
            stats = known.get(id(shared))
            if stats is None:
                stats = known[id(shared)] = _describe_answer(shared)
            found[each.place] = TogetherAnswer(shared.content_type, told, stats)

    async def _exchange(self, lane: WorkerLoad, body: bytes, request: TogetherRequest, count: int) -> Answers:
        """Send the call and read its response. Raises WorkerLost, Refused.

        It may come a little after the deadline: an item was answered before, or is refused for that.
        """
        link = self.links[lane.worker]
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
        lane: WorkerLoad,
        items: Sequence[_Started],
        asked: Sequence[TogetherItem],
        answers: Answers | None,
        client: str,
        now: float,
    ) -> None:
        """Count the items as done, and learn from their times."""
        backlog = self.links[lane.worker].backlog if lane.worker in self.links else None
        if backlog is not None:
            for each, item in zip(items, asked, strict=True):
                backlog.end(item.model, client, was_work=each.counted)
        if answers is None:
            for each, item in zip(items, asked, strict=True):
                self.router.count_end(lane, item.model, each.counted, held=False)
            return
        known: dict[int, tuple[bool, float, float]] = {}  # by answer: items alike share one
        for each, item, (head, _) in zip(items, asked, answers, strict=True):
            told = known.get(id(head))
            if told is None:
                is_held = head.situation in HOLDS
                load_s = head.load_us / 1e6 if head.cache == CacheResult.MISS and is_held else 0.0
                told = known[id(head)] = is_held, (head.queue_us + head.inference_us) / 1e6, load_s
            held, wait_s, load_s = told
            self.router.count_end(lane, item.model, each.counted, held=held, wait_s=wait_s, load_s=load_s)
        last = items[-1]
        if backlog is not None and last.counted and answers[-1][0].cache == CacheResult.HIT:
            backlog.learn(last.ahead, now, time.monotonic())

    def _read_refusal(self, lane: WorkerLoad, started: _Started, head: SharedAnswer, body: memoryview) -> Refused:
        detail = msgspec.json.decode(body, type=Detail)
        refused = Refused(Situation(head.situation), *msgspec.structs.astuple(detail))
        if refused.situation in (Situation.OVERLOADED, Situation.DEADLINE) and lane.worker in self.links:
            refused.advise(self.links[lane.worker].backlog.expected_s(started.ahead, time.monotonic()))
        return refused


def _describe_answer(head: SharedAnswer) -> InferStats:
    times = (head.queue_us, head.load_us or None, head.inference_us)
    return InferStats(CACHE_NAMES[head.cache], *times, TIER_NAMES[head.tier], "", head.quality, head.warnings)
