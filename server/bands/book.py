"""The records of all archives (`server.bands.market`), by the name that workers have for each. Pure, and bounded.

An archive whose new version has another shape (levels, step, zone, or a calibration of its own) begins with offsets of
zero, because those of the old one are not true of it; one of the same shape goes on with what was learnt. The record of
the old shape stays until a third one comes: while versions swap, or after a rollback, each has its own.
"""

from datetime import UTC, datetime
from enum import IntEnum
from functools import lru_cache
from zoneinfo import ZoneInfo

from msgspec import Struct, field

from server.bands.market import MOST_FORECAST_BYTES, AnsweredForecast, MarketRecord, Outcome, open_record

MOST_SHAPES = 2  #: of one archive, of which records are kept
_EPOCH = datetime.fromisoformat("1970-01-01")


class Kept(IntEnum):
    """What became of a forecast."""

    KEPT = 0
    OVERLAPPING = 1
    DROPPED = 2


class Price(Struct, frozen=True, array_like=True):
    """An observed price. `at`: seconds since 1970, UTC or on the wall clock of the archive's zone."""

    at: int
    is_utc: bool
    price: float


class Book(Struct):
    """See the module. `observed`: prices by outcome; `forecasts`: forecasts by what became of them."""

    records: dict[str, list[MarketRecord]] = field(default_factory=dict)
    observed: list[int] = field(default_factory=lambda: [0, 0, 0])
    forecasts: list[int] = field(default_factory=lambda: [0, 0, 0])

    def note_forecast(self, answered: AnsweredForecast, most_models: int) -> Kept:
        """Keep a forecast that a client got, unless `most_models` others have records already."""
        if len(answered.quantiles) > MOST_FORECAST_BYTES:
            return self._count(Kept.DROPPED)
        records = self.records.get(answered.model)
        if records is None:
            if len(self.records) >= most_models:
                return self._count(Kept.DROPPED)
            records = self.records[answered.model] = []
        record = next((each for each in records if each.shape == answered.shape), None)
        if record is None:
            record = open_record(answered.shape)
            if len(records) >= MOST_SHAPES:
                records.remove(min(records, key=lambda each: each.used_at))
            records.append(record)
        return self._count(Kept.KEPT if record.note_forecast(answered) else Kept.OVERLAPPING)

    def _count(self, kept: Kept) -> Kept:
        self.forecasts[kept] += 1
        return kept

    def pair(self, model: str, price: Price) -> Outcome:
        """Take an observed price; each shape's forecasts are paired with it."""
        found = Outcome.UNMATCHED
        for record in self.records.get(model, ()):
            at = find_wall_time(price, record.shape.time_zone)
            if at is not None:
                found = min(found, record.pair(at, price.price), key=_RANK.index)
        self.observed[found] += 1
        return found

    def reset(self, model: str) -> bool:
        """Forget all of an archive. Returns whether there was anything."""
        return self.records.pop(model, None) is not None


_RANK = (Outcome.PAIRED, Outcome.REPEATED, Outcome.UNMATCHED)


@lru_cache(maxsize=256)
def _find_zone(name: str) -> ZoneInfo | None:
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError):
        return None


def find_wall_time(price: Price, zone: str) -> int | None:
    """Find the wall-clock seconds of a price in an archive's zone; None beyond the calendar, or for no zone."""
    if not price.is_utc:
        return price.at
    found = _find_zone(zone)
    if found is None:
        return None
    try:
        wall = datetime.fromtimestamp(price.at, UTC).astimezone(found).replace(tzinfo=None)
    except (ValueError, OverflowError, OSError):
        return None
    return round((wall - _EPOCH).total_seconds())
