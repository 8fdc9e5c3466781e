"""Shifts the quantile levels of forecasts by offsets that were learnt from past errors. No torch.

An offset is in widths of the forecast's own band, so that it widens a wide band by more than a narrow one. Estimated
by `handlers.evaluation.conformal`, carried by the archive, applied where network numbers have become prices.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from handlers.base import Float32
from handlers.codecs.features import DAY, Float64, parse_step_seconds
from model_store.archives.manifest import ForecastSpec

HOUR = 3600
HOURS = 24

Hours = npt.NDArray[np.intp]


class BandCalibration:
    """The offsets of one archive. Safe in several threads: its only state is replaced as a whole."""

    def __init__(self, forecast: ForecastSpec, offsets: Float32, low: float, high: float) -> None:
        """`offsets` [rows, levels] are in widths of the band between the levels `low` and `high`."""
        self._offsets = offsets.astype(np.float64)
        places = (forecast.quantile_levels.index(level) for level in (low, high))
        self._low, self._high = ((..., slice(place, place + 1)) for place in places)
        self.growth = 1 + 2 * float(np.abs(self._offsets).max())  #: most times that a shifted price is larger
        self._step_s, self._length = parse_step_seconds(forecast.frequency), forecast.prediction_length
        self._last: tuple[str, Float64] = ("", self._offsets)

    def __repr__(self) -> str:
        rows, levels = self._offsets.shape
        return f"<BandCalibration of {levels} levels, {rows} rows>"

    def shift(self, prices: Float64, starts: Sequence[str]) -> Float64:
        """Shift sorted quantiles [n, prediction, levels], whose first steps are at the stamps `starts`.

        They may cross then. Prices must be at most FLOAT32_MAX / `growth`, so that shifted ones are float32.
        """
        shifted = self._find_offsets(starts) * (prices[self._high] - prices[self._low])
        shifted += prices
        return shifted

    def _find_offsets(self, starts: Sequence[str]) -> Float64:
        """Return the offsets [n or 1, prediction or 1, levels] of forecasts that begin at these stamps."""
        if len(self._offsets) == 1:
            return self._offsets
        times = [stamp[11:16] for stamp in starts]
        known, found = self._last
        if times.count(known) == len(times):  # forecasts of one archive mostly begin at the same time of day
            return found
        by_time = {time: self._offsets[list_hours(_parse_time(time), self._step_s, self._length)] for time in times}
        if len(by_time) == 1:
            self._last = next(iter(by_time.items()))
            return self._last[1]
        return np.stack([by_time[time] for time in times])


def list_hours(first_s: int, step_s: int, length: int) -> Hours:
    """Return the hours of the day of `length` steps; the first is `first_s` seconds after midnight."""
    return (first_s + step_s * np.arange(length)) // HOUR % HOURS


def count_rows(step_s: int) -> int:
    """Return how many rows of offsets a forecast has: one for each hour, or one where steps do not divide a day."""
    return HOURS if step_s < DAY and DAY % step_s == 0 else 1


def _parse_time(text: str) -> int:
    """Parse HH:MM into seconds since midnight."""
    return int(text[:2]) * HOUR + int(text[3:]) * 60
