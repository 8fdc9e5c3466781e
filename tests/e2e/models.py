"""Archives to serve and requests for them, each with the answer of the plain `nn.Module`.

Nothing of the batched forward is used for what is expected: it is the reference network's own forward on the inputs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper
from torch import nn

from handlers.forecasters import build_family, random_tensors
from handlers.kinds import ArchiveParts, pack_model
from model_store.archives.manifest import ForecastSpec, InputChannel, Kind, Scaler, Setting

Float32 = npt.NDArray[np.float32]
Config = Mapping[str, Setting]

SHAPES: Config = {"features": 3, "context_length": 12, "prediction_length": 4, "quantiles": 3}
SMALL_TCN: Config = {**SHAPES, "channels": 16, "layers": 2}
SMALL_MLP: Config = {**SHAPES, "hidden": 32}
FORECAST_TCN: Config = {**SMALL_TCN, "features": 1}
LEVELS = (0.1, 0.5, 0.9)
CENTER, SCALE = 50.0, 20.0
ABSOLUTE, RELATIVE = 1e-5, 1e-4


@dataclass(frozen=True)
class Question:
    """A request body for `model` and what it must be answered: [prediction_length, quantiles]."""

    model: str
    body: bytes
    expected: Float32

    def check(self, answer: bytes) -> None:
        """Raises AssertionError unless the answer is right, abs <= 1e-5 + 1e-4 |expected|."""
        predictions = json.loads(answer)["predictions"]
        if isinstance(predictions[0], dict):
            quantiles = predictions[0]["quantiles"]
            predictions = np.array([quantiles[str(level)] for level in LEVELS]).T
        np.testing.assert_allclose(np.array(predictions), self.expected, rtol=RELATIVE, atol=ABSOLUTE)


@dataclass(frozen=True)
class Model:
    """One archive: its name, its bytes, the network in it, and that network's input shape."""

    name: str
    data: bytes
    network: nn.Module
    shape: tuple[int, ...]
    forecast: bool = False

    def question(self, seed: int) -> Question:
        """A request of seeded numbers, tensors or a DeepAR series."""
        rng = np.random.default_rng(seed)
        if self.forecast:
            target = np.round(CENTER + SCALE * rng.normal(size=self.shape[1]), 2)
            request: dict[str, Any] = {
                "instances": [{"start": "2026-01-01 00:00:00", "target": target.tolist()}],
                "configuration": {"output_types": ["quantiles"]},
            }
            x = ((target - CENTER) / SCALE).astype(np.float32)[None]
            expected = np.sort(self.run(x), axis=-1) * SCALE + CENTER
        else:
            x = np.round(rng.normal(size=self.shape), 3).astype(np.float32)
            request = {"x": [[round(float(number), 3) for number in row] for row in x]}
            expected = self.run(x)
        return Question(self.name, json.dumps(request).encode(), expected)

    def run(self, x: Float32) -> Float32:
        """The reference network's answer for one row x."""
        with torch.inference_mode():
            answer: Float32 = self.network(torch.from_numpy(x)[None])[0].numpy()
        return answer


def pack_forecaster(
    name: str, seed: int, architecture: str = "tcn", config: Config = SMALL_TCN, *, forecast: bool = False
) -> Model:
    """A forecaster of seeded random weights; with `forecast` it is asked by DeepAR JSON of one channel, the target."""
    family = build_family(architecture, config)
    tensors = random_tensors(family, seed)
    network = family.reference()
    network.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()})
    recipe = None
    if forecast:
        context, prediction = family.input_shape[1], family.output_shape[0]
        recipe = ForecastSpec(
            frequency="1h",
            context_length=context,
            prediction_length=prediction,
            quantile_levels=LEVELS,
            inputs=(InputChannel(source="target"),),
            scaler=Scaler(kind="linear", center=CENTER, scale=SCALE),
            tail="clamp",
        )
    data = pack_model(
        Kind.FORECASTER,
        ArchiveParts(tensors=tensors, architecture=architecture, config=config, forecast=recipe),
        model_name=name.replace("/", "-"),
    )
    return Model(name, data, network, family.input_shape, forecast)


class Dense(nn.Module):
    """What the ONNX archives compute: [N, 3, 12] -> [N, 4, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One dense layer and a relu."""
        return torch.relu(self.linear(x.flatten(1))).view(-1, 4, 3)


def onnx_model(name: str, seed: int) -> Model:
    """An ONNX archive of `Dense` with seeded random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Dense().eval()
    weight, bias = (tensor.detach().numpy() for tensor in (network.linear.weight, network.linear.bias))
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["dense"], transB=1),
        helper.make_node("Relu", ["dense"], ["positive"]),
        helper.make_node("Reshape", ["positive", "shape"], ["y"]),
    ]
    constants = [
        helper.make_tensor("weight", TensorProto.FLOAT, weight.shape, weight.ravel()),
        helper.make_tensor("bias", TensorProto.FLOAT, bias.shape, bias),
        helper.make_tensor("shape", TensorProto.INT64, [3], [-1, 4, 3]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 12])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 3])
    graph = helper.make_graph(nodes, "dense", [x], [y], constants)
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Model(
        name,
        pack_model(Kind.ONNX, ArchiveParts(program=model.SerializeToString()), model_name=name.replace("/", "-")),
        network,
        (3, 12),
    )


def pack_onnx(nodes: Sequence[onnx.NodeProto], inputs: Sequence[Any], outputs: Sequence[Any]) -> bytes:
    """An ONNX archive of a graph without weights."""
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return pack_model(Kind.ONNX, ArchiveParts(program=model.SerializeToString()), model_name="m")


def pack_identity(kind: int, name: str = "x", output: str = "y") -> bytes:
    """An ONNX archive that gives what it gets: [rows, any] of this type."""
    shape: list[str | int | None] = ["n", "length"]
    given, made = (helper.make_tensor_value_info(each, kind, shape) for each in (name, output))
    return pack_onnx([helper.make_node("Identity", [name], [output])], [given], [made])


def pack_fleet(prefix: str, count: int, seed: int = 0, config: Config = SMALL_TCN) -> list[Model]:
    """`count` models of one small family, `{prefix}/00.mar` and on."""
    return [pack_forecaster(f"{prefix}/{i:02}.mar", seed + i, "tcn", config) for i in range(count)]
