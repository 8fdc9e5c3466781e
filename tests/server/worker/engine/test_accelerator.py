"""The accelerator's pool and engine on a fake device that does everything as late and as disorderly as it may."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.base import Family, Float32
from handlers.forecasters import build_family, random_tensors
from server.worker.engine.accelerator import DeviceEngine, DevicePool
from server.worker.engine.graph_choice import EAGER_RUNS, MAX_GRAPHS
from server.worker.engine.staging import DeviceStaging, StagingMemory, count_floats
from server.worker.engine.work_memory import measure_work
from tests.server.fake_device import FakeDevice
from tests.server.worker.engine.learning import learn_all
from tests.server.worker.engine.test_cpu import CONFIGS, answer_plainly

TCN = build_family("tcn", CONFIGS["tcn"])
SIZE = TCN.row_floats * 4
ROWS = {model: TCN.row(random_tensors(TCN, model)) for model in range(6)}
X = np.random.default_rng(0).standard_normal((8, 1, *TCN.input_shape), dtype=np.float32)
RIGHT = {model: [answer_plainly(TCN, model, x) for x in X] for model in ROWS}


def make_engine(device: FakeDevice, rows: int = 8, max_rows: int = 16) -> DeviceEngine:
    """An engine with a pool of so many `TCN` rows."""
    return DeviceEngine(DevicePool(rows * SIZE, device), max_rows)


def draw_inputs(family: Family, count: int, seed: int = 0) -> Float32:
    """Rows of input."""
    return np.random.default_rng(seed).standard_normal((count, *family.input_shape), dtype=np.float32)


def check(found: Sequence[Float32], models: Sequence[int], parts: Sequence[Float32]) -> None:
    """Answers are the single models'."""
    for answer, model, x in zip(found, models, parts, strict=True):
        np.testing.assert_allclose(answer, answer_plainly(TCN, model, x), rtol=1e-4, atol=1e-5)


