"""Makes one archive of a fleet: a forecaster with random weights, one fitted to a synthetic market, or an ONNX graph.

Forecasts of random weights mean nothing; everything else is as in a real fleet: DeepAR JSON, calendar and lags, a
scaler for each market, a golden sample computed by the architecture's reference network. Torch; no store.
"""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import msgspec
import numpy as np
import torch

from handlers.base import Family, Float32
from handlers.codecs.codec import JSON, FamilyCodec
from handlers.forecasters import ARCHITECTURES, build_family, random_tensors
from handlers.kinds import ArchiveParts, pack_model
from handlers.training.fit import Fitted
from loadtest.fleets.network_shape import CONFIG, CONTEXT, LAG, LEVELS, ONNX, PREDICTION, TRAINED, UNITS, make_request
from model_store.archives.manifest import ForecastSpec, GoldenSample, InputChannel, Kind, Scaler, Setting

CALENDAR = ("hour_sin", "hour_cos", "weekday_sin", "weekday_cos", "year_sin", "year_cos")
WIDTHS = ("channels", "hidden")  #: config fields that the number in `tcn-64` sets
LADDER = ("tcn-8", "tcn-16", "tcn", "tcn-64", "tcn-128")  #: sizes are rounded to these: few families, full banks
OF_ONNX = "mlp-8"  #: the network that an ONNX archive holds as a graph
OPSET, IR_VERSION = 17, 8  #: of ONNX graphs: what ONNX Runtime 1.20 reads as well as later ones


@dataclass(frozen=True, slots=True)
class Network:
    """A kind's architecture with its config."""

    architecture: str
    config: Mapping[str, Setting]
    family: Family


@cache
def build_network(kind: str) -> Network:
    """Build the network of `tcn`, or of `tcn-64` with another width. Raises ValueError, ArchiveInvalid."""
    architecture, _, width = kind.partition("-")
    known = ARCHITECTURES.get(architecture)
    fields = [] if known is None else [field.name for field in msgspec.structs.fields(known.config)]
    field = next((name for name in WIDTHS if name in fields), None)
    if known is None or (width and (field is None or not width.isdecimal())):
        kinds = ", ".join((*ARCHITECTURES, ONNX, TRAINED))
        raise ValueError(f"there is no family {kind!r}: known are {kinds}, and networks with a width, such as tcn-64")
    config = {**CONFIG, **({field: int(width)} if field and width else {})}
    return Network(architecture, config, build_family(architecture, config))


def check_kind(kind: str) -> None:
    """Check a kind. Raises ValueError if its archives cannot be made here, ArchiveInvalid for an impossible width."""
    if kind == ONNX:
        _import_onnx()
    elif kind != TRAINED:
        build_network(kind)


def compute_size_shares(median: float, sigma: float) -> dict[str, float]:
    """Compute kind -> share for lognormal sizes of the weights around `median` bytes, rounded to LADDER."""
    rungs = [math.log(build_network(kind).family.row_floats * 4) for kind in LADDER]
    law = NormalDist(math.log(median), sigma)
    below = [0.0, *(law.cdf((low + high) / 2) for low, high in pairwise(rungs)), 1.0]
    shares = {kind: high - low for kind, (low, high) in zip(LADDER, pairwise(below), strict=True)}
    return {kind: share for kind, share in shares.items() if share}


def make_archive(kind: str, name: str, seed: int) -> bytes:
    """Make one model with random weights; equal arguments give equal bytes. Raises as `check_kind` does."""
    if kind == ONNX:
        return _make_onnx(name, seed)
    found = build_network(kind)
    tensors = random_tensors(found.family, seed)
    forecast = make_forecast(UNITS.get(name.partition("/")[0], "EUR/MWh"), seed)
    return pack_model(
        Kind.FORECASTER,
        ArchiveParts(tensors=tensors, architecture=found.architecture, config=found.config, forecast=forecast),
        model_name=_strip_suffix(name),
        golden=_make_golden(found.family, tensors, forecast, seed),
        description=f"random weights, seed {seed}: for load tests, not for forecasts",
    )


def pack_fitted(fitted: Fitted, name: str, seed: int) -> bytes:
    """Pack a model that was fitted to a synthetic market of `seed`."""
    return pack_model(
        Kind.FORECASTER,
        ArchiveParts(
            tensors=fitted.tensors, architecture=fitted.architecture, config=fitted.config, forecast=fitted.forecast
        ),
        model_name=_strip_suffix(name),
        golden=fitted.golden,
        description=f"fitted to the synthetic market {fitted.name} of seed {seed}",
    )


