"""Owns what was forecast and which prices came: takes forecasts from workers and prices from fronts, and tells bands.

Runs on the supervisor's event loop; what touches the disk runs on a thread. INVARIANT: a price that is acknowledged is
on the disk, and every worker that is up has its offsets, or is named as not having said so.
"""

import asyncio
import contextlib
from array import array
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Protocol

import structlog

from model_store.names import ModelName
from server.bands.book import Book, NoSuchProduct, Price
from server.bands.market import AnsweredForecast, Outcome
from server.errors import Situation
from server.ipc.control import ControlError
from server.ipc.operations import ActualsReply, BandOffsets, KeptLevels, ObservedPrices, PairedCounts
from server.settings import Settings
from server.supervisor.actuals.journal import (
    Event,
    ForecastsAnswered,
    Journal,
    PricesObserved,
    RecordReset,
    apply_event,
)

TAKE_S = 1.0  #: how often workers are asked for the forecasts that clients got
PRICES_AT_ONCE = 100  #: that are paired before the event loop gets its turn
OFF = "this server takes no prices: its operator can set `actuals` to a folder for them"

log = structlog.get_logger()


class WatchedFleet(Protocol):
    """What the service has of the supervisor."""

    async def take_forecasts(self) -> Sequence[KeptLevels]:
        """The forecasts that workers have since the last time."""

    async def announce_bands(self, models: dict[str, list[BandOffsets]], *, whole: bool) -> list[int]:
        """Have all workers shift these markets. Those that have not said so in time."""


