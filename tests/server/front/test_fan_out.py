"""A call for many models: bounded memory, order, places of errors, one limit for all answers."""

import asyncio
import json
import tracemalloc
from itertools import pairwise
from typing import Any

import msgspec
import pytest

from model_store.names import ModelName, at_version
from server.errors import Refused, Situation
from server.front.dataplane import DataPlane
from server.front.dialects.forecasts import parse_call
from server.front.exchange import Limit
from server.front.fan_out import (
    MAX_UNDER_WAY,
    MIN_WINDOW,
    FanOut,
    JointPrediction,
    Prediction,
    put_samples,
    require_all,
)
from server.front.inference import ClientGone, InferStats
from server.front.releases import ReleasedPlane, Releases
from server.front.slices import ITEM, SLICE, finish_slices
from server.ipc.operations import ReleaseArm
from server.metrics import FrontMetrics
from tests.server.front.answering import Asked, Worker, attach, stay_connected

MIB = 1024 * 1024
LIMIT = Limit(64 * MIB, "max_forecasts_bytes")
FAR = 1e9
ANSWER = b'{"predictions":[{"mean":[1.50]}]}'
STATS = InferStats("hit", 0, None, 0)


def call(count: int, configuration_bytes: int = 0) -> bytes:
    """A call of so many small items that share a configuration of some size."""
    items = b",".join(b'{"target_model":"m%d.mar"}' % i for i in range(count))
    return b'{"requests":[' + items + b'],"configuration":{"x":"' + b"y" * configuration_bytes + b'"}}'


def fan_out(body: bytes, worker: Worker, limit: Limit = LIMIT, client_gone: Any = stay_connected) -> FanOut:
    """The call under way at one worker."""
    plane = DataPlane(256 * MIB)
    attach(plane, worker)
    return FanOut(plane, finish_slices(parse_call(body, LIMIT)), limit, FAR, client_gone)


@pytest.mark.slow
def test_many_items_with_a_large_configuration_are_refused_before_anything_is_built() -> None:
    """10,000 items and 120 kB of configuration, 370 kB in all, would be 1.2 GB: 413, with the numbers, for 10 MB."""
    worker = Worker(lambda _: ANSWER)
    body = call(10_000, 120_000)
    tracemalloc.start()
    try:
        with pytest.raises(Refused) as caught:
            asyncio.run(infer(body, worker))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.situation is Situation.TOO_LARGE
    assert "10000 requests with 120008 bytes of configuration each are 1200080000 bytes" in str(caught.value)
    assert "67108864 (max_forecasts_bytes)" in str(caught.value)
    assert (worker.asked, peak < 10 * MIB) == ([], True)


async def infer(body: bytes, worker: Worker, limit: Limit = LIMIT) -> list[Prediction | Refused]:
    """What came of each item."""
    return await fan_out(body, worker, limit).infer()


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_what_is_allowed_is_built_when_its_turn_comes(fails: bool) -> None:
    """2,000 items share 30 kB, 60 MB in all: a megabyte of it is there at a time, whether items succeed or fail."""
    sizes: list[int] = []

    def answer(asked: Asked) -> Any:
        sizes.append(len(asked.body))
        worker.asked.clear()
        return (Situation.NOT_FOUND, b'{"message":"no"}') if fails else ANSWER

    worker = Worker(answer)
    body = call(2000, 30_000)
    tracemalloc.start()
    try:
        found = asyncio.run(infer(body, worker))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(sizes) > 55 * MIB
    assert peak < 12 * MIB, f"{peak / MIB:.1f} MiB"
    assert sum(isinstance(each, Refused) for each in found) == (2000 if fails else 0)


def test_items_under_way_are_bounded_by_count_and_bytes() -> None:
    """At most so many items, and as many bytes as the call has itself; one alone is always asked."""

    async def scenario(body: bytes) -> tuple[int, int]:
        worker = Worker(lambda _: ...)
        running = fan_out(body, worker)
        asked = asyncio.ensure_future(running.infer())
        for _ in range(1000):
            await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        return len(worker.asked), sum(len(each.body) for each in worker.asked)

    assert asyncio.run(scenario(call(3000)))[0] == MAX_UNDER_WAY
    count, size = asyncio.run(scenario(call(2000, 30_000)))
    assert 1 < count < 40
    assert size < 1.1 * MIN_WINDOW
    large = b'{"target_model":"m.mar","x":"%b"}' % (b"y" * 2 * MIN_WINDOW)
    many = b'{"requests":[' + b",".join([large] * 5) + b"]}"
    assert asyncio.run(scenario(many))[0] == 5, "as many bytes as the call has itself"


