"""The data plane: routing, one more try, refusals, large answers, bytes held, clients that leave."""

import asyncio
import contextlib
import gc
import time
from pathlib import Path
from types import FrameType
from typing import Any, cast

import msgspec
import pytest

from model_store.names import parse_model_name
from server.code_messages import decode_fields
from server.errors import Refused, Situation
from server.front import dataplane
from server.front.backlog import Backlog, Bounds
from server.front.dataplane import BOUNDS, DataPlane
from server.front.handler_calls import CallDetails, CodeCalls
from server.front.inference import ClientGone, ClientWatch, InferRequest, InferStats, RefusedByWorker
from server.front.worker_client import WorkerLink
from server.ipc.handler_calls import decode_call
from server.ipc.pulse import LoadSigns, Pulse, PulseReader
from tests.server.front.answering import JSON, Worker, attach

FAR = 1e9
MODEL = parse_model_name("au/m.mar")


def make_request(body: bytes = b"{}", client_gone: ClientWatch | None = None) -> InferRequest:
    """A request to the model."""
    return InferRequest(MODEL, body, JSON, "", FAR, client_gone)


def make_plane(*workers: Worker, max_held_bytes: int = 1000, bounds: Bounds = BOUNDS) -> DataPlane:
    """A plane over these workers."""
    made = DataPlane(max_held_bytes, bounds)
    attach(made, *workers)
    return made


async def catch_refusal(made: DataPlane, asked: InferRequest | None = None) -> Refused:
    """Why the request is refused."""
    with pytest.raises(Refused) as caught:
        await made.infer(asked or make_request())
    return caught.value


def die_always(_: Any) -> None:
    """A worker that dies with every request."""


