"""Mixtures: the answer is the weighted mean of the parts, each with its own channels; what cannot be is refused."""

from typing import Any

import numpy as np
import pytest
import torch

from handlers.forecasters import build_family, random_tensors
from handlers.forecasters.mixture import SHARES, Mixture, describe_mixture
from model_store.errors import ArchiveInvalid

SHAPE = {"features": 3, "context_length": 20, "prediction_length": 4, "quantiles": 3}
PARTS = [{"architecture": "lear", "inputs": [1, 0], "members": 2}, {"architecture": "mlp", "hidden": 5}]


def build_mixture(**config: Any) -> Mixture:
    """Two parts of two architectures, unless the config names others."""
    family = build_family("mixture", {**SHAPE, "parts": PARTS, **config})
    assert isinstance(family, Mixture)
    return family


def test_the_answer_is_the_weighted_mean_of_the_parts() -> None:
    """Of what each part alone answers to its channels, with a weight for every level; only ratios matter."""
    family = build_mixture()
    tensors = random_tensors(family, 0)
    tensors[SHARES] = np.array([[3, 1, 0], [1, 1, 5]], np.float32)
    x = torch.randn((6, 3, 20), generator=torch.Generator().manual_seed(0))
    alone = []
    for i, (part, places) in enumerate(zip(family.parts, family.places, strict=True)):
        row = torch.from_numpy(part.row(family.take_tensors(i, tensors)))[None].expand(6, -1)
        alone.append(part.forward(part.bind(row), x[:, list(places)]))
    weights = torch.tensor([[0.75, 0.5, 0], [0.25, 0.5, 1]])
    expected = alone[0] * weights[0] + alone[1] * weights[1]
    for scale in (1, 20):
        scaled = tensors | {SHARES: tensors[SHARES] * np.float32(scale)}
        rows = torch.from_numpy(np.stack([family.row(scaled)] * 6))
        torch.testing.assert_close(family.forward(family.bind(rows), x), expected, atol=1e-5, rtol=1e-4)


def test_a_linear_part_works_with_prices() -> None:
    """Its channels of prices are those of a scaler without a hyperbolic sine, and its answer is one of the others."""
    parts = [{**PARTS[0], "linear": [1]}, PARTS[1]]
    family, plain = build_mixture(parts=parts), build_mixture()
    tensors = random_tensors(family, 0)
    tensors[SHARES] = np.array([[1, 1, 1], [0, 0, 0]], np.float32)
    x = torch.randn((6, 3, 20), generator=torch.Generator().manual_seed(0))
    prices = x.clone()
    prices[:, 0] = x[:, 0].sinh()  # its inputs are the channels 1 and 0
    rows = torch.from_numpy(np.stack([family.row(tensors)] * 6))
    expected = plain.forward(plain.bind(rows), prices).asinh()
    torch.testing.assert_close(family.forward(family.bind(rows), x), expected, atol=1e-5, rtol=1e-4)
    x[0, 0] = 1e6  # of which no float32 has the hyperbolic sine
    assert family.forward(family.bind(rows), x).isfinite().all()


def test_equal_mixtures_are_one_family_and_others_are_not() -> None:
    """So that their models share a bank; the members of a part, its channels and its config tell families apart."""
    family = build_mixture()
    assert build_mixture() is family
    others = [
        build_mixture(parts=[{**PARTS[0], **change}, PARTS[1]])
        for change in ({"members": 3}, {"inputs": [0, 1]}, {"past_blocks": [0]}, {"linear": [0]})
    ]
    assert len({family.key, *(each.key for each in others)}) == 5


def test_the_memory_is_that_of_all_parts() -> None:
    """A row has the rows of the parts and the shares; nothing is shared or left out."""
    family = build_mixture()
    assert family.row_floats == 16 + sum(part.row_floats for part in family.parts)
    assert family.row(random_tensors(family, 0)).nbytes == 4 * family.row_floats


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([{"inputs": [0]}], "part 0 names no architecture"),
        ([{"architecture": "mixture"}], "part 0 is a mixture"),
        ([{"architecture": "deepar"}], "part 0: .*deepar"),
        ([{"architecture": "lstm"}], "part 0: unknown architecture 'lstm'"),
        ([{"architecture": "mlp", "inputs": [3]}], "part 0 reads channel 3, but there are 3"),
        ([{"architecture": "mlp", "inputs": [-1]}], "part 0 reads channel -1, but there are 3"),
        ([{"architecture": "mlp", "inputs": []}], "inputs of a part"),
        ([{"architecture": "mlp", "inputs": "all"}], "inputs of a part"),
        ([{"architecture": "mlp", "inputs": [2], "linear": [1]}], "part 0 reads its channel 1 as prices, but it has 1"),
        ([{"architecture": "mlp", "linear": [-1]}], "part 0 reads its channel -1 as prices, but it has 3"),
        ([{"architecture": "mlp", "linear": "all"}], "linear of a part"),
        ([{"architecture": "mlp", "width": 3}], "part 0: .*width"),
        ([{"architecture": "mlp", "members": 65}], "part 0: .*members"),
        ([], "parts"),
        ([{"architecture": "mlp"}] * 17, "parts"),
    ],
)
def test_what_cannot_be_a_part_is_refused(parts: list[Any], said: str) -> None:
    """With the number of the part, before anything is allocated."""
    with pytest.raises(ArchiveInvalid, match=said):
        build_mixture(parts=parts)


@pytest.mark.parametrize("shares", [[[1, 1, -0.1], [0, 0, 1]], [[0, 1, 1], [0, 1, 1]]])
def test_shares_that_are_no_weights_are_refused(shares: list[list[float]]) -> None:
    """Negative ones, and a level without any."""
    family = build_mixture()
    with pytest.raises(ArchiveInvalid, match="tensor 'shares' must have no negative number"):
        family.row(random_tensors(family, 0) | {SHARES: np.array(shares, np.float32)})


def test_the_description_has_the_weights() -> None:
    """In shares of one, by part and level; other families have none."""
    family = build_mixture()
    tensors = random_tensors(family, 0) | {SHARES: np.array([[3, 1, 1], [1, 1, 1]], np.float32)}
    first, second = describe_mixture(family, tensors)["mixture"]
    assert first == {"architecture": "lear", "members": 2, "weight": 0.5833, "weights": [0.75, 0.5, 0.5]}
    assert (second["architecture"], second["members"], second["weights"]) == ("mlp", 1, [0.25, 0.5, 0.5])
    assert describe_mixture(family.parts[1], tensors) == {}
    linear = build_mixture(parts=[PARTS[0], {**PARTS[1], "linear": [0]}])
    first, second = describe_mixture(linear, tensors)["mixture"]
    assert ("scaling" in first, second["scaling"]) == (False, "linear")
