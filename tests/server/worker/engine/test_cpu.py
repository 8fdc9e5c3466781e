"""The pool and the engine: rows written, moved, gathered and run give what the single models give."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.base import Family, Float32
from handlers.forecasters import build_family, random_tensors
from server.worker.engine.batch_inputs import allocate_rows
from server.worker.engine.cpu import Engine
from server.worker.engine.memory_pool import Pool

TCN = {"features": 3, "context_length": 12, "prediction_length": 4, "quantiles": 3, "channels": 8}
MLP = {name: size for name, size in TCN.items() if name != "channels"}
CONFIGS = {"tcn": TCN, "mlp": MLP, "gru": MLP | {"hidden": 9, "layers": 2}, "seq2seq": MLP | {"hidden": 9}}
MODELS = 5
CPU = torch.device("cpu")


def answer_plainly(family: Family, seed: int, x: Float32) -> Float32:
    """What the plain network with these weights answers."""
    network = family.reference()
    network.load_state_dict({name: torch.from_numpy(value) for name, value in random_tensors(family, seed).items()})
    with torch.inference_mode():
        answer: Float32 = network(torch.from_numpy(x)).numpy()
    return answer


def make_filled(family: Family) -> tuple[Engine, list[int]]:
    """An engine whose pool is NaN but for the rows of `MODELS` models at odd places."""
    size = family.row_floats * 4
    pool = Pool(MODELS * (size + 128) + 4 * size, CPU)
    pool.floats.fill_(float("nan"))
    offsets = [64 * (i + 1) + i * size for i in range(MODELS)]
    for i, offset in enumerate(offsets):
        pool.write(offset, family.row(random_tensors(family, i)))
    return Engine(pool, 512), offsets


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(
    architecture=st.sampled_from(sorted(CONFIGS)),
    models=st.lists(st.tuples(st.integers(0, MODELS - 1), st.integers(1, 3)), min_size=1, max_size=150),
    seed=st.integers(0, 2**16),
)
def test_any_mix_and_repetition_equals_the_single_models(
    architecture: str, models: list[tuple[int, int]], seed: int
) -> None:
    """Requests of one or several rows, any models in any order, over the forward's cut: abs <= 1e-5 + 1e-4 |ref|."""
    family = build_family(architecture, CONFIGS[architecture])
    engine, offsets = make_filled(family)
    rng = np.random.default_rng(seed)
    parts = [rng.standard_normal((rows, *family.input_shape), dtype=np.float32) for _, rows in models]
    answers = engine.run(family, [offsets[model] for model, _ in models], parts)
    for (model, _), x, answer in zip(models, parts, answers, strict=True):
        np.testing.assert_allclose(answer, answer_plainly(family, model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
@pytest.mark.parametrize("shift", [0, 1])
def test_rows_of_many_models_may_come_in_one_array(architecture: str, shift: int) -> None:
    """Wherever that lies in memory, without the steps that are not read: to the bits of requests of their own."""
    config = CONFIGS[architecture] | {"context_length": 30} | ({"layers": 2} if architecture == "tcn" else {})
    family = build_family(architecture, config)
    engine, offsets = make_filled(family)
    rows = np.random.default_rng(1).standard_normal((150, *family.input_shape), dtype=np.float32)
    shared = [offsets[i * i % MODELS] for i in range(len(rows))]
    expected = np.concatenate(engine.run(family, shared, [rows[i : i + 1] for i in range(len(rows))]))
    read, steps = family.read_shape, family.read_shape[-1]
    block = allocate_rows((rows[..., -steps:].size + shift,), 1)[0, shift:].reshape(len(rows), *read)
    block[...] = rows[..., -steps:]
    (found,) = engine.run(family, shared, [block])
    assert np.array_equal(found, expected)
    parts = [rows[:1], block[1:130], rows[130:131], block[131:]]
    assert np.array_equal(np.concatenate(engine.run(family, shared, parts)), expected)


def test_rows_survive_moves_between_steps() -> None:
    """A model answers the same after its row has moved, and nothing of the poison around it leaks in."""
    family = build_family("tcn", TCN)
    engine, offsets = make_filled(family)
    x = np.ones((1, *family.input_shape), np.float32)
    before = engine.run(family, [offsets[2]], [x])[0].copy()
    target = offsets[-1] + 2 * family.row_floats * 4
    engine.pool.move(offsets[2], target, family.row_floats * 4)
    engine.pool.floats[offsets[2] // 4 : offsets[2] // 4 + family.row_floats] = float("nan")
    assert np.array_equal(engine.run(family, [target], [x])[0], before)


def test_answers_are_not_overwritten_by_the_next_step() -> None:
    """What a step returned stays what it was while the same staging serves the next one."""
    family = build_family("tcn", TCN)
    engine, offsets = make_filled(family)
    x = np.ones((1, *family.input_shape), np.float32)
    first = engine.run(family, [offsets[0]], [x])[0]
    kept = first.copy()
    engine.run(family, [offsets[1]], [2 * x])
    assert np.array_equal(first, kept)


def test_probe_needs_no_place_in_the_pool() -> None:
    """The golden sample's run leaves the pool as it was and equals the reference."""
    family = build_family("tcn", TCN)
    engine, _ = make_filled(family)
    before = engine.pool.floats.clone()
    x = np.ones((2, *family.input_shape), np.float32)
    answer = engine.probe(family, family.row(random_tensors(family, 9)), x)
    np.testing.assert_allclose(answer, answer_plainly(family, 9, x), rtol=1e-4, atol=1e-5)
    assert torch.equal(engine.pool.floats.nan_to_num(), before.nan_to_num())


def test_pool_reads_back_what_was_written() -> None:
    """Rows at neighbouring places do not touch each other."""
    pool = Pool(4096, CPU)
    pool.write(64, np.arange(16, dtype=np.float32))
    pool.write(128, np.arange(16, 32, dtype=np.float32))
    assert pool.read(64, 128).tolist() == list(range(32))
    assert repr(pool) == "<Pool 0.0 MB on cpu>"


def test_a_row_beyond_the_pool_is_an_error() -> None:
    """An offset outside the memory raises instead of reading somebody else's bytes."""
    with pytest.raises((IndexError, RuntimeError)):
        Pool(4096, CPU).gather([4096], torch.empty(1, 16))
