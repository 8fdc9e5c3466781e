"""Long requests run in slices on other threads: the same answers, and other models run in between."""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import pytest
import torch

from handlers.base import Float32
from handlers.codecs.codec import SingleCodec
from handlers.errors import Overran
from handlers.kinds import SingleModel, build_model
from handlers.model import Model
from handlers.work import Work
from model_store.archives.archive import open_archive
from model_store.cache.cache import Cache
from model_store.names import ModelName
from server.errors import Refused, Situation
from server.ipc.frames import Request
from server.ipc.pulse import BATCH_BYTES, Pulse, PulseReader, RunningModel
from server.metrics import WorkerMetrics
from server.worker.engine.accelerator import DeviceEngine, DevicePool
from server.worker.engine.cpu import Engine
from server.worker.engine.memory_pool import Pool
from server.worker.host_cache import HostCache
from server.worker.long_jobs import LongJobs
from server.worker.model_loader import LoadedModel, LoadSteps
from server.worker.row_batches import Pace, RowBatches
from server.worker.scheduler import Job, Scheduler
from server.worker.single_batches import SingleBatches
from server.worker.step_loop import StepLoop
from tests.server.fake_device import FakeDevice
from tests.server.markets import HISTORY, pack_market
from tests.server.worker.loads import make_load
from tests.server.worker.test_step_loop import let_loop_run

SLAB = 1 << 20
FAR = 1 << 62
INSTANCES = 11
ARCHIVES = [pack_market(seed) for seed in range(4)]


def make_body(instances: int = INSTANCES, samples: int = 0) -> bytes:
    """A request for so many forecasts."""
    series = [
        {"start": "2024-03-01 00:00:00", "target": [50 + 10 * math.sin(i + t / 5) for t in range(HISTORY)]}
        for i in range(instances)
    ]
    types = ["samples"] if samples else ["mean", "quantiles"]
    configuration = {"output_types": types, "num_samples": samples or 100, "seed": 3}
    return orjson.dumps({"instances": series, "configuration": configuration})


@dataclass
class Loader:
    """Forecasters of seeded weights, and sessions under the name `single...`."""

    session: "Session"

    def load(self, model: ModelName, *, revalidate: bool = False, stale: bool = False) -> LoadSteps:
        """As from a store."""
        del revalidate, stale
        return make_load(lambda: self.build(model))

    def build(self, model: ModelName) -> LoadedModel:
        """What a load gives."""
        if model.startswith("single"):
            self.session.take(self.session.short_loads)
            return LoadedModel(model, "v1", "store", 0.0, self.session.model(), None, None)
        built = build_model(open_archive(ARCHIVES[int(model)], model))
        return LoadedModel(model, "v1", "store", 0.0, built.body, built.row, None)

    def forget(self, model: ModelName) -> None:
        """Nothing is kept."""


@dataclass
class Session:
    """A session that doubles its input. The device is out of memory for the first runs and loads, as many as said."""

    overruns: bool = False
    short_runs: list[str] = field(default_factory=list)
    short_loads: list[str] = field(default_factory=list)
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"x": (-1,)})
    outputs: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"y": (-1,)})
    charge_bytes: int = 1000
    threads: list[int] = field(default_factory=list)

    __hash__ = object.__hash__

    def model(self) -> SingleModel:
        """As a load gives it."""
        return SingleModel(self, SingleCodec(self.inputs, self.outputs))

    def run(self, feeds: Mapping[str, Float32]) -> Mapping[str, Float32]:
        """Twice the input."""
        return {"y": 2 * feeds["x"]}

    def run_all(self, requests: Sequence[Mapping[str, Float32]]) -> Sequence[Mapping[str, Float32]]:
        """Of each."""
        if self.overruns:
            raise Overran("a run was ended after 1 s")
        self.take(self.short_runs)
        return [self.run(feeds) for feeds in requests]

    def take(self, errors: list[str]) -> None:
        """Raise the next error, if there is one."""
        if errors:
            raise torch.OutOfMemoryError(errors.pop())


