"""The owner of prices: nothing is changed that is not on the disk, and workers that do not follow are named."""

import asyncio
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from model_store.names import ModelName
from server.bands.adaptive_offsets import HOUR, BandShape
from server.bands.book import Price
from server.bands.market import AnsweredForecast
from server.errors import Situation
from server.ipc.control import ControlError
from server.ipc.operations import BandOffsets, KeptLevels, ObservedPrices, PairedCounts
from server.settings import Settings
from server.supervisor.actuals.service import ActualsService

SHAPE = BandShape((0.1, 0.5, 0.9), HOUR, "UTC")
PRICES = ObservedPrices("m", [Price(hour * HOUR, False, 100.0) for hour in range(24)])


class Fleet:
    """Workers that have answered one forecast; `told` is what they were told last."""

    def __init__(self, silent: list[int] | None = None) -> None:
        levels = struct.pack("<3f", 10.0, 20.0, 30.0) * 24
        self.waiting = [AnsweredForecast("m", "v", "desk", 1, SHAPE, 0, levels)]
        self.told: dict[str, list[BandOffsets]] = {}
        self._silent = silent or []

    async def take_forecasts(self) -> Sequence[KeptLevels]:
        """The forecast, once."""
        taken, self.waiting = self.waiting, []
        return [KeptLevels(taken, 0)]

    async def announce_bands(self, models: dict[str, list[BandOffsets]], *, whole: bool) -> list[int]:
        """Followed by all but the silent ones."""
        del whole
        self.told = models
        return self._silent


def make_service(folder: Path, fleet: Fleet, **settings: object) -> ActualsService:
    """A service that has read its folder."""
    made = ActualsService(Settings.model_validate({"store": "models", "actuals": folder, **settings}), fleet)
    made.open()
    return made


def test_prices_are_paired_told_and_kept(tmp_path: Path) -> None:
    """The forecast that a worker still held is found; offsets go to the workers; a new server has them."""
    fleet = Fleet(silent=[3])

    async def scenario() -> None:
        service = make_service(tmp_path, fleet)
        reply = await service.record([PRICES, ObservedPrices("unknown", PRICES.prices[:2])])
        assert reply.counts == [PairedCounts(24, 0, 0), PairedCounts(0, 0, 2)]
        assert (reply.adapted, reply.unheard) == (True, [3])
        assert (await service.record([PRICES])).counts == [PairedCounts(0, 24, 0)]
        await service.close()
        again = make_service(tmp_path, fleet)
        assert again.book.records == service.book.records
        async with again.hold_bands() as bands:
            assert bands == told
        await again.reset(ModelName("m"))
        assert fleet.told == {"m": []}
        await again.close()

    told: dict[str, list[BandOffsets]] = {}

    async def note() -> None:
        service = make_service(tmp_path / "first", Fleet())
        await service.record([PRICES])
        told.update(service.list_bands(["m"]))
        await service.close()

    asyncio.run(note())
    asyncio.run(scenario())


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 that says so; then the same prices are taken."""

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    async def scenario() -> None:
        service = make_service(tmp_path, Fleet())
        await service.record([])  # the forecast is kept
        with monkeypatch.context() as patch:
            patch.setattr("os.write", fail)
            with pytest.raises(ControlError, match="No space left on device; nothing was changed") as refused:
                await service.record([PRICES])
        assert refused.value.situation == Situation.NOT_READY
        assert service.book.records["m"][0].total == 0
        assert (await service.record([PRICES])).counts == [PairedCounts(24, 0, 0)]
        await service.close()

    asyncio.run(scenario())


def test_watching_alone_changes_no_forecast(tmp_path: Path) -> None:
    """With adaptive bands off prices are scored, and workers are told nothing."""

    async def scenario() -> None:
        fleet = Fleet()
        service = make_service(tmp_path, fleet, adaptive_bands="off")
        reply = await service.record([PRICES])
        assert (reply.counts, reply.adapted, fleet.told) == ([PairedCounts(24, 0, 0)], False, {})
        await service.close()

    asyncio.run(scenario())


def test_without_a_folder_nothing_is_kept() -> None:
    """403 that names the setting."""
    service = ActualsService(Settings.model_validate({"store": "models"}), Fleet())
    service.open()
    with pytest.raises(ControlError, match="`actuals`") as refused:
        asyncio.run(service.record([PRICES]))
    assert refused.value.situation == Situation.FORBIDDEN


LEVELS = struct.pack("<3f", 10.0, 20.0, 30.0) * 24
OF_PRODUCTS = AnsweredForecast("lu", "v", "desk", 1, SHAPE, 0, LEVELS * 2, ("energy", "reserve"))


def test_prices_of_a_product_move_its_bands_alone(tmp_path: Path) -> None:
    """Workers are told of the observed product and not of the other; a new server has both; the operator has the
    archive forgotten with all its products.
    """

    async def scenario() -> None:
        fleet = Fleet()
        fleet.waiting.append(OF_PRODUCTS)
        service = make_service(tmp_path, fleet)
        reply = await service.record([PRICES, ObservedPrices("lu", PRICES.prices, "reserve")])
        assert reply.counts == [PairedCounts(24, 0, 0)] * 2
        assert set(fleet.told) == {"m", "lu#reserve"}
        assert service.list_bands(["lu#energy", "m"])["lu#energy"] == []
        await service.close()
        service = make_service(tmp_path, fleet)
        async with service.hold_bands() as bands:
            assert {market: len(found) for market, found in bands.items()} == {"m": 1, "lu#energy": 0, "lu#reserve": 1}
        again = await service.record([ObservedPrices("lu", PRICES.prices, "reserve")])
        assert again.counts == [PairedCounts(0, 24, 0)]
        assert (await service.reset(ModelName("lu")))["reset"]
        assert fleet.told == {"lu": [], "lu#energy": [], "lu#reserve": []}
        assert set(service.book.records) == {"m"}
        assert (await service.record([ObservedPrices("lu", PRICES.prices, "reserve")])).counts == [
            PairedCounts(0, 0, 24)
        ]
        assert service.unknown == 24
        await service.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("item", [("lu", ""), ("lu", "gas"), ("m", "gas")])
def test_a_product_that_there_is_not_refuses_the_whole_call(tmp_path: Path, item: tuple[str, str]) -> None:
    """400 that names those there are, and no price of the call is taken or counted; for an archive of an alias of
    several it is unmatched instead.
    """
    model, product = item

    async def scenario() -> None:
        fleet = Fleet()
        fleet.waiting.append(OF_PRODUCTS)
        service = make_service(tmp_path, fleet)
        wrong = ObservedPrices(model, PRICES.prices, product)
        with pytest.raises(
            ControlError, match=r"(energy, reserve|leave out).*; no price of the call was taken"
        ) as told:
            await service.record([PRICES, wrong])
        assert told.value.situation == Situation.BAD_REQUEST
        assert (service.book.observed, service.unknown, fleet.told) == ([0, 0, 0], 0, {})
        reply = await service.record([PRICES, ObservedPrices(model, PRICES.prices, product, strict=False)])
        assert reply.counts == [PairedCounts(24, 0, 0), PairedCounts(0, 0, 24)]
        await service.close()

    asyncio.run(scenario())
