"""Ensembles: the mean of members that run as rows of one bank, whichever way their rows are bound."""

import numpy as np
import pytest
import torch

from handlers.forecasters import build_family, random_tensors
from handlers.forecasters.ensemble import Ensemble
from model_store.errors import ArchiveInvalid

SMALL = {"features": 2, "context_length": 9, "prediction_length": 4, "hidden": 5}


def test_the_answer_is_the_mean_of_the_members_answers() -> None:
    """Three archives of an mlp, and one of the three together."""
    one, three = build_family("mlp", SMALL), build_family("mlp", {**SMALL, "members": 3})
    states = [random_tensors(one, seed) for seed in range(3)]
    row = three.row({f"members.{i}.{name}": each for i, state in enumerate(states) for name, each in state.items()})
    x = torch.randn((1, 2, 9), generator=torch.Generator().manual_seed(0))
    answers = [one.forward(one.bind(torch.from_numpy(one.row(state))[None]), x) for state in states]
    answer = three.forward(three.bind(torch.from_numpy(row)[None]), x)
    torch.testing.assert_close(answer, torch.stack(answers).mean(0), atol=1e-6, rtol=1e-5)
    assert three.row_floats == 3 * one.row_floats


@pytest.mark.parametrize("architecture", ["tcn", "gru"])
def test_rows_that_are_all_the_same_one_answer_as_rows_side_by_side(architecture: str) -> None:
    """Many inputs of one ensemble, whose row is read once and may change after it is bound."""
    made = build_family(architecture, {"features": 2, "context_length": 9, "prediction_length": 4, "members": 3})
    rows = [torch.from_numpy(made.row(random_tensors(made, seed))) for seed in range(2)]
    x, row = torch.randn((5, 2, 9), generator=torch.Generator().manual_seed(0)), rows[0].clone()[None]
    same = made.bind(row.expand(5, -1))
    for each in rows:
        row[0] = each
        side_by_side = made.bind(each.repeat(5, 1))
        torch.testing.assert_close(made.forward(same, x), made.forward(side_by_side, x), atol=1e-6, rtol=1e-5)


def test_a_member_that_is_poisoned_spoils_its_ensemble_alone() -> None:
    """NaN in one member's row of one model changes no bit of the models beside it."""
    made = build_family("mlp", {**SMALL, "members": 2})
    block = torch.from_numpy(np.stack([made.row(random_tensors(made, seed)) for seed in range(3)]))
    bound, x = made.bind(block), torch.ones(3, *made.input_shape)
    clean = made.forward(bound, x)
    block[1, : made.row_floats // 2] = torch.nan
    poisoned = made.forward(bound, x)
    assert poisoned[1].isnan().all()
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]])


def test_bad_tensors_are_named_with_their_member() -> None:
    """A missing tensor, and one that is not finite."""
    made = build_family("mlp", {**SMALL, "members": 2})
    tensors = random_tensors(made, 0)
    with pytest.raises(ArchiveInvalid, match=r"missing \['members.1.head.bias'\]"):
        made.row({name: tensor for name, tensor in tensors.items() if name != "members.1.head.bias"})
    bad = tensors["members.1.head.bias"] * np.float32(np.nan)
    with pytest.raises(ArchiveInvalid, match=r"not finite: members.1.head.bias$"):
        made.row(tensors | {"members.1.head.bias": bad})


def test_members_are_a_number_in_bounds() -> None:
    """One member is no ensemble; too many, none, or those of a sampler are refused."""
    assert not isinstance(build_family("mlp", {**SMALL, "members": 1}), Ensemble)
    assert build_family("mlp", {**SMALL, "members": 2}) is build_family("mlp", {**SMALL, "members": 2})
    assert build_family("mlp", {**SMALL, "members": 2}).key != build_family("mlp", {**SMALL, "members": 3}).key
    for members in (0, 65, "2"):
        with pytest.raises(ArchiveInvalid, match=r"config of mlp: .*\$.members"):
            build_family("mlp", {**SMALL, "members": members})
    with pytest.raises(ArchiveInvalid, match=r"the mean of paths is no path"):
        build_family("deepar", {"members": 2})