class RandomRows:
    """Rows that come, go and move at random, what should be where, and steps that check it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        device = FakeDevice(seed)
        self.engine = make_engine(device)
        self.models: dict[int, int] = {}  # by row
        self.shelf = [device.host(TCN.row_floats) for _ in range(3)]
        self.shelved: dict[int, int] = {}

    def act(self) -> None:
        """Tell the pool one thing; seldom a step, which waits for what the others leave open."""
        place = self.random.randrange(8)
        if place in self.models and self.random.random() < 0.5:
            target = self.random.choice([row for row in range(8) if row != place])
            self.engine.pool.move(place * SIZE, target * SIZE, SIZE)
            self.models[target] = self.models.pop(place)
        elif place in self.models:
            kept = self.random.randrange(3)
            self.engine.pool.keep(place * SIZE, self.shelf[kept])
            self.shelved[kept] = self.models.pop(place)
        elif self.shelved and self.random.random() < 0.5:
            kept = self.random.choice(list(self.shelved))
            self.engine.pool.write(place * SIZE, self.shelf[kept].numpy())
            self.models[place] = self.shelved[kept]
        else:
            self.models[place] = self.random.randrange(6)
            self.engine.pool.write(place * SIZE, ROWS[self.models[place]].copy())

    def step(self) -> None:
        """A forward of more rows than fit in one, over everything that is here."""
        places = sorted(self.models) + self.random.choices(sorted(self.models), k=30)
        found = self.engine.run(TCN, [place * SIZE for place in places], [X[place] for place in places])
        right = [RIGHT[self.models[place]][place] for place in places]
        np.testing.assert_allclose(np.stack(found), right, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_no_order_that_the_streams_allow_is_seen(seed: int) -> None:
    """Rows written, moved, kept on the host, written back and run: whatever order the device then takes, every step
    sees the rows that were told before it, and nothing else. (Fails without any one of the pool's `after`.)
    """
    fleet = RandomRows(seed)
    for _ in range(12):
        while fleet.random.random() < 0.85 or not fleet.models:
            fleet.act()
        fleet.step()


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**16),
    architecture=st.sampled_from(sorted(CONFIGS)),
    models=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=20),
)
def test_every_architecture_in_any_batch_equals_the_single_models(
    seed: int, architecture: str, models: list[tuple[int, int]]
) -> None:
    """Requests of one or many rows, over the cuts of a forward, four times over, so that graphs run too."""
    family = build_family(architecture, CONFIGS[architecture])
    device = FakeDevice(seed)
    made = DeviceEngine(DevicePool(4 * family.row_floats * 4, device), 16)
    for model in range(4):
        made.pool.write(model * family.row_floats * 4, family.row(random_tensors(family, model)))
    for turn in range(EAGER_RUNS + 1):
        if turn == EAGER_RUNS:
            learn_all(made)
        parts = [draw_inputs(family, rows, seed + turn) for _, rows in models]
        answers = made.run(family, [model * family.row_floats * 4 for model, _ in models], parts)
        for (model, _), x, answer in zip(models, parts, answers, strict=True):
            np.testing.assert_allclose(answer, answer_plainly(family, model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_step_waits_for_its_rows() -> None:
    """The same pool told without the waiting gives poison on some order: the fake does find what it is for."""
    seen = set()
    for seed in range(20):
        made = make_engine(FakeDevice(seed))
        made.pool.write(0, ROWS[0])
        made.pool.copied = None
        seen.add(bool(np.isnan(made.run(TCN, [0], [draw_inputs(TCN, 1)])[0]).any()))
    assert seen == {True, False}


def test_a_row_is_freed_only_when_its_step_is_over() -> None:
    """What `run` launched has happened when it returns and when it raises: the next write may take the rows' place."""
    device = FakeDevice()
    made = make_engine(device)
    made.pool.write(0, ROWS[0])
    made.run(TCN, [0], [draw_inputs(TCN, 1)])
    assert not device.told["compute"]
    with pytest.raises(ValueError, match="could not broadcast"):  # the second forward cannot be filled
        made.run(TCN, [0] * 17, [*[draw_inputs(TCN, 1)] * 16, np.zeros((1, 2, 2), np.float32)])
    assert not device.told["compute"]
    check(made.run(TCN, [0], [draw_inputs(TCN, 1)]), [0], [draw_inputs(TCN, 1)])


def test_graphs_after_a_few_runs_and_padded_with_a_real_row() -> None:
    """What ran three times is captured in idle time; one graph serves all counts of a bucket, and no answer knows of
    the padding.
    """
    device = FakeDevice()
    made = make_engine(device)
    for model in range(3):
        made.pool.write(model * SIZE, ROWS[model])
    for turn, rows in enumerate([3, 4, 3, 4, 3]):
        assert learn_all(made) == (2 if turn == EAGER_RUNS else 0)  # it is watched, then captured
        models = [i % 3 for i in range(rows)]
        parts = [draw_inputs(TCN, 1, turn + i) for i in range(rows)]
        check(made.run(TCN, [model * SIZE for model in models], parts), models, parts)
    assert (device.captures, device.replays) == (1, 2)
    assert repr(made) == "<DeviceEngine <DevicePool 0.0 MB on cpu>, 1 families, 1 graphs>"


def test_graphs_see_staging_alone() -> None:
    """A graph replays after every row has moved."""
    device = FakeDevice()
    made = make_engine(device)
    made.pool.write(0, ROWS[1])
    for _ in range(EAGER_RUNS):
        made.run(TCN, [0], [draw_inputs(TCN, 1)])
    learn_all(made)
    made.pool.move(0, 5 * SIZE, SIZE)
    made.pool.write(0, ROWS[2])
    found = made.run(TCN, [5 * SIZE], [draw_inputs(TCN, 1)])
    check([*found, *made.run(TCN, [0], [draw_inputs(TCN, 1)])], [1, 2], [draw_inputs(TCN, 1)] * 2)
    assert device.replays == 2


def make_families(count: int) -> list[Family]:
    """So many small ones."""
    config = {"features": 1, "context_length": 3, "prediction_length": 1, "quantiles": 1}
    return [build_family("mlp", {**config, "hidden": 1 + i}) for i in range(count)]


@pytest.mark.slow
def test_families_that_take_turns_are_captured_once() -> None:
    """Seventy of them, six more than there are graphs: sixty-four replay from their first graph on, six run eagerly,
    and no capture follows. (An LRU would capture each at every turn.)
    """
    device, many = FakeDevice(), make_families(MAX_GRAPHS + 6)
    made = DeviceEngine(DevicePool(max(family.row_floats for family in many) * 4, device), 2)
    made.pool.write(0, np.zeros(made.pool.floats.numel(), np.float32))
    captures = list[int]()
    for _ in range(EAGER_RUNS + 6):
        for family in many:
            made.run(family, [0], [draw_inputs(family, 1)])
            made.learn()
        captures.append(device.captures)
    assert captures[-1] == captures[-3] == MAX_GRAPHS == len(made.graphs)
    replays = device.replays
    for family in many:
        made.run(family, [0], [draw_inputs(family, 1)])
    assert device.replays - replays == MAX_GRAPHS


def test_what_runs_more_often_takes_the_place_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the one that runs least; and what was captured once has its memory back when it has gone."""
    monkeypatch.setattr("server.worker.engine.graph_choice.MAX_GRAPHS", 2)
    device, many = FakeDevice(), make_families(3)
    made = DeviceEngine(DevicePool(max(family.row_floats for family in many) * 4, device), 2)
    made.pool.write(0, np.zeros(made.pool.floats.numel(), np.float32))

    def run(family: Family, times: int) -> None:
        for _ in range(times):
            made.run(family, [0], [draw_inputs(family, 1)])
        learn_all(made)

    for family, times in zip(many, (4, 3, 8), strict=True):
        run(family, times)
    assert [made.graphs.captured(family.key) for family in many] == [{1}, {1}, set()]
    run(many[2], 1)  # nine are twice three, and three more
    assert [made.graphs.captured(family.key) for family in many] == [{1}, set(), {1}]
    assert device.captures == 3


def test_what_cannot_be_captured_runs_eagerly_for_good() -> None:
    """It is tried once."""
    device = FakeDevice(uncapturable=True)
    plain = make_engine(device)
    plain.pool.write(0, ROWS[0])
    for _ in range(3):
        for _ in range(EAGER_RUNS):
            check(plain.run(TCN, [0], [draw_inputs(TCN, 1)]), [0], [draw_inputs(TCN, 1)])
        learn_all(plain)
    assert (device.captures, device.replays) == (1, 0)


def test_no_request_waits_for_a_capture() -> None:
    """However often a forward runs, it is captured in idle time alone, and a piece of that is one thing."""
    device = FakeDevice()
    made = make_engine(device)
    made.pool.write(0, ROWS[0])
    for _ in range(3 * EAGER_RUNS):
        for rows in (1, 2):
            made.run(TCN, [0] * rows, [draw_inputs(TCN, 1)] * rows)
    assert (device.captures, device.replays) == (0, 0)
    captures = []
    while made.learn():
        captures.append(device.captures)
    assert captures == [0, 0, 1, 2]  # two are watched, two are captured


def test_idle_time_leaves_no_trace_in_answers() -> None:
    """What is watched and warmed writes over staging between two runs."""
    device = FakeDevice(1)
    made = make_engine(device)
    made.expect(make_families(1)[0])
    for model in range(3):
        made.pool.write(model * SIZE, ROWS[model])
    for turn in range(EAGER_RUNS + 3):
        batch = made.open_batch(TCN)
        for model in range(3):
            batch.keep(draw_inputs(TCN, 1, turn + model))
        parts = [draw_inputs(TCN, 1, turn + model) for model in range(3)]
        check(made.run(TCN, [0, SIZE, 2 * SIZE], batch), [0, 1, 2], parts)
        made.learn()
    assert device.replays == 2


def test_a_family_is_warm_before_its_first_request() -> None:
    """A model of it was loaded, on whose thread its memory was measured: one piece of idle time runs it on zeros, alone
    and in a batch, and keeps no scratch. A family that has run is warm.
    """
    device, warmed = FakeDevice(), list[int]()
    made = make_engine(device, max_rows=128)
    made.pool.write(0, ROWS[0])
    family = Counted(make_families(1)[0], warmed)
    made.measure(family)  # type: ignore[arg-type]
    warmed.clear()
    for _ in range(2):
        made.expect(family)  # type: ignore[arg-type]
    assert learn_all(made) == 1
    assert warmed == [1, 64]
    assert made._staging[family.key].bindings == 0
    made.run(TCN, [0], [draw_inputs(TCN, 1)])
    made.expect(TCN)
    assert learn_all(made) == 0


class Counted:
    """A family that notes the rows of its forwards."""

    def __init__(self, family: Family, seen: list[int]) -> None:
        self._family, self._seen = family, seen
        self.key = f"counted-{family.key}"

    def __getattr__(self, name: str) -> object:
        return getattr(self._family, name)

    def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """The family's. (Its memory is measured by one more.)"""
        assert not x.any()
        self._seen.append(len(x))
        return self._family.forward(weights, x)


@pytest.mark.slow
@pytest.mark.parametrize("failures", range(1, 6))
def test_idle_time_short_of_memory_is_no_error(failures: int) -> None:
    """Wherever it is short: what was to be learnt is left, later runs bring it back, and answers stay right."""
    device = FakeDevice()
    made = make_engine(device)
    made.pool.write(0, ROWS[0])
    for _ in range(EAGER_RUNS):
        made.run(TCN, [0], [draw_inputs(TCN, 1)])
    made.expect(make_families(1)[0])
    device.short_of_memory = failures
    learn_all(made)
    device.short_of_memory = 0
    for _ in range(EAGER_RUNS + 1):
        check(made.run(TCN, [0], [draw_inputs(TCN, 1)]), [0], [draw_inputs(TCN, 1)])
        learn_all(made)
    assert len(made.graphs) == 1


def test_a_device_that_is_lost_in_idle_time_is_told() -> None:
    """The step loop ends the process; any other error is the family's, which runs eagerly."""
    device = FakeDevice()
    made = make_engine(device)
    made.pool.write(0, ROWS[0])
    for _ in range(EAGER_RUNS):
        made.run(TCN, [0], [draw_inputs(TCN, 1)])
    device.break_context()
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        made.learn()


def test_bf16_is_close_and_nothing_else() -> None:
    """bfloat16 forwards answer float32 numbers within 3 %, eager and as graphs, and probes alike; float32 is exact."""
    made = DeviceEngine(DevicePool(8 * SIZE, FakeDevice()), 16, bf16=True)
    made.pool.write(0, ROWS[0])
    x = draw_inputs(TCN, 5)
    right = answer_plainly(TCN, 0, x)
    answers = [made.run(TCN, [0], [x])[0] for _ in range(EAGER_RUNS)]
    learn_all(made)
    answers += [made.run(TCN, [0], [x])[0], made.probe(TCN, ROWS[0], x)]
    assert len(made.graphs) == 1
    for answer in answers:
        assert answer.dtype == np.float32
        np.testing.assert_allclose(answer, right, atol=0.03 * np.abs(right).max())
        assert not np.allclose(answer, right, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["deepar", "deepstate"])
def test_bf16_draws_the_paths_of_the_seed(architecture: str) -> None:
    """Two seeds that bfloat16 cannot tell apart give two sets of paths, each close to float32's: a golden sample holds
    within the roundings of the network.
    """
    family = build_family(architecture, {"context_length": 30, "prediction_length": 6, "paths": 20})
    row, x = family.row(random_tensors(family, 0)), draw_inputs(family, 2)
    x[:, -1] = 0
    x[:, -1, :2] = [[1_000_001, 7], [1_000_999, 7]]
    right = answer_plainly(family, 0, x)
    made = DeviceEngine(DevicePool(row.nbytes, FakeDevice()), 16, bf16=True)
    made.pool.write(0, row)
    answers = [made.run(family, [0], [x])[0] for _ in range(EAGER_RUNS)]
    learn_all(made)
    for answer in [*answers, made.run(family, [0], [x])[0], made.probe(family, row, x)]:
        np.testing.assert_allclose(answer, right, atol=0.03 * np.abs(right).max())
        assert np.abs(answer[0] - answer[1]).max() > 0.3 * np.abs(right).max()


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_step_short_of_memory_can_be_run_again(failures: int) -> None:
    """Wherever the allocation fails, the engine is whole after `trim`: nothing in flight, the same answers."""
    device = FakeDevice()
    made = make_engine(device)
    made.pool.write(0, ROWS[0])
    device.short_of_memory = failures
    for _ in range(failures):
        with pytest.raises(torch.OutOfMemoryError):
            made.run(TCN, [0], [draw_inputs(TCN, 1)])
        made.trim()
    check(made.run(TCN, [0], [draw_inputs(TCN, 1)]), [0], [draw_inputs(TCN, 1)])
    assert device.trims == failures


def test_probe_and_read_are_whole() -> None:
    """A golden sample's run and a test's look at a row wait for what they need."""
    device = FakeDevice(3)
    made = make_engine(device)
    made.pool.write(SIZE, ROWS[4])
    made.pool.move(SIZE, 3 * SIZE, SIZE)
    assert np.array_equal(made.pool.read(3 * SIZE, SIZE), ROWS[4])
    check([made.probe(TCN, ROWS[2], draw_inputs(TCN, 3))], [2], [draw_inputs(TCN, 3)])


def test_staging_is_capped() -> None:
    """Buckets are powers of two up to the capacity, which bytes bound as well as rows."""
    device, work = FakeDevice(), measure_work(TCN, bf16=False)
    memory = StagingMemory(12, device)
    memory.grow(*count_floats(TCN, 12))
    staging = DeviceStaging(TCN, memory, work, device, bf16=False)
    assert [staging.bucket_size(rows) for rows in (1, 2, 3, 5, 9, 12)] == [1, 2, 4, 8, 12, 12]
    assert repr(staging) == f"<DeviceStaging {TCN.key}, 12 rows>"
    assert repr(staging.lanes[0]) == "<StagingLane of 12 rows, idle>"
