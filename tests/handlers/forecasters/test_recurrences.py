"""`esrnn`, `recursive` and the `mq` decoder: what each reads, smooths and feeds back, by hand."""

import numpy as np
import pytest
import torch

from handlers.base import Family
from handlers.forecasters import build_family, random_tensors
from model_store.errors import ArchiveInvalid

SIZES = {
    "deepar": 8_450, "deepstate": 4_068, "esrnn": 14_234, "lear": 72_120, "mqcnn": 49_003, "mqrnn": 47_483,
    "recursive": 17_093,
}  # fmt: skip


def answer(family: Family, tensors: dict[str, np.ndarray], x: torch.Tensor) -> torch.Tensor:
    """One model's, by the batched form."""
    return family.forward(family.bind(torch.from_numpy(family.row(tensors))[None]), x)


def draw_silent(family: Family, *loud: str) -> dict[str, np.ndarray]:
    """Random tensors, all zero but those whose names begin so."""
    tensors = random_tensors(family, 3)
    return {name: each if name.startswith(loud) else np.zeros_like(each) for name, each in tensors.items()}


@pytest.mark.parametrize("architecture", SIZES)
def test_default_size(architecture: str) -> None:
    """The number of parameters that the documentation states."""
    assert sum(np.prod(shape) for shape in build_family(architecture, {}).parameters.values()) == SIZES[architecture]


def test_smoothing_by_hand() -> None:
    """Two seasons of two steps and rates of a half and a quarter, with a network that says nothing.

    Begun with level 3 and seasons -1, 1: t=0: level 3 + (5 + 1 - 3) / 2 = 4.5, season -1 + (5 - 4.5 + 1) / 4 = -0.625;
    t=1: level 4.5 + (8 - 1 - 4.5) / 2 = 5.75, season 1 + (8 - 5.75 - 1) / 4 = 1.3125. In the first season itself the
    steady values are 3, so that nothing changes.
    """
    family = build_family(
        "esrnn", {"features": 1, "context_length": 5, "season": 2, "prediction_length": 3, "quantiles": 1}
    )
    tensors = draw_silent(family) | {
        "season_rate": np.log(np.array([1 / 3], np.float32))
    }  # a sigmoid of 1/4; that of zero is 1/2
    found = answer(family, tensors, torch.tensor([[[99.0, 2.0, 4.0, 5.0, 8.0]]]))
    torch.testing.assert_close(found.flatten(), torch.tensor([5.125, 7.0625, 5.125]))


@pytest.mark.parametrize("rate", [-30.0, 0.3, 30.0])
def test_smoothing_holds_at_extreme_rates(rate: float) -> None:
    """Rates of nearly nought and one, also for a long season: finite, and the reference's answer."""
    family = build_family("esrnn", {"features": 2, "context_length": 130, "season": 60, "hidden": 4})
    tensors = random_tensors(family, 0) | {
        "level_rate": np.array([rate], np.float32),
        "season_rate": np.array([-rate], np.float32),
    }
    network = family.reference()
    network.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    x = torch.randn((3, 2, 130), generator=torch.Generator().manual_seed(0))
    block = torch.from_numpy(family.row(tensors)).repeat(3, 1)
    with torch.no_grad():
        torch.testing.assert_close(family.forward(family.bind(block), x), network(x), atol=1e-5, rtol=1e-4)


def test_the_middle_quantile_is_fed_back() -> None:
    """A decoder that hears only its own last answer: another head's middle level changes later steps, an outer none."""
    family = build_family("recursive", {"features": 2, "context_length": 9, "prediction_length": 4, "quantiles": 3})
    tensors, x = draw_silent(family, "decoder", "head"), torch.zeros(1, 2, 9)
    before = answer(family, tensors, x)
    for level, changed in ((0, False), (1, True), (2, False)):
        bias = tensors["head.bias"].copy()
        bias[level] += 1
        found = answer(family, tensors | {"head.bias": bias}, x)
        others = [other for other in range(3) if other != level]
        assert bool((found[..., others] != before[..., others]).any()) == changed
        assert torch.equal(found[:, 0, others], before[:, 0, others])  # the first step hears the context's last value


@pytest.mark.parametrize("architecture", ["mqcnn", "mqrnn"])
def test_a_covariate_of_a_step_reaches_it_by_the_local_network(architecture: str) -> None:
    """With a global layer that says nothing, a number changes the answer of the step it is known of, and no other."""
    family = build_family(architecture, {"features": 2, "context_length": 9, "prediction_length": 4, "quantiles": 2})
    tensors = draw_silent(family, "local", "head")
    x = torch.zeros(1, 2, 9)
    before = answer(family, tensors, x)
    for column in range(9):
        moved = x.clone()
        moved[0, 1, column] = 5
        changed = (answer(family, tensors, moved) != before)[0].any(1).tolist()
        assert changed == [column - 5 == step for step in range(4)]


@pytest.mark.parametrize("architecture", ["mqcnn", "mqrnn"])
def test_the_past_reaches_every_step_by_the_contexts(architecture: str) -> None:
    """The target's last value, five columns from which no step is known, changes all steps' answers."""
    family = build_family(architecture, {"features": 2, "context_length": 9, "prediction_length": 4})
    tensors, x = random_tensors(family, 0), torch.zeros(1, 2, 9)
    tensors = {name: abs(each) for name, each in tensors.items()}  # no unit is at rest
    moved = x.clone()
    moved[0, 0, 4] = 5
    assert (answer(family, tensors, moved) != answer(family, tensors, x))[0].any(1).all()


@pytest.mark.parametrize(
    ("architecture", "config", "said"),
    [
        ("mqcnn", {"context_length": 20}, "prediction_length 24 is above context_length 20, whose last columns"),
        ("mqrnn", {"context_length": 20}, "prediction_length 24 is above context_length 20, whose last columns"),
        ("recursive", {"context_length": 20}, "prediction_length 24 is above context_length 20, whose last columns"),
        ("deepar", {"context_length": 24}, "prediction_length 24 is not below context_length 24, whose last columns"),
        ("deepstate", {"context_length": 24}, "prediction_length 24 is not below context_length 24"),
        ("mqcnn", {"context_length": 2000, "prediction_length": 2000}, "the global layer has .* 67108864 are allowed"),
        ("deepar", {"hidden": 512, "paths": 1000}, "multiplications, 2147483648 are allowed"),
        ("deepstate", {"paths": 10_000, "prediction_length": 160}, "prediction_length x paths is 1600000"),
        ("deepar", {"features": 1}, r"\$.features"),
    ],
)
def test_a_config_that_cannot_be_is_refused(architecture: str, config: dict[str, int], said: str) -> None:
    """The message names the fields that do not go together, or the limit."""
    with pytest.raises(ArchiveInvalid, match=said):
        build_family(architecture, config)
