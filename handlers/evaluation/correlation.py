"""Estimates a correlation archive from the errors of held-out forecasts. Pure numpy, and the normal quantile of torch.

Errors of W windows, N products and T steps are an array [W, N, T], NaN where a value is missing. Only their order
within a margin (a product at a step) matters: it is turned into normal scores for the Gaussian copula, so that errors
may be probability integral transforms or any other numbers that rise with the actual value.
"""

from dataclasses import dataclass

import numpy as np
import torch

from handlers.base import Float32
from handlers.codecs.features import Float64
from model_store.archives.manifest import CorrelationSpec

LEAST_WINDOWS = 8  #: least number of windows for an estimate
LEAST_EIGENVALUE = 1e-6  #: lower bound of the eigenvalues of a correlation matrix


class TooFewErrors(ValueError):
    """There are too few windows for an estimate."""


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """One estimated correlation matrix [n, n], positive definite with unit diagonal, and properties of its estimate."""

    correlation: Float64
    shrinkage: float  #: share of the sample matrix that was replaced by the identity
    observations: float  #: mean number of pairs of values of an entry
    independent: float  #: equivalent number of independent pairs
    condition_before: float  #: largest / smallest eigenvalue of the sample matrix; infinite if it is singular

    def __repr__(self) -> str:
        return f"<Matrix {len(self.correlation)}, shrinkage {self.shrinkage:.3f}, condition {self.condition:.3g}>"

    @property
    def condition(self) -> float:
        """The ratio of the largest to the smallest eigenvalue."""
        return compute_condition(self.correlation)

    @property
    def factor(self) -> Float32:
        """The lower Cholesky factor, as in archives."""
        return np.linalg.cholesky(self.correlation).astype(np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class Estimate:
    """The record of an archive, its tensors, and both matrices for the method gaussian."""

    record: CorrelationSpec
    tensors: dict[str, Float32]
    matrices: tuple[Matrix, ...] = ()


def compute_pit(levels: Float64, values: Float64, actual: Float64) -> Float64:
    """Compute the probability integral transform of actual [...] under sorted `values` [..., levels], in (0, 1).

    It is linear between the levels; an actual at an atom gets the middle of its jump. Beyond the outer quantiles, where
    only the order counts, the tails are exponential on the scale of the distance between them.
    """
    below = (values < actual[..., None]).sum(-1)  # levels whose quantile is less
    upto = (values <= actual[..., None]).sum(-1)
    last = len(levels) - 1
    left, right = np.clip(below - 1, 0, last), np.clip(below, 0, last)
    low, high = (np.take_along_axis(values, at[..., None], -1)[..., 0] for at in (left, right))
    spread = values[..., -1] - values[..., 0]
    spread = np.where(spread > 0, spread, 1.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        between = levels[left] + (levels[right] - levels[left]) * (actual - low) / (high - low)
        under = levels[0] * np.exp(np.minimum(actual - values[..., 0], 0) / spread)
        over = 1 - (1 - levels[-1]) * np.exp(-np.maximum(actual - values[..., -1], 0) / spread)
    atom = (levels[right] + levels[np.clip(upto - 1, 0, last)]) / 2
    found = np.select([upto == 0, below > last, upto > below], [under, over, atom], between)
    return np.where(np.isnan(actual), np.nan, found)


def compute_normal_scores(errors: Float64) -> Float64:
    """Compute normal scores [W, N, T] of each margin: normal quantiles at (rank - 1/2) / observed; ties share a rank.

    NaN stays NaN; a constant margin scores 0.
    """
    found = np.full(errors.shape, np.nan)
    for margin in np.ndindex(errors.shape[1:]):
        column = errors[:, *margin]
        here = ~np.isnan(column)
        if here.any():
            found[here, *margin] = _middle_ranks(column[here]) / here.sum()
    return np.asarray(torch.special.ndtri(torch.from_numpy(found)).numpy())


def estimate_gaussian(errors: Float64, products: tuple[str, ...], overlap: float = 1.0) -> Estimate:
    """Estimate the correlation in Kronecker form: of products at equal steps, and of steps of equal products.

    `overlap` is the mean number of windows that share a step, which count as one. Raises TooFewErrors.
    """
    windows = _require_windows(errors, int(np.isfinite(errors).any((1, 2)).sum()))
    scores = compute_normal_scores(errors)
    by_product = np.moveaxis(scores, 1, 0).reshape(len(products), -1)
    by_step = np.moveaxis(scores, 2, 0).reshape(errors.shape[2], -1)
    (among_products, pairs), (among_steps, step_pairs) = _correlate_sample(by_product), _correlate_sample(by_step)
    # Correlated observations count less: the mean of T with correlation C varies as if of T^2 / |C|^2 independent.
    matrices = (
        shrink_correlation(among_products, pairs, _independent_share(among_steps) / overlap),
        shrink_correlation(among_steps, step_pairs, _independent_share(among_products) / overlap),
    )
    record = CorrelationSpec(
        products=products,
        horizon=errors.shape[2],
        method="gaussian",
        windows=windows,
        shrinkage_products=matrices[0].shrinkage,
        shrinkage_time=matrices[1].shrinkage,
    )
    return Estimate(record, {"product_factor": matrices[0].factor, "time_factor": matrices[1].factor}, matrices)


def estimate_schaake(errors: Float64, products: tuple[str, ...]) -> Estimate:
    """Rank the windows without missing values; equal errors are ranked in the order of the windows.

    Raises TooFewErrors.
    """
    whole = errors[np.isfinite(errors).all((1, 2))]
    windows = _require_windows(errors, len(whole))
    ranks = whole.argsort(axis=0, kind="stable").argsort(axis=0, kind="stable").astype(np.float32)
    record = CorrelationSpec(products=products, horizon=errors.shape[2], method="schaake", windows=windows)
    return Estimate(record, {"ranks": ranks})


def shrink_correlation(sample: Float64, observations: float, independent_share: float = 1.0) -> Matrix:
    """Shrink the correlation matrix of a sample towards the identity, then apply `repair_matrix`.

    The intensity is that of Schaefer and Strimmer (2005), the analytic Ledoit-Wolf one for correlations: the sum of the
    variances of the entries divided by that of their squares, with the variance (1 - r^2)^2 / (n - 1) of normal data.
    """
    independent = observations * independent_share
    n = max(2.0, independent)
    off = sample[~np.eye(len(sample), dtype=bool)]
    squares, variances = (off**2).sum(), ((1 - off**2) ** 2).sum() / (n - 1)
    shrinkage = float(min(1.0, variances / squares)) if squares > 0 else float(len(sample) > 1)
    mixed = (1 - shrinkage) * sample + shrinkage * np.eye(len(sample))
    return Matrix(repair_matrix(mixed), shrinkage, observations, independent, compute_condition(sample))


def repair_matrix(matrix: Float64) -> Float64:
    """Return a positive definite matrix with unit diagonal near a symmetric one with a positive diagonal.

    Eigenvalues are clipped from below, and rows and columns are scaled, a congruence that keeps them positive.
    """
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    floor = LEAST_EIGENVALUE * max(1.0, values[-1])
    if values[0] < floor:
        matrix = (vectors * np.maximum(values, floor)) @ vectors.T
    scale = 1 / np.sqrt(np.diag(matrix))
    found: Float64 = (matrix + matrix.T) / 2 * scale[:, None] * scale
    np.fill_diagonal(found, 1.0)
    return found


def compute_condition(matrix: Float64) -> float:
    """Return the ratio of the largest to the smallest eigenvalue; infinite if that is not positive, up to rounding."""
    values = np.linalg.eigvalsh(matrix)
    positive = values[0] > len(matrix) * np.finfo(np.float64).eps * values[-1]
    return float(values[-1] / values[0]) if positive else float("inf")


def _correlate_sample(scores: Float64) -> tuple[Float64, float]:
    """Correlate scores [n, observations] of mean 0 over common observations; also returns the mean number of pairs.

    A constant series is uncorrelated.
    """
    here = np.isfinite(scores).astype(np.float64)
    values = np.where(here > 0, scores, 0.0)
    squares = values**2 @ here.T
    size = np.sqrt(squares * squares.T)
    found = np.divide(values @ values.T, size, out=np.zeros(size.shape), where=size > 0)
    found = np.clip((found + found.T) / 2, -1, 1)
    np.fill_diagonal(found, 1.0)
    return found, float((here @ here.T).mean())


def _independent_share(correlation: Float64) -> float:
    """Return the equivalent number of independent ones among n observations with this correlation, as a share of n."""
    return float(len(correlation) / (correlation**2).sum())


def _middle_ranks(values: Float64) -> Float64:
    """Return rank - 1/2 of each value; equal values get the middle of their ranks."""
    rising = np.sort(values)
    ranks = np.searchsorted(rising, values, "left") + np.searchsorted(rising, values, "right")
    return np.asarray(ranks / 2)


def _require_windows(errors: Float64, windows: int) -> int:
    if windows < LEAST_WINDOWS:
        what = f"{windows} of {len(errors)} windows can be used, and {LEAST_WINDOWS} are the least; give more rows"
        raise TooFewErrors(what)
    return windows
