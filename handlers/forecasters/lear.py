"""`lear`: a linear model of chosen columns of the context, for each forecast step and level its own coefficients.

Source: Lago et al. 2021, "Forecasting day-ahead electricity prices" (Applied Energy 293), the LASSO-estimated
autoregression that is the field's linear baseline. A block is `prediction_length` columns, a day where a day is
forecast. Of the target it reads the blocks `past_blocks` back from the end of the context (0, 1, 2 and 6: the days d-1,
d-2, d-3 and d-7), of every known-future channel (shifted by the prediction length) `known_blocks` (0, 1 and 7: the day
that is forecast, d-1 and d-7), and of the last `marks` channels, the weekday dummies, only the last column. Blocks that
lie before the context are left out. `fleetcast train` fits it by L1-penalised quantile regression
(`handlers.training.quantile_lasso`), and for origins at one time of day, so that a coefficient belongs to an hour and
not to a distance.

Parameters: (F + 1) x prediction_length x quantiles for F numbers read; of a day of hours with two covariates and seven
weekdays F is 247, and all parameters are 29,760; 72,120 by default.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from msgspec import Meta
from torch import nn

from handlers.base import Shape
from handlers.forecasters.architecture import Architecture
from handlers.forecasters.network_config import QuantileConfig
from handlers.forecasters.row_layout import Rows
from handlers.forecasters.training_forward import map_over_models

MOST_PARAMETERS = 2**26
Blocks = Annotated[tuple[Annotated[int, Meta(ge=0, le=1000)], ...], Meta(max_length=100)]


class LearConfig(QuantileConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The config of `lear`. x [features, context_length] -> [prediction_length, quantiles]."""

    context_length: Annotated[int, Meta(ge=1, le=100_000)] = 192
    past: Annotated[int, Meta(ge=0, le=1023)] = 1  #: the first channels, which are not known ahead
    marks: Annotated[int, Meta(ge=0, le=1023)] = 0  #: the last channels, which encode the day
    past_blocks: Blocks = (0, 1, 2, 6)
    known_blocks: Blocks = (0, 1, 7)

    def __post_init__(self) -> None:
        """Raises ValueError for missing channels, no inputs, or a row beyond 256 MB."""
        if self.past + self.marks > self.features:
            raise ValueError(f"past {self.past} and marks {self.marks} are more than the {self.features} features")
        read = len(list(list_taps(self)))
        if not read:
            raise ValueError("no block lies within the context: make context_length at least prediction_length")
        if read * self.prediction_length * self.quantiles > MOST_PARAMETERS:
            what = f"{read} numbers read for {self.prediction_length} x {self.quantiles} answers"
            raise ValueError(f"{what} are more than {MOST_PARAMETERS} parameters; name fewer past_blocks, known_blocks")


def list_taps(config: LearConfig) -> Iterator[int]:
    """Yield the indices in the flattened input [features * context_length] that the model reads."""
    context, block, known = config.context_length, config.prediction_length, config.features - config.marks
    for channel in range(known):
        for back in config.past_blocks if channel < config.past else config.known_blocks:
            start = context - (back + 1) * block
            if start >= 0:
                yield from range(channel * context + start, channel * context + start + block)
    for channel in range(known, config.features):
        yield (channel + 1) * context - 1


class LearReference(nn.Module):
    """The network as one would write it: [N, features, context] -> [N, prediction, quantiles]."""

    taps: torch.Tensor

    def __init__(self, config: LearConfig) -> None:
        super().__init__()
        self.shape = (-1, config.prediction_length, config.quantiles)
        self.register_buffer("taps", torch.tensor(list(list_taps(config)), device="cpu"), persistent=False)
        self.head = nn.Linear(len(self.taps), config.prediction_length * config.quantiles)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, features, context_length] -> [N, prediction_length, quantiles]."""
        answer: torch.Tensor = self.head(x.flatten(1)[:, self.taps])
        return answer.view(self.shape)


class Lear(Rows):
    """The family: one row a model, all models of a batch in one `baddbmm`, limited by memory bandwidth."""

    def __init__(self, key: str, config: LearConfig) -> None:
        self.config = config
        self.taps = torch.tensor(list(list_taps(config)))
        out = config.prediction_length * config.quantiles
        parameters: dict[str, Shape] = {"head.weight": (out, len(self.taps)), "head.bias": (out,)}
        given, answered = (config.features, config.context_length), (config.prediction_length, config.quantiles)
        super().__init__(key, given, answered, parameters, parameters)

    def reference(self) -> nn.Module:
        """The plain network, freshly initialised, in eval mode."""
        return LearReference(self.config).eval()

    def bind(self, block: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows [B, row_floats] -> the places read, weight [B, F, out], bias [B, 1, out], and scratch [B, F]."""
        part = self._layout.views(block)
        with torch.inference_mode(False):  # so that the scratch may be written with and without inference mode
            places, read = self.taps.to(block.device), block.new_empty(len(block), len(self.taps))
        return [places, part["head.weight"].transpose(1, 2), part["head.bias"][:, None], read]

    def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Input x [B, features, context_length] -> [B, prediction_length, quantiles]; see Family.forward."""
        places, weight, bias, read = weights
        torch.index_select(x.flatten(1).to(read.dtype), 1, places, out=read)
        return torch.baddbmm(bias, read[:, None], weight).view(-1, *self.output_shape)


def compute_longest_context(family: Lear) -> int:
    """Return the steps that contain every block of the config."""
    config = family.config
    blocks = 1 + max((*config.past_blocks, *config.known_blocks), default=0)
    return blocks * config.prediction_length


ARCHITECTURE = Architecture(
    name="lear",
    config=LearConfig,
    family=Lear,
    context=compute_longest_context,
    whole_days=True,
    training_forward=map_over_models,
    fit="lasso",
)
