"""Learns the shares of the parts of a mixture from their forecasts of windows that they were not fitted to. Torch.

The shares minimise the mean pinball loss of the weighted mean, under the prior belief that all parts are equal: they
are never negative, have the sum 1, and are drawn towards the prior. The loss is convex in them; exponentiated
gradients (Kivinen and Warmuth 1997) stay on the simplex.
"""

import torch

STEPS = 200
RATE = 2.0  #: of the first step, for losses in units of the mean loss
SHRINKAGE = 0.3  #: part of the prior in the answer: windows are few, and the next ones differ


def learn_shares(
    answers: torch.Tensor, y: torch.Tensor, levels: torch.Tensor, prior: torch.Tensor | None = None
) -> torch.Tensor:
    """Learn shares [parts, levels] from answers [windows, parts, steps, levels] and targets [windows, steps].

    Each part has one share at all levels. Targets that are NaN are missing; without any, the prior [parts, levels] is
    returned, which by default is equal shares.
    """
    parts = answers.shape[1]
    believed = torch.full((parts, len(levels)), 1 / parts) if prior is None else prior / prior.sum(0)
    seen = ~y.isnan()
    if not seen.any():
        return believed
    quantiles, actual = answers.transpose(1, 2)[seen], y[seen][:, None]  # [n, parts, levels], [n, 1]
    start = believed.mean(1)
    found = _minimise_loss(quantiles, actual, levels, start)
    shares: torch.Tensor = (1 - SHRINKAGE) * found + SHRINKAGE * start
    return shares[:, None].repeat(1, len(levels))


def _minimise_loss(
    quantiles: torch.Tensor, actual: torch.Tensor, levels: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """Minimise the loss over shares [parts]; returns the mean of the steps, which converges where a step does not."""
    shares, total = start.clone(), torch.zeros_like(start)
    count = actual.numel() * len(levels)
    for step in range(1, STEPS + 1):
        error = actual - torch.einsum("npq,p->nq", quantiles, shares)
        slope = torch.where(error > 0, -levels, 1 - levels)
        scale = (-slope * error).sum() / count
        gradient = torch.einsum("npq,nq->p", quantiles, slope) / count / scale.clamp(min=1e-9)
        shares = shares * torch.exp(-RATE / step**0.5 * (gradient - (gradient * shares).sum()))
        shares = shares / shares.sum()
        total += shares
    return total / STEPS
