"""Fits `lear`: chooses the penalty of each forecast step by the holdout, then fits once more over all windows. Torch.

Models are fitted one after another, or side by side on threads, because the 24 x 5 regressions of a model are large
products.
Measured, one core, four years of days with two covariates: 0.6 s a model (`loadtest.benchmarks.accuracy`).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from handlers.forecasters.lear import Lear
from handlers.training import quantile_lasso
from handlers.training.quantile_lasso import Coefficients, Problem, Regressions
from handlers.training.windows import Windows

MOST_WINDOWS = 4096  #: most windows of a regression and of its holdout, for bounded memory
CUT = 256  #: most windows whose whole context is in memory at once


class LinearFit:
    """The regressions of all models of one family over their windows; every `members` of them are one ensemble.

    The members of an ensemble have different calibration windows, as in the LEAR ensembles of Lago et al.: all of the
    past, the last half of it, the last quarter, and so on.
    """

    def __init__(self, family: Lear, data: Windows, pool: ThreadPoolExecutor, members: int) -> None:
        self._family = family
        self._data = data
        self._pool = pool
        self._members = members
        self._held_out = data.held_out(MOST_WINDOWS)
        self._penalty: dict[int, torch.Tensor] = {}

    def __repr__(self) -> str:
        return f"<LinearFit {self._family.key} {self._data!r}>"

    def best(self, progress: Callable[[int, int, float], None] | None) -> torch.Tensor:
        """Fit flat parameters [M, n] with the penalty of least holdout loss for every forecast step."""
        found = []
        for weights, loss in self._pool.map(self._best, range(len(self._data))):
            found.append(weights)
            if progress:
                progress(len(found), len(self._data), loss)
        return torch.stack(found)

    def whole(self, weights: torch.Tensor) -> torch.Tensor:
        """Continue `best` with the same penalties on all windows, also those of the holdout, since prices change."""
        return torch.stack(list(self._pool.map(self._whole, range(len(self._data)), weights)))

    def _best(self, model: int) -> tuple[torch.Tensor, float]:
        problem, check = (
            self._problem(model, self._recent(model, self._data.train)),
            self._problem(model, self._held_out),
        )
        found = kept = quantile_lasso.make_null_model(problem)
        regressions = Regressions(problem, found)
        path = regressions.penalties()
        penalty, least = path[0], self._by_step(quantile_lasso.compute_losses(check, found))
        for each in path:
            found = regressions.solve(each)
            loss = self._by_step(quantile_lasso.compute_losses(check, found))
            better, least = loss < least, torch.minimum(loss, least)
            penalty = torch.where(better, each, penalty)
            kept = Coefficients(*(torch.where(better, new, old) for new, old in zip(found, kept, strict=True)))
        self._penalty[model] = penalty
        return _flatten_coefficients(kept), least.mean().item()

    def _whole(self, model: int, weights: torch.Tensor) -> torch.Tensor:
        windows = self._recent(model, self._data.all)
        columns = len(self._penalty[model])
        start = Coefficients(weights[:-columns].view(columns, -1).T, weights[-columns:])
        return _flatten_coefficients(
            Regressions(self._problem(model, windows), start).solve(self._penalty[model], 2 * quantile_lasso.STEPS)
        )

    def _recent(self, model: int, starts: range) -> torch.Tensor:
        """Return the windows of a model: for members of an ensemble all, the last half, the last quarter and so on."""
        return self._data.spaced(starts[-(len(starts) >> model % self._members) or -1 :], MOST_WINDOWS)

    def _by_step(self, losses: torch.Tensor) -> torch.Tensor:
        """Replace the loss of every column by the mean over the levels of its step [columns].

        A step of which nothing is observed in the holdout has the mean loss of the others: a loss of 0 would choose the
        largest penalty for it.
        """
        losses = losses.view(*self._family.output_shape)
        by_step = losses.mean(1, keepdim=True)
        return by_step.where(~by_step.isnan(), by_step.nanmean()).expand_as(losses).flatten()

    def _problem(self, model: int, starts: torch.Tensor) -> Problem:
        """Make the problem of one model from the windows that forecast from these steps [M, n]."""
        x, y, weighted = [], [], self._data.weigh(starts[model])
        for some in torch.split(starts, CUT, 1):
            context, targets = self._data.cut(some, slice(model, model + 1))
            x.append(context[0].transpose(1, 2).flatten(1).index_select(1, self._family.taps))
            y.append(targets[0])
        weights = None if weighted is None else weighted.to(x[0].dtype)
        return Problem(torch.cat(x), torch.cat(y), self._data.levels, weights)


def _flatten_coefficients(found: Coefficients) -> torch.Tensor:
    """Concatenate the coefficients as the state dict has them [n]."""
    return torch.cat([found.weight.T.flatten(), found.bias])
