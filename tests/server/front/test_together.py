"""The plane of calls for many models: one request a worker, each item counted by itself, and alone what must be."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, cast

import pytest

from model_store.names import ModelName
from server.access.tokens import Scope, Token
from server.errors import Refused, Situation
from server.front.auth.permissions import PermittedPlane
from server.front.backlog import Bounds
from server.front.call_items import Item
from server.front.dialects.forecasts import parse_call
from server.front.exchange import Limit
from server.front.fan_out import FanOut, MultiModelCall, Prediction
from server.front.inference_plane import InferencePlane
from server.front.slices import finish_slices
from server.front.together import TogetherPlane
from server.ipc.frames import CacheResult, Tier
from server.ipc.packed import TableRow
from server.ipc.together import PREDICTION, TOGETHER, SharedAnswer, read_asked, write_answered
from tests.server.front.answering import Asked, Worker, attach, stay_connected

FAR = 1e9
LIMIT = Limit(1_000_000, "max_forecasts_bytes")
Judge = Callable[[str], tuple[Situation, bytes]]


def say_name(model: str) -> tuple[Situation, bytes]:
    """Each model's answer is its name."""
    return Situation.OK, json.dumps(model).encode()


def answer_together(asked: Asked, judge: Judge = say_name) -> Any:
    """A worker's answer to a call, and to an item alone."""
    if asked.content_type != TOGETHER:
        return b'{"predictions":["alone"]}'
    found = [judge(model) for model in read_asked(asked.body).head.models]
    items = [SharedAnswer(situation, CacheResult.HIT, Tier.NONE, PREDICTION, 5, 0, 7) for situation, _ in found]
    return write_answered(items, range(len(items)), [body for _, body in found])


def make_plane(*workers: Worker, bounds: Bounds | None = None) -> TogetherPlane:
    """The plane over these workers."""
    plane = TogetherPlane(1_000_000) if bounds is None else TogetherPlane(1_000_000, bounds)
    attach(plane, *workers)
    return plane


def infer(plane: InferencePlane, count: int, limit: Limit = LIMIT) -> list[Prediction | Refused]:
    """What came of a call for so many models."""
    items = ",".join(f'{{"target_model":"m{i}.mar"}}' for i in range(count))
    call = finish_slices(parse_call(f'{{"requests":[{items}]}}'.encode(), limit))

    async def run() -> list[Prediction | Refused]:
        with FanOut(plane, call, limit, FAR, stay_connected) as running:
            return await running.infer()

    return asyncio.run(run())


def read_bodies(found: list[Prediction | Refused]) -> list[Any]:
    """The predictions; of a refusal its situation."""
    return [
        each.situation if isinstance(each, Refused) else json.loads(bytes(cast("memoryview", each.body)))
        for each in found
    ]


def test_one_request_a_worker() -> None:
    """Forty models over two workers: two requests, all answers in order, and nothing is under way after them."""
    workers = Worker(answer_together), Worker(answer_together)
    plane = make_plane(*workers)
    found = infer(plane, 40)
    assert read_bodies(found) == [f"m{i}.mar" for i in range(40)]
    assert [len(worker.asked) for worker in workers] == [1, 1]
    assert [len(worker.backlog) for worker in workers] == [0, 0]
    assert [lane.running for lane in plane.router.lanes.values()] == [0, 0]
    assert plane.held.size == 0
    assert all(isinstance(each, Prediction) and each.stats.cache == "hit" for each in found)
    assert sum(len(lane.warm) for lane in plane.router.lanes.values()) == 40


def test_an_item_that_fails_fails_alone() -> None:
    """A refusal has its situation and its words; the model is not taken for warm."""

    def judge(model: str) -> tuple[Situation, bytes]:
        return (Situation.NOT_FOUND, b'{"message":"no m1"}') if model == "m1.mar" else say_name(model)

    plane = make_plane(Worker(lambda asked: answer_together(asked, judge)))
    found = infer(plane, 3)
    assert read_bodies(found) == ["m0.mar", Situation.NOT_FOUND, "m2.mar"]
    assert "no m1" in str(found[1])
    assert not plane.router.lanes[0].warm.has("m1.mar")


