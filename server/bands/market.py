"""What was forecast of one market, which prices came, and what follows: adaptive offsets, scores by day, drift.

A market is an archive of one product, or one product of an archive of several.

Pure, and bounded: see the constants. Times are seconds since 1970 on the archive's wall clock, whose days have 24 hours
(docs/clocks.md). The same calls in the same order always give the same record: the journal relies on it.
"""

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from struct import Struct as Layout

from msgspec import Struct, field
from msgspec.structs import replace

from server.bands.adaptive_offsets import (
    DAY,
    Band,
    BandShape,
    Steps,
    choose_steps,
    choose_unit,
    list_bands,
    make_state,
    move_offsets,
    sum_offsets,
)
from server.bands.drift import Drift

MOST_FORECASTS = 16  #: forecasts kept at a time; the oldest goes
MOST_FORECAST_BYTES = 128 * 1024  #: of their levels together; a forecast of more is not kept
MOST_DAYS = 56  #: days of which scores are kept
MOST_PRICES = 4096  #: prices kept for the naive forecast
MOST_SHAPES = 1024  #: of which steps and bands are remembered
WEEK = 7 * DAY
MONDAY, SATURDAY = 0, 5
THURSDAY = 3  #: the weekday of 1970-01-01
PRODUCT_MARK = "#"  #: between the name of an archive and that of one of its products
LEAST_SHARE = 0.5  #: of a day's steps, before its loss is judged for drift
_PRICE, _FLOAT32 = Layout("<qd"), Layout("<f")


class Outcome(IntEnum):
    """What became of a price."""

    PAIRED = 0  #: it was forecast
    REPEATED = 1  #: its step has one already, which counts: nothing is changed
    UNMATCHED = 2  #: nothing that is kept forecast it


class AnsweredForecast(Struct, frozen=True, array_like=True):
    """One forecast that a client got. `quantiles`: float32 [products?, steps, levels], as they were answered.

    `products`: the names of those of an archive of several, in its order; empty for one. `start`: of its first step.
    `client`: the name of its token or key, empty where the server asks for none; `asked_at`: seconds since 1970, UTC.
    """

    model: str
    version: str
    client: str
    asked_at: int
    shape: BandShape
    start: int
    quantiles: bytes
    products: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """How many steps it has of each product."""
        return len(self.quantiles) // (4 * len(self.shape.levels) * max(1, len(self.products)))

    @property
    def bytes_of_each(self) -> int:
        """The bytes of the levels of one product."""
        return len(self.quantiles) // max(1, len(self.products))

    def split(self) -> "list[AnsweredForecast]":
        """Split it by markets, each under its name (`name_market`)."""
        if not self.products:
            return [self]
        size = self.bytes_of_each
        return [
            replace(
                self,
                model=name_market(self.model, product),
                quantiles=self.quantiles[i * size : (i + 1) * size],
                products=(),
            )
            for i, product in enumerate(self.products)
        ]


def name_market(model: str, product: str) -> str:
    """Name a product of an archive of several as correlations and `calibrate` do, such as `lu.mar#energy`."""
    return f"{model}{PRODUCT_MARK}{product}" if product else model


class KeptForecast(Struct):
    """A forecast that waits for its prices. `paired`: a byte for each step, 1 once its price has come."""

    version: str
    client: str
    asked_at: int
    start: int
    quantiles: bytes
    paired: bytearray


class DayScores(Struct):
    """Sums over the prices of one day. `inside`: by band, as `list_bands` orders them.

    The pinball losses are means over the levels; those `beside` are of the steps that the naive forecast has as well.
    """

    day: int
    count: int = 0
    inside: list[int] = []
    pinball: float = 0.0
    beside: float = 0.0
    naive: float = 0.0
    judged: bool = False


