"""Many models in one call: each item at its worker, then the correlation where scenarios are joint. Runs in a front.

It knows DeepAR JSON (every forecast is one) and no dialect. An item's body is built only when its turn comes and is
counted as held while it is there, so that a call holds about as much again as its own body, however many items share
however large a configuration.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress
from types import MappingProxyType
from typing import Self, cast

import msgspec

from model_store.names import ModelName
from server.contract import JSON
from server.errors import Refused, Situation
from server.front.call_items import Item, Items, list_named, measure_items, select_instances
from server.front.exchange import Limit
from server.front.inference import (
    ClientGone,
    ClientWatch,
    InferRequest,
    InferResponse,
    InferStats,
    TogetherAnswer,
    TogetherRequest,
)
from server.front.inference_plane import InferencePlane, add_near_names
from server.front.raw_json import (
    Fields,
    build_correlation_request,
    build_request,
    cut_prediction,
    extract_prediction,
    replace_marginal,
    split_samples,
)
from server.front.slices import ITEM, Pacer, Slices
from server.ipc.packed import (
    NUMBERS,
    Instance,
    NumbersBlock,
    TableRow,
    measure_instance,
    read_json_prediction,
    write_instance,
)
from server.ipc.together import PREDICTION

MAX_UNDER_WAY = 1024  #: items of one call that are at the workers at once
LEAST_TOGETHER = 2  #: items for which a request of their own is no worse
TAKEN = ITEM // 16  #: what it counts to take an answer as it is
MIN_WINDOW = 1024 * 1024  #: bytes of a small call's items that may be at the workers at once
SMALL_BYTES = 256  #: of each item asked with others, which do not count: what is said once in the call is said of each


@dataclass(frozen=True, slots=True)
class Joint:
    """How the call's scenarios are joint: which archive correlates them, and how samples are drawn."""

    correlation: ModelName
    drawn: Mapping[str, msgspec.Raw]


@dataclass(frozen=True, slots=True)
class MultiModelCall:
    """Items in order, of which one that names no model is refused alone, and what all share."""

    items: Items
    configuration: bytes
    joint: Joint | None
    size: int  #: bytes of the body that the items lie in
    numbers: bool = False  #: whether predictions are wanted as rows of blocks: see `server.ipc.packed`


class Prediction(msgspec.Struct, frozen=True, gc=False):
    """What came of an item: the prediction as JSON or as numbers, and what happened on the way.

    Items that a block answers are its rows in their order, and may share one of these.
    `fields`: those of the prediction in a joint call, in the place of its body.
    """

    body: bytes | NumbersBlock
    stats: InferStats
    fields: Fields = MappingProxyType({})


class JointPrediction(msgspec.Struct, frozen=True, gc=False):
    """A prediction with its samples, in parts: these may be a hundred times what the rest is, and are copied once."""

    parts: Sequence[bytes | memoryview]
    stats: InferStats


