"""Chooses the band that errors are measured by, and learns the tail rule `exponential` from them. Pure numpy.

The maximum likelihood estimate of an exponential distribution is the mean distance of the prices beyond an outer
quantile, here in widths of the forecast's own band. On seven markets it is 8 % better than flat tails in the pinball
loss of the levels 0.001 to 0.999 beyond nine trained ones, where a generalised Pareto distribution is 3 % better: the
few prices beyond 0.01 and 0.99 do not tell its shape.
"""

import numpy as np

from handlers.codecs.calibration import find_unit_band
from handlers.codecs.features import Float64
from model_store.archives.manifest import MAX_TAIL, Tails

UNSEEN = 0.2  #: the distance where no price was beyond the level, in widths: of a normal distribution, 0.1 to 0.2


class TooFewScores(ValueError):
    """There are too few actual values for a calibration."""


def choose_band(levels: Float64) -> tuple[int, int]:
    """Return the indices of the pair of levels whose distance is the unit of scores. Raises TooFewScores."""
    found = find_unit_band(levels)
    if found is None:
        raise TooFewScores(f"the only level {levels[0]:g} makes no band")
    return found


def fit_tails(y: Float64, q: Float64, levels: Float64) -> Tails:
    """Fit the rule to actuals y [...] (NaN: missing) and sorted quantiles q [..., levels] that did not know them.

    Raises TooFewScores for a single level, which has no band.
    """
    low, high = choose_band(levels)
    width = q[..., high] - q[..., low]
    usable = ~np.isnan(y) & (width > 0)
    y, q, width = y[usable], q[usable], width[usable]
    under, over = (q[:, 0] - y) / width, (y - q[:, -1]) / width
    return Tails(
        low=_measure_distance(under),
        high=_measure_distance(over),
        band=(float(levels[low]), float(levels[high])),
        beyond=(int((under > 0).sum()), int((over > 0).sum())),
    )


def _measure_distance(distances: Float64) -> float:
    """Return the mean of the positive distances, rounded so that records are readable."""
    beyond = distances[distances > 0]
    return float(f"{min(beyond.mean(), MAX_TAIL):.4g}") if len(beyond) else UNSEEN
