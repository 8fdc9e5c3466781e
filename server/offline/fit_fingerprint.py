"""The fingerprint of a fit: equal for fits that would give the same archive, so that the second need not be made."""

from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any

import msgspec

from handlers.training.fit import Fitting, complete_config
from handlers.training.time_series import Series
from model_store.archives.manifest import ForecastSpec
from server.sdk import __version__


def compute_fingerprint(
    series: Series, forecast: ForecastSpec, architecture: str, config: Mapping[str, Any], fitting: Fitting
) -> str:
    """Hash what a fit depends on: rows, recipe, architecture, terms, program; empty with a time limit.

    Which others are fitted along with it is left out: it changes which windows a network draws, not what they are of.
    """
    if fitting.max_seconds < float("inf"):
        return ""
    stamps = (series.start.isoformat(), series.step.total_seconds(), series.zone, series.known_names)
    if forecast.tails:  # what the fit before has learnt of them is no term of this one
        forecast = msgspec.structs.replace(
            forecast, tails=msgspec.structs.replace(forecast.tails, low=1.0, high=1.0, beyond=(0, 0))
        )
    config = complete_config(architecture, dict(config), forecast)
    terms = (architecture, repr(replace(fitting, threads=1)), __version__)
    digest = sha256(repr((stamps, terms)).encode())
    digest.update(msgspec.json.encode((config, forecast), order="sorted"))
    digest.update(series.values.tobytes())
    digest.update(series.known.tobytes())
    return digest.hexdigest()