def test_items_begin_in_slices() -> None:
    """Between two turns of the loop's other tasks no more items are built than a slice has work for."""

    async def scenario(body: bytes) -> list[tuple[int, int]]:
        worker, turns = Worker(lambda _: ...), [(0, 0)]
        running = fan_out(body, worker)
        asked = asyncio.ensure_future(running.infer())
        while len(turns) < 200:
            await asyncio.sleep(0)
            turns.append((len(worker.asked), sum(len(each.body) for each in worker.asked)))
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(turns)]

    small = asyncio.run(scenario(call(1000)))
    assert sum(count for count, _ in small) == 1000
    assert max(count for count, _ in small) <= SLICE // ITEM + 1
    large = asyncio.run(scenario(call(50, 20_000)))
    assert sum(count for count, _ in large) == 50
    assert max(size for _, size in large) <= SLICE + 21_000


def test_order_and_failures() -> None:
    """Every item in its place, whichever is answered first; an item without a model is not asked."""
    body = json.dumps({"requests": [{"target_model": f"m{i}.mar"} for i in range(3)] + [{}]}).encode()

    def answer(asked: Asked) -> Any:
        if asked.model == "m1.mar":
            return Situation.NOT_FOUND, b'{"message":"no m1"}'
        return b'{"predictions":["%b"]}' % asked.model.encode()

    first, second, third, fourth = asyncio.run(infer(body, Worker(answer)))
    assert isinstance(first, Prediction)
    assert isinstance(third, Prediction)
    assert isinstance(second, Refused)
    assert isinstance(fourth, Refused)
    assert (first.body, third.body) == (b'"m0.mar"', b'"m2.mar"')
    assert (second.situation, str(second), fourth.situation) == (Situation.NOT_FOUND, "no m1", Situation.BAD_REQUEST)


def test_answers_are_bounded_together() -> None:
    """The item that makes them too large ends the call; what is under way is cancelled."""
    worker = Worker(lambda asked: ... if asked.model == "m0.mar" else b'{"predictions":["%b"]}' % (b"x" * 300))
    with pytest.raises(Refused, match="answers have more than 1000 bytes together") as caught:
        asyncio.run(infer(call(5), worker, Limit(1000, "limit")))
    assert caught.value.situation is Situation.TOO_LARGE
    assert worker.cancelled == 1


def test_a_client_that_leaves_ends_the_call() -> None:
    """Its items are cancelled at the worker, and nothing stays held."""

    async def scenario() -> None:
        left = asyncio.Event()
        worker = Worker(lambda _: ...)
        running = fan_out(call(20), worker, client_gone=left.wait)
        asked = asyncio.ensure_future(running.infer())
        for _ in range(5):
            await asyncio.sleep(0)
        left.set()
        with pytest.raises(ClientGone):
            await asked
        assert (len(worker.asked), worker.cancelled, running._plane.held.size) == (20, 20, 0)

    asyncio.run(scenario())


def joint_call(*models: str) -> bytes:
    """A call for joint scenarios."""
    configuration = {"joint": True, "correlation": "joint.mar", "num_samples": 2}
    requests = [{"target_model": model} for model in models]
    return json.dumps({"requests": requests, "configuration": configuration}).encode()


