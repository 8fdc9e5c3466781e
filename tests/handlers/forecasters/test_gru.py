"""`gru`: the weights of any nn.GRU fit, all of the context is read, and no model's numbers reach another's answer."""

import numpy as np
import pytest
import torch
from torch import nn

from handlers.base import Family
from handlers.forecasters import build_family, random_tensors
from handlers.forecasters.batched_gru import CHUNK
from handlers.forecasters.network_config import MOST_NUMBERS, MOST_PRODUCTS
from model_store.errors import ArchiveInvalid

SMALL = {"features": 3, "prediction_length": 4, "quantiles": 2, "hidden": 5}
RECURRENT = ("gru", "seq2seq")  #: what is true of both


def rows_of(made: Family, count: int) -> torch.Tensor:
    """Rows [count, row_floats] of different models."""
    return torch.from_numpy(np.stack([made.row(random_tensors(made, seed)) for seed in range(count)]))


def test_default_size() -> None:
    """The number of parameters that the documentation states."""
    assert sum(np.prod(shape) for shape in build_family("gru", {}).parameters.values()) == 14_232


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("steps", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 7 * CHUNK])
def test_a_users_gru_fits_whatever_the_context(steps: int, layers: int) -> None:
    """An nn.GRU and a Linear of the user's own, saved under our names, answer the same, on both sides of a chunk."""
    made = build_family("gru", {**SMALL, "context_length": steps, "layers": layers})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(steps)
        gru, head, x = nn.GRU(3, 5, layers), nn.Linear(5, 8), torch.randn(2, 3, steps)
    state = {
        f"{part}.{name}": each for part, net in (("gru", gru), ("head", head)) for name, each in net.named_parameters()
    }
    row = torch.from_numpy(made.row({name: each.detach().numpy() for name, each in state.items()}))
    with torch.no_grad():
        _, last = gru(x.permute(2, 0, 1))
        answer = made.forward(made.bind(row.repeat(2, 1)), x)
        torch.testing.assert_close(answer, head(last[-1]).view(2, 4, 2), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", RECURRENT)
def test_poison_stays_in_its_row_and_its_forward(architecture: str) -> None:
    """NaN in one model's row or input changes no bit of its neighbours' answers, nor of the next answer there."""
    made = build_family(architecture, {**SMALL, "context_length": 2 * CHUNK + 5, "layers": 2})
    block = rows_of(made, 5)
    bound, x = made.bind(block), torch.ones(5, *made.input_shape)
    clean, kept = made.forward(bound, x), block.clone()
    block[1], x[3, 0, 0] = torch.nan, torch.nan
    poisoned = made.forward(bound, x)
    assert poisoned[[1, 3]].isnan().all(dim=(1, 2)).all()
    assert torch.equal(poisoned[[0, 2, 4]], clean[[0, 2, 4]])
    block.copy_(kept)
    assert torch.equal(made.forward(bound, torch.ones_like(x)), clean)


@pytest.mark.parametrize("architecture", RECURRENT)
def test_scratch_does_not_grow_with_the_context(architecture: str) -> None:
    """A context of 10,000 steps binds no more memory than one of some chunks."""

    def bind_scratch(steps: int) -> int:
        made = build_family(architecture, {**SMALL, "context_length": steps})
        block = rows_of(made, 1)
        memory = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in made.bind(block)}
        return sum(memory.values()) - block.untyped_storage().nbytes()

    assert bind_scratch(10_000) <= bind_scratch(8 * CHUNK)


@pytest.mark.parametrize("architecture", RECURRENT)
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hidden": 513}, r"\$.hidden"),
        ({"layers": 5}, r"\$.layers"),
        ({"hidden": 512, "layers": 4, "context_length": 5000}, f"multiplications, {MOST_PRODUCTS} are allowed"),
        ({"features": 1024, "context_length": 1025}, f"features x context_length is 1049600, {MOST_NUMBERS} are"),
        ({"context_length": 2000, "prediction_length": 2000, "quantiles": 1000}, "prediction_length x quantiles is"),
    ],
)
def test_a_config_that_would_hold_up_a_worker_is_refused(architecture: str, config: dict[str, int], said: str) -> None:
    """Each field within its bounds is not enough: time, input and answer of a forecast have limits, named with why."""
    with pytest.raises(ArchiveInvalid, match=said):
        build_family(architecture, config)


@pytest.mark.parametrize("architecture", RECURRENT)
def test_biases_that_overflow_when_folded_are_refused(architecture: str) -> None:
    """Two finite biases whose sum is not finite never become a row."""
    made = build_family(architecture, {**SMALL, "context_length": 6})
    tensors = random_tensors(made, 0)
    tensors |= {name: np.full_like(each, 3e38) for name, each in tensors.items() if name.endswith(("ih_l0", "hh_l0"))}
    with pytest.raises(ArchiveInvalid, match="not finite: the folded biases overflow float32"):
        made.row(tensors)
