"""Compares two point forecasts of the same prices, such as an archive's median and an operator's own. Pure numpy."""

from dataclasses import dataclass
from math import ceil, erfc, sqrt

import numpy as np

from handlers.codecs.features import Float64

LEAST_WINDOWS = 8  #: least number of windows of a significance test


@dataclass(frozen=True, slots=True)
class PointComparison:
    """The errors of two forecasts over the steps that both have, NaN if undefined.

    `skill` is the share of the other's mean absolute error that is saved. `statistic` is positive where the other's
    errors are larger; `p_value` is the probability of one as large if the first is no better.
    """

    column: str  #: of the other forecast
    mae: float
    other_mae: float
    rmse: float
    other_rmse: float
    skill: float
    statistic: float
    p_value: float
    observed: int  #: number of compared steps


def compare_points(column: str, y: Float64, ours: Float64, other: Float64, stride: int) -> PointComparison:
    """Compare the forecasts `ours` and `other` [W, H] of actuals y, whose windows start `stride` steps apart."""
    both = ~np.isnan(y - ours - other)
    first, second = np.where(both, y - ours, np.nan), np.where(both, y - other, np.nan)
    mae, other_mae = _average(np.abs(first[both])), _average(np.abs(second[both]))
    seen = both.any(1)
    losses = np.nansum(np.abs(second[seen]), 1) - np.nansum(np.abs(first[seen]), 1)
    statistic, p_value = diebold_mariano(losses, max(0, ceil(y.shape[1] / max(stride, 1)) - 1))
    return PointComparison(
        column=column,
        mae=mae,
        other_mae=other_mae,
        rmse=sqrt(_average(first[both] ** 2)),
        other_rmse=sqrt(_average(second[both] ** 2)),
        skill=1 - mae / other_mae if other_mae else float("nan"),
        statistic=statistic,
        p_value=p_value,
        observed=int(both.sum()),
    )


def diebold_mariano(differences: Float64, lags: int) -> tuple[float, float]:
    """Test whether the mean of loss differences [W] is above zero (Diebold and Mariano 1995): statistic and p-value.

    A window's loss is the sum of its absolute errors, as in the multivariate test of Ziel and Weron 2018. Windows that
    overlap are correlated over `lags` windows, which Bartlett's weights take into account (Newey and West 1987). The
    p-value is the normal distribution's, one-sided; both are NaN for fewer than LEAST_WINDOWS windows, or without any
    variation.
    """
    count = len(differences)
    if count < LEAST_WINDOWS:
        return float("nan"), float("nan")
    centered = differences - differences.mean()
    variance = float(centered @ centered) / count
    for lag in range(1, min(lags, count - 1) + 1):
        variance += 2 * (1 - lag / (lags + 1)) * float(centered[lag:] @ centered[:-lag]) / count
    if variance <= 0:
        return float("nan"), float("nan")
    statistic = float(differences.mean()) / sqrt(variance / count)
    return statistic, erfc(statistic / sqrt(2)) / 2


def _average(values: Float64) -> float:
    return float(values.mean()) if len(values) else float("nan")