@dataclass
class Origin:
    """Keeps what is answered, in order."""

    answers: dict[int, bytes] = field(default_factory=dict)
    refusals: dict[int, Refused] = field(default_factory=dict)

    def answer_part(self, job: Job, content_type: str, body: bytes, head: bytes) -> bool:
        """No model here answers in parts."""
        raise AssertionError((job, content_type, body, head))

    def answer(
        self, job: Job, content_type: str, body: bytes, *, queue_s: float, inference_s: float, head: bytes = b""
    ) -> None:
        """The first word for this job."""
        assert content_type
        assert min(queue_s, inference_s) >= 0
        assert job.request.id not in {*self.answers, *self.refusals}
        self.answers[job.request.id] = body

    def refuse(self, job: Job, refused: Refused) -> None:
        """The same."""
        assert job.request.id not in {*self.answers, *self.refusals}
        self.refusals[job.request.id] = refused


@dataclass
class Worker:
    """A step loop and whom it answers to."""

    steps: StepLoop
    long: LongJobs
    origin: Origin
    metrics: WorkerMetrics
    count: int = 0

    def send(self, model: str, sent: bytes, deadline_ns: int = FAR) -> Job:
        """Submit a request."""
        self.count += 1
        return self.steps.submit(Request(self.count, deadline_ns, model, "", "", 0, sent), self.origin)

    async def settled(self) -> None:
        """Until every request has its answer or refusal."""
        await let_loop_run(lambda: len(self.origin.answers) + len(self.origin.refusals) >= self.count)

    def series(self, name: str, **labels: str) -> float:
        """A number of the metrics."""
        found = self.metrics.registry.get_sample_value(f"fleetcast_{name}", {"worker": "0", "device": "cpu", **labels})
        return found or 0.0


def play(
    scenario: Callable[[Worker], Coroutine[Any, Any, None]],
    noted: Path,
    *,
    slice_s: float = 0.0,
    long_s: float = 0.0,
    on_device: bool = False,
    session: Session | None = None,
) -> None:
    """Run a scenario on a step loop for which, by default, every request is long and every slice has one row."""

    async def run() -> None:
        pool = DevicePool(4 * SLAB, FakeDevice(0)) if on_device else Pool(4 * SLAB, torch.device("cpu"))
        engine = DeviceEngine(pool, 64) if isinstance(pool, DevicePool) else Engine(pool, 64)
        cache, metrics = Cache(4 * SLAB, SLAB), WorkerMetrics(0, "cpu")
        long = LongJobs(asyncio.get_running_loop(), Pulse(str(noted)), slice_s=slice_s, long_s=long_s)
        steps = StepLoop(
            cache,
            Scheduler(2000, 5000),
            engine,
            Loader(session or Session()),
            metrics,
            shelf=HostCache(torch.empty(0), 60),
            long=long,
            batch=64,
            loader_threads=2,
            patience_s=5,
        )
        worker = Worker(steps, long, Origin(), metrics)
        try:
            await scenario(worker)
            await worker.settled()
            await let_loop_run(lambda: not long.running)
            assert all(slot.leases == 0 for slot in cache)
        finally:
            steps.close()
            await asyncio.to_thread(long._threads.shutdown)

    asyncio.run(run())