class FanOut:
    """The items of one call under way. `limit` bounds their configurations together, and their answers together.

    The answers count as held until the `with` block of the call ends.
    """

    def __init__(
        self,
        plane: InferencePlane,
        call: MultiModelCall,
        limit: Limit,
        deadline: float,
        client_gone: ClientWatch,
        arrived: float = 0.0,
        ident: bytes = b"",
        client: str = "",
    ) -> None:
        self._plane, self._call, self._limit = plane, call, limit
        self._deadline, self._client_gone, self._origin = deadline, client_gone, (arrived, ident, client)
        self._window = max(call.size, MIN_WINDOW)
        self._running = self._under_way = self._answered = 0
        self._room = asyncio.Event()
        self._pacer = Pacer()
        self._taken_as_is = (PREDICTION, NUMBERS) if call.joint is None else ()

    def __repr__(self) -> str:
        """For example `<FanOut of 500 items, 80 running with 90000 bytes>`."""
        return f"<FanOut of {len(self._call.items)} items, {self._running} running with {self._under_way} bytes>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._plane.held.size -= self._answered

    async def infer(self) -> list[Prediction | Refused]:
        """What came of each item, in order.

        Raises Refused for a call that fails as a whole, ClientGone when the client leaves.
        """
        self._check_size()
        with self._plane.held.hold(self._call.size):
            items = asyncio.ensure_future(self._infer_items())
            gone = asyncio.ensure_future(self._client_gone())
            try:
                await asyncio.wait((items, gone), return_when=asyncio.FIRST_COMPLETED)
                if not items.done():
                    raise ClientGone
                return items.result()
            finally:
                gone.cancel()
                items.cancel()
                await asyncio.gather(items, gone, return_exceptions=True)

    async def draw(self, joint: Joint, found: Sequence[Prediction | Refused], accept: str) -> bytes:
        """The correlation's answer: everybody's samples. It knows archives: an alias is the one that answered for it.

        Raises Refused, its place being that among the items.
        """
        answered = [
            (each.stats.archive or item.model, each.fields)
            for item, each in zip(self._call.items, found, strict=True)
            if isinstance(item, Item) and isinstance(each, Prediction)
        ]
        asked = await self._pacer.run(build_correlation_request(answered, joint.drawn))
        request = InferRequest(joint.correlation, asked, JSON, accept, self._deadline, self._client_gone, *self._origin)
        try:
            response = await self._plane.infer(request)
        except Refused as refused:
            raise _at_item(refused, found) from None
        try:
            self._check_answers(response.body_bytes)
        except Refused:
            response.cancel()
            raise
        return await response.read()

    def _check_size(self) -> None:
        count, size = len(self._call.items), len(self._call.configuration)
        if count * size > self._limit.bytes:
            message = (
                f"{count} requests with {size} bytes of configuration each are {count * size} bytes, the limit is "
                f"{self._limit.bytes} ({self._limit.setting}); ask for less in one call"
            )
            raise Refused(Situation.TOO_LARGE, message)

    def _check_answers(self, size: int) -> None:
        if size > self._limit.bytes:
            message = f"the answers have more than {self._limit.bytes} bytes together ({self._limit.setting})"
            raise Refused(Situation.TOO_LARGE, f"{message}; ask for less in one call")

    async def _infer_items(self) -> list[Prediction | Refused]:
        items = self._call.items
        results: list[Prediction | Refused | None] = [None] * len(items)
        try:
            await self._infer_together(results)
            async with asyncio.TaskGroup() as group:
                for i in [i for i, each in enumerate(results) if each is None]:
                    item = items[i]
                    if isinstance(item, Refused):
                        results[i] = item
                        continue
                    size = measure_instance(item.instance) + len(self._call.configuration)
                    await self._wait_for_room(size)
                    group.create_task(self._infer_item(i, item, size, results))
                    await self._pacer.spend(ITEM + size)
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return cast("list[Prediction | Refused]", results)

    async def _infer_together(self, results: list[Prediction | Refused | None]) -> None:
        """Ask the workers for all items that can be asked together; what is left has no result then."""
        call = self._call
        left, models = list_named(call.items)
        selected = self._plane.select_together(models)
        if not all(selected):
            left, models = list(compress(left, selected)), list(compress(models, selected))
        while len(left) >= LEAST_TOGETHER:
            count = self._count_wave(left)
            wave, asked = left[:count], models[:count]
            left, models = left[count:], models[count:]
            arrived, _, client = self._origin
            limits = (call.configuration, self._limit.bytes, self._deadline, arrived, client)
            instances = select_instances(call.items, wave)
            found = await self._plane.infer_together(
                TogetherRequest(asked, instances, *limits, self._hold_answer, call.numbers)
            )
            await self._take_answers(wave, asked, found, results)

    async def _take_answers(
        self,
        wave: Sequence[int],
        models: Sequence[ModelName],
        found: Sequence[TogetherAnswer | Refused | None],
        results: list[Prediction | Refused | None],
    ) -> None:
        """Put what came of a wave's items into their places."""
        last, taken = None, None
        for i, model, each in zip(wave, models, found, strict=True):
            if each is not None and each is last:  # several items may share one
                results[i] = taken
            elif isinstance(each, TogetherAnswer):
                if each.content_type in self._taken_as_is:
                    taken = Prediction(each.body, each.stats)  # type: ignore[arg-type]  # any buffer is taken
                    results[i], last = taken, each
                    continue
                results[i] = await self._read_answer(each)
                await self._pacer.spend(ITEM)
            else:
                if each is not None:
                    add_near_names(each, model, self._plane)
                    results[i] = _without_frames(each)
                await self._pacer.spend(ITEM)
        await self._pacer.spend(len(wave) * TAKEN)

    def _count_wave(self, places: Sequence[int]) -> int:
        """Count how many of these may be at the workers at once: see `_wait_for_room`."""
        more = len(self._call.configuration) - SMALL_BYTES
        sizes = [max(0, size + more) for size in measure_items(self._call.items, places[:MAX_UNDER_WAY])]
        if sum(sizes) <= self._window:
            return len(sizes)
        return max(1, bisect_right(list(accumulate(sizes)), self._window))

    async def _read_answer(self, answer: TogetherAnswer) -> Prediction | Refused:
        try:
            return await self._read_prediction(bytes(cast("bytes", answer.body)), answer.stats)
        except Refused as refused:
            return _without_frames(refused)

    async def _infer_item(self, i: int, item: Item, size: int, results: list[Prediction | Refused | None]) -> None:
        """Put one item's prediction, or why there is none, into its place. Raises Refused when all are too large."""
        try:
            results[i] = await self._predict(item)
        finally:
            self._running -= 1
            self._under_way -= size
            self._room.set()

    async def _predict(self, item: Item) -> Prediction | Refused:
        try:
            body = build_request(self._write_instance(item.instance), self._call.configuration)
            request = InferRequest(item.model, body, JSON, JSON, self._deadline, None, *self._origin)
            response = await self._plane.infer(request)
        except Refused as refused:
            add_near_names(refused, item.model, self._plane)
            return _without_frames(refused)
        self._hold_answer(response)
        try:
            return await self._read_prediction(await response.read(), response.stats)
        except Refused as refused:
            return _without_frames(refused)

    @staticmethod
    def _write_instance(instance: Instance) -> msgspec.Raw | bytes:
        """The instance as JSON. Raises Refused."""
        if not isinstance(instance, TableRow):
            return cast("bytes", instance)
        try:
            return write_instance(instance)
        except ValueError as error:
            raise Refused(Situation.BAD_REQUEST, str(error), field="target") from None

    async def _read_prediction(self, answer: bytes, stats: InferStats) -> Prediction:
        """The prediction in a model's answer, packed where that is wanted. Raises Refused."""
        if self._call.joint is not None:
            return Prediction(b"", stats, await self._pacer.run(cut_prediction(answer)))
        body = await self._pacer.run(extract_prediction(answer))
        if not self._call.numbers:
            return Prediction(body, stats)
        try:
            return Prediction(read_json_prediction(body), stats)
        except (msgspec.MsgspecError, ValueError) as error:
            message = f"the answer has no place in a table, ask by JSON: {error}"
            raise Refused(Situation.BAD_REQUEST, message) from None

    def _hold_answer(self, response: InferResponse) -> None:
        """Count an answer before it is read. Raises Refused, the whole call's, where all are too large."""
        self._answered += response.body_bytes
        self._plane.held.size += response.body_bytes
        try:
            self._check_answers(self._answered)
            self._plane.held.check()
        except Refused:
            response.cancel()
            raise

    async def _wait_for_room(self, size: int) -> None:
        """Until an item of `size` bytes may begin. One alone always may."""
        while self._running and (self._running >= MAX_UNDER_WAY or self._under_way + size > self._window):
            self._room.clear()
            await self._room.wait()
        self._running += 1
        self._under_way += size


