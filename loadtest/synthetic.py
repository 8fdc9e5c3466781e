"""Synthetic power markets with daily and weekly shape, spikes and negative prices: data for demos, loads and tests."""

from datetime import datetime, timedelta

import numpy as np

from handlers.recipe import recipe
from handlers.series import Float64, Series
from handlers.training import Fitted, Fitting, Progress, fit

START = datetime(2025, 1, 6)  # noqa: DTZ001 - wall-clock time of the market; a Monday
DAY, WEEK = 24, 168
REGIONS = ("north", "south", "east", "west", "coast", "hills", "lakes", "plains")

#: 240 `tcn` of the default size in about 15 s on two cores.
FLEET = Fitting(epochs=4.0, batch=32, learning_rate=8e-3, average=0.98, holdout_windows=24, checks=8)


def make_markets(count: int, seed: int, steps: int = 90 * DAY) -> list[Series]:
    """Hourly prices of `count` markets, [steps] each, the same for the same seed whatever the count."""
    return [_market(index, np.random.default_rng([seed, index]), steps) for index in range(count)]


def fit_fleet(count: int, seed: int, steps: int = 90 * DAY, progress: Progress | None = None) -> list[Fitted]:
    """Trained forecasters of that many markets, fitted together."""
    markets = make_markets(count, seed, steps)
    forecasts = [recipe(market, 81, context_length=WEEK, prediction_length=DAY, unit="EUR/MWh") for market in markets]
    return fit(markets, forecasts, "tcn", {}, FLEET, progress)


def _market(index: int, rng: np.random.Generator, steps: int) -> Series:
    hours = np.arange(steps)
    base, swing = rng.uniform(30, 90), rng.uniform(8, 30)
    day = np.exp(-(((hours % DAY - rng.uniform(7, 9)) / 2.0) ** 2)) + 1.6 * np.exp(
        -(((hours % DAY - rng.uniform(17.5, 20)) / 2.5) ** 2)
    )
    solar = rng.uniform(0.2, 2.2) * np.exp(-(((hours % DAY - 12.5) / 2.2) ** 2))
    weekend = np.where(hours % WEEK >= 5 * DAY, rng.uniform(0.5, 0.9), 1.0)
    sky = 0.5 + 0.5 / (1 + np.exp(-2 * _drift(rng, steps, 30.0)))  # cloudy to clear, by the day
    wind = _drift(rng, steps, 18.0)
    price = base + swing * (day * weekend - solar * sky - 0.8 * wind) + rng.normal(0, 0.06 * base, steps)
    return Series(
        name=f"{REGIONS[index % len(REGIONS)]}/m{index:03d}",
        start=START,
        step=timedelta(hours=1),
        values=np.round(price + _spikes(rng, hours, base), 2),
        known=np.empty((0, steps)),
    )


def _drift(rng: np.random.Generator, steps: int, hours: float) -> Float64:
    """A stationary first-order autoregression of variance 1 with this memory."""
    keep = np.exp(-1 / hours)
    noise = rng.normal(0, np.sqrt(1 - keep**2), steps)
    found = np.empty(steps)
    last = rng.normal()
    for i in range(steps):
        last = found[i] = keep * last + noise[i]
    return found


def _spikes(rng: np.random.Generator, hours: Float64, base: float) -> Float64:
    """Rare scarcity, mostly in the evening, several times the base price, decaying in hours."""
    odds = np.where((hours % DAY >= 17) & (hours % DAY <= 20), 0.02, 0.001)
    jumps = (rng.random(len(hours)) < odds) * base * rng.pareto(2.0, len(hours)).clip(max=20)
    found = np.convolve(jumps, 0.5 ** np.arange(6))[: len(hours)]
    return np.asarray(found, np.float64)