@pytest.mark.slow
@pytest.mark.parametrize("samples", [0, 20])
@pytest.mark.parametrize("on_device", [False, True])
def test_slices_give_the_answers_of_one_forward(tmp_path: Path, *, on_device: bool, samples: int) -> None:
    """On the CPU and on a device: each slice one row, several, or all, each equals the model's own answer."""

    def is_answered(name: str, slice_s: float, long_s: float) -> list[Any]:
        found: list[Any] = []

        async def scenario(worker: Worker) -> None:
            for model in ("1", "2", "1"):
                worker.send(model, make_body(samples=samples))
            await worker.settled()
            assert not worker.origin.refusals
            found.extend(orjson.loads(worker.origin.answers[i]) for i in (1, 2, 3))

        play(scenario, tmp_path / name, slice_s=slice_s, long_s=long_s, on_device=on_device)
        return found

    right = []
    for seed in (1, 2, 1):
        opened = open_archive(ARCHIVES[seed], "m")
        right.append(orjson.loads(Model(opened, build_model(opened)).answer(make_body(samples=samples))))
    kinds = {"by rows": (0.0, 0.0), "by several": (3e-6, 0.0), "at once": (math.inf, math.inf)}
    for name, (slice_s, long_s) in kinds.items():
        found = is_answered(name, slice_s, long_s)
        for one, other in zip(_list_numbers(found), _list_numbers(right), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def _list_numbers(value: Any) -> list[Any]:
    """All numbers of a JSON value, in order."""
    if isinstance(value, dict):
        return [number for each in value.values() for number in _list_numbers(each)]
    if isinstance(value, list):
        return [number for each in value for number in _list_numbers(each)]
    return [] if isinstance(value, str) else [value]


def test_other_models_run_between_slices(tmp_path: Path) -> None:
    """Short requests that come after a long one are answered before it."""

    async def scenario(worker: Worker) -> None:
        worker.send("1", make_body(1))
        worker.send("2", make_body(1))
        await worker.settled()
        worker.send("1", make_body(200))
        await asyncio.sleep(0)
        for _ in range(3):
            worker.send("2", make_body(1))
        await worker.settled()
        assert list(worker.origin.answers)[-1] == 3

    play(scenario, tmp_path / "noted", slice_s=1e-6, long_s=0.0)


def test_a_batch_takes_what_a_slice_has_room_for(tmp_path: Path) -> None:
    """The rest of the group's requests run in later steps; all are answered, each once."""

    async def scenario(worker: Worker) -> None:
        for i in range(40):
            worker.send(str(i % 4), make_body(3))
        await worker.settled()
        assert len(worker.origin.answers) == 40
        rows, forwards = worker.series("inference_batch_rows_sum"), worker.series("inference_batch_rows_count")
        assert rows == 120
        assert forwards == 40  # one request at a time: a slice has room for one row, and no request is cut

    play(scenario, tmp_path / "noted", slice_s=0.0, long_s=math.inf)


def test_a_deadline_ends_a_long_request_between_two_slices(tmp_path: Path) -> None:
    """It is refused when the deadline passes, and its lease ends at the next slice."""

    async def scenario(worker: Worker) -> None:
        worker.send("1", make_body(1))
        await worker.settled()
        worker.send("1", make_body(1000), deadline_ns=time.monotonic_ns() + 30_000_000)
        await worker.settled()
        assert worker.origin.refusals[2].situation is Situation.DEADLINE

    play(scenario, tmp_path / "noted", slice_s=0.0, long_s=0.0)


def test_a_client_that_leaves_ends_its_request(tmp_path: Path) -> None:
    """No answer is sent; the slices that are left do not run."""

    async def scenario(worker: Worker) -> None:
        worker.send("1", make_body(1))
        await worker.settled()
        job = worker.send("1", make_body(1000))
        worker.count -= 1  # no answer is expected
        await let_loop_run(lambda: bool(worker.long.running))
        worker.steps.cancel(job)
        await let_loop_run(lambda: not worker.long.running)
        assert list(worker.origin.answers) == [1]
        assert worker.series("inference_batch_rows_sum") < 1000

    play(scenario, tmp_path / "noted", slice_s=0.0, long_s=0.0)


def test_a_wrong_request_is_refused_from_another_thread_too(tmp_path: Path) -> None:
    """With the place that is wrong, as on the step thread."""

    async def scenario(worker: Worker) -> None:
        worker.send("1", b'{"instances": [{"start": 1}], "pad": "' + b" " * (1 << 21) + b'"}')
        worker.send("single", b'{"x": "' + b" " * (1 << 21) + b'"}')
        await worker.settled()
        assert {refused.situation for refused in worker.origin.refusals.values()} == {Situation.BAD_REQUEST}

    play(scenario, tmp_path / "noted", slice_s=math.inf, long_s=math.inf)


def test_what_runs_apart_is_counted(tmp_path: Path) -> None:
    """Rows, forwards and seconds of decode, forward and encode, as of batches on the step thread."""

    async def scenario(worker: Worker) -> None:
        worker.send("1", make_body(5))
        worker.send("single", b'{"x": [1, 2, 3]}')
        await worker.settled()
        assert orjson.loads(worker.origin.answers[2]) == {"predictions": [2, 4, 6]}
        assert worker.series("inference_batch_rows_sum") == 6
        assert worker.series("inference_batch_models_sum") == 2
        for part in ("forward", "encode"):
            assert worker.series("step_seconds_total", part=part) > 0, part

    play(scenario, tmp_path / "noted", slice_s=0.0, long_s=0.0)


def test_a_single_that_was_quick_runs_on_the_step_thread(tmp_path: Path) -> None:
    """Up to the numbers that were quick before; one that was slow loses half of that."""
    with closing(asyncio.new_event_loop()) as loop:
        long, model = LongJobs(loop, Pulse()), Session().model()
        nothing = cast("Any", None)
        batches = SingleBatches(nothing, nothing, nothing, long, quarantine=nothing, wake=nothing)
        calls = [model.codec.decode(orjson.dumps({"x": [0.0] * n}), "", "") for n in (100, 60, 40)]
        assert batches._is_long(model, calls[:1])
        batches._learn(model, calls[:1], 0.001)
        assert not batches._is_long(model, calls[:1])
        assert batches._is_long(model, calls[:2])
        batches._learn(model, calls[:1], 1.0)
        assert batches._is_long(model, calls[1:2])
        assert not batches._is_long(model, calls[2:])
        assert batches._is_long(replace(model, unbounded=True), calls[2:])
        long.close()


def test_a_single_that_overran_is_quarantined(tmp_path: Path) -> None:
    """Its requests are refused with the reason, at once from then on; it is unloaded."""

    async def scenario(worker: Worker) -> None:
        worker.send("single", b'{"x": [1]}')
        await worker.settled()
        assert "a run was ended after 1 s" in worker.steps.quarantine.reasons["single"]
        worker.send("single", b'{"x": [1]}')
        await worker.settled()
        assert "an operator can release it" in worker.origin.refusals[2].detail.message
        await let_loop_run(lambda: not worker.steps.describe())

    play(scenario, tmp_path / "noted", session=Session(overruns=True))


@pytest.mark.parametrize("times", [1, 2])
def test_a_long_run_that_is_out_of_memory_runs_once_more(tmp_path: Path, times: int) -> None:
    """As on the step thread: memory is freed first, and a second time is the device's fault, not the model's."""

    async def scenario(worker: Worker) -> None:
        worker.send("single", b'{"x": [1]}')
        await worker.settled()
        if times == 1:
            assert worker.origin.answers == {1: b'{"predictions":[2.0]}'}
        else:
            assert worker.origin.refusals[1].situation is Situation.NO_ROOM
            assert "the device is out of memory" in worker.origin.refusals[1].detail.message

    play(scenario, tmp_path / "noted", session=Session(short_runs=["full"] * times))


def test_a_load_that_is_out_of_memory_frees_some(tmp_path: Path) -> None:
    """A session takes its memory from the device while it is loaded: refused as no room, idle sessions leave."""
    session = Session()

    async def scenario(worker: Worker) -> None:
        worker.send("single/idle", b'{"x": [1]}')
        await worker.settled()
        assert [row["model"] for row in worker.steps.describe() if row["state"] == "ready"] == ["single/idle"]
        session.short_loads.append("full")
        worker.send("single/new", b'{"x": [1]}')
        await worker.settled()
        assert worker.origin.refusals[2].situation is Situation.NO_ROOM
        assert "single/new: the device is out of memory: full" in worker.origin.refusals[2].detail.message
        assert not [row for row in worker.steps.describe() if row["state"] == "ready"]

    play(scenario, tmp_path / "noted", session=session)


def test_the_models_of_a_batch_are_noted_as_far_as_there_is_room(tmp_path: Path) -> None:
    """The supervisor reads them while they run; a longer list is cut."""
    path, nothing = str(tmp_path / "run"), cast("Any", None)
    with closing(asyncio.new_event_loop()) as loop:
        long = LongJobs(loop, Pulse(path))
        batches, reader = RowBatches(nothing, nothing, nothing, nothing, long), PulseReader(path)
        batches._note_batch(["a.mar", "b.mar"])
        assert reader.running() == [RunningModel("a.mar", "batch"), RunningModel("b.mar", "batch")]
        batches._note_batch(f"{i:08}.mar" for i in range(BATCH_BYTES // 8))
        assert BATCH_BYTES // 16 < len(reader.running()) <= BATCH_BYTES // 12
        long.close()


def test_a_pace_follows_what_was_measured() -> None:
    """The estimate counts at first; slices grow as rows prove to be quick, up to a bound."""
    pace = Pace(Work(given=1, answered=1, flops=400_000_000), slice_s=0.03)
    assert pace.slice_rows == 1
    for _ in range(30):
        pace.ran(10, 10 * 0.001)
    assert 25 <= pace.slice_rows <= 30
    assert pace.seconds(100) == pytest.approx(0.1, rel=0.05)
    assert Pace(Work(given=1, answered=1), slice_s=math.inf).slice_rows > 10_000
