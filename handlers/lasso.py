"""Quantile regressions with an L1 penalty, of many models, steps and levels at once. Torch; no files.

The pinball loss is smoothed by a uniform kernel (Fernandes et al. 2021, "Smoothing quantile regressions"), which gives
it a gradient, and minimised by FISTA (Beck and Teboulle 2009) with adaptive restart (O'Donoghue and Candes 2015) from
the largest penalty of a path to the smallest. Columns of the answer share nothing but the design matrix, so all of them
are one product a step.
"""

from typing import NamedTuple

import torch

BANDWIDTH = 0.1  #: half the kernel's width, in network numbers: asinh of prices by their spread
STEPS = 60  #: of FISTA at each penalty, from the solution at the one before
PENALTIES = 10
SMALLEST = 1e-3  #: of the path, as a part of the largest, at which all coefficients are about zero


class Problem(NamedTuple):
    """Data of m models: design x [m, n, F], targets y [m, n, P] (NaN: missing), levels [Q]."""

    x: torch.Tensor
    y: torch.Tensor
    levels: torch.Tensor

    @property
    def columns(self) -> int:
        """Answers of a model: P x Q, all levels of the first step before those of the next."""
        return self.y.shape[2] * len(self.levels)


class Coefficients(NamedTuple):
    """Weight [m, F, columns] and bias [m, 1, columns]."""

    weight: torch.Tensor
    bias: torch.Tensor


def null(problem: Problem) -> Coefficients:
    """Zero coefficients, and for the bias the quantiles of the targets."""
    models, _, features = problem.x.shape
    quantiles = problem.y.nanquantile(problem.levels, dim=1)  # [Q, m, P]
    bias = quantiles.permute(1, 2, 0).reshape(models, 1, problem.columns)
    return Coefficients(problem.x.new_zeros(models, features, problem.columns), bias.nan_to_num().contiguous())


def penalties(problem: Problem, start: Coefficients) -> torch.Tensor:
    """The path, falling: [PENALTIES, m, 1, columns]. At the first all coefficients are about zero."""
    gradient, _ = _gradients(problem, start)
    largest = gradient.abs().amax(1, keepdim=True)
    path = torch.logspace(0, torch.tensor(SMALLEST).log10().item(), PENALTIES, dtype=largest.dtype)
    return path[:, None, None, None] * largest


def solve(problem: Problem, penalty: torch.Tensor, start: Coefficients, steps: int = STEPS) -> Coefficients:
    """The regressions with `penalty` [m, 1, columns], from `start`. The bias is not penalised."""
    rate = 1 / _curvature(problem.x)
    weight, bias = start
    ahead, ahead_bias, momentum = weight, bias, torch.ones_like(penalty)
    for _ in range(steps):
        gradient, bias_gradient = _gradients(problem, Coefficients(ahead, ahead_bias))
        found = torch.nn.functional.relu((moved := ahead - rate * gradient).abs() - rate * penalty) * moved.sign()
        found_bias = ahead_bias - rate * bias_gradient
        # a column whose momentum points uphill starts again
        uphill = ((ahead - found) * (found - weight)).sum(1, keepdim=True) > 0
        following = torch.where(uphill, 1.0, (1 + (1 + 4 * momentum**2).sqrt()) / 2)
        pull = torch.where(uphill, 0.0, (momentum - 1) / following)
        ahead, ahead_bias = found + pull * (found - weight), found_bias + pull * (found_bias - bias)
        weight, bias, momentum = found, found_bias, following
    return Coefficients(weight, bias)


def losses(problem: Problem, found: Coefficients) -> torch.Tensor:
    """Mean pinball loss of every column [m, 1, columns]."""
    error, seen = _errors(problem, found)
    levels = problem.levels.repeat(problem.y.shape[2])
    loss = torch.maximum(levels * error, (levels - 1) * error) * seen
    return loss.sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)


def _errors(problem: Problem, at: Coefficients) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets less answers, and which are not missing, both [m, n, columns]."""
    y = problem.y.repeat_interleave(len(problem.levels), 2)
    return y.nan_to_num() - torch.baddbmm(at.bias, problem.x, at.weight), ~y.isnan()


def _gradients(problem: Problem, at: Coefficients) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the mean smoothed loss by weight and bias."""
    error, seen = _errors(problem, at)
    below = (0.5 - error / (2 * BANDWIDTH)).clamp_(0, 1)  # the smoothed indicator of a target below its answer
    slope = (below - problem.levels.repeat(problem.y.shape[2])) * seen
    count = problem.x.shape[1]
    return problem.x.transpose(1, 2) @ slope / count, slope.sum(1, keepdim=True) / count


def _curvature(x: torch.Tensor) -> torch.Tensor:
    """A bound of the smoothed loss' second derivative, of each model: [m, 1, 1]. By power iteration, with a margin."""
    with_bias = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)
    gram = with_bias.transpose(1, 2) @ with_bias / x.shape[1]
    v = gram.new_ones(*gram.shape[:2], 1)
    for _ in range(50):
        v = gram @ v
        v = v / v.norm(dim=1, keepdim=True)
    largest: torch.Tensor = (gram @ v).norm(dim=1, keepdim=True)
    return 1.05 * largest / (2 * BANDWIDTH)
