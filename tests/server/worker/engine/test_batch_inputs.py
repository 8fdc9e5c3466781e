"""The inputs of a batch: in order and whole wherever they lie, and written once where the device copies them from."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from handlers.base import Float32
from handlers.codecs.codec import NPY, FamilyCodec
from handlers.codecs.tensors import write_npy
from handlers.forecasters import build_family, random_tensors
from server.worker.engine.accelerator import DeviceEngine, DevicePool
from server.worker.engine.batch_inputs import ALIGNED_BYTES, LaneInputs, ListedInputs, allocate_rows
from tests.server.fake_device import FakeDevice
from tests.server.worker.engine.test_cpu import TCN, answer_plainly

FAMILY = build_family("tcn", {**TCN, "context_length": 20, "kernel": 3, "layers": 2})
CODEC = FamilyCodec(FAMILY)
SIZE = FAMILY.row_floats * 4
MODELS = 3
X = np.random.default_rng(0).standard_normal((40, *FAMILY.input_shape), dtype=np.float32)


def make_engine(device: FakeDevice, max_rows: int = 8) -> DeviceEngine:
    """With three models, and the family's staging."""
    made = DeviceEngine(DevicePool(MODELS * SIZE, device), max_rows)
    for model in range(MODELS):
        made.pool.write(model * SIZE, FAMILY.row(random_tensors(FAMILY, model)))
    made.run(FAMILY, [0], [X[:1]])
    return made


def decode(inputs: LaneInputs, row: Float32) -> Float32:
    """A request's row as a step decodes it."""
    return CODEC.decode(write_npy(row), NPY, NPY, inputs.place).rows


def check(answers: object, models: list[int], parts: list[Float32]) -> None:
    """Each answer is its model's own."""
    assert isinstance(answers, np.ndarray | list)
    for answer, model, x in zip(answers, models, parts, strict=True):
        np.testing.assert_allclose(answer, answer_plainly(FAMILY, model, x), rtol=1e-4, atol=1e-5)


def test_a_request_is_decoded_to_where_the_device_copies_it_from() -> None:
    """Into page-locked memory, its steps that are read alone; the forward copies no inputs of its own."""
    device = FakeDevice()
    made = make_engine(device)
    inputs = made.open_batch(FAMILY)
    for row in X[:5]:
        rows = decode(inputs, row)
        assert rows.shape == (1, 3, 9)
        assert device.page_locked.get_serial(torch.from_numpy(rows.base)) is not None
        inputs.keep(rows)
    assert repr(inputs) == "<LaneInputs of 5 requests, rows in lanes: [5]>"
    models = [i % MODELS for i in range(5)]
    check(made.run(FAMILY, [model * SIZE for model in models], inputs), models, list(X[:5, None]))
    staging = made._staging[FAMILY.key]
    assert staging.x.shape == (8, 3, 9)
    assert np.array_equal(staging.lanes[0].inputs[:5], X[:5, :, -9:])


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 8, 9, 16, 17, 40])
def test_a_batch_of_any_size_is_answered_row_by_row(count: int) -> None:
    """In one lane, in both, and in arrays where even these are too few."""
    made = make_engine(FakeDevice())
    inputs = made.open_batch(FAMILY)
    for row in X[:count]:
        inputs.keep(decode(inputs, row))
    assert inputs.is_staged == (count <= 16)
    models = [i * i % MODELS for i in range(count)]
    check(made.run(FAMILY, [model * SIZE for model in models], inputs), models, list(X[:count, None]))


def test_a_request_that_does_not_run_leaves_no_trace() -> None:
    """Refused, it is written over; run apart, it has memory of its own, that of a lane or not."""
    made = make_engine(FakeDevice())
    inputs = made.open_batch(FAMILY)
    decode(inputs, X[0])  # refused: wrong further on
    inputs.keep(decode(inputs, X[1]))
    apart = inputs.detach(decode(inputs, X[2]))
    assert not np.shares_memory(apart, made._staging[FAMILY.key].lanes[0].inputs)
    large = inputs.place(9)  # of 8 in a lane
    large[...] = X[3:12, :, -9:]
    assert inputs.detach(large) is large
    inputs.keep(decode(inputs, X[12]))
    inputs.keep(apart)  # of a batch before, say
    large[...] = 0
    check(made.run(FAMILY, [0, SIZE, 0], inputs), [0, 1, 0], [X[1:2], X[12:13], X[2:3]])


