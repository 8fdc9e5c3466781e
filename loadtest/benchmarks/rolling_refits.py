"""Fits forecasters again and again to the past of a market, and forecasts the days until the next fit.

A fit calls what `fleetcast train` calls, and its forecasts pass the codec of requests. Every fit is saved in its own
file, so that an interrupted run continues; a change of code, recipe or prices leads to other files.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

import handlers
from handlers.codecs.features import Float64
from handlers.training.fit import (
    Config,
    Fitted,
    Fitting,
    ask_network,
    fit_forecasters,
    make_reference_network,
    suggest_inputs,
)
from handlers.training.input_recipe import LEVELS, Scaling
from handlers.training.time_series import Series, read_csv

MARKETS = ("NP", "PJM", "BE", "FR", "DE")
TIME, TARGET, KNOWN = "datetime_local", "price", ("exog1", "exog2")
DAYS, HOURS = 728, 24  #: the test period of Lago et al. 2021: the last 17,472 hours of a market
EVERY = (728, 364, 91, 28, 7, 1)  #: days between two fits, from rare to daily


@dataclass(frozen=True, slots=True)
class Recipe:
    """The options of a user for `fleetcast train`."""

    name: str
    architecture: str
    members: int = 1
    config: str = "{}"  #: JSON
    epochs: float = 0.0
    scaling: Scaling = "asinh"
    levels: tuple[float, ...] = LEVELS
    parts: str = ""  #: of a mixture with learnt weights, as `--architecture` names them

    @property
    def flags(self) -> list[str]:
        """The flags of the command: the levels, and what differs from its defaults."""
        found = ["--architecture", *([self.parts, "--stack"] if self.parts else [self.architecture])]
        found += ["--members", str(self.members)] if self.members > 1 else []
        found += ["--config", self.config] if self.config != "{}" and not self.parts else []
        found += ["--epochs", f"{self.epochs:g}"] if self.epochs else []
        found += ["--scaling", self.scaling] if self.scaling != "asinh" else []
        return [*found, "--quantiles", ",".join(map(str, self.levels))]

    @property
    def options(self) -> Config:
        """The config that the command makes."""
        return {
            **msgspec.json.decode(self.config, type=Config),
            **({"members": self.members} if self.members > 1 else {}),
        }


class Task(NamedTuple):
    """One fit of a market to all prices before test day `day`; it forecasts `days` days."""

    market: str
    recipe: Recipe
    day: int
    days: int


def schedule_refits(market: str, recipe: Recipe, every: int, first: int = 0) -> Iterator[Task]:
    """List all fits from day `first` on; a fit that a coarser schedule shares forecasts as far as that one needs."""
    for day in range(first, DAYS, every):
        longest = next(each for each in EVERY if (day - first) % each == 0)
        yield Task(market, recipe, day, min(longest, DAYS - day))


@cache
def read_market(data: Path, name: str) -> Series:
    """Read a market with its two covariates. Raises SeriesInvalid, OSError."""
    return read_csv(data / f"{name}.csv.gz", TIME, [TARGET], KNOWN)[0]


def find_period_start(series: Series) -> int:
    """Return the first step of the test period."""
    return len(series.values) - DAYS * HOURS


class Refits:
    """The saved fits in a folder."""

    def __init__(self, data: Path, folder: Path) -> None:
        self._data = data
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __repr__(self) -> str:
        return f"<Refits of {self._data} in {self._folder}>"

    def has(self, task: Task) -> bool:
        """Return whether this or an earlier run finished the task."""
        return self._path(task).exists()

    def done(self, task: Task) -> float:
        """Fit, forecast and save. Returns the seconds of the fit."""
        series = read_market(self._data, task.market)
        first = find_period_start(series) + task.day * HOURS
        started = time.perf_counter()
        fitted = _fit_task(series.before(series.start + first * series.step), task.recipe)
        seconds = time.perf_counter() - started
        quantiles = forecast_days(fitted, series, range(first, first + task.days * HOURS, HOURS))
        path = self._path(task)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, quantiles=quantiles.astype(np.float32), seconds=seconds)
        partial.replace(path)
        return seconds

    def quantiles(self, name: str, recipe: Recipe, every: int, first: int = 0) -> Float64 | None:
        """Return forecasts [days, 24, levels] from day `first` on of fits at this interval; None if one is missing."""
        found = []
        for task in schedule_refits(name, recipe, every, first):
            if not self.has(task):
                return None
            with np.load(self._path(task)) as kept:
                found.append(kept["quantiles"][: min(every, DAYS - task.day)])
        return np.concatenate(found).astype(np.float64)

    def seconds(self, name: str, recipe: Recipe, every: int, first: int = 0) -> float:
        """Return the total seconds of these fits."""
        total = 0.0
        for task in schedule_refits(name, recipe, every, first):
            with np.load(self._path(task)) as kept:
                total += float(kept["seconds"])
        return total

    def _path(self, task: Task) -> Path:
        said = repr((task.recipe, task.days)).encode() + _hash_prices(self._data, task.market) + _hash_code()
        return self._folder / f"{task.market}-{hashlib.sha256(said).hexdigest()[:12]}-{task.day:03d}.npz"


def _fit_task(series: Series, of: Recipe) -> Fitted:
    made = suggest_inputs([series], of.architecture, of.options, HOURS, levels=of.levels, scaling=of.scaling)
    (found,) = fit_forecasters([series], made, of.architecture, of.options, Fitting(of.epochs))
    return found


def forecast_days(fitted: Fitted, series: Series, origins: Sequence[int]) -> Float64:
    """Forecast the day from each origin, [W, 24, levels], each by a request that ends before the origin."""
    network, forecast = make_reference_network(fitted.architecture, fitted.config, fitted.tensors), fitted.forecast
    found = []
    for origin in origins:
        instance = series.instance(origin - forecast.history_length, origin, HOURS)
        request = {"instances": [instance], "configuration": {"output_types": ["quantiles"]}}
        (answer,) = ask_network(network, forecast, request)["predictions"]
        found.append(np.array([answer["quantiles"][f"{level:g}"] for level in forecast.quantile_levels]).T)
    return np.stack(found)


@cache
def _hash_prices(data: Path, name: str) -> bytes:
    return hashlib.sha256((data / f"{name}.csv.gz").read_bytes()).digest()


@cache
def _hash_code() -> bytes:
    """Hash all code that determines the result of a fit."""
    files = sorted(Path(handlers.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).digest()
