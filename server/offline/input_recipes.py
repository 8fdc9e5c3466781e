"""Makes the input recipe of each series for `train` and `retrain`. Imports torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from handlers.training.fit import suggest_inputs
from handlers.training.time_series import Series
from model_store.archives.manifest import FLEETCAST_JSON, ForecastSpec
from model_store.errors import ArchiveInvalid


def make_recipes(
    series: Sequence[Series],
    architecture: str,
    config: Mapping[str, Any],
    prediction_length: int,
    context_length: int,
    options: Mapping[str, Any],
) -> list[ForecastSpec]:
    """Make the input recipe of each series; a length of 0 (steps) is chosen by the series' frequency.

    Raises:
        SeriesInvalid: a series cannot be fitted.
        ValueError: the architecture or its configuration is wrong; the message names the flags that give them.
    """
    try:
        return suggest_inputs(series, architecture, config, prediction_length, context_length, **options)
    except ArchiveInvalid as error:  # no archive exists yet, so that the flags are wrong
        said = str(error).removeprefix(f"{FLEETCAST_JSON}: ")
        raise ValueError(f"--architecture, --config: {said}") from error