def make_forecast(unit: str, seed: int) -> ForecastSpec:
    """Describe a day ahead from a week of hourly prices: the target, its value six days earlier, and the calendar."""
    rng = random.Random(seed)
    calendar = (InputChannel(source="calendar", feature=feature, shift=PREDICTION) for feature in CALENDAR)  # type: ignore[arg-type]
    return ForecastSpec(
        frequency="1h",
        context_length=CONTEXT,
        prediction_length=PREDICTION,
        quantile_levels=LEVELS,
        inputs=(InputChannel(source="target"), InputChannel(source="target", lag=LAG), *calendar),
        unit=unit,
        scaler=Scaler(kind="asinh", center=round(rng.uniform(40, 90), 2), scale=round(rng.uniform(15, 40), 2)),
        tail="clamp",
    )


def _strip_suffix(name: str) -> str:
    return name.removesuffix(".mar").replace("/", "-")


def _make_golden(family: Family, tensors: Mapping[str, Float32], forecast: ForecastSpec, seed: int) -> GoldenSample:
    """Make a request and its answer by the reference network, which shares no code with the batched forward."""
    request = make_request(seed, output_types=["mean", "quantiles"], quantiles=["0.1", "0.5", "0.9"])
    call = FamilyCodec(family, forecast).decode(json.dumps(request).encode(), JSON, JSON)
    answer, _ = call.encode(_compute_answer(family, tensors, call.rows))
    return GoldenSample(request=request, response=json.loads(answer))


def _compute_answer(family: Family, tensors: Mapping[str, Float32], rows: Float32) -> Float32:
    """Run the reference network on rows [N, *input_shape]."""
    reference = family.reference()
    reference.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    with torch.inference_mode():
        found: Float32 = reference(torch.from_numpy(rows)).numpy()
    return found


# --- ONNX -----------------------------------------------------------------------------------------------------------


def _make_onnx(name: str, seed: int) -> bytes:
    """Make the archive of a perceptron as an ONNX graph, which takes and gives tensors."""
    family = build_network(OF_ONNX).family
    tensors = random_tensors(family, seed)
    x = np.random.default_rng(seed).normal(size=family.input_shape).astype(np.float32).round(3)
    return pack_model(
        Kind.ONNX,
        ArchiveParts(program=_build_graph(family, tensors)),
        model_name=_strip_suffix(name),
        golden=GoldenSample(
            request={"x": x.tolist()}, response={"predictions": _compute_answer(family, tensors, x[None])[0].tolist()}
        ),
        description=f"random weights, seed {seed}: for load tests, not for forecasts",
    )


def _build_graph(family: Family, tensors: Mapping[str, Float32]) -> bytes:
    """Build the perceptron x [n, features, context] -> y [n, prediction, quantiles] with an open batch axis."""
    onnx = _import_onnx()
    helper, kinds = onnx.helper, onnx.TensorProto
    layers = [("x0", "first", "h1"), ("x1", "second", "h2"), ("x2", "head", "h3")]
    nodes = [helper.make_node("Flatten", ["x"], ["x0"])]
    for i, (taken, layer, given) in enumerate(layers):
        nodes.append(helper.make_node("Gemm", [taken, f"{layer}.weight", f"{layer}.bias"], [given], transB=1))
        last = ("Reshape", [given, "shape"], ["y"])
        nodes.append(helper.make_node(*last if i == len(layers) - 1 else ("Relu", [given], [f"x{i + 1}"])))
    constants = [helper.make_tensor(key, kinds.FLOAT, each.shape, each.ravel()) for key, each in tensors.items()]
    constants.append(helper.make_tensor("shape", kinds.INT64, [3], [-1, *family.output_shape]))
    x = helper.make_tensor_value_info("x", kinds.FLOAT, ["n", *family.input_shape])
    y = helper.make_tensor_value_info("y", kinds.FLOAT, ["n", *family.output_shape])
    graph = helper.make_graph(nodes, "perceptron", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    packed: bytes = model.SerializeToString(deterministic=True)
    return packed


def _import_onnx() -> Any:
    """Import the onnx package, which only the writing of graphs needs."""
    try:
        return import_module("onnx")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"a fleet with {ONNX!r} archives needs the package that writes them: pip install onnx"
        ) from error
