"""Offsets of quantile levels that follow observed prices: online conformal calibration. Pure.

Each price moves the offset of each level by the level's pinball gradient: down by (1 - l) steps when the price lies
below the level l, up by l steps when it lies above. So the share below a level comes to l whatever the prices do
(quantile tracking: Gibbs and Candes 2021; Angelopoulos, Candes and Tibshirani 2023). A level's offset is the sum of one
for the hour of the day, which prices of that hour and its neighbours move, and of one for all hours, which every price
moves a little. Only the answered levels are needed, and an offset never moves by more than MOST_STEP for a price, nor
beyond BOUND widths of the forecast's band.

The constants were chosen on markets before their test periods (docs/bands.md).
"""

from collections.abc import Sequence
from math import sqrt

from msgspec import Struct

HOUR, DAY = 3600, 86_400
HOURS = 24
STEP = 0.01  #: of the median for a price of its hour, in widths of the band
COMMON = 0.4  #: share of a step that the offset of all hours takes for an hour's prices
MOST_STEP = 0.15  #: of any level for one price
#: Share of a step that the hours before and after take too. INVARIANT: at most 1/2. With more of it, patterns of hours
#: that alternate would grow instead of shrinking: 1 + 2 * NEIGHBOUR * cos is negative for them.
NEIGHBOUR = 0.5
BOUND = 1.0  #: largest offset, in widths of the band
BAND = 0.8  #: nominal coverage of the band whose width is the unit, where the levels have it
SAME_LEVEL = 1e-5  #: how far 1 - l may be from the level on the other side: clients compute 1 - 0.9


class BandShape(Struct, frozen=True):
    """What two versions of an archive must share for the offsets of one to be true of the other.

    `calibration`: identifies the archive's own offsets, on which these are added; empty if it has none.
    """

    levels: tuple[float, ...]
    step_s: int
    time_zone: str
    calibration: str = ""

    @property
    def rows(self) -> int:
        """How many rows of offsets there are: one for each hour of the day, or one where steps do not divide a day."""
        return HOURS if self.step_s < DAY and DAY % self.step_s == 0 else 1


class Band(Struct, frozen=True):
    """A symmetric pair of levels: their indices and the coverage that they promise."""

    low: int
    high: int
    nominal: float


def list_bands(levels: Sequence[float]) -> list[Band]:
    """List the symmetric pairs of rising levels, the widest first."""
    return [
        Band(low, high, round(1 - 2 * level, 6))
        for low, level in enumerate(levels)
        for high in range(len(levels) - 1, low, -1)
        if level < 0.5 and abs(levels[high] - (1 - level)) <= SAME_LEVEL  # noqa: PLR2004 -- the median
    ]


def choose_unit(levels: Sequence[float]) -> Band | None:
    """Choose the band whose width is the unit of offsets; None for a single level, which has no band."""
    if len(levels) == 1:
        return None
    bands = list_bands(levels)
    if not bands:
        return Band(0, len(levels) - 1, levels[-1] - levels[0])
    return min(bands, key=lambda band: abs(levels[band.high] - levels[band.low] - BAND))


def make_state(shape: BandShape) -> list[float]:
    """Make the state of an archive of which nothing is known: zeros [rows + 1, levels], the last row for all hours."""
    return [0.0] * ((shape.rows + 1) * len(shape.levels))


def sum_offsets(state: Sequence[float], shape: BandShape) -> list[float]:
    """Sum the offsets [rows, levels] of a state. INVARIANT: none is beyond BOUND."""
    width = len(shape.levels)
    common = state[-width:]
    return [_bound(each + common[i % width]) for i, each in enumerate(state[:-width])]


class Steps(Struct, frozen=True):
    """The steps of each level for one price: those of its hour's offset, and of the offset of all hours."""

    hour: tuple[float, ...]
    common: tuple[float, ...]


def choose_steps(shape: BandShape) -> Steps:
    """Choose the steps. Prices of one hour move together, so they share the hour's steps.

    Outer levels take longer steps, because they are missed rarely. Where days have no hours, the offset of all hours
    takes the steps of both.
    """
    hour = min(1.0, shape.step_s / HOUR)
    common = COMMON * min(shape.step_s, DAY) / HOUR
    if shape.rows == 1:
        hour, common = 0.0, common * (1 + (1 + 2 * NEIGHBOUR) / (COMMON * HOURS))
    longest = [MOST_STEP / ((hour + common) * max(level, 1 - level)) for level in shape.levels]
    wanted = [STEP / (2 * sqrt(level * (1 - level))) for level in shape.levels]
    steps = [min(pair) for pair in zip(wanted, longest, strict=True)]
    return Steps(tuple(hour * step for step in steps), tuple(common * step for step in steps))


def move_offsets(
    state: list[float], shape: BandShape, steps: Steps, at: int, levels: Sequence[float], price: float
) -> None:
    """Move the offsets by a price that was observed at `at`, in seconds on the wall clock, and the answered `levels`.

    A level that equals the price, such as one at a floor, stays where it is.
    """
    gradients = [
        0.0 if price == level else promised - 1 if price < level else promised
        for promised, level in zip(shape.levels, levels, strict=True)
    ]
    _move_row(state, shape.rows, gradients, steps.common, 1.0)
    if shape.rows == 1:
        return
    hour = at // HOUR % HOURS
    _move_row(state, hour, gradients, steps.hour, 1.0)
    _move_row(state, (hour - 1) % HOURS, gradients, steps.hour, NEIGHBOUR)
    _move_row(state, (hour + 1) % HOURS, gradients, steps.hour, NEIGHBOUR)


def _move_row(state: list[float], row: int, gradients: Sequence[float], steps: Sequence[float], share: float) -> None:
    at = row * len(gradients)
    for gradient, step in zip(gradients, steps, strict=True):
        state[at] = _bound(state[at] + share * step * gradient)
        at += 1


def _bound(offset: float) -> float:
    return min(BOUND, max(-BOUND, offset))