def require_all(found: Sequence[Prediction | Refused]) -> None:
    """Raises the first item's refusal, with its place, as the whole call's: one array has no place for a failure."""
    for i, each in enumerate(found):
        if isinstance(each, Refused):
            raise Refused(each.situation, each.detail.message, i, each.detail.field, each.detail.retry_ms)


def put_samples(found: Sequence[Prediction | Refused], scenarios: bytes) -> Slices[list[JointPrediction | Refused]]:
    """The predictions with their samples from the correlation's answer in the place of their marginals.

    Raises Refused for an answer that has not one item of samples for each prediction.
    """
    pieces = yield from split_samples(scenarios)
    expected = sum(isinstance(each, Prediction) for each in found)
    if len(pieces) != expected:
        message = f"the correlation archive answers samples of {len(pieces)} forecasts, expected {expected}"
        raise Refused(Situation.MODEL_FAILED, message)
    samples = iter(pieces)
    done: list[JointPrediction | Refused] = []
    for each in found:
        if isinstance(each, Prediction):
            yield ITEM
            done.append(JointPrediction(replace_marginal(each.fields, next(samples)), each.stats))
        else:
            done.append(each)
    return done


def _without_frames(refused: Refused) -> Refused:
    """A new one: the traceback of the other holds frames, and these hold the item's body."""
    return Refused(refused.situation, *msgspec.structs.astuple(refused.detail))


def _at_item(refused: Refused, found: Sequence[Prediction | Refused]) -> Refused:
    """The correlation's refusal. It counts the forecasts it got; the client counts its items."""
    detail = refused.detail
    if detail.instance is None:
        return refused
    asked = [i for i, each in enumerate(found) if isinstance(each, Prediction)]
    return Refused(refused.situation, detail.message, asked[detail.instance], detail.field, detail.retry_ms)