class MarketRecord(Struct):
    """See the module. `state`: of `server.bands.adaptive_offsets`; `used_at`: of the last forecast kept, since 1970."""

    shape: BandShape
    state: list[float]
    used_at: int = 0
    forecasts: list[KeptForecast] = []
    days: list[DayScores] = []
    drift: Drift = field(default_factory=Drift)
    prices: bytearray = field(default_factory=bytearray)
    total: int = 0  #: prices ever paired
    inside: list[int] = []  #: of these, by band
    pinball: float = 0.0

    @property
    def offsets(self) -> list[float]:
        """The offsets of its levels now [rows * levels], in widths of the forecast's band."""
        return sum_offsets(self.state, self.shape)

    def note_forecast(self, answered: AnsweredForecast) -> bool:
        """Keep a forecast. Returns False where one is kept that it overlaps, so that all steps ahead count alike.

        Of forecasts with one start the last one counts, until the first of its prices has come.
        """
        span = answered.steps * self.shape.step_s
        for i, kept in enumerate(self.forecasts):
            if (
                answered.start < kept.start + len(kept.paired) * self.shape.step_s
                and kept.start < answered.start + span
            ):
                if kept.start != answered.start or any(kept.paired):
                    return False
                del self.forecasts[i]
                break
        self.forecasts.append(
            KeptForecast(
                answered.version,
                answered.client,
                answered.asked_at,
                answered.start,
                answered.quantiles,
                bytearray(answered.steps),
            )
        )
        self.used_at = max(self.used_at, answered.asked_at)
        while len(self.forecasts) > MOST_FORECASTS or _count_bytes(self.forecasts) > MOST_FORECAST_BYTES:
            del self.forecasts[0]
        return True

    def pair(self, at: int, price: float) -> Outcome:
        """Take the price that was observed at `at`. Raises OverflowError for one beyond float32.

        It is rounded as levels are, so that a price at a floor equals a level there.
        """
        (price,) = _FLOAT32.unpack(_FLOAT32.pack(price))
        for kept in self.forecasts:
            step, off_grid = divmod(at - kept.start, self.shape.step_s)
            if off_grid or not 0 <= step < len(kept.paired):
                continue
            if kept.paired[step]:
                return Outcome.REPEATED
            kept.paired[step] = 1
            self._learn(at, price, _read_levels(kept.quantiles, step, len(self.shape.levels)))
            return Outcome.PAIRED
        return Outcome.UNMATCHED

    def _learn(self, at: int, price: float, levels: Sequence[float]) -> None:
        self._score(at, price, levels)
        unit = find_unit(self.shape)
        if unit is not None and levels[unit.high] > levels[unit.low]:  # a band without width would not move
            move_offsets(self.state, self.shape, find_steps(self.shape), at, levels, price)

    # --- scores -----------------------------------------------------------------------------------------------------

    def _score(self, at: int, price: float, levels: Sequence[float]) -> None:
        promised = self.shape.levels
        loss = sum(map(_compute_pinball, [price] * len(levels), levels, promised)) / len(levels)
        inside = [int(levels[band.low] <= price <= levels[band.high]) for band in find_bands(self.shape)]
        day = self._open_day(at // DAY)
        for sums in (day.inside, self.inside):
            sums[:] = [a + b for a, b in zip(sums or [0] * len(inside), inside, strict=True)]
        day.count, self.total = day.count + 1, self.total + 1
        day.pinball, self.pinball = day.pinball + loss, self.pinball + loss
        naive = self._find_naive(at)
        if naive is not None:
            day.beside += loss
            day.naive += sum(_compute_pinball(price, naive, level) for level in promised) / len(promised)
        self._keep_price(at, price)

    def _open_day(self, day: int) -> DayScores:
        """Find or begin the scores of a day. Days before a new one are judged for drift, once."""
        for each in reversed(self.days):
            if each.day == day:
                return each
        for each in self.days:
            if each.day < day and not each.judged:
                each.judged = True
                if each.count >= max(1, LEAST_SHARE * DAY / self.shape.step_s):
                    self.drift.judge(each.day, each.pinball / each.count)
        opened = DayScores(day, inside=[0] * len(find_bands(self.shape)))
        self.days.append(opened)
        self.days.sort(key=lambda each: each.day)
        if len(self.days) > MOST_DAYS:
            gone = self.days.pop(0)
            return opened if gone is not opened else DayScores(day, inside=[0] * len(opened.inside))
        return opened

    # --- the naive forecast -----------------------------------------------------------------------------------------

    def _find_naive(self, at: int) -> float | None:
        """Find the price a week before for Saturday, Sunday, Monday and steps of a day, else that a day before."""
        weekday = (at // DAY + THURSDAY) % 7
        lag = WEEK if self.shape.step_s >= DAY or weekday in (MONDAY, SATURDAY, SATURDAY + 1) else DAY
        if not self.prices:
            return None
        index = (at - lag) // self.shape.step_s
        found, price = _PRICE.unpack_from(self.prices, index % self._most_prices * _PRICE.size)
        return price if found == index else None

    def _keep_price(self, at: int, price: float) -> None:
        if not self.prices:
            self.prices = bytearray(_PRICE.pack(-1, 0.0) * self._most_prices)
        index = at // self.shape.step_s
        _PRICE.pack_into(self.prices, index % self._most_prices * _PRICE.size, index, price)

    @property
    def _most_prices(self) -> int:
        """How many prices are kept: those of eight days, where that is not too many."""
        return min(MOST_PRICES, max(8, 8 * DAY // self.shape.step_s))


def open_record(shape: BandShape) -> MarketRecord:
    """Begin the record of a market."""
    return MarketRecord(shape, make_state(shape))


def _count_bytes(forecasts: Sequence[KeptForecast]) -> int:
    return sum(len(each.quantiles) for each in forecasts)


@lru_cache(maxsize=MOST_SHAPES)
def _find_layout(levels: int) -> Layout:
    return Layout(f"<{levels}f")


@lru_cache(maxsize=MOST_SHAPES)
def find_steps(shape: BandShape) -> Steps:
    """Find the steps of this shape's levels."""
    return choose_steps(shape)


@lru_cache(maxsize=MOST_SHAPES)
def find_bands(shape: BandShape) -> list[Band]:
    """Find the bands of this shape's levels, the widest first."""
    return list_bands(shape.levels)


@lru_cache(maxsize=MOST_SHAPES)
def find_unit(shape: BandShape) -> Band | None:
    """Find the band whose width is the unit of this shape's offsets."""
    return choose_unit(shape.levels)


def _read_levels(quantiles: bytes, step: int, levels: int) -> tuple[float, ...]:
    return _find_layout(levels).unpack_from(quantiles, step * levels * 4)


def _compute_pinball(price: float, quantile: float, level: float) -> float:
    error = price - quantile
    return max(level * error, (level - 1) * error)
