"""Examples are answered by the codec of the archive that they were made for."""

import json
from typing import Any

import pytest
from msgspec.structs import replace

from handlers.codecs.codec import describe_recipe
from handlers.codecs.deepar import DeepAr
from model_store.archives.manifest import ForecastSpec, InputChannel, Scaler
from server.routes.example_requests import NoExample, make_example, make_forecast_example, make_tensor_example

PLAIN = ForecastSpec(
    frequency="1h",
    context_length=24,
    prediction_length=6,
    quantile_levels=(0.1, 0.9),
    inputs=(InputChannel(source="target", lag=3),),
    tail="clamp",
)
CHANNELS = (
    InputChannel(source="target"),
    InputChannel(source="target", product=1),
    InputChannel(source="dynamic_feat", index=1),
    InputChannel(source="static"),
)
RICH = replace(
    PLAIN,
    frequency="30min",
    origin="23:30",
    time_zone="Australia/Sydney",
    products=("energy", "reserve"),
    scalers=(Scaler(), Scaler()),
    dynamic_feat=("load", "wind"),
    cat=("zone",),
    inputs=CHANNELS,
)


@pytest.mark.parametrize(
    "forecast",
    [PLAIN, RICH, replace(PLAIN, frequency="1D"), replace(PLAIN, frequency="7h"), replace(PLAIN, origin="06:00")],
    ids=lambda forecast: f"{forecast.frequency} from {forecast.origin or 'any time'}",
)
def test_an_example_is_answered(forecast: ForecastSpec) -> None:
    """Of each form of archive, also after it has gone over the wire."""
    recipe = json.loads(json.dumps(describe_recipe(forecast)))
    rows, _ = DeepAr(forecast).decode(json.dumps(make_forecast_example(recipe)).encode())
    assert rows.shape == (1, len(forecast.inputs), 24)
    assert make_example({"parameters": {"forecast": recipe}}) == make_forecast_example(recipe)


def test_examples_of_tensors_have_their_shapes() -> None:
    """Open lengths are one; the axis of rows is left out."""
    assert make_tensor_example({"x": [2, -1], "y": []}) == {"x": [[0.0], [0.0]], "y": 0.0}
    assert make_example({"inputs": [{"name": "x", "shape": [-1, 2], "datatype": "FP32"}]}) == {"x": [0.0, 0.0]}


@pytest.mark.parametrize(
    "metadata",
    [
        {"inputs": [{"name": "body", "shape": [-1, 1], "datatype": "BYTES"}]},
        {"inputs": [{"name": "x", "shape": [-1, 10_000_000], "datatype": "FP32"}]},
        {"parameters": {"forecast": {**describe_recipe(PLAIN), "history_length": 10**9}}},
        {"parameters": {"forecast": {}}},
        {},
    ],
)
def test_what_has_no_example(metadata: dict[str, Any]) -> None:
    """Code's bytes, more numbers than anybody pastes, and descriptions of something else."""
    with pytest.raises(NoExample):
        make_example(metadata)