def test_the_correlation_gets_the_marginals_that_are_there() -> None:
    """By name, without the items that failed; its samples go to the others; its refusal names the client's item."""

    def answer(asked: Asked) -> Any:
        if asked.model == "joint.mar":
            names = [each["name"] for each in json.loads(asked.body)["forecasts"]]
            if names == ["b.mar", "odd.mar"]:
                return Situation.BAD_REQUEST, b'{"message":"odd is unknown","instance":1}'
            return b'{"samples":[[1],[2.50]]}'
        if asked.model == "gone.mar":
            return Situation.NOT_FOUND, b'{"message":"no"}'
        return b'{"predictions":[{"mean":[1.50],"marginal":{}}]}'

    async def scenario(*models: str) -> list[JointPrediction | Refused]:
        running = fan_out(joint_call(*models), Worker(answer))
        found = await running.infer()
        assert running._call.joint is not None
        return finish_slices(put_samples(found, await running.draw(running._call.joint, found, "")))

    first, gone, last = asyncio.run(scenario("a.mar", "gone.mar", "c.mar"))
    assert isinstance(first, JointPrediction)
    assert isinstance(gone, Refused)
    assert isinstance(last, JointPrediction)
    bodies = [b"".join(each.parts) for each in (first, last)]
    assert bodies == [b'{"mean":[1.50],"samples":[1]}', b'{"mean":[1.50],"samples":[2.50]}']
    with pytest.raises(Refused, match="odd is unknown") as caught:
        asyncio.run(scenario("gone.mar", "b.mar", "odd.mar"))
    assert caught.value.detail.instance == 2


@pytest.mark.parametrize(
    ("scenarios", "message"),
    [
        (b'{"samples":[[1]]}', "samples of 1 forecasts, expected 2"),
        (b'{"sizes":[3],"samples":[[1]]}', "samples of 1 forecasts, expected 2"),
        (b'{"samples":[]}', "samples of 0 forecasts, expected 2"),
        (b'{"samples":[[1],[2],[3]]}', "samples of 3 forecasts, expected 2"),
        (b'{"predictions":[]}', "no samples: it has no `samples`"),
        (b'{"samples":{}}', "no samples: "),
        (b"hello", "no samples: "),
    ],
)
def test_a_correlation_that_answers_other_samples_than_asked_is_refused(scenarios: bytes, message: str) -> None:
    """Fewer, more or none: no forecast gets another one's scenarios, and the client reads what came."""
    fields = {"marginal": msgspec.Raw(b"{}")}
    prediction, refused = Prediction(b"", STATS, fields), Refused(Situation.NOT_FOUND, "no")
    with pytest.raises(Refused, match=message) as caught:
        finish_slices(put_samples([prediction, refused, prediction], scenarios))
    assert caught.value.situation is Situation.MODEL_FAILED


def test_the_correlation_gets_the_archive_that_an_alias_stands_for() -> None:
    """It knows archives alone: neither an alias nor a version, and of a canary the archive that has answered."""
    asked_for = list[list[str]]()

    def answer(asked: Asked) -> Any:
        if asked.model == "joint.mar":
            asked_for.append([each["name"] for each in json.loads(asked.body)["forecasts"]])
            return b'{"samples":[[1],[2],[3]]}'
        return b'{"predictions":[{"marginal":{}}]}'

    async def scenario() -> None:
        plane, releases = DataPlane(256 * MIB), Releases(FrontMetrics())
        attach(plane, Worker(answer))
        pinned, follows = ReleaseArm(at_version(ModelName("a.mar"), "old"), "old", 1.0), ReleaseArm("b.mar", "", 1.0)
        releases.replace({"a@stable": [pinned], "b@stable": [follows]})
        call = finish_slices(parse_call(joint_call("a@stable", "b@stable", "c.mar"), LIMIT))
        running = FanOut(ReleasedPlane(plane, releases), call, LIMIT, FAR, stay_connected)
        assert call.joint is not None
        await running.draw(call.joint, await running.infer(), "")

    asyncio.run(scenario())
    assert asked_for == [["a.mar", "b.mar", "c.mar"]]


def test_one_array_has_no_place_for_a_failure() -> None:
    """The first item's refusal is the call's, with its place."""
    good = Prediction(b"{}", STATS)
    with pytest.raises(Refused) as caught:
        require_all([good, Refused(Situation.NOT_FOUND, "no", field="target_model")])
    detail = caught.value.detail
    assert (caught.value.situation, detail.instance, detail.field) == (Situation.NOT_FOUND, 1, "target_model")
    require_all([good])