def test_items_are_admitted_one_by_one() -> None:
    """Where the worker has room for three, three of five are asked, and the others are refused as overload."""
    worker = Worker(answer_together)
    found = read_bodies(infer(make_plane(worker, bounds=Bounds(3, 3)), 5))
    assert found == ["m0.mar", "m1.mar", "m2.mar", Situation.OVERLOADED, Situation.OVERLOADED]
    assert len(read_asked(worker.asked[0].body)[0].models) == 3


def test_small_items_are_one_wave() -> None:
    """A thousand rows of as many bytes as the call has, each counted with a little more: one request to a worker."""
    rows = [TableRow("2026-01-01", None, "d", (), [bytes(2000)]) for _ in range(1000)]
    items = [Item(ModelName(f"m{i}.mar"), row) for i, row in enumerate(rows)]
    worker, plane = Worker(answer_together), TogetherPlane(50_000_000)
    attach(plane, worker)
    call = MultiModelCall(items, b'{"quantiles":["0.5"]}', None, 2_000_000)

    async def run() -> int:
        return len(await FanOut(plane, call, LIMIT, FAR, stay_connected).infer())

    assert asyncio.run(run()) == 1000
    assert len(worker.asked) == 1


def test_what_is_lost_with_a_worker_is_asked_alone() -> None:
    """The worker dies with the call: each item is asked once more, by itself."""

    def answer(asked: Asked) -> Any:
        return None if asked.content_type == TOGETHER else answer_together(asked)

    worker = Worker(answer)
    plane = make_plane(worker)
    assert read_bodies(infer(plane, 3)) == ["alone"] * 3
    assert len(worker.asked) == 4
    assert (len(worker.backlog), plane.router.lanes[0].running) == (0, 0)


def test_a_suspect_is_asked_alone() -> None:
    """A model that ran when a worker died goes with no others, so that its next death says which it was."""
    plane = make_plane(Worker(answer_together))
    plane.suspects.add({"m1.mar"}, 0)
    assert plane.select_together([ModelName(f"m{i}.mar") for i in range(3)]) == [True, False, True]


def test_a_token_holds_for_each_item() -> None:
    """What a token does not allow never goes with others: it is refused by itself."""
    worker = Worker(answer_together)
    token = Token("desk", "0" * 64, (Scope.INVOKE,), ("m1",))
    found = read_bodies(infer(PermittedPlane(make_plane(worker), token), 12))
    assert found == [f"m{i}.mar" if i in (1, 10, 11) else Situation.FORBIDDEN for i in range(12)]
    assert read_asked(worker.asked[0].body)[0].models == ["m1.mar", "m10.mar", "m11.mar"]


@pytest.mark.parametrize("situation", [Situation.TOO_LARGE, Situation.OVERLOADED])
def test_a_call_that_the_worker_refuses(situation: Situation) -> None:
    """Answers that are too many fail the call; an overloaded worker fails the items."""
    worker = Worker(lambda _: (situation, b'{"message":"no room"}'))
    if situation is Situation.TOO_LARGE:
        with pytest.raises(Refused, match="no room"):
            infer(make_plane(worker), 3)
    else:
        assert read_bodies(infer(make_plane(worker), 3)) == [Situation.OVERLOADED] * 3


def test_answers_are_held_before_they_are_read() -> None:
    """Answers of more bytes than a call may have: the whole call is refused, and nothing stays held."""
    plane = make_plane(Worker(lambda asked: answer_together(asked, lambda _: (Situation.OK, b" " * 600_000))))
    with pytest.raises(Refused, match="max_forecasts_bytes"):
        infer(plane, 2)
    assert plane.held.size == 0
