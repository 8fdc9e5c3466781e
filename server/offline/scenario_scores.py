"""Scores joint scenarios of past windows: how often the mean of a window lies outside all of them. No torch."""

import numpy as np
import numpy.typing as npt

from handlers.codecs.features import Float64
from handlers.codecs.scenarios import CorrelationModel, Marginal, draw_scenarios_each, load_correlation
from handlers.codecs.tails import ExponentialTails
from handlers.errors import RequestError
from model_store.archives.archive import read_tensors
from model_store.archives.manifest import ForecastSpec
from model_store.names import ModelName
from server.offline.rolling_windows import Unfit, WindowForecasts, fetch_version
from server.settings import Settings
from server.worker.archive_store import open_store

Observed = npt.NDArray[np.bool_]

SCENARIOS = 100  #: of a window; of 101 equally likely means the actual is the first or last one on 2 % of windows


def fetch_correlation(name: ModelName, settings: Settings) -> CorrelationModel:
    """Fetch a correlation archive from the store. Raises LoadError, Unfit for an archive of another kind."""
    source, limits = open_store(settings)
    archive = fetch_version(source, name, limits).archive
    if archive.spec is None or not archive.spec.correlation:
        raise Unfit(f"{name} is no correlation; `fleetcast correlate` makes one")
    return load_correlation(archive.spec.correlation, read_tensors(archive))


def measure_outside(found: WindowForecasts, forecast: ForecastSpec, correlation: CorrelationModel) -> float | None:
    """Measure the share of windows whose mean is outside all SCENARIOS joint scenarios; None if none is observed.

    A mean is of the observed steps. The scenarios of a window are those that a server draws, with the window's number
    as the seed, and with the tail rule of the fit that forecast it. Raises Unfit for a model that the correlation does
    not know.
    """
    outside = list[bool]()
    for window, actual in enumerate(found.actuals):
        observed = ~np.isnan(actual)
        if not observed.any():
            continue
        means = _draw_means(found, forecast, correlation, window, observed)
        mean = float(actual[observed].mean())
        outside.append(not means.min() <= mean <= means.max())
    return sum(outside) / len(outside) if outside else None


def _draw_means(
    found: WindowForecasts, forecast: ForecastSpec, correlation: CorrelationModel, window: int, observed: Observed
) -> Float64:
    """Draw the scenarios of a window, and return their means over the observed steps [SCENARIOS]."""
    values, record = np.sort(found.quantiles[window]), found.refitted[window] if found.refitted else forecast
    marginal = Marginal(found.model, found.levels, values, tails=ExponentialTails.of(record))
    try:
        (drawn,) = draw_scenarios_each([marginal], correlation, SCENARIOS, window)
    except RequestError as error:
        raise Unfit(f"{found.model}: {error.message}") from error
    means: Float64 = drawn[:, observed].astype(np.float64).mean(axis=1)
    return means
