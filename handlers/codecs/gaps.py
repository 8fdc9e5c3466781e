"""A history as it was judged, and what its missing steps take. Pure numpy.

The codes are the marks of an answer; `docs/quality.md` says what each means.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FILLED, MISSING, EMPTY, SHORT = "filled", "missing", "empty", "short"
FLAT, STALE, SHIFTED, RANGE = "flat", "stale", "shifted", "range"
FALLBACK = "fallback"  #: the answer is the archive's fallback
CODES = (FILLED, MISSING, EMPTY, SHORT, FLAT, STALE, SHIFTED, RANGE, FALLBACK)

SHORT_GAP = 3  #: steps

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


class History(NamedTuple):
    """A completed history: `values` [T] without gaps, its codes, and the fallback [prediction, levels] if it is one."""

    values: Floats
    codes: tuple[str, ...] = ()
    fallback: Floats | None = None


def complete_history(values: Floats, center: float, season: int) -> Floats:
    """Return values [T] without NaN: gaps of up to SHORT_GAP steps on a line between their neighbours, longer ones as
    the nearest season before or after, what is left as the last known value, else the center.

    A `season` of 0 takes the last known value at once.
    """
    found = values.copy()
    if season:
        _bridge_short_gaps(found)
    if season > 1:
        _take_seasons(found, season)
    missing = np.isnan(found)
    if missing.any():
        last = np.maximum.accumulate(np.where(missing, -1, np.arange(len(found))))
        found = np.where(last < 0, center, found[last])
    return found


def _bridge_short_gaps(values: Floats) -> None:
    """Fill gaps of up to SHORT_GAP steps between two known values: there neighbours tell more than another day."""
    missing, steps = np.isnan(values), np.arange(len(values))
    before = np.maximum.accumulate(np.where(missing, -1, steps))
    after = np.minimum.accumulate(np.where(missing, len(values), steps)[::-1])[::-1]
    short = missing & (before >= 0) & (after < len(values)) & (after - before <= SHORT_GAP + 1)
    if short.any():
        values[short] = np.interp(steps[short], steps[~missing], values[~missing])


def _take_seasons(values: Floats, season: int) -> None:
    """Fill gaps with the nearest known value of the same phase, of seasons before where there is one."""
    known = values.copy()
    for lag in (*range(season, len(values), season), *range(-season, -len(values), -season)):
        gaps = np.flatnonzero(np.isnan(values))
        if not len(gaps):
            return
        gaps = gaps[(gaps >= lag) & (gaps < len(values) + lag)]
        values[gaps] = known[gaps - lag]


def complete_plainly(values: Floats, center: float) -> History:
    """Complete a history for an archive without rules: by the last known value, else the center."""
    if not np.isnan(values).any():
        return History(values)
    empty = bool(np.isnan(values).all())
    return History(complete_history(values, center, 0), (EMPTY,) if empty else ())
