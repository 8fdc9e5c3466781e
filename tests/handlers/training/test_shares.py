"""The shares of a mixture's parts: weights that lower the loss, towards equal ones, whatever is missing."""

import torch

from handlers.training.fit import compute_pinball
from handlers.training.shares import learn_shares

LEVELS = torch.tensor([0.1, 0.5, 0.9])


def make_parts(*noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers [100, parts, 24, 3] of forecasters whose centers are off by independent noise, and targets [100, 24]."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn((100, 24), generator=draw)
    y = truth + 0.5 * torch.randn((100, 24), generator=draw)
    spread = 0.5 * torch.special.ndtri(LEVELS)
    parts = [(truth + each * torch.randn((100, 24), generator=draw))[..., None] + spread for each in noise]
    return torch.stack(parts, 1), y


def compute_loss(shares: torch.Tensor, answers: torch.Tensor, y: torch.Tensor) -> float:
    """The mean pinball loss of the weighted mean."""
    mixed = (answers * shares[:, None]).sum(1)
    return compute_pinball(y, mixed, LEVELS).mean().item()


def test_better_parts_weigh_more_and_the_loss_is_lower() -> None:
    """Weights are a share of one at every level, and beat equal ones on other windows of the same forecasters."""
    answers, y = make_parts(0.2, 0.6, 2.0)
    shares = learn_shares(answers[:50], y[:50], LEVELS)
    assert shares.shape == (3, 3)
    torch.testing.assert_close(shares.sum(0), torch.ones(3))
    assert (shares > 0).all()
    assert (shares[0] > shares[1]).all()
    assert (shares[1] > shares[2]).all()
    equal = torch.full((3, 3), 1 / 3)
    assert compute_loss(shares, answers[50:], y[50:]) < 0.9 * compute_loss(equal, answers[50:], y[50:])


def test_equal_parts_stay_equal() -> None:
    """Copies of one forecaster share evenly."""
    answers, y = make_parts(0.3)
    shares = learn_shares(answers.expand(-1, 4, -1, -1), y, LEVELS)
    torch.testing.assert_close(shares, torch.full((4, 3), 0.25))


def test_missing_targets_do_not_count_and_without_any_the_prior_stays() -> None:
    """NaN steps leave the weights as those of the others; a whole holdout without values is the prior."""
    answers, y = make_parts(0.2, 1.0)
    y[::2] = torch.nan
    torch.testing.assert_close(learn_shares(answers, y, LEVELS), learn_shares(answers[1::2], y[1::2], LEVELS))
    prior = torch.tensor([[3.0, 3, 3], [1, 1, 1]])
    torch.testing.assert_close(learn_shares(answers, y * torch.nan, LEVELS, prior), prior / 4)


def test_the_prior_draws() -> None:
    """The same windows give a part more where it weighed more before."""
    answers, y = make_parts(0.5, 0.5)
    before = torch.tensor([[9.0, 9, 9], [1, 1, 1]])
    assert (learn_shares(answers, y, LEVELS, before)[0] > learn_shares(answers, y, LEVELS)[0] + 0.05).all()
