"""The lengths, levels, configuration and units of the networks of all fleets, and requests to them. Pure."""

import datetime as dt
import random
from collections.abc import Mapping
from typing import Any

from model_store.archives.manifest import Setting

CONTEXT, PREDICTION, LAG = 168, 24, 144
LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)
CONFIG: Mapping[str, Setting] = {
    "features": 8,  # the target, its lag, six of the calendar
    "context_length": CONTEXT,
    "prediction_length": PREDICTION,
    "quantiles": len(LEVELS),
}
START = "2026-01-01 00:00:00"
ONNX, TRAINED = "onnx", "trained"  #: kinds of model beside the networks
UNITS = {"au": "AUD/MWh", "eu": "EUR/MWh", "us": "USD/MWh"}


def make_request(seed: int, *, steps: int = CONTEXT + LAG, **configuration: Any) -> dict[str, Any]:
    """Make a DeepAR request: `steps` hours of prices with a daily and a weekly shape, noise and a few spikes."""
    rng = random.Random(seed)
    daily = (0, -4, -7, -8, -6, -1, 8, 16, 14, 6, -2, -9, -12, -12, -8, 2, 14, 28, 30, 22, 13, 7, 4, 2)
    target = []
    for hour in range(steps):
        weekend = (hour // 24 + dt.date.fromisoformat(START[:10]).weekday()) % 7 >= 5  # noqa: PLR2004 -- Saturday
        spike = rng.expovariate(1 / 120) if rng.random() < 0.01 else 0.0  # noqa: PLR2004 -- one hour in a hundred
        target.append(round(60 + daily[hour % 24] * (0.5 if weekend else 1.0) + rng.gauss(0, 5) + spike, 2))
    request: dict[str, Any] = {"instances": [{"start": START, "target": target}]}
    return request | ({"configuration": configuration} if configuration else {})
