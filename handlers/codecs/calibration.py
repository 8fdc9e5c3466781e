"""Shifts the quantile levels of forecasts by offsets that were learnt from past errors. No torch.

An offset is in widths of the forecast's own band, so that it widens a wide band by more than a narrow one. Estimated
by `handlers.evaluation.conformal`, carried by the archive, applied where network numbers have become prices. A sample
path is shifted by the offset of its rank at that step, and keeps its rank: paths stay what they are, one above another.
"""

from collections.abc import Sequence
from datetime import datetime
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from handlers.base import Float32
from handlers.codecs.features import DAY, Float64, parse_step_seconds
from model_store.archives.manifest import ForecastSpec

HOUR = 3600
HOURS = 24
BAND = 0.8  #: nominal coverage of the band whose width is the unit of offsets, where the levels have it

Hours = npt.NDArray[np.intp]


EPOCH = datetime.fromisoformat("1970-01-01")  # without zone: of a wall clock


class AnsweredLevels(NamedTuple):
    """The levels of one forecast as they were answered: float32 [D?, steps, levels], from `start` on.

    `start`: seconds since 1970 on the archive's wall clock.
    """

    start: int
    quantiles: bytes


class BandCalibration:
    """The offsets of one archive. Safe in several threads: its only state is replaced as a whole."""

    def __init__(self, forecast: ForecastSpec, offsets: Float32, low: float, high: float) -> None:
        """`offsets` [D?, rows, levels] are in widths of the band between the levels `low` and `high`."""
        self._forecast, self._unit = forecast, (low, high)
        self._by_level = self._offsets = offsets.astype(np.float64)
        places = (forecast.quantile_levels.index(level) for level in (low, high))
        self._low, self._high = ((..., slice(place, place + 1)) for place in places)
        self._band = np.empty(0)  #: weights [paths, 1] of sorted paths, whose sum is the width of the band
        if forecast.paths:
            ranks = np.array(forecast.trained_levels)
            levels, rows = forecast.quantile_levels, self._offsets.reshape(-1, self._offsets.shape[-1])
            spread = [np.interp(ranks, levels, row) for row in rows]
            self._offsets = np.stack(spread).reshape(*self._offsets.shape[:-1], len(ranks))
            self._band = (_weigh_ranks(high, ranks) - _weigh_ranks(low, ranks))[:, None]
        self.growth = 1 + 2 * float(np.abs(self._offsets).max())  #: most times that a shifted price is larger
        self._step_s, self._length = parse_step_seconds(forecast.frequency), forecast.prediction_length
        self._last: tuple[str, Float64] = ("", self._offsets)

    def __repr__(self) -> str:
        rows, levels = self._offsets.shape[-2:]
        return f"<BandCalibration of {levels} levels, {rows} rows>"

    @property
    def identity(self) -> str:
        """A name of these offsets, the same for the same numbers."""
        return sha256(self._by_level.astype(np.float32).tobytes()).hexdigest()[:16]

    @property
    def unit(self) -> tuple[int, int]:
        """The places of the two levels whose distance the offsets are measured in."""
        return self._low[1].start, self._high[1].start

    def add(self, offsets: Float32) -> "BandCalibration":
        """Make the calibration by these offsets and others [D?, rows, levels], which are in the same widths."""
        return BandCalibration(self._forecast, (self._by_level + offsets).astype(np.float32), *self._unit)

    def shift(self, prices: Float64, starts: Sequence[str]) -> Float64:
        """Shift sorted quantiles [n, D?, prediction, levels], whose first steps are at the stamps `starts`.

        They may cross then. Prices must be at most FLOAT32_MAX / `growth`, so that shifted ones are float32.
        """
        shifted = self.find_offsets(starts) * (prices[self._high] - prices[self._low])
        shifted += prices
        return shifted

    def shift_paths(self, paths: Float64, starts: Sequence[str]) -> Float64:
        """Shift sample paths [n, prediction, paths] by rank; the highest at a step stays the highest there."""
        order = np.argsort(paths, axis=-1, kind="stable")
        ranked = np.take_along_axis(paths, order, -1)
        shifted = np.sort(ranked + self.find_offsets(starts) * (ranked @ self._band), axis=-1)
        found = np.empty_like(paths)
        np.put_along_axis(found, order, shifted, -1)
        return found

    def find_offsets(self, starts: Sequence[str]) -> Float64:
        """Return the offsets [n or 1, D?, prediction or 1, levels or paths] of forecasts that begin at these stamps."""
        if self._offsets.shape[-2] == 1:
            return self._offsets
        known, found = self._last
        if len(starts) == 1 and starts[0][11:16] == known:
            return found
        times = [stamp[11:16] for stamp in starts]
        if times.count(known) == len(times):  # forecasts of one archive mostly begin at the same time of day
            return found
        hours = {time: list_hours(_parse_time(time), self._step_s, self._length) for time in times}
        by_time = {time: self._offsets[..., places, :] for time, places in hours.items()}
        if len(by_time) == 1:
            self._last = next(iter(by_time.items()))
            return self._last[1]
        return np.stack([by_time[time] for time in times])


def find_unit_band(levels: Float64) -> tuple[int, int] | None:
    """Find the indices of the symmetric pair of levels whose coverage is nearest to BAND, else first and last.

    None for a single level, which has no band.
    """
    if len(levels) == 1:
        return None
    pairs = [
        (low, high)
        for low, level in enumerate(levels)
        if level < 0.5 and np.isclose(levels[high := int(np.argmin(np.abs(levels - (1 - level))))], 1 - level)  # noqa: PLR2004 -- the median
    ]
    if not pairs:
        return 0, len(levels) - 1
    return min(pairs, key=lambda pair: abs(levels[pair[1]] - levels[pair[0]] - BAND))


def make_calibration(forecast: ForecastSpec) -> BandCalibration | None:
    """Make a calibration that shifts nothing yet; None for an archive of a single level, which has no band."""
    levels = np.array(forecast.quantile_levels)
    unit = find_unit_band(levels)
    if unit is None:
        return None
    products, rows = len(forecast.products), count_rows(parse_step_seconds(forecast.frequency))
    zeros = np.zeros((*((products,) if products > 1 else ()), rows, len(levels)), np.float32)
    return BandCalibration(forecast, zeros, float(levels[unit[0]]), float(levels[unit[1]]))


def count_seconds(stamp: str) -> int:
    """Count the seconds from 1970 to a stamp, both on one wall clock; an offset of the stamp is left out."""
    since = datetime.fromisoformat(stamp).replace(tzinfo=None) - EPOCH
    return since.days * DAY + since.seconds


def list_hours(first_s: int, step_s: int, length: int) -> Hours:
    """Return the hours of the day of `length` steps; the first is `first_s` seconds after midnight."""
    return (first_s + step_s * np.arange(length)) // HOUR % HOURS


def count_rows(step_s: int) -> int:
    """Return how many rows of offsets a forecast has: one for each hour, or one where steps do not divide a day."""
    return HOURS if step_s < DAY and DAY % step_s == 0 else 1


def _weigh_ranks(level: float, ranks: Float64) -> Float64:
    """Weigh sorted paths [paths] so that their sum is the quantile at a level, between the two ranks around it."""
    at = float(np.interp(level, ranks, np.arange(len(ranks))))
    weights: Float64 = np.maximum(0.0, 1.0 - np.abs(np.arange(len(ranks)) - at))
    return weights


def _parse_time(text: str) -> int:
    """Parse HH:MM into seconds since midnight."""
    return int(text[:2]) * HOUR + int(text[3:]) * 60
