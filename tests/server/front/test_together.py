"""The plane of calls for many models: one request a worker, each item counted by itself, and alone what must be."""

import asyncio
import json
from array import array
from collections.abc import Callable
from typing import Any, cast

import pytest

from model_store.names import ModelName
from server.access.tokens import Scope, Token
from server.errors import Refused, Situation
from server.front.auth.permissions import PermittedPlane
from server.front.backlog import Bounds
from server.front.call_items import Item, TableItems, list_models
from server.front.columns.answered_table import read_runs
from server.front.dialects.forecasts import parse_call
from server.front.exchange import Limit
from server.front.fan_out import FanOut, MultiModelCall, Prediction
from server.front.inference_plane import InferencePlane
from server.front.slices import finish_slices
from server.front.together import TogetherPlane
from server.ipc.frames import CacheResult, Tier
from server.ipc.packed import NUMBERS, BlockRow, NumbersBlock, TableRow
from server.ipc.together import PREDICTION, TOGETHER, AskedColumns, RowColumns, SharedAnswer, read_asked, write_answered
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


def make_table(models: list[str]) -> MultiModelCall:
    """A call of as many rows, which stay columns: each one's number is its place."""
    target = memoryview(array("d", range(len(models)))).cast("B")
    head = AskedColumns("d", [], ["2026-01-01"], [], [], [[1]])
    items = TableItems([ModelName(model) for model in models], RowColumns(head, [target], len(models)))
    return MultiModelCall(items, b"{}", None, 8 * len(models), numbers=True)


def answer_numbers(asked: Asked) -> Any:
    """Forecasts in one block: each one's is the number that it was asked with; alone it is that in JSON."""
    if asked.content_type != TOGETHER:
        (instance,) = json.loads(asked.body)["instances"]
        return json.dumps({"predictions": [{"mean": instance["target"]}]}).encode()
    head, _, columns = read_asked(asked.body)
    assert columns is not None
    numbers = array("f", memoryview(columns.series[0]).cast("d"))
    block = NumbersBlock("s", 1, True, [], [numbers.tobytes()])
    answer = SharedAnswer(Situation.OK, CacheResult.HIT, Tier.NONE, NUMBERS, 5, 0, 7)
    return write_answered([answer], [0] * len(head.models), [BlockRow(block, at) for at in range(len(head.models))])


def infer_table(plane: InferencePlane, call: MultiModelCall) -> list[tuple[int, str, float]]:
    """What came of a table: item, model and number of each row."""

    async def run() -> list[Prediction | Refused]:
        with FanOut(plane, call, LIMIT, FAR, stay_connected) as running:
            return await running.infer()

    runs = finish_slices(read_runs(list_models(call.items), asyncio.run(run())))
    values = [value for run in runs for value in memoryview(run.numbers["mean"]).cast("f")]
    return list(zip(range(len(values)), [model for run in runs for model in run.models], values, strict=True))


MANY = [f"m{i}.mar" for i in range(40)]
WANTED = [(i, model, float(i)) for i, model in enumerate(MANY)]


def test_a_table_is_columns_to_the_worker_and_back() -> None:
    """All rows in one request, whose numbers lie as in the table; nothing is under way after it."""
    worker = Worker(answer_numbers)
    plane = make_plane(worker)
    for _ in range(2):  # cold, then warm
        assert infer_table(plane, make_table(MANY)) == WANTED
    assert [bytes(read_asked(each.body).columns.series[0]) for each in worker.asked] == [  # type: ignore[union-attr]
        array("d", range(40)).tobytes()
    ] * 2
    lane = plane.router.lanes[0]
    assert (len(worker.backlog), lane.running, len(lane.warm), plane.held.size) == (0, 0, 40, 0)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("suspects", [set[str](), {"m0.mar"}, {"m7.mar", "m8.mar", "m39.mar"}])
def test_rows_keep_their_places(workers: int, suspects: set[str]) -> None:
    """Over workers, among which rows are spread, and beside rows that are asked alone."""
    made = [Worker(answer_numbers) for _ in range(workers)]
    plane = make_plane(*made)
    plane.suspects.add(suspects, 0)
    assert infer_table(plane, make_table(MANY)) == WANTED
    alone = [each.model for worker in made for each in worker.asked if each.content_type != TOGETHER]
    assert sorted(alone) == sorted(suspects)
    assert [len(worker.backlog) for worker in made] == [0] * workers


def test_a_model_that_comes_twice_and_one_that_is_busy() -> None:
    """Rows of one model, and of one that has a request under way: all are answered, and counted one by one."""
    worker = Worker(answer_numbers)
    plane = make_plane(worker)
    worker.backlog.start("m3.mar", "", 0.0, is_work=False)
    models = [*MANY[:20], *MANY[:20]]
    assert infer_table(plane, make_table(models)) == [(i, model, float(i)) for i, model in enumerate(models)]
    assert len(worker.backlog) == 1


def test_a_table_of_which_some_rows_have_no_room() -> None:
    """The first rows are asked, those behind the worker's bound are refused, each with the reason."""
    worker = Worker(answer_numbers)
    call = make_table(MANY)

    async def run() -> list[Prediction | Refused]:
        with FanOut(make_plane(worker, bounds=Bounds(30, 30)), call, LIMIT, FAR, stay_connected) as running:
            return await running.infer()

    found = asyncio.run(run())
    assert [isinstance(each, Prediction) for each in found] == [True] * 30 + [False] * 10
    assert all(isinstance(each, Refused) and each.situation is Situation.OVERLOADED for each in found[30:])
    assert len(worker.backlog) == 0


def test_a_token_holds_for_each_row() -> None:
    """Rows whose models it does not allow are refused, and their numbers go nowhere."""
    worker = Worker(answer_numbers)
    token = Token("desk", "0" * 64, (Scope.INVOKE,), ("m1",))
    call = make_table(MANY[:12])

    async def run() -> list[Prediction | Refused]:
        with FanOut(PermittedPlane(make_plane(worker), token), call, LIMIT, FAR, stay_connected) as running:
            return await running.infer()

    found = asyncio.run(run())
    assert [i for i, each in enumerate(found) if isinstance(each, Prediction)] == [1, 10, 11]
    (asked,) = worker.asked
    columns = read_asked(asked.body).columns
    assert columns is not None
    assert [*memoryview(columns.series[0]).cast("d")] == [1.0, 10.0, 11.0]
