"""A worker's part of adaptive bands: shifts its models' levels as the supervisor says, and keeps what was answered.

On the step thread. The supervisor owns the state (`server.supervisor.actuals`); here is a copy, which it replaces, and
a bounded buffer that it empties every second: what it has taken is kept until it says that it has it. Offsets and
forecasts are of an archive, whichever version of it has answered: one that an alias or a rollback names is a model of
its own here, and goes on with what was learnt. Of an archive of several products the offsets come by product, each a
market with a name of its own (`server.bands.book`).
"""

import time
import uuid
from collections.abc import Callable, Collection, Sequence

import numpy as np

from handlers.base import Float32
from handlers.codecs.calibration import AnsweredLevels
from handlers.codecs.codec import FamilyCodec
from handlers.codecs.deepar import DeepAr
from handlers.codecs.features import parse_step_seconds
from model_store.cache.slots import Slot
from model_store.names import split_version
from server.bands.adaptive_offsets import BandShape
from server.bands.market import MOST_FORECAST_BYTES, AnsweredForecast, name_market
from server.ipc.operations import BandOffsets, KeptLevels

MOST_KEPT_BYTES = 8 * 1024 * 1024  #: of forecasts between two visits of the supervisor
MOST_KEPT = 20_000  #: forecasts, which have some 300 bytes beside their levels

Key = tuple[str, str, int]  #: of a forecast: its archive, version and start


