"""A worker's part of adaptive bands: shifts its models' levels as the supervisor says, and keeps what was answered.

On the step thread. The supervisor owns the state (`server.supervisor.actuals`); here is a copy, which it replaces, and
a bounded buffer that it empties every second: what it has taken is kept until it says that it has it. Offsets and
forecasts are of an archive, whichever version of it has answered: one that an alias or a rollback names is a model of
its own here, and goes on with what was learnt.
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
from model_store.names import ModelName, split_version
from server.bands.adaptive_offsets import BandShape
from server.bands.market import MOST_FORECAST_BYTES, AnsweredForecast
from server.ipc.operations import BandOffsets, KeptLevels

MOST_KEPT_BYTES = 8 * 1024 * 1024  #: of forecasts between two visits of the supervisor
MOST_KEPT = 20_000  #: forecasts, which have some 300 bytes beside their levels


class AdaptiveBands:
    """See the module. `now`: seconds since 1970."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._offsets: dict[str, list[BandOffsets]] = {}
        self._equipped: dict[Slot, tuple[DeepAr, BandShape]] = {}
        self._slots: dict[ModelName, list[Slot]] = {}
        self._kept: dict[tuple[str, str, int], AnsweredForecast] = {}
        self._kept_bytes, self._dropped = 0, 0
        self._handed_over: KeptLevels | None = None  # until its receipt comes

    def __repr__(self) -> str:
        """For example `<AdaptiveBands of 3 archives, 7 forecasts kept>`."""
        return f"<AdaptiveBands of {len(self._slots)} archives, {len(self._kept)} forecasts kept>"

    # --- models that come and go ------------------------------------------------------------------------------------

    def equip(self, slot: Slot, codec: FamilyCodec) -> None:
        """Shift the levels of a model that is loaded now, and keep what it answers."""
        deepar = codec.adaptable
        if deepar is None:
            return
        deepar.keeps_levels = True
        shape = find_shape(deepar)
        self._equipped[slot] = (deepar, shape)
        archive, _ = split_version(slot.model)
        self._slots.setdefault(archive, []).append(slot)
        deepar.adapt(self._find_offsets(archive, shape))

    def forget(self, slot: Slot) -> None:
        """The slot is retired."""
        if self._equipped.pop(slot, None) is not None:
            archive, _ = split_version(slot.model)
            slots = self._slots[archive]
            slots.remove(slot)
            if not slots:
                del self._slots[archive]

    def follow(self, models: dict[str, list[BandOffsets]], *, whole: bool) -> None:
        """Shift these models as told from now on, and no others where it is `whole`."""
        touched = set(models) | (set(self._offsets) if whole else set())
        if whole:
            self._offsets = {}
        for model, offsets in models.items():
            self._offsets.pop(model, None)
            if offsets:
                self._offsets[model] = offsets
        for model in touched:
            for slot in self._slots.get(ModelName(model), ()):
                deepar, shape = self._equipped[slot]
                deepar.adapt(self._find_offsets(model, shape))

    def _find_offsets(self, model: str, shape: BandShape) -> Float32 | None:
        """The offsets [rows, levels] for an archive of this shape; None if there are none."""
        for each in self._offsets.get(model, ()):
            if each.shape == shape and len(each.offsets) == 4 * shape.rows * len(shape.levels):
                return np.frombuffer(each.offsets, np.float32).reshape(shape.rows, -1)
        return None

    # --- what was answered ------------------------------------------------------------------------------------------

    def keep(self, slot: Slot, client: str, answered: Sequence[AnsweredLevels]) -> None:
        """Keep the levels that a client has got. Of one model and start the last ones are kept."""
        found = self._equipped.get(slot)
        if found is None:
            return
        shape, asked_at, (archive, _) = found[1], int(self._now()), split_version(slot.model)
        for each in answered:
            key = (archive, slot.version, each.start)
            before = self._kept.pop(key, None)
            self._kept_bytes += len(each.quantiles) - (0 if before is None else len(before.quantiles))
            too_long = len(each.quantiles) > MOST_FORECAST_BYTES  # the supervisor would not keep it
            if too_long or self._kept_bytes > MOST_KEPT_BYTES or len(self._kept) >= MOST_KEPT:
                self._kept_bytes -= len(each.quantiles)
                self._dropped += 1
                continue
            self._kept[key] = AnsweredForecast(
                archive, slot.version, client, asked_at, shape, each.start, each.quantiles
            )

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
        again = list[tuple[tuple[str, str, int], AnsweredForecast]]()
        self._dropped += lost.dropped
        for forecast in reversed(lost.forecasts):
            key, size = (forecast.model, forecast.version, forecast.start), len(forecast.quantiles)
            if key in self._kept:
                continue
            if self._kept_bytes + size > MOST_KEPT_BYTES or len(self._kept) + len(again) >= MOST_KEPT:
                self._dropped += 1
                continue
            self._kept_bytes += size
            again.append((key, forecast))
        self._kept = {**dict(reversed(again)), **self._kept}


def find_shape(deepar: DeepAr) -> BandShape:
    """Find what another version of the archive must share with this one to have its offsets."""
    forecast = deepar.forecast
    step_s = parse_step_seconds(forecast.frequency)
    return BandShape(forecast.quantile_levels, step_s, forecast.time_zone, deepar.calibration_identity)
