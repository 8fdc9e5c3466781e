"""The records of all markets (`server.bands.market`), by name. Pure, and bounded.

A market is an archive of one product, under the archive's name, or a product of an archive of several (`name_market`):
each has a record of its own, and counts as one. An archive whose new version has another shape (levels, step, zone, or
a calibration of its own) begins with offsets of zero, because those of the old one are not true of it; one of the same
shape goes on with what was learnt. The record of the old shape stays until a third one comes: while versions swap, or
after a rollback, each has its own. Products that a new version no longer has keep their records, as archives that are
gone do, until an operator has the archive forgotten.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from enum import IntEnum
from functools import lru_cache
from zoneinfo import ZoneInfo

from msgspec import Struct, field

from server.bands.market import (
    MOST_FORECAST_BYTES,
    PRODUCT_MARK,
    AnsweredForecast,
    MarketRecord,
    Outcome,
    name_market,
    open_record,
)

MOST_SHAPES = 2  #: of one market, of which records are kept
MOST_NAMED = 10  #: products that a message names
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


class NoSuchProduct(ValueError):
    """The price is of no product that the archive has; the message names those that it has."""


class Book(Struct):
    """See the module. `observed`: prices by outcome; `forecasts`: forecasts of a market by what became of them.

    `products`: those that have records, by archive of several. INVARIANT: each of these has its record in `records`.
    """

    records: dict[str, list[MarketRecord]] = field(default_factory=dict)
    observed: list[int] = field(default_factory=lambda: [0, 0, 0])
    forecasts: list[int] = field(default_factory=lambda: [0, 0, 0])
    products: dict[str, list[str]] = field(default_factory=dict)

    # --- forecasts --------------------------------------------------------------------------------------------------

    def note_forecast(self, answered: AnsweredForecast, most_models: int) -> Kept:
        """Keep a forecast that a client got, of each of its products. Returns the worst that became of one.

        A market without a record gets one unless `most_models` others have records already; of the products of an
        archive all that have none yet get theirs, or none of them does.
        """
        is_small = answered.bytes_of_each <= MOST_FORECAST_BYTES
        if is_small:
            self._open_markets(answered.model, answered.products, most_models)
        worst = Kept.KEPT
        for product, each in zip(answered.products or ("",), answered.split(), strict=True):
            keeps = is_small and self._has_market(answered.model, product)
            kept = self._note_market(each) if keeps else Kept.DROPPED
            self.forecasts[kept] += 1
            worst = max(worst, kept)
        return worst

    def _open_markets(self, model: str, products: Sequence[str], most_models: int) -> None:
        """Open the markets of an archive that have no records yet, if there is room for all of them.

        A name that is there already is another archive's own, whose name has the mark of products: then none is opened.
        """
        new = [product for product in products or ("",) if not self._has_market(model, product)]
        names = [name_market(model, product) for product in new]
        if len(self.records) + len(names) > most_models or any(name in self.records for name in names):
            return
        for name in names:
            self.records[name] = []
        if products and new:
            self.products[model] = [*self.products.get(model, ()), *new]

    def _has_market(self, model: str, product: str = "") -> bool:
        """Whether there is a record of this product of the archive, or of the archive as one of one product."""
        if product:
            return product in self.products.get(model, ())
        return model in self.records and self.find_archive(model) == model

    def find_archive(self, market: str) -> str:
        """Find the archive of a market that has a record."""
        at = market.find(PRODUCT_MARK)
        while at >= 0:
            if market[at + 1 :] in self.products.get(market[:at], ()):
                return market[:at]
            at = market.find(PRODUCT_MARK, at + 1)
        return market

    def _note_market(self, answered: AnsweredForecast) -> Kept:
        records = self.records[answered.model]
        record = next((each for each in records if each.shape == answered.shape), None)
        if record is None:
            record = open_record(answered.shape)
            if len(records) >= MOST_SHAPES:
                records.remove(min(records, key=lambda each: each.used_at))
            records.append(record)
        return Kept.KEPT if record.note_forecast(answered) else Kept.OVERLAPPING

    # --- prices -----------------------------------------------------------------------------------------------------

    def find_market(self, model: str, product: str = "") -> str | None:
        """Find the name of the market that prices are of; None where nothing of the archive is known.

        Raises NoSuchProduct where the archive has others, or has several and none is named.
        """
        there = self.products.get(model, ())
        if self._has_market(model, product):
            return name_market(model, product)
        if product and there:
            raise NoSuchProduct(f"{model} has no product {product!r}; it has {_list_names(there)}")
        if there:
            raise NoSuchProduct(f"{model} has several products; name one as `product`: {_list_names(there)}")
        if product and self._has_market(model):
            raise NoSuchProduct(f"{model} has one product, not {product!r} beside others; leave out `product`")
        return None

    def list_markets(self, model: str) -> list[str]:
        """List the names of the markets of an archive that have records."""
        alone = [model] if self._has_market(model) else []
        return alone + [name_market(model, product) for product in self.products.get(model, ())]

    def pair(self, market: str, price: Price) -> Outcome:
        """Take an observed price; each shape's forecasts are paired with it."""
        found = Outcome.UNMATCHED
        for record in self.records.get(market, ()):
            at = find_wall_time(price, record.shape.time_zone)
            if at is not None:
                found = min(found, record.pair(at, price.price), key=_RANK.index)
        self.observed[found] += 1
        return found

    def reset(self, model: str) -> bool:
        """Forget all of an archive, with all of its products. Returns whether there was anything."""
        markets = self.list_markets(model)
        for market in markets:
            del self.records[market]
        self.products.pop(model, None)
        return bool(markets)


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


def _list_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{', '.join(names[:MOST_NAMED])}{more}"