class AdaptiveBands:
    """See the module. `now`: seconds since 1970."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._offsets: dict[str, list[BandOffsets]] = {}  #: by market
        self._equipped: dict[Slot, tuple[DeepAr, BandShape]] = {}
        self._slots: dict[str, list[Slot]] = {}  #: by market
        self._kept: dict[Key, AnsweredForecast] = {}
        self._kept_bytes, self._dropped = 0, 0
        self._handed_over: KeptLevels | None = None  # until its receipt comes

    def __repr__(self) -> str:
        """For example `<AdaptiveBands of 3 models, 7 forecasts kept>`."""
        return f"<AdaptiveBands of {len(self._equipped)} models, {len(self._kept)} forecasts kept>"

    # --- models that come and go ------------------------------------------------------------------------------------

    def equip(self, slot: Slot, codec: FamilyCodec) -> None:
        """Shift the levels of a model that is loaded now, and keep what it answers."""
        deepar = codec.adaptable
        if deepar is None:
            return
        deepar.keeps_levels = True
        self._equipped[slot] = (deepar, find_shape(deepar))
        for market in list_markets(slot, deepar):
            self._slots.setdefault(market, []).append(slot)
        self._adapt(slot)

    def forget(self, slot: Slot) -> None:
        """The slot is retired."""
        found = self._equipped.pop(slot, None)
        if found is None:
            return
        for market in list_markets(slot, found[0]):
            slots = self._slots[market]
            slots.remove(slot)
            if not slots:
                del self._slots[market]

    def follow(self, markets: dict[str, list[BandOffsets]], *, whole: bool) -> None:
        """Shift these markets as told from now on, and no others where it is `whole`."""
        touched = set(markets) | (set(self._offsets) if whole else set())
        if whole:
            self._offsets = {}
        for market, offsets in markets.items():
            self._offsets.pop(market, None)
            if offsets:
                self._offsets[market] = offsets
        for slot in {slot for market in touched for slot in self._slots.get(market, ())}:
            self._adapt(slot)

    def _adapt(self, slot: Slot) -> None:
        """Shift a model by what is known of its products; one of which nothing is known stays as its archive has it."""
        deepar, shape = self._equipped[slot]
        archive, _ = split_version(slot.model)
        found = [self._find_offsets(market, archive, shape) for market in list_markets(slot, deepar)]
        if all(each is None for each in found):
            deepar.adapt(None)
            return
        zeros = np.zeros((shape.rows, len(shape.levels)), np.float32)
        offsets = np.stack([zeros if each is None else each for each in found])
        deepar.adapt(offsets if len(found) > 1 else offsets[0])

    def _find_offsets(self, market: str, archive: str, shape: BandShape) -> Float32 | None:
        """The offsets [rows, levels] for a market of this archive and shape; None if there are none."""
        for each in self._offsets.get(market, ()):
            if (
                each.archive == archive
                and each.shape == shape
                and len(each.offsets) == 4 * shape.rows * len(shape.levels)
            ):
                return np.frombuffer(each.offsets, np.float32).reshape(shape.rows, -1)
        return None

    # --- what was answered ------------------------------------------------------------------------------------------

    def keep(self, slot: Slot, client: str, answered: Sequence[AnsweredLevels]) -> None:
        """Keep the levels that a client has got. Of one model and start the last ones are kept."""
        found = self._equipped.get(slot)
        if found is None:
            return
        (deepar, shape), asked_at, (archive, _) = found, int(self._now()), split_version(slot.model)
        products = list_products(deepar)
        longest = MOST_FORECAST_BYTES * max(1, len(products))  # the supervisor would keep no longer one
        for each in answered:
            forecast = AnsweredForecast(
                archive, slot.version, client, asked_at, shape, each.start, each.quantiles, products
            )
            before = self._kept.pop(_make_key(forecast), None)
            if before is not None:
                self._kept_bytes -= _measure_size(before)
            if len(each.quantiles) > longest or not self._has_room(forecast, len(self._kept)):
                self._dropped += _count_markets(forecast)
                continue
            self._kept_bytes += _measure_size(forecast)
            self._kept[_make_key(forecast)] = forecast

    def take(self, receipts: Collection[str]) -> KeptLevels:
        """Hand over what was kept, in the order in which it was answered: first what has not arrived the last time.

        INVARIANT: a forecast is handed over until its receipt comes, or newer ones need the room.
        """
        if self._handed_over is not None and self._handed_over.receipt not in receipts:
            self._keep_again(self._handed_over)
        taken = KeptLevels(list(self._kept.values()), self._dropped, uuid.uuid4().hex)
        self._kept, self._kept_bytes, self._dropped = {}, 0, 0
        self._handed_over = taken if taken.forecasts or taken.dropped else None
        return taken

    def _keep_again(self, lost: KeptLevels) -> None:
        """Keep what was handed over in vain before what was answered since, the last ones of it as far as they fit."""
        again = list[tuple[Key, AnsweredForecast]]()
        self._dropped += lost.dropped
        for forecast in reversed(lost.forecasts):
            if _make_key(forecast) in self._kept:
                continue
            if not self._has_room(forecast, len(self._kept) + len(again)):
                self._dropped += _count_markets(forecast)
                continue
            self._kept_bytes += _measure_size(forecast)
            again.append((_make_key(forecast), forecast))
        self._kept = {**dict(reversed(again)), **self._kept}

    def _has_room(self, forecast: AnsweredForecast, count: int) -> bool:
        """Whether the forecast fits beside so many."""
        return self._kept_bytes + _measure_size(forecast) <= MOST_KEPT_BYTES and count < MOST_KEPT


def find_shape(deepar: DeepAr) -> BandShape:
    """Find what another version of the archive must share with this one to have its offsets."""
    forecast = deepar.forecast
    step_s = parse_step_seconds(forecast.frequency)
    return BandShape(forecast.quantile_levels, step_s, forecast.time_zone, deepar.calibration_identity)


def list_products(deepar: DeepAr) -> tuple[str, ...]:
    """List the products of an archive of several; none for one."""
    products = deepar.forecast.products
    return products if len(products) > 1 else ()


def list_markets(slot: Slot, deepar: DeepAr) -> list[str]:
    """List the names of a model's markets, in the order of its products: those of its archive, at any version."""
    archive, _ = split_version(slot.model)
    return [name_market(archive, product) for product in list_products(deepar) or ("",)]


def _make_key(forecast: AnsweredForecast) -> Key:
    """What a later forecast shares that takes the place of this one."""
    return forecast.model, forecast.version, forecast.start


def _measure_size(forecast: AnsweredForecast) -> int:
    """The bytes that a forecast is counted with: of its levels, and of its products' names, which travel with it."""
    return len(forecast.quantiles) + sum(map(len, forecast.products))


def _count_markets(forecast: AnsweredForecast) -> int:
    """The markets that it is a forecast of."""
    return max(1, len(forecast.products))