@pytest.mark.parametrize("count", [5, 20])
def test_a_batch_that_ran_out_of_memory_can_run_again(count: int) -> None:
    """Its inputs outlive the staging, which is freed: page-locked memory is not there twice."""
    device = FakeDevice()
    made = make_engine(device)
    inputs = made.open_batch(FAMILY)
    for row in X[:count]:
        inputs.keep(decode(inputs, row))
    before = device.page_locked.used_bytes
    device.short_of_memory = 1
    offsets, models = [SIZE] * count, [1] * count
    with pytest.raises(torch.OutOfMemoryError):
        made.run(FAMILY, offsets, inputs)
    made.trim()
    assert device.page_locked.used_bytes == 0
    check(made.run(FAMILY, offsets, inputs), models, list(X[:count, None]))
    assert device.page_locked.used_bytes <= before


@pytest.mark.slow
@settings(max_examples=400)
@example(capacity=2, lanes=2, requests=[(1, "kept"), (2, "block"), (1, "kept")], leaves=False)
@example(capacity=1, lanes=1, requests=[(2, "apart"), (1, "apart"), (1, "kept")], leaves=False)
@given(
    capacity=st.integers(1, 6),
    lanes=st.integers(0, 2),
    requests=st.lists(
        st.tuples(st.integers(1, 8), st.sampled_from(["kept", "refused", "apart", "from elsewhere", "block"]))
    ),
    leaves=st.booleans(),
)
def test_rows_stay_in_order_and_whole(
    capacity: int, lanes: int, requests: list[tuple[int, str]], *, leaves: bool
) -> None:
    """Whatever is refused or run apart between them; what runs apart is nobody else's. Answers are cut alike."""
    memory = [np.zeros((capacity, 1, 2), np.float32) for _ in range(lanes)]
    inputs, kept, apart = LaneInputs((1, 2), memory), list[Float32](), list[tuple[Float32, Float32]]()
    for number, (rows, fate) in enumerate(requests):
        right = np.full((rows, 1, 2), number, np.float32)
        placed = inputs.place(rows)
        placed[...] = -1 if fate in ("from elsewhere", "block") else right
        if fate == "apart":
            apart.append((inputs.detach(placed), right))
        elif fate == "block":
            inputs.keep_block(right.copy())
            kept.append(right)
        elif fate != "refused":
            inputs.keep(placed if fate == "kept" else right.copy())
            kept.append(right)
    if leaves or not inputs.is_staged:
        inputs.leave_lanes()
        for lane in memory:
            lane[...] = -2
    forwards = [sum(map(len, pieces)) for pieces in inputs.cut(capacity)]
    found = [piece for pieces in inputs.cut(capacity) for piece in pieces]
    flat = np.concatenate([np.empty((0, 1, 2), np.float32), *kept])
    assert np.array_equal(np.concatenate([flat[:0], *found]), flat)
    assert all(rows == capacity for rows in forwards[:-1])
    assert inputs.rows == len(flat)
    for own, right in apart:
        assert np.array_equal(own, right)
    for answer, right in zip(inputs.split(flat), kept, strict=True):
        assert np.array_equal(answer, right)
    assert np.array_equal(inputs.repeat(np.arange(len(kept))), np.repeat(np.arange(len(kept)), [*map(len, kept)]))


@pytest.mark.parametrize("count", [5, 12, 24])
def test_a_block_is_cut_over_lanes_and_answered_as_one(count: int) -> None:
    """Rows of many models in one array, behind a request of its own: in one lane, in both, and beyond them."""
    made = make_engine(FakeDevice())
    inputs = made.open_batch(FAMILY)
    inputs.keep(decode(inputs, X[0]))
    block = allocate_rows(FAMILY.read_shape, count)
    block[...] = X[1 : count + 1, :, -9:]
    inputs.keep_block(block)
    assert inputs.is_staged == (count < 16)
    models = [i * i % MODELS for i in range(count + 1)]
    first, others = made.run(FAMILY, [model * SIZE for model in models], inputs)
    check([first, *others[:, None]], models, list(X[: count + 1, None]))


@pytest.mark.parametrize("shape", [(3, 9), (1, 1), (5, 7)])
def test_memory_for_rows_begins_where_torch_would_begin(shape: tuple[int, ...]) -> None:
    """Whatever lies before it."""
    kept = [allocate_rows(shape, count) for count in range(1, 20)]
    assert [rows.ctypes.data % ALIGNED_BYTES for rows in kept] == [0] * len(kept)
    assert [rows.shape for rows in kept] == [(count, *shape) for count in range(1, 20)]
    assert torch.empty(100).data_ptr() % ALIGNED_BYTES == 0


def test_on_the_cpu_inputs_are_a_list_of_arrays() -> None:
    """Its forwards gather them in pieces that stay in cache."""
    inputs = ListedInputs()
    for part in (X[:2], X[2:3]):
        inputs.keep(inputs.detach(part))
    assert (inputs.rows, inputs.place) == (3, None)
    assert inputs[0].base is X
    assert repr(inputs) == "<ListedInputs of 2 requests>"
