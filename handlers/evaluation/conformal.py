"""Rolling conformal calibration: how far each level would have had to lie elsewhere to hold its promise. Pure numpy.

The score of an actual y and a level q is (y - q) / w, in widths w of the forecast's own band. The offset of a level l
is the l-quantile of the scores of past windows: shifted by it, the share l of these actuals lies below. The quantile is
that of n + 1 exchangeable values (Vovk et al. 2005; quantile forecasts: Romano et al. 2019), so that few windows give
no narrower bands. Scores are pooled over the hour before and after, which have similar errors.
"""

import numpy as np

from handlers.base import Float32
from handlers.codecs.calibration import HOURS
from handlers.codecs.features import Float64
from handlers.evaluation.scores import Steps
from handlers.training.tails import TooFewScores, choose_band

LEAST_SCORES = 50  #: least number of scores of an hour and its neighbours; with fewer it takes those of all hours


def estimate_offsets(y: Float64, q: Float64, levels: Float64, hours: Steps, rows: int) -> Float32:
    """Estimate offsets [rows, levels] from actuals y [W, H], forecasts q [W, H, levels] and hours of the day [W, H].

    Raises TooFewScores.
    """
    low, high = choose_band(levels)
    width = q[..., high] - q[..., low]
    usable = ~np.isnan(y) & (width > 0)
    if usable.sum() < LEAST_SCORES:
        raise TooFewScores(f"{usable.sum()} actual values with a band; a calibration needs {LEAST_SCORES}")
    scores = (y[usable][:, None] - q[usable]) / width[usable][:, None]
    at = hours[usable]
    whole = _take_quantiles(scores, levels)
    found = np.tile(whole, (rows, 1))
    for hour in range(rows if rows > 1 else 0):
        near = (at - hour + 1) % HOURS <= 2  # noqa: PLR2004 -- hours from one before to one after
        if near.sum() >= LEAST_SCORES:
            found[hour] = _take_quantiles(scores[near], levels)
    return found.astype(np.float32)


def shift_levels(q: Float64, levels: Float64, offsets: Float32, hours: Steps) -> Float64:
    """Return what the codec makes of quantiles q [W, H, levels] by these offsets, but for floor and cap."""
    low, high = choose_band(levels)
    rows = offsets.astype(np.float64)[hours if len(offsets) > 1 else np.zeros_like(hours)]
    return np.sort(q + rows * (q[..., high] - q[..., low])[..., None], axis=-1)


def calibrate_rolling(
    y: Float64, q: Float64, levels: Float64, hours: Steps, rows: int, trailing: int, every: int
) -> Float64:
    """Return q from window `trailing` on as calibrated by only what was known: the windows before, newly each `every`.

    Raises TooFewScores.
    """
    parts = []
    for at in range(trailing, len(q), every):
        past, now = slice(at - trailing, at), slice(at, at + every)
        offsets = estimate_offsets(y[past], q[past], levels, hours[past], rows)
        parts.append(shift_levels(q[now], levels, offsets, hours[now]))
    return np.concatenate(parts)


def _take_quantiles(scores: Float64, levels: Float64) -> Float64:
    """Return the quantile of each column [n, levels] at its own level, of n + 1 values ("weibull")."""
    columns = [
        np.quantile(column, level, method="weibull") for column, level in zip(scores.T, levels.tolist(), strict=True)
    ]
    return np.array(columns)