@pytest.mark.slow
def test_a_refusal_keeps_no_body() -> None:
    """It would until the collector's next full run if its own traceback held it: 400 items of a call are 40 MB."""

    async def scenario() -> None:
        made = make_plane(Worker(lambda _: (Situation.BAD_REQUEST, b'{"message":"no"}')))
        gc.collect()
        gc.disable()
        try:
            with contextlib.suppress(Refused):
                await made.infer(make_request())
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            assert not [each for each in gc.garbage if isinstance(each, FrameType | RefusedByWorker)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    asyncio.run(scenario())


def test_an_answer_and_what_happened() -> None:
    """The body, its type, and the worker's account of cache and times."""

    async def scenario() -> None:
        worker = Worker(lambda asked: asked.body * 2)
        response = await make_plane(worker).infer(make_request(b"ab"))
        assert (response.body, response.content_type, await response.read()) == (b"abab", JSON, b"abab")
        assert response.stats == InferStats("hit", 1500, None, 20, "disk", "v1")
        assert worker.asked[0].model == MODEL

    asyncio.run(scenario())


def test_only_the_code_that_may_run_is_told_of_a_request() -> None:
    """And nothing where the dialect has nothing to tell, or the server runs no code."""

    async def scenario() -> None:
        worker = Worker(lambda _: b"1")
        told, details = InferRequest(MODEL, b"", JSON, "", FAR, call=CallDetails({b"x-a": b"b"})), []
        for keys, request in ((["au/"], told), (["eu/"], told), (["au/"], make_request()), (None, told)):
            code = None if keys is None else CodeCalls(keys, shows_credentials=True)
            plane = DataPlane(1000, BOUNDS, code)
            attach(plane, worker)
            await plane.infer(request)
            details.append(worker.asked[-1].handler_call)
        assert decode_fields(decode_call(details[0]).fields) == {"x-a": "b"}
        assert details[1:] == [b"", b"", b""]

    asyncio.run(scenario())


def test_a_dead_worker_costs_one_more_try() -> None:
    """The other worker is asked; where one worker after the other dies with a request, it is refused after some."""

    async def scenario() -> None:
        pair = [Worker(lambda asked: asked.body), Worker(lambda asked: asked.body)]
        made = make_plane(*pair)
        home = pair[made.router.order(MODEL)[0]]
        home.answer = die_always
        assert (await made.infer(make_request(b"x"))).body == b"x"
        assert [len(worker.asked) for worker in pair] == [1, 1]
        pair[0].answer = pair[1].answer = die_always
        refused = await catch_refusal(made)
        assert (refused.situation, "4 workers" in str(refused)) == (Situation.WORKER_LOST, True)
        assert [len(worker.asked) for worker in pair] == [3, 3]
        assert (await catch_refusal(make_plane(Worker(die_always)))).situation is Situation.WORKER_LOST
        assert (await catch_refusal(make_plane())).situation is Situation.NOT_READY
        assert all(lane.running == 0 for lane in made.router.lanes.values())

    asyncio.run(scenario())


def make_deserted_plane() -> DataPlane:
    """A plane whose only worker has died."""
    made = make_plane()
    made.note_up(0)
    made.router.worker_down(0)
    return made


def test_requests_wait_for_the_next_worker_where_all_have_died(monkeypatch: pytest.MonkeyPatch) -> None:
    """New ones too, up to a number of them and for a time."""

    async def scenario() -> None:
        made = make_deserted_plane()
        waiting = asyncio.ensure_future(made.infer(make_request(b"x")))
        await asyncio.sleep(0)
        monkeypatch.setattr(dataplane, "MOST_WAITING", 1)
        assert "1 requests wait" in str(await catch_refusal(made))
        made.links[0] = cast("WorkerLink", Worker(lambda asked: asked.body))
        made.note_up(0)
        assert (await waiting).body == b"x"
        made.router.worker_down(0)
        monkeypatch.setattr(dataplane, "RESTART_S", 0.01)
        assert (await catch_refusal(made)).situation is Situation.NOT_READY

    asyncio.run(scenario())


def test_no_request_waits_for_a_worker_where_the_supervisor_has_died() -> None:
    """Nobody would start one: who waits already and who comes is refused at once."""

    async def scenario() -> None:
        made = make_deserted_plane()
        waiting = asyncio.ensure_future(made.infer(make_request(b"x")))
        await asyncio.sleep(0)
        assert not waiting.done()
        made.abandon()
        async with asyncio.timeout(dataplane.RESTART_S / 2):
            with pytest.raises(Refused, match="the server is stopping") as caught:
                await waiting
            assert caught.value.situation is Situation.NOT_READY
            assert (await catch_refusal(made)).situation is Situation.NOT_READY

    asyncio.run(scenario())


def test_a_suspect_runs_alone_and_an_answer_clears_it(tmp_path: Path) -> None:
    """The model that ran when the worker died is marked in its request, until it has been answered; others are not."""

    async def scenario() -> None:
        pair = [Worker(lambda asked: asked.body), Worker(lambda asked: asked.body)]
        made = make_plane(*pair)
        home, other = made.router.order(MODEL)
        pulse = Pulse(str(tmp_path / "run"))
        made.pulses[home] = PulseReader(str(tmp_path / "run"))
        innocent = parse_model_name(next(f"{i}.mar" for i in range(99) if made.router.order(f"{i}.mar")[0] == home))

        def die(_: Any) -> None:
            pulse.batch[: len(MODEL) + 1] = MODEL.encode() + b"\0"
            made.note_loss(home)
            pulse.batch[0] = 0

        pair[home].answer = die
        assert (await made.infer(make_request(b"x"))).body == b"x"
        assert (await made.infer(InferRequest(innocent, b"y", JSON, "", FAR))).body == b"y"
        assert [(each.model, each.alone) for each in pair[other].asked] == [(MODEL, True), (innocent, False)]

    asyncio.run(scenario())


def test_a_worker_refuses() -> None:
    """Situation, place and what happened until then arrive."""

    async def scenario() -> None:
        detail = b'{"message":"short","instance":2,"field":"target"}'
        refused = await catch_refusal(make_plane(Worker(lambda _: (Situation.BAD_REQUEST, detail))))
        assert isinstance(refused, RefusedByWorker)
        assert (refused.situation, refused.detail.instance, refused.detail.field) == (3, 2, "target")
        assert refused.stats.cache == "hit"

    asyncio.run(scenario())


def test_a_large_answer_comes_in_parts() -> None:
    """All of it when read; when the worker dies on the way a refusal; when it is given up the worker is told."""

    async def scenario() -> None:
        worker = Worker(lambda _: [b"one", b"two", b"three"])
        made = make_plane(worker)
        assert await (await made.infer(make_request())).read() == b"onetwothree"
        assert worker.cancelled == 0
        response = await made.infer(make_request())
        assert (response.body, response.body_bytes, response.unread) == (b"one", 11, 8)
        response.cancel()
        assert worker.cancelled == 1
        worker.answer = lambda _: [b"one", b""]
        with pytest.raises(Refused, match="half of the answer"):
            await (await made.infer(make_request())).read()

    asyncio.run(scenario())


def test_bodies_count_as_held_while_they_are_asked() -> None:
    """Above the limit the front is overloaded; however a request ends, nothing stays counted."""

    async def scenario() -> None:
        worker = Worker(lambda _: ...)
        made = make_plane(worker, max_held_bytes=1000)
        waiting = asyncio.ensure_future(made.infer(make_request(bytes(600))))
        await asyncio.sleep(0)
        assert made.held.size == 600
        assert (await catch_refusal(made, make_request(bytes(600)))).situation is Situation.OVERLOADED
        assert len(worker.asked) == 1
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert (made.held.size, worker.cancelled) == (0, 1)
        with pytest.raises(Refused), made.held.hold(1001):
            pass
        assert made.held.size == 0

    asyncio.run(scenario())


def test_a_client_that_leaves_cancels_its_slow_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep after the request has become slow watches the client, once; its leaving ends the request."""
    monkeypatch.setattr(dataplane, "WATCH_AFTER_S", -1.0)

    async def scenario() -> None:
        left, watches = asyncio.Event(), []

        async def client_gone() -> None:
            watches.append(1)
            await left.wait()

        worker = Worker(lambda _: ...)
        made = make_plane(worker)
        waiting = asyncio.ensure_future(made.infer(make_request(client_gone=client_gone)))
        await asyncio.sleep(0)
        made.sweep()
        made.sweep()
        left.set()
        with pytest.raises(ClientGone):
            await waiting
        assert (len(watches), worker.cancelled) == (1, 2)

    asyncio.run(scenario())


def test_a_silent_worker_is_routed_around(tmp_path: Path) -> None:
    """What it has is asked elsewhere, new requests go elsewhere, until it beats again; where all are silent none is
    given up, for there is nowhere to go.
    """

    async def scenario() -> None:
        workers = [Worker(lambda asked: asked.body), Worker(lambda asked: asked.body)]
        made = make_plane(*workers)
        home, other = made.router.order(MODEL)
        pulses = {number: Pulse(str(tmp_path / str(number))) for number in (home, other)}
        made.pulses = {number: PulseReader(str(tmp_path / str(number))) for number in pulses}
        workers[home].answer = lambda _: ...
        waiting = asyncio.ensure_future(made.infer(make_request(b"first")))
        for tick in range(5):
            await asyncio.sleep(0)
            pulses[other].beat(LoadSigns(0, 0))
            made._route_around_silence(tick * 0.25)
            assert (workers[home].given_up > 0) == (tick == 4)
        assert (await waiting).body == b"first"
        assert (await made.infer(make_request(b"second"))).body == b"second"
        assert [asked.body for asked in workers[other].asked] == [b"first", b"second"]
        pulses[home].beat(LoadSigns(0, 0))
        made._route_around_silence(1.5)
        workers[home].answer = lambda asked: asked.body
        assert (await made.infer(make_request(b"third"))).body == b"third"
        assert len(workers[home].asked) == 2
        given_up = workers[home].given_up
        for pulse in pulses.values():
            pulse.beat(LoadSigns(0, 0))
        for tick in range(10):
            made._route_around_silence(2 + tick * 0.25)
        assert made.router.silent == {home, other}
        assert (await made.infer(make_request(b"fourth"))).body == b"fourth"
        assert (workers[home].given_up, workers[other].given_up) == (given_up, 0)

    asyncio.run(scenario())


def test_what_is_under_way_is_bounded_for_each_model_and_worker() -> None:
    """The third of a model is refused before the worker is asked, another model is not; all that ends makes room."""

    async def scenario() -> None:
        worker = Worker(lambda _: ...)
        made = make_plane(worker, bounds=Bounds(per_worker=5, per_model=2))
        other = msgspec.structs.replace(make_request(), model=parse_model_name("other.mar"))
        waiting = [asyncio.ensure_future(made.infer(each)) for each in (make_request(), make_request(), other)]
        await asyncio.sleep(0)
        refused = await catch_refusal(made)
        assert (refused.situation, "queue_per_model" in str(refused)) == (Situation.OVERLOADED, True)
        assert (len(worker.asked), len(worker.backlog)) == (3, 3)
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert len(worker.backlog) == 0
        worker.answer = die_always
        assert (await catch_refusal(made)).situation is Situation.WORKER_LOST
        assert len(worker.backlog) == 0

    asyncio.run(scenario())


def test_what_cannot_be_answered_in_time_is_refused_at_once_with_advice() -> None:
    """20 requests are ahead and 10 ms each: 50 ms are not enough, and 210 ms are what the client is told; 50 s are."""

    async def scenario() -> None:
        worker = Worker(lambda asked: asked.body)
        made = make_plane(worker)
        await made.infer(make_request())  # the model is there now
        worker.answer = lambda _: ...
        worker.backlog = Backlog()
        for _ in range(20):
            worker.backlog.start(MODEL, "", time.monotonic(), is_work=True)
        worker.backlog.learn(20, time.monotonic() - 0.2, time.monotonic())
        asked = len(worker.asked)
        short = msgspec.structs.replace(make_request(), deadline=time.monotonic() + 0.05)
        refused = await catch_refusal(made, short)
        assert (refused.situation, len(worker.asked)) == (Situation.OVERLOADED, asked)
        assert refused.detail.retry_ms is not None
        assert 210 <= refused.detail.retry_ms < 1000
        patient = asyncio.ensure_future(made.infer(make_request()))
        await asyncio.sleep(0)
        assert len(worker.asked) == asked + 1
        patient.cancel()
        worker.answer = lambda _: (Situation.DEADLINE, b'{"message":"late"}')
        refused = await catch_refusal(made)
        assert refused.detail.retry_ms is not None
        assert refused.detail.retry_ms >= 210, "the worker's refusal gets the front's advice"

    asyncio.run(scenario())


def test_what_is_ready_after_its_deadline_is_no_answer() -> None:
    """Neither to one request nor to an item of a call; what is on the way is given up."""

    async def scenario() -> None:
        worker = Worker(lambda _: [b"one", b"two"])
        late = msgspec.structs.replace(make_request(), deadline=time.monotonic() - 1)
        assert (await catch_refusal(make_plane(worker), late)).situation is Situation.DEADLINE
        assert worker.cancelled == 1

    asyncio.run(scenario())


def test_answers_teach_the_pace() -> None:
    """Answers of models that were there are learnt from; loads and refusals are not."""

    async def scenario() -> None:
        worker = Worker(lambda asked: asked.body)
        made = make_plane(worker)
        await made.infer(make_request())
        assert worker.backlog.expected_s(1, 0.0) == 0, "the model was not known to be there"
        await made.infer(make_request())
        assert worker.backlog.expected_s(1, 0.0) > 0

    asyncio.run(scenario())
