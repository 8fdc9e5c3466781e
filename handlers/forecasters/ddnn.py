"""`ddnn`: two dense hidden layers over the numbers that `lear` reads, and quantiles of every forecast step.

Source: Marcjasz et al. 2023, "Distributional neural networks for electricity price forecasting" (Energy Economics 125),
with quantiles as output instead of the parameters of a distribution. It reads the same blocks and marks as `lear`. To
the quantiles of a step a base is added, a linear function of the target's blocks; the fit sets it where prices wander
between levels, and to zero elsewhere. `fleetcast train` fits it by `handlers.training.dense_fit`; ensembles of a few
are better than one (`ddnn:2`).

Parameters: (F + 1) x hidden + (hidden + 1) x hidden + (hidden + 1) x prediction_length x quantiles, and the base; for a
day of hours with two covariates, 64 hidden units and nine levels 36,400.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from msgspec import Meta
from torch import nn

from handlers.base import Shape
from handlers.forecasters.architecture import Architecture
from handlers.forecasters.lear import LearConfig, compute_longest_context, list_taps
from handlers.forecasters.row_layout import Rows
from handlers.forecasters.training_forward import map_over_models

LAYERS = ("first", "second", "head")


class DdnnConfig(LearConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The config of `ddnn`. x [features, context_length] -> [prediction_length, quantiles]."""

    hidden: Annotated[int, Meta(ge=1, le=1024)] = 64


def count_base_taps(config: DdnnConfig) -> int:
    """Count the numbers that the base reads: the blocks of the first channel, which come first among all taps."""
    return sum(tap < config.context_length for tap in list_taps(config) if config.features > config.marks)


class DdnnReference(nn.Module):
    """The network as one would write it: [N, features, context] -> [N, prediction, quantiles]."""

    taps: torch.Tensor

    def __init__(self, config: DdnnConfig) -> None:
        super().__init__()
        self.shape = (-1, config.prediction_length, config.quantiles)
        self.register_buffer("taps", torch.tensor(list(list_taps(config)), device="cpu"), persistent=False)
        self.first = nn.Linear(len(self.taps), config.hidden)
        self.second = nn.Linear(config.hidden, config.hidden)
        self.head = nn.Linear(config.hidden, config.prediction_length * config.quantiles)
        base_taps = count_base_taps(config)
        self.base = nn.Linear(max(1, base_taps), config.prediction_length, bias=False)
        if not base_taps:  # an archive may read no past of its target; torch warns of layers without weights
            self.base.in_features, self.base.weight = 0, nn.Parameter(torch.empty(config.prediction_length, 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, features, context_length] -> [N, prediction_length, quantiles]."""
        read = x.flatten(1)[:, self.taps]
        h = nn.functional.elu(self.second(nn.functional.elu(self.first(read))))
        base = self.base(read[:, : self.base.in_features])
        answer: torch.Tensor = self.head(h).view(self.shape) + base[..., None]
        return answer


class Ddnn(Rows):
    """The family: one row a model, all models of a batch in one `baddbmm` a layer."""

    def __init__(self, key: str, config: DdnnConfig) -> None:
        self.config = config
        self.taps = torch.tensor(list(list_taps(config)))
        self.base_taps = count_base_taps(config)
        widths = (len(self.taps), config.hidden, config.hidden, config.prediction_length * config.quantiles)
        parameters: dict[str, Shape] = {}
        for name, c_in, c_out in zip(LAYERS, widths[:-1], widths[1:], strict=True):
            parameters |= {f"{name}.weight": (c_out, c_in), f"{name}.bias": (c_out,)}
        parameters["base.weight"] = (config.prediction_length, self.base_taps)
        super().__init__(key, config.input_shape, config.output_shape, parameters, parameters)

    def reference(self) -> nn.Module:
        """The plain network, freshly initialised, in eval mode."""
        return DdnnReference(self.config).eval()

    def bind(self, block: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows [B, row_floats] -> weight [B, in, out] and bias [B, 1, out] a layer, the base, places, and scratch."""
        part = self._layout.views(block)
        bound: list[torch.Tensor] = []
        for name in LAYERS:
            bound += [part[f"{name}.weight"].transpose(1, 2), part[f"{name}.bias"][:, None]]
        with torch.inference_mode(False):  # so that the scratch may be written with and without inference mode
            places, read = self.taps.to(block.device), block.new_empty(len(block), len(self.taps))
            hidden = [block.new_empty(len(block), 1, self.config.hidden) for _ in range(2)]
        return [*bound, part["base.weight"].transpose(1, 2), places, read, *hidden]

    def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Input x [B, features, context_length] -> [B, prediction_length, quantiles]; see Family.forward."""
        first, first_bias, second, second_bias, head, head_bias, base, places, read, h1, h2 = weights
        torch.index_select(x.flatten(1).to(read.dtype), 1, places, out=read)
        nn.functional.elu_(torch.baddbmm(first_bias, read[:, None], first, out=h1))
        nn.functional.elu_(torch.baddbmm(second_bias, h1, second, out=h2))
        answer = torch.baddbmm(head_bias, h2, head).view(-1, *self.output_shape)
        return answer + torch.bmm(read[:, None, : self.base_taps], base).transpose(1, 2)


ARCHITECTURE = Architecture(
    name="ddnn",
    config=DdnnConfig,
    family=Ddnn,
    context=compute_longest_context,
    whole_days=True,
    training_forward=map_over_models,
    fit="dense",
)
