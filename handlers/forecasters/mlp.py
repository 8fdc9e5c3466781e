"""`mlp`: two hidden layers with relu on the flattened input, prediction_length x quantiles out.

At batch 1 a product per layer is a matrix times a vector, limited by the reading of the weights (1.7 MB by default), so
that their order in memory makes no difference; the row keeps the [out, in] of the state dict and is a plain copy.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from msgspec import Meta
from torch import nn

from handlers.base import Shape
from handlers.forecasters.architecture import Architecture
from handlers.forecasters.network_config import QuantileConfig
from handlers.forecasters.row_layout import Rows
from handlers.forecasters.training_forward import map_over_models

LAYERS = ("first", "second", "head")


class MlpConfig(QuantileConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The config of `mlp`. x [features, context_length] -> [prediction_length, quantiles]."""

    hidden: Annotated[int, Meta(ge=1, le=4096)] = 256


class MlpReference(nn.Module):
    """The network as one would write it for training: [N, features, context] -> [N, prediction, quantiles]."""

    def __init__(self, config: MlpConfig) -> None:
        super().__init__()
        self.shape = (-1, config.prediction_length, config.quantiles)
        self.first = nn.Linear(config.features * config.context_length, config.hidden)
        self.second = nn.Linear(config.hidden, config.hidden)
        self.head = nn.Linear(config.hidden, config.prediction_length * config.quantiles)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, features, context_length] -> [N, prediction_length, quantiles]."""
        h = torch.relu(self.second(torch.relu(self.first(x.flatten(1)))))
        answer: torch.Tensor = self.head(h)
        return answer.view(self.shape)


class Mlp(Rows):
    """The family: one row a model, all models of a batch in one `baddbmm` a layer."""

    def __init__(self, key: str, config: MlpConfig) -> None:
        self.config = config
        flat, out = config.features * config.context_length, config.prediction_length * config.quantiles
        widths = (flat, config.hidden, config.hidden, out)
        parameters: dict[str, Shape] = {}
        for name, c_in, c_out in zip(LAYERS, widths[:-1], widths[1:], strict=True):
            parameters |= {f"{name}.weight": (c_out, c_in), f"{name}.bias": (c_out,)}
        super().__init__(key, config.input_shape, config.output_shape, parameters, parameters)

    def reference(self) -> nn.Module:
        """The plain network, freshly initialised, in eval mode."""
        return MlpReference(self.config).eval()

    def bind(self, block: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows [B, row_floats] -> [weight [B, in, out], bias [B, 1, out]] a layer, then the hidden layers' scratch."""
        part = self._layout.views(block)
        bound: list[torch.Tensor] = []
        for name in LAYERS:
            bound += [part[f"{name}.weight"].transpose(1, 2), part[f"{name}.bias"][:, None]]
        with torch.inference_mode(False):  # so that the scratch may be written with and without inference mode
            return [*bound, *[block.new_empty(block.shape[0], 1, self.config.hidden) for _ in range(2)]]

    def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Input x [B, features, context_length] -> [B, prediction_length, quantiles]; see Family.forward."""
        first, first_bias, second, second_bias, head, head_bias, h1, h2 = weights
        torch.baddbmm(first_bias, x.flatten(1)[:, None].to(first.dtype), first, out=h1).relu_()
        torch.baddbmm(second_bias, h1, second, out=h2).relu_()
        return torch.baddbmm(head_bias, h2, head).view(-1, *self.output_shape)


ARCHITECTURE = Architecture(name="mlp", config=MlpConfig, family=Mlp, training_forward=map_over_models)