class ActualsService:
    """See the module. Without the setting `actuals` there is a book, and it stays empty."""

    def __init__(self, settings: Settings, fleet: WatchedFleet) -> None:
        self.settings, self._fleet = settings, fleet
        self._journal = None if settings.actuals is None else Journal(settings.actuals)
        self.book = Book()
        self.not_kept = 0  #: forecasts for which workers had no room, or the disk
        self.unknown = 0  #: prices of markets that have no record
        self._changing = asyncio.Lock()
        self._adapts = settings.adaptive_bands == "on"

    def __repr__(self) -> str:
        """For example `<ActualsService of 3 markets>`."""
        return f"<ActualsService of {len(self.book.records)} markets>"

    @property
    def is_on(self) -> bool:
        """Whether forecasts and prices are kept."""
        return self._journal is not None

    def open(self) -> None:
        """Read the book. Raises JournalUnreadable."""
        if self._journal is not None:
            self.book = self._journal.open()

    async def keep(self) -> None:
        """Take the forecasts of the workers every second, until cancelled."""
        while self._journal is not None:
            await asyncio.sleep(TAKE_S)
            try:
                async with self._changing:
                    await self._keep_forecasts()
                    await self._shorten()
            except ControlError:  # logged: the disk does not take it now
                continue
            except Exception:  # a bug must not end this for all later forecasts
                log.exception("forecasts_not_kept")

    async def close(self) -> None:
        """Keep the last forecasts, and end the use of the folder."""
        if self._journal is None:
            return
        async with self._changing:
            with contextlib.suppress(ControlError):
                await self._keep_forecasts(sync=True)
            self._journal.close()
            self._journal = None

    async def record(self, items: Sequence[ObservedPrices]) -> ActualsReply:
        """Take observed prices, all or none. Raises ControlError."""
        if self._journal is None:
            raise ControlError(OFF, Situation.FORBIDDEN)
        async with self._changing:
            await self._keep_forecasts()  # so that a price finds a forecast that was answered before it came
            found = [(self._find_market(item), item.prices) for item in items]
            self.unknown += sum(len(prices) for market, prices in found if market is None)
            events = [PricesObserved(market, prices) for market, prices in found if market is not None and prices]
            await self._write(events, sync=True)
            counts = [await self._pair(market, prices) for market, prices in found]
            moved = {market for (market, _), each in zip(found, counts, strict=True) if market and each.paired}
            unheard = await self._announce(moved)
            await self._shorten()
        return ActualsReply(counts, self._adapts, unheard)

    async def reset(self, model: ModelName) -> dict[str, object]:
        """Forget an archive's forecasts, scores and offsets, of all its products; the workers follow.

        Raises ControlError.
        """
        if self._journal is None:
            raise ControlError(OFF, Situation.FORBIDDEN)
        async with self._changing:
            await self._keep_forecasts()
            markets = self.book.list_markets(model)
            if markets:
                await self._write([RecordReset(model)], sync=True)
                self.book.reset(model)
                log.warning("bands_reset", model=model)
            unheard = await self._announce({model, *markets})
        return {"model": model, "reset": bool(markets), **({"unheard_workers": unheard} if unheard else {})}

    def list_bands(self, markets: Iterable[str]) -> dict[str, list[BandOffsets]]:
        """List the offsets of these markets; an empty list for one that has none."""
        if not self._adapts:
            return {}
        return {
            market: [
                BandOffsets(self.book.find_archive(market), record.shape, array("f", record.offsets).tobytes())
                for record in self.book.records.get(market, ())
                if record.total
            ]
            for market in markets
        }

    @contextlib.asynccontextmanager
    async def hold_bands(self) -> AsyncIterator[dict[str, list[BandOffsets]]]:
        """All offsets, which do not change within the context."""
        async with self._changing:
            yield self.list_bands(self.book.records)

    # --- changes ----------------------------------------------------------------------------------------------------

    async def _keep_forecasts(self, *, sync: bool = False) -> None:
        taken = await self._fleet.take_forecasts()
        self.not_kept += sum(each.dropped for each in taken)
        forecasts: list[AnsweredForecast] = [forecast for each in taken for forecast in each.forecasts]
        if not forecasts:
            return
        event = ForecastsAnswered(forecasts, self.settings.actuals_models)
        try:
            await self._write([event], sync=sync)
        except ControlError:
            self.not_kept += len(forecasts)
            raise
        apply_event(self.book, event)

    def _find_market(self, item: ObservedPrices) -> str | None:
        """Find the market of prices; None if there is none. Raises ControlError where it has no such product."""
        try:
            return self.book.find_market(item.model, item.product)
        except NoSuchProduct as error:
            if not item.strict:
                return None
            raise ControlError(f"{error}; no price of the call was taken", Situation.BAD_REQUEST) from None

    async def _pair(self, market: str | None, prices: Sequence[Price]) -> PairedCounts:
        if market is None:
            return PairedCounts(0, 0, len(prices))
        counts = [0, 0, 0]
        for i, price in enumerate(prices):
            counts[self.book.pair(market, price)] += 1
            if i % PRICES_AT_ONCE == PRICES_AT_ONCE - 1:
                await asyncio.sleep(0)
        return PairedCounts(counts[Outcome.PAIRED], counts[Outcome.REPEATED], counts[Outcome.UNMATCHED])

    async def _announce(self, markets: Iterable[str]) -> list[int]:
        bands = self.list_bands(markets)
        return await self._fleet.announce_bands(bands, whole=False) if bands else []

    async def _write(self, events: Sequence[Event], *, sync: bool) -> None:
        """Append to the journal. Raises ControlError; then nothing is changed."""
        assert self._journal is not None, "asked before"
        if not events:
            return
        try:
            await asyncio.to_thread(self._journal.append, events, sync=sync)
        except OSError as error:
            log.error("actuals_not_written", error=str(error))  # noqa: TRY400 -- the disk's fault has no traceback
            message = f"the folder of actuals cannot be written: {error.strerror}; nothing was changed, try again"
            raise ControlError(message, Situation.NOT_READY) from error

    async def _shorten(self) -> None:
        """Write a snapshot where the journal is long. If it cannot be, the journal goes on."""
        if self._journal is None or not self._journal.is_long:
            return
        try:
            await asyncio.to_thread(self._journal.write_snapshot, self.book)
        except OSError as error:
            log.warning("actuals_snapshot_not_written", error=str(error))
