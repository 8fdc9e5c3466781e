"""Everything that grows with the input of clients is bounded in bytes; docs/memory-bounds.md lists it."""

import ast
import asyncio
import gc
import re
import tracemalloc
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from handlers import forecasters
from handlers.codecs.codec import FamilyCodec
from handlers.forecasters import build_family, random_tensors
from handlers.kinds import RowModel
from handlers.kinds.graph import family as graph_families
from model_store.cache.eviction import due, s3fifo
from model_store.cache.eviction.due import Due
from model_store.cache.eviction.s3fifo import S3Fifo
from model_store.name_table import NameTable
from model_store.names import MAX_NAME, ModelName
from server.cli.setting_flags import settings_from
from server.errors import Refused, Situation
from server.front.app import App
from server.front.chunks import PIECE_BYTES
from server.front.dataplane import DataPlane
from server.front.dialects import forecasts, sagemaker
from server.front.dialects.forecasts import MAX_CONFIGURATION_BYTES, Forecasts
from server.front.exchange import HttpReply, Limit
from server.front.fan_out import FanOut, MultiModelCall
from server.front.raw_json import MAX_ITEMS
from server.front.slices import finish_slices
from server.front.suspects import MAX_SUSPECT_BYTES, Suspects
from server.ipc.bodies import Outbox
from server.ipc.control import ControlError
from server.ipc.frames import CHUNK, Request, Response
from server.ipc.pulse import Pulse
from server.metrics import FrontMetrics
from server.routing import MAX_WARM_BYTES, Router
from server.supervisor import pins
from server.worker import model_loads, row_batches
from server.worker.engine import cpu
from server.worker.engine.memory_pool import Pool
from server.worker.front_connection import FrontConnection
from server.worker.long_jobs import LongJobs
from server.worker.scheduler import Job
from server.worker.step_loop import StepLoop
from tests.e2e.models import SHAPES, Config
from tests.server.front.answering import Worker, attach, stay_connected
from tests.server.worker.test_step_loop import FakeLoader, Front, let_loop_run, play

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "memory-bounds.md"
MIB = 1024 * 1024


def parse_call(body: bytes) -> MultiModelCall:
    """The call, without a pause."""
    return finish_slices(forecasts.parse_call(body, Limit(6 * MIB, "max_body_bytes")))


def long_name(i: int) -> str:
    """A made-up name of the greatest length, in characters of four bytes."""
    return f"{i:08}" + "\N{MATHEMATICAL BOLD CAPITAL A}" * (MAX_NAME - 8)


