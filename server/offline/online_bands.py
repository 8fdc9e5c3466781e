"""What adaptive bands would have done: replays a backtest's windows as a server with `actuals` lives them. Pure numpy.

Before each window the record of `server.bands` gets all prices that were known at its start, as if a client had sent
them; the window's levels are then shifted by the offsets of that moment, and joint scenarios are drawn from these. Of
sample paths the quantiles are shifted, which differs a little from shifting each path by its rank.
"""

from dataclasses import dataclass, replace

import numpy as np

from handlers.base import Float32
from handlers.codecs.calibration import count_rows
from handlers.codecs.features import Float64
from handlers.codecs.scenarios import CorrelationModel
from handlers.evaluation.conformal import shift_levels
from handlers.evaluation.scores import compute_pinball
from handlers.training.tails import TooFewScores
from model_store.archives.manifest import ForecastSpec
from server.bands.adaptive_offsets import BandShape, list_bands
from server.bands.market import AnsweredForecast, MarketRecord, open_record
from server.offline.rolling_windows import (
    ArchiveVersion,
    Unfit,
    WindowForecasts,
    list_hours_of_windows,
)
from server.offline.scenario_scores import measure_outside


@dataclass(frozen=True, slots=True)
class BandScore:
    """The share of prices inside one band, without and with adaptive offsets."""

    nominal: float
    fixed: float
    adaptive: float


@dataclass(frozen=True, slots=True)
class OnlineScores:
    """What adaptive bands change: coverage by band, the widest first, the mean pinball loss, and the days of alarms.

    `outside_scenarios`: the share of windows whose mean lies outside all joint scenarios of the moved levels, which are
    those that a server draws; None if there are none.
    """

    bands: list[BandScore]
    pinball_fixed: float
    pinball_adaptive: float
    drift_alarms: int
    outside_scenarios: float | None = None


def score_replay(
    model: ArchiveVersion,
    found: WindowForecasts,
    raw: WindowForecasts,
    base: Float32 | None,
    correlation: CorrelationModel | None = None,
) -> OnlineScores:
    """Replay windows `raw` without calibration on top of the offsets `base`, beside what was forecast. Raises Unfit."""
    forecast = model.forecast_of_any
    try:
        adapted = replay_windows(raw, forecast, base)
    except TooFewScores as error:
        raise Unfit(f"{model.name}: {error}") from error
    y, levels = found.actuals, found.levels
    known = ~np.isnan(y)
    bands = [
        BandScore(
            band.nominal,
            *(
                float(((q[..., band.low] <= y) & (y <= q[..., band.high]))[known].mean())
                for q in (found.quantiles, adapted.quantiles)
            ),
        )
        for band in list_bands(levels.tolist())
    ]
    fixed, adaptive = (float(compute_pinball(y, q, levels)[known].mean()) for q in (found.quantiles, adapted.quantiles))
    outside = None
    if correlation is not None:
        outside = measure_outside(replace(found, quantiles=adapted.quantiles), forecast, correlation)
    return OnlineScores(bands, fixed, adaptive, adapted.record.drift.alarms, outside)


@dataclass(frozen=True, slots=True)
class Replayed:
    """The levels that would have been answered [W, H, levels], and the record after the last window."""

    quantiles: Float64
    record: MarketRecord


def replay_windows(raw: WindowForecasts, forecast: ForecastSpec, base: Float32 | None) -> Replayed:
    """Replay windows of levels `raw` that are not calibrated; `base`: the archive's own offsets, on which others come.

    Raises TooFewScores for a single level, which has no band.
    """
    step_s = round(raw.series.step.total_seconds())
    shape = BandShape(tuple(raw.levels.tolist()), step_s, forecast.time_zone)
    record, rows = open_record(shape), count_rows(step_s)
    fixed = np.zeros((rows, len(raw.levels)), np.float32) if base is None else base
    hours, values = list_hours_of_windows(raw), raw.series.values
    begin = int(np.datetime64(raw.series.start, "s").astype(np.int64))
    answered, at = np.empty_like(raw.quantiles), int(raw.origins[0])
    for i, origin in enumerate(raw.origins.tolist()):
        for step in range(at, origin):
            if not np.isnan(values[step]):
                record.pair(begin + step * step_s, float(values[step]))
        at = origin
        offsets = fixed + np.array(record.offsets, np.float32).reshape(rows, -1)
        shifted = shift_levels(raw.quantiles[i : i + 1], raw.levels, offsets, hours[i : i + 1])[0]
        if forecast.floor is not None or forecast.cap is not None:
            shifted = np.clip(shifted, forecast.floor, forecast.cap)
        answered[i] = shifted
        levels = shifted.astype(np.float32).tobytes()
        record.note_forecast(AnsweredForecast(raw.model, "", "", 0, shape, begin + origin * step_s, levels))
    return Replayed(answered, record)
