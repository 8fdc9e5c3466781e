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
from server.bands.book import Book, Price
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
        """Have all workers shift these archives. Those that have not said so in time."""


class ActualsService:
    """See the module. Without the setting `actuals` there is a book, and it stays empty."""

    def __init__(self, settings: Settings, fleet: WatchedFleet) -> None:
        self.settings, self._fleet = settings, fleet
        self._journal = None if settings.actuals is None else Journal(settings.actuals)
        self.book = Book()
        self.not_kept = 0  #: forecasts for which workers had no room, or the disk
        self.unknown = 0  #: prices of archives that have no record
        self._changing = asyncio.Lock()
        self._adapts = settings.adaptive_bands == "on"

    def __repr__(self) -> str:
        """For example `<ActualsService of 3 archives>`."""
        return f"<ActualsService of {len(self.book.records)} archives>"

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
            known = [item for item in items if item.prices and item.model in self.book.records]
            self.unknown += sum(len(item.prices) for item in items if item.model not in self.book.records)
            await self._write([PricesObserved(item.model, item.prices) for item in known], sync=True)
            counts = [await self._pair(item.model, item.prices) for item in items]
            models = {item.model for item, count in zip(items, counts, strict=True) if count.paired}
            unheard = await self._announce(models)
            await self._shorten()
        return ActualsReply(counts, self._adapts, unheard)

    async def reset(self, model: ModelName) -> dict[str, object]:
        """Forget an archive's forecasts, scores and offsets; the workers follow. Raises ControlError."""
        if self._journal is None:
            raise ControlError(OFF, Situation.FORBIDDEN)
        async with self._changing:
            await self._keep_forecasts()
            there = model in self.book.records
            if there:
                await self._write([RecordReset(model)], sync=True)
                self.book.reset(model)
                log.warning("bands_reset", model=model)
            unheard = await self._announce({model})
        return {"model": model, "reset": there, **({"unheard_workers": unheard} if unheard else {})}

    def list_bands(self, models: Iterable[str]) -> dict[str, list[BandOffsets]]:
        """List the offsets of these archives; an empty list for one that has none."""
        if not self._adapts:
            return {}
        return {
            model: [
                BandOffsets(record.shape, array("f", record.offsets).tobytes())
                for record in self.book.records.get(model, ())
                if record.total
            ]
            for model in models
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

    async def _pair(self, model: str, prices: Sequence[Price]) -> PairedCounts:
        if model not in self.book.records:
            return PairedCounts(0, 0, len(prices))
        counts = [0, 0, 0]
        for i, price in enumerate(prices):
            counts[self.book.pair(model, price)] += 1
            if i % PRICES_AT_ONCE == PRICES_AT_ONCE - 1:
                await asyncio.sleep(0)
        return PairedCounts(counts[Outcome.PAIRED], counts[Outcome.REPEATED], counts[Outcome.UNMATCHED])

    async def _announce(self, models: Iterable[str]) -> list[int]:
        bands = self.list_bands(models)
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