@pytest.mark.parametrize("page", [TABLE, ROOT / "SECURITY.md"])
def test_the_table_names_tests_that_exist(page: Path) -> None:
    """Each row of the documented tables, of bounds and of threats, has a test behind it."""
    rows = re.findall(r"^\|.*\|$", page.read_text(), re.MULTILINE)[2:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for path, test in named:
            assert test in list_names(path), (path, test)


@cache
def list_names(path: str) -> set[str]:
    """What a file of the repository defines."""
    return {each.name for each in ast.walk(ast.parse((ROOT / path).read_text())) if hasattr(each, "name")}


@pytest.mark.parametrize("name", [long_name, "au/{}.mar".format, lambda i: f"{i}é"])
def test_a_table_of_names_takes_no_more_than_it_says(name: Any) -> None:
    """Whatever the names, Python has allocated no more for the table than its bound; the newest are there."""
    count = 3000
    tracemalloc.start()
    try:
        table: NameTable[int] = NameTable(MIB // 2)
        for i in range(count):
            made = name(i)
            made.encode()  # Python keeps the UTF-8 with the text
            table.put(made, i)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 1.1 * MIB // 2
    assert table.used_bytes <= MIB // 2
    assert table.get(name(count - 1)) == count - 1
    assert name(0) not in table


def test_a_table_of_names_forgets_the_oldest() -> None:
    """Bytes go up and down with the entries, a touched name stays longest, and a None is a value."""
    table: NameTable[None] = NameTable(3 * (256 + 1))
    for name in "abc":
        table.put(name, None)
    table.touch("a")
    table.put("d", None)
    assert list(table) == ["c", "a", "d"]
    table.pop("a")
    table.pop("a")
    assert table.used_bytes == 2 * 257
    table.clear()
    assert (table.used_bytes, len(table)) == (0, 0)


def test_a_front_remembers_checked_names_in_bounded_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """50,000 made-up names leave the bound behind, not 400 MB."""
    monkeypatch.setattr(sagemaker, "MAX_NAME_BYTES", MIB)
    dialect = sagemaker.SageMaker(settings_from({"store": "x"}))
    for i in range(2000):
        dialect._parse_name(long_name(i).encode())
    assert 0 < dialect._names.used_bytes <= MIB


def test_a_router_remembers_models_in_bounded_bytes() -> None:
    """Orders and warm models of a lane end at their bounds, and routing goes on."""
    router = Router()
    for worker in range(3):
        router.worker_up(worker)
    for i in range(4000):
        lane = router.route(long_name(i), 0.0)
        assert lane is not None
        router.count_end(lane, long_name(i), router.count_start(lane, long_name(i)), held=True)
    assert 0 < router._orders.used_bytes <= 16 * MIB
    assert all(0 < lane.warm.used_bytes <= MAX_WARM_BYTES for lane in router.lanes.values())


def test_policies_remember_models_that_left_in_bounded_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ghosts with the longest names, of both policies that keep some."""
    monkeypatch.setattr(due, "MAX_GHOST_BYTES", MIB)
    monkeypatch.setattr(s3fifo, "MAX_GHOST_BYTES", MIB)
    for policy in (Due(), S3Fifo()):
        names = [ModelName(long_name(i)) for i in range(600)]
        for name in names:
            policy.enter(name, "g", 0.0, asked=True)
        for name in names[:300]:
            policy.leave(name)
        assert 0 < policy._ghosts.used_bytes <= MIB


@pytest.mark.slow
def test_items_are_counted_before_they_are_cut() -> None:
    """8 MiB of tiny items (`[1,1,1]`) are refused for 10,001 objects, not for one each; the largest call passes."""
    body = b'{"requests":[' + b"1," * (4 * MIB) + b"1]}"
    tracemalloc.start()
    try:
        with pytest.raises(Refused, match=f"1 to {MAX_ITEMS} requests, not more"):
            parse_call(body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * MIB
    assert len(parse_call(b'{"requests":[' + b"1," * (MAX_ITEMS - 1) + b"1]}").items) == MAX_ITEMS


def test_a_configuration_is_bounded() -> None:
    """Its fields become objects: one above the bound is 413."""
    fields = b",".join(b'"f%d":1' % i for i in range(MAX_CONFIGURATION_BYTES // 6))
    with pytest.raises(Refused) as caught:
        parse_call(b'{"requests":[1],"configuration":{' + fields + b"}}")
    assert caught.value.situation is Situation.TOO_LARGE


def test_answers_count_as_held_until_they_are_sent() -> None:
    """A large answer leaves in pieces as fast as its client reads, and counts as held meanwhile."""
    app = App(settings_from({"store": "x"}), FrontMetrics(), (Forecasts,))
    sent: list[bytes] = []
    held: list[int] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        held.append(app.plane.held.size)

    async def scenario(size: int) -> bytes:
        sent.clear()
        body = np.random.default_rng(1).bytes(size)
        request: Any = type("", (), {"headers": {}, "id": b""})()
        await app._send(HttpReply(200, "a/b", body), request, {}, send)
        assert b"".join(sent) == body
        return body

    for size in (0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES, 3 * PIECE_BYTES + 7):
        asyncio.run(scenario(size))
        assert max(map(len, sent)) <= PIECE_BYTES
        assert set(held[-len(sent) :]) == {size}
    assert app.plane.held.size == 0


def test_answers_of_a_call_count_as_held() -> None:
    """A front that holds all it may refuses the call as overload, and holds nothing afterwards."""
    plane = DataPlane(10_000)
    body = b'{"predictions":[{"mean":["' + b"x" * 3000 + b'"]}]}'
    call = parse_call(b'{"requests":[' + b",".join(b'{"target_model":"m%d"}' % i for i in range(8)) + b"]}")

    async def scenario() -> None:
        attach(plane, Worker(lambda _: body))
        limit = Limit(MIB, "max_forecasts_bytes")
        with FanOut(plane, call, limit, 1e9, stay_connected) as running:
            await running.infer()

    with pytest.raises(Refused) as caught:
        asyncio.run(scenario())
    assert caught.value.situation is Situation.OVERLOADED
    assert plane.held.size == 0


def test_an_outbox_counts_what_it_holds() -> None:
    """A body counts whole until its last chunk has left or it is dropped."""
    outbox = Outbox()
    for ident in (1, 2):
        outbox.start(ident, bytes(3 * CHUNK))
    assert outbox.held_bytes == 6 * CHUNK
    outbox.drop(1)
    while outbox.next_chunk() is not None:
        pass
    assert (outbox.held_bytes, len(outbox)) == (0, 0)


def test_large_answers_that_no_client_takes_are_bounded() -> None:
    """A worker refuses a further large answer as overload; a small one still leaves."""
    sent: list[Response] = []

    class Recording(FrontConnection):
        def send(self, frame: Any) -> None:
            sent.append(frame)
            super().send(frame)

    async def scenario() -> int:
        connection = Recording(cast("Any", None), MIB, 10 * CHUNK)
        for ident, size in enumerate((6 * CHUNK, 6 * CHUNK, 10)):
            job = Job(Request(ident, 0, "m", "", "", 0, b""), ModelName("m"), connection, 0.0, 0.0)
            connection.answer(job, "a/b", bytes(size), queue_s=0.0, inference_s=0.0)
        return connection.unsent_bytes

    assert asyncio.run(scenario()) == 6 * CHUNK
    assert [frame.situation for frame in sent] == [Situation.OK, Situation.OVERLOADED, Situation.OK]


@pytest.mark.slow
def test_families_that_no_model_has_are_forgotten() -> None:
    """The same object while it is used, and none when it is not: an author can make up any number of them."""
    config = {"features": 1, "context_length": 3, "prediction_length": 1, "quantiles": 1}
    kept = build_family("mlp", {**config, "context_length": 4})
    assert build_family("mlp", {**config, "context_length": 4}) is kept
    before = set(forecasters._families)
    for length in range(100, 150):
        build_family("mlp", {**config, "context_length": length})
    gc.collect()
    assert set(forecasters._families) <= before
    assert len(graph_families._families) < 256


def test_staging_of_families_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of families run; the staging of the last used ones stays, and answers stay the same."""
    monkeypatch.setattr(cpu, "MAX_STAGING_BYTES", 16 * MIB)
    monkeypatch.setattr(cpu, "MAX_LEARNING", 20)
    config = {"features": 1, "context_length": 3, "prediction_length": 1, "quantiles": 1}
    families = [build_family("mlp", {**config, "context_length": 3 + i}) for i in range(40)]
    size = max(family.row_floats for family in families) * 4
    pool = Pool(size, torch.device("cpu"))
    engine = cpu.Engine(pool, 512)
    answers = []
    for _ in range(2):
        for family in families:
            pool.write(0, family.row(random_tensors(family, 1)))
            x = np.ones((1, *family.input_shape), np.float32)
            answers.append(engine.run(family, [0], [x])[0].copy())
    assert sum(staging.nbytes for staging in engine._staging.values()) <= 16 * MIB
    assert (1 <= len(engine._staging) < 40, len(engine._learning)) == (True, 20)
    np.testing.assert_array_equal(answers[:40], answers[40:])


def leave(front: Front, ident: int) -> None:
    """The client of a request leaves."""
    front.steps.cancel(front.jobs[ident])
    front.refusals[ident] = Refused(Situation.INTERNAL, "its client has left")


def test_loads_are_bounded_where_clients_leave_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads that no request waits for any more count: a further one is refused as overload until some have ended."""
    monkeypatch.setattr(model_loads, "MAX_LOADS", 5)

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        loader.gate.clear()
        for i in range(5):
            leave(front, front.send(f"a/m{i}"))
        assert front.refusals[front.send("a/late")].situation is Situation.OVERLOADED
        loader.gate.set()
        await let_loop_run(lambda: not len(steps._loads))
        served = front.send("a/late")
        await front.settled()
        assert served in front.answers

    play(scenario)


def test_built_models_that_wait_for_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """While more than the bound is built and waits, no further archive is fetched; in the end all are served."""
    monkeypatch.setattr(model_loads, "MAX_BUILT_BYTES", 0)
    most: list[int] = []

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        loads, queue = steps._loads, steps._loads._queue

        def note(built: Any, now: float) -> None:
            queue(built, now)
            most.append(len(loads.built))

        monkeypatch.setattr(loads, "_queue", note)
        for i in range(30):
            front.send(f"a/m{i}")
        await front.settled()
        assert len(loader.builds) == 30

    play(scenario)
    assert max(most) <= 4, "as many as there are loader threads"


def test_a_cancelled_request_gives_its_body_up() -> None:
    """The job stays queued until its turn comes, without its bytes."""

    async def scenario(steps: StepLoop, loader: FakeLoader, front: Front) -> None:
        loader.gate.clear()
        leave(front, front.send("a/m1"))
        assert front.jobs[0].request.body == b""
        loader.gate.set()
        await let_loop_run(lambda: not len(steps._loads))

    play(scenario)


def test_pins_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator's script that pins names without end is told so."""
    monkeypatch.setattr(pins, "MAX_PIN_BYTES", 100)
    pinned = pins.PinnedModels(["a" * 60])
    with pytest.raises(ControlError, match="1 models are pinned already"):
        pinned.require_room("b" * 60)


def test_suspects_are_bounded() -> None:
    """Workers that die with models of made-up names leave a megabyte of suspects: the oldest are none any more."""
    suspects = Suspects()
    for i in range(0, 2000, 100):
        suspects.add({long_name(j) for j in range(i, i + 100)}, 0)
    assert suspects.has(long_name(1999)) or suspects.has(long_name(1950))
    assert not suspects.has(long_name(0))
    assert suspects._models.used_bytes <= MAX_SUSPECT_BYTES


def test_paces_of_families_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest family's pace is forgotten for a new one's, and estimated anew should it run again."""
    monkeypatch.setattr(row_batches, "MOST_PACES", 3)
    models = [row_model({**SHAPES, "channels": 4 + i}) for i in range(5)]
    with closing(asyncio.new_event_loop()) as loop:
        long, nothing = LongJobs(loop, Pulse()), cast("Any", None)
        batches = row_batches.RowBatches(nothing, nothing, nothing, nothing, long)
        first = batches.pace(models[0])
        assert batches.pace(models[0]) is first
        for model in models:
            batches.pace(model)
        assert list(batches._paces) == [model.family.key for model in models[2:]]
        assert batches.pace(models[0]) is not first
        long.close()


def row_model(config: Config) -> RowModel:
    """A model of a family of its own."""
    family = build_family("tcn", {**config, "layers": 2})
    return RowModel(family, FamilyCodec(family))
