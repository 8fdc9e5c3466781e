"""The tail rule `exponential`: how the distribution of a forecast goes on beyond its outer quantile levels. No torch.

Beyond the level a (below it, or above 1 - a) prices lie exponentially far from its quantile, so that the quantile at
the probability u is s w log(a / u) away from it. w is the width of the forecast's own band, and s the mean distance
that past prices had, in such widths (`handlers.evaluation.tails` learns it). Quantiles at the levels do not change.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from handlers.codecs.features import Float64
from model_store.archives.manifest import ForecastSpec

MOST = float(np.finfo(np.float32).max)
LEAST_MASS = 1e-9  #: least probability beyond a sample: a random number may be 0
WIDE_LOW, WIDE_HIGH = 0.05, 0.95  #: where the outer levels lie inside these, samples depend on the tail rule


@dataclass(frozen=True, slots=True)
class ExponentialTails:
    """The rule of one archive: `low` and `high` are s below and above, `band` the places of the levels of the band."""

    low: float
    high: float
    band: tuple[int, int]
    floor: float | None = None
    cap: float | None = None

    @classmethod
    def of(cls, forecast: ForecastSpec) -> Self | None:
        """Return the rule of an archive; None if it has another one."""
        tails = forecast.tails
        if not tails:
            return None
        places = (forecast.quantile_levels.index(level) for level in tails.band)
        return cls(tails.low, tails.high, (next(places), next(places)), forecast.floor, forecast.cap)

    def measure_widths(self, values: Float64) -> Float64:
        """Return the widths [...] of the bands of sorted quantiles [..., levels]."""
        widths: Float64 = values[..., self.band[1]] - values[..., self.band[0]]
        return widths

    def reach_below(self, widths: Float64, u: Float64, level: float) -> Float64:
        """Return how far below the quantile at the first `level` those at u < level lie; u and widths broadcast."""
        distance: Float64 = self.low * widths * np.log(level / np.maximum(u, LEAST_MASS))
        return distance

    def reach_above(self, widths: Float64, u: Float64, level: float) -> Float64:
        """Return how far above the quantile at the last `level` those at u > level lie; u and widths broadcast."""
        distance: Float64 = self.high * widths * np.log((1 - level) / np.maximum(1 - u, LEAST_MASS))
        return distance

    def bound(self, prices: Float64) -> Float64:
        """Return prices within floor, cap and float32."""
        low = -MOST if self.floor is None else self.floor
        return np.clip(prices, low, MOST if self.cap is None else self.cap)

    def shift_mean(self, weights: Float64, levels: Float64) -> Float64:
        """Return the weights of a mean with flat tails, changed so that q @ weights is the mean with this rule.

        The integral of a tail is its mass times its mean distance s w; w is a difference of two quantiles.
        """
        added = (1 - levels[-1]) * self.high - levels[0] * self.low
        found = weights.copy()
        found[self.band[1]] += added
        found[self.band[0]] -= added
        return found


def has_narrow_levels(levels: Float64) -> bool:
    """Whether samples of a forecast with these levels depend much on the tail rule, of which clients are warned."""
    return bool(levels[0] > WIDE_LOW or levels[-1] < WIDE_HIGH)
