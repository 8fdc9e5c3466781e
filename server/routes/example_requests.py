"""Example bodies that a model answers: made of what it says it wants, with invented numbers. Pure, without torch.

Runs in the supervisor (`GET /fleet/models/MODEL`) and in the command line (`fleetcast invoke --example`, `inspect`).
"""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

MOST_NUMBERS = 50_000  #: of an example; a model that wants more gets none
DAY = 24  #: steps of the invented wave
FIRST = datetime(2026, 1, 5)  # noqa: DTZ001 -- a Monday, on the clock of the archive


class NoExample(ValueError):
    """The description does not say enough, or the body would be too long."""


def make_forecast_example(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Make a body of DeepAR JSON of one instance, of a description as `handlers.codecs.codec.describe_recipe` gives it.

    Its forecast begins at the archive's time of day. Raises NoExample.
    """
    try:
        history, ahead = int(recipe["history_length"]), int(recipe["prediction_length"])
        products, covariates, categories = recipe["products"], recipe["dynamic_feat"], recipe["cat"]
        step = timedelta(seconds=int(recipe["step_s"]))
    except (KeyError, TypeError, ValueError):
        raise NoExample("the description of the model does not say what a forecast needs") from None
    numbers = history * len(products) + (history + ahead) * len(covariates)
    if numbers > MOST_NUMBERS:
        raise NoExample(f"a request has {numbers} numbers, and examples at most {MOST_NUMBERS}")
    origin = recipe.get("origin", "any")
    hour, _, minute = ("00:00" if origin == "any" else str(origin)).partition(":")
    start = FIRST + timedelta(hours=int(hour), minutes=int(minute)) - history * step
    series = [_make_wave(history, i) for i in range(len(products))]
    instance: dict[str, Any] = {"start": start.isoformat(" ", "seconds")}
    instance["target"] = series if len(products) > 1 else series[0]
    if categories:
        instance["cat"] = [0] * len(categories)
    if covariates:
        instance["dynamic_feat"] = [_make_wave(history + ahead, i) for i in range(len(covariates))]
    return {"instances": [instance]}


def make_tensor_example(inputs: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Make a body of tensor JSON: zeros of these shapes, of which an open length (-1) is one. Raises NoExample."""
    shapes = {name: [1 if length == -1 else length for length in shape] for name, shape in inputs.items()}
    if sum(math.prod(shape) for shape in shapes.values()) > MOST_NUMBERS:
        raise NoExample(f"a request has more numbers than examples, which have at most {MOST_NUMBERS}")
    return {name: _nest_zeros(shape) for name, shape in shapes.items()}


def make_example(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Make a body for a model of which this is the metadata of the Open Inference Protocol. Raises NoExample."""
    recipe = metadata.get("parameters", {}).get("forecast")
    if recipe is not None:
        return make_forecast_example(recipe)
    inputs = metadata.get("inputs", [])
    if not inputs or any(each.get("datatype") == "BYTES" for each in inputs):
        raise NoExample("the model takes bytes of which only its code knows the meaning")
    return make_tensor_example({each["name"]: each["shape"][1:] for each in inputs})


def _make_wave(length: int, phase: int) -> list[float]:
    return [round(50 + 10 * math.sin(2 * math.pi * (i + phase) / DAY), 2) for i in range(length)]


def _nest_zeros(shape: Sequence[int]) -> Any:
    return 0.0 if not shape else [_nest_zeros(shape[1:]) for _ in range(shape[0])]
