"""`recursive`: an encoder GRU reads the context; a decoder GRU reads its own median of the step before at each step.

Sources: Cho et al. 2014, arXiv 1406.1078 (units, encoder and decoder), Taieb et al. 2012 for what "recursive" means
beside the direct forecasts of the other architectures. What the decoder also reads is what is known of the step: the
last `prediction_length` columns of every channel, of the target the values one prediction length before. One linear
head gives the quantiles of a step, of which the middle one is fed back; training runs the same loop.

Parameters: 3 H (W + H + 2) for the encoder and 3 H (W + H + 3) for the decoder, a layer of H units and W inputs, and
H q + q; 17,093 by default.
"""

from collections.abc import Sequence

import torch
from torch import nn

from handlers.forecasters.architecture import Architecture
from handlers.forecasters.autoregression import Feedback
from handlers.forecasters.batched_gru import LinearHead, Recurrence, Recurrent
from handlers.forecasters.network_config import (
    RecurrentConfig,
    count_products,
    require_known_steps,
    require_numbers,
    require_products,
)


class RecursiveConfig(RecurrentConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The config of `recursive`. x [features, context_length] -> [prediction_length, quantiles]."""

    def __post_init__(self) -> None:
        """Raises ValueError for a forecast longer than the context, or a network that would hold up a worker."""
        require_known_steps(self)
        require_numbers(self.input_shape, self.output_shape)
        steps = self.context_length + self.prediction_length
        require_products(steps * count_products(self.features + 1, self.hidden, self.layers))


class RecursiveReference(nn.Module):
    """The network as one would write it for training: [N, features, context] -> [N, prediction, quantiles]."""

    def __init__(self, config: RecursiveConfig) -> None:
        super().__init__()
        self.steps, self.middle = config.prediction_length, config.quantiles // 2
        self.encoder = nn.GRU(config.features, config.hidden, config.layers, batch_first=True)
        self.decoder = nn.GRU(1 + config.features, config.hidden, config.layers, batch_first=True)
        self.head = nn.Linear(config.hidden, config.quantiles)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, features, context_length] -> [N, prediction_length, quantiles]."""
        _, state = self.encoder(x.transpose(1, 2))
        value, found = x[:, 0, -1:], []
        for of_step in x[..., -self.steps :].unbind(2):
            states, state = self.decoder(torch.cat([value, of_step], 1)[:, None], state)
            answer = self.head(states[:, 0])
            value = answer[:, self.middle, None]
            found.append(answer)
        return torch.stack(found, 1)


class Recursive(Recurrent):
    """The family: one row a model, all models of a batch in one `baddbmm` a step and gate."""

    def __init__(self, key: str, config: RecursiveConfig) -> None:
        self.config = config
        size = (config.hidden, config.layers)
        self._encoder = Recurrence("encoder", config.features, *size, config.context_length)
        self._feedback = Feedback("decoder", *size)
        self._head = LinearHead(config.hidden, config.quantiles)
        decoder = Recurrence("decoder", 1 + config.features, *size, config.prediction_length)  # for its place in a row
        pieces, bound = (self._encoder, decoder, self._head), (self._head, self._feedback, self._encoder)
        super().__init__(key, config.input_shape, config.output_shape, pieces, bound)

    def reference(self) -> nn.Module:
        """The plain network, freshly initialised, in eval mode."""
        return RecursiveReference(self.config).eval()

    def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Input x [B, features, context_length] -> [B, prediction_length, quantiles]; see Family.forward."""
        (head, bias), rest = weights[:2], weights[2:]
        steps, middle = self.config.prediction_length, self.config.quantiles // 2
        start = self._encoder.final(rest[self._feedback.items :], x.transpose(1, 2))
        found = head.new_empty(len(x), *self.output_shape)

        def answered(step: int, states: torch.Tensor) -> torch.Tensor:
            torch.baddbmm(bias, states, head, out=found[:, step : step + 1])
            return found[:, step, middle, None]

        known = x[..., -steps:].transpose(1, 2)
        self._feedback.run(rest[: self._feedback.items], known, start, x[:, 0, -1:], answered)
        return found


ARCHITECTURE = Architecture(name="recursive", config=RecursiveConfig, family=Recursive)
