"""Synthetic power markets with daily and weekly shape, spikes and negative prices: data for demos, loads and tests."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt

from handlers.forecasters import build_family
from handlers.training.batched_networks import compute_reach
from handlers.training.fit import Fitted, Fitting, Progress, fit_forecasters
from handlers.training.input_recipe import make_recipe
from handlers.training.time_series import Float64, Series

START = datetime.fromisoformat("2025-01-06")  # a Monday, in the market's wall-clock time
DAY, WEEK = 24, 168
KNOWN = 90 * DAY  #: hours of a market to which its model is fitted

#: 200 of the default `tcn` in about 12 s on one core, 8 s on two.
FLEET = Fitting(epochs=2.5, batch=32, learning_rate=8e-3, average=0.98, holdout_windows=24, checks=8, threads=2)


def make_market(index: int, seed: int, steps: int = KNOWN) -> Series:
    """Make hourly prices [steps] of one market; other `steps` give another market."""
    return _make_market(index, np.random.default_rng([seed, index]), steps)


def make_markets(count: int, seed: int, steps: int = KNOWN) -> list[Series]:
    """Make the first `count` markets of a seed, [steps] each."""
    return [make_market(index, seed, steps) for index in range(count)]


def make_training_markets(models: int, seed: int) -> list[Series]:
    """Make the markets of a trained fleet, with one day more than their models are fitted to."""
    return make_markets(models, seed, KNOWN + DAY)


def make_market_request(market: Series) -> tuple[dict[str, Any], list[float]]:
    """Make a request for the model of a synthetic market, and the actual next day, to which no model was fitted."""
    instance = market.instance(KNOWN - 2 * WEEK, KNOWN, DAY)
    return {"instances": [instance]}, market.values[KNOWN : KNOWN + DAY].tolist()


def fit_markets(indices: Sequence[int], seed: int, progress: Progress | None = None) -> list[Fitted]:
    """Fit forecasters of markets of a seed together, on all but their last day."""
    markets = [make_market(index, seed, KNOWN + DAY) for index in indices]
    return fit_fleet([market.before(market.start + KNOWN * market.step) for market in markets], progress=progress)


def fit_fleet(markets: Sequence[Series], unit: str = "EUR/MWh", progress: Progress | None = None) -> list[Fitted]:
    """Fit day-ahead forecasters of the markets together."""
    seen = compute_reach(build_family("tcn", {"context_length": WEEK}))
    forecasts = [make_recipe(each, seen, context_length=WEEK, prediction_length=DAY, unit=unit) for each in markets]
    return fit_forecasters(markets, forecasts, "tcn", {}, FLEET, progress)


def _make_market(index: int, rng: np.random.Generator, steps: int) -> Series:
    hours = np.arange(steps)
    base, swing = rng.uniform(30, 90), rng.uniform(8, 30)
    morning, noon, evening = rng.uniform(7, 9), 12.5, rng.uniform(17.5, 20)
    weekend = np.where(hours % WEEK >= 5 * DAY, rng.uniform(0.5, 0.9), 1.0)
    load = weekend * (_make_hill(hours, morning, 2.0) + 1.6 * _make_hill(hours, evening, 2.5))
    sky = 0.5 + 0.5 / (1 + np.exp(-2 * _draw_drift(rng, steps, 30.0)))  # from cloudy to clear
    solar = rng.uniform(0.2, 2.2) * sky * _make_hill(hours, noon, 2.2)
    wind = 0.8 * _draw_drift(rng, steps, 18.0)
    scarcity = _draw_spikes(rng, _make_hill(hours, evening, 1.5), base)
    prices = base + swing * (load - solar - wind) + rng.normal(0, 0.06 * base, steps) + scarcity
    name = f"market-{index:03d}"
    return Series(name, START, timedelta(hours=1), np.asarray(prices.round(2), np.float64), np.empty((0, steps)))


def _make_hill(hours: npt.NDArray[np.int64] | Float64, center: float, width: float) -> Float64:
    """Make a daily hill."""
    return np.asarray(np.exp(-(((hours % DAY - center) / width) ** 2)), np.float64)


def _draw_drift(rng: np.random.Generator, steps: int, memory: float) -> Float64:
    """Draw a first-order autoregression of variance 1 with a memory of `memory` steps."""
    keep = np.exp(-1 / memory)
    found = rng.normal(0, np.sqrt(1 - keep**2), steps)
    found[0] = rng.normal()
    for i in range(1, steps):
        found[i] += keep * found[i - 1]
    return found


def _draw_spikes(rng: np.random.Generator, odds: Float64, base: float) -> Float64:
    """Draw rare hours of several times the base price, mostly where the odds are near 1; they fade within hours."""
    steps = len(odds)
    jumps = (rng.random(steps) < 0.001 + 0.02 * odds) * base * rng.pareto(2.0, steps).clip(max=20)
    return np.convolve(jumps, 0.5 ** np.arange(6))[:steps]


# --- products that move together ------------------------------------------------------------------------------------

SHARED = 0.75  #: share of the variance of a region that it has in common with the others


def make_coupled_markets(
    regions: Sequence[str], products: Sequence[str], seed: int, steps: int, a_day: int
) -> list[Series]:
    """Make prices of every product in every region, named `region/product`, region by region; `a_day` steps each day.

    The first product is energy. The others are reserves: `raise...` is dear where energy is scarce, any other where it
    abounds. Regions share most of their weather, and reserves of one kind are bought for all of them together.
    """
    rng = np.random.default_rng([seed, len(regions), len(products)])
    hours = np.arange(steps) * DAY / a_day
    wind, sky, luck = (
        _draw_shared_drifts(rng, len(regions), steps, memory * a_day / DAY) for memory in (18.0, 30.0, 4.0)
    )
    bought = {product: _draw_drift(rng, steps, 12.0 * a_day / DAY) for product in products[1:]}
    found = []
    for region, blows, clear, lucky in zip(regions, wind, sky, luck, strict=True):
        base, swing, solar = rng.uniform(50, 80), rng.uniform(22, 34), rng.uniform(0.8, 1.8)
        weekend = np.where(hours % WEEK >= 5 * DAY, 0.75, 1.0)
        load = weekend * (_make_hill(hours, 8.0, 2.0) + 1.6 * _make_hill(hours, 18.5, 2.5))
        sun = solar / (1 + np.exp(-2 * clear)) * _make_hill(hours, 12.5, 2.2)
        scarce = load - sun - 0.4 * blows + 0.25 * lucky
        spikes = _draw_spikes(rng, _make_hill(hours, 18.5, 1.5) * DAY / a_day, base)
        prices = {products[0]: base + swing * scarce + rng.normal(0, 0.03 * base, steps) + spikes}
        for product in products[1:]:
            sign = 1.0 if product.startswith("raise") else -1.0
            own = 0.6 * bought[product] + 0.3 * _draw_drift(rng, steps, 6.0 * a_day / DAY)
            prices[product] = rng.uniform(2, 12) * np.exp(0.45 * sign * scarce + 0.5 * own)
        found += [_make_series(f"{region}/{product}", prices[product], a_day) for product in products]
    return found


def _draw_shared_drifts(rng: np.random.Generator, count: int, steps: int, memory: float) -> list[Float64]:
    """Draw drifts that have SHARED of their variance in common."""
    common = _draw_drift(rng, steps, memory)
    return [SHARED**0.5 * common + (1 - SHARED) ** 0.5 * _draw_drift(rng, steps, memory) for _ in range(count)]


def _make_series(name: str, prices: Float64, a_day: int) -> Series:
    return Series(name, START, timedelta(days=1) / a_day, prices.round(2), np.empty((0, len(prices))))
