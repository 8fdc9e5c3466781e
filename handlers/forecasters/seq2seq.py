"""`seq2seq`: an encoder GRU reads the context; from its state a decoder GRU goes through the forecast steps.

Sources: Cho et al. 2014, arXiv 1406.1078 (the units), and Sutskever et al. 2014, arXiv 1409.3215 (the encoder's last
state, layer by layer, is the decoder's first). What the decoder reads at a step is what is known of that step: the last
`prediction_length` columns of every channel but the first `past`. That fits the recipe of `fleetcast train`, which puts
the target first and shifts or lags all others so that these columns tell of the forecast steps (calendar and covariates
of the very step, prices one day and one week before it). One linear head serves all steps. No answer is fed back: a
forecast is one pass without sampling, so quantiles stay what training made them.

Parameters: 3 H (W + H + 2) a layer of H units and W inputs, in both, and H q + q; 16,805 by default.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from msgspec import Meta
from torch import nn

from handlers.forecasters.architecture import Architecture
from handlers.forecasters.batched_gru import LinearHead, Recurrence, Recurrent
from handlers.forecasters.network_config import (
    RecurrentConfig,
    count_products,
    require_known_steps,
    require_numbers,
    require_products,
)


class Seq2SeqConfig(RecurrentConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The config of `seq2seq`. x [features, context_length] -> [prediction_length, quantiles]."""

    past: Annotated[int, Meta(ge=0, le=1023)] = 1  #: the first channels, which the decoder does not read

    def __post_init__(self) -> None:
        """Raises ValueError for a decoder without inputs, or a network that would hold up a worker."""
        if self.past >= self.features:
            what = f"past is {self.past} of {self.features} features"
            raise ValueError(f"{what}, but the decoder needs a channel that is known of the forecast steps")
        require_known_steps(self)
        require_numbers(self.input_shape, self.output_shape)
        encoder = self.context_length * count_products(self.features, self.hidden, self.layers)
        decoder = self.prediction_length * count_products(self.features - self.past, self.hidden, self.layers)
        require_products(encoder + decoder)


class Seq2SeqReference(nn.Module):
    """The network as one would write it for training: [N, features, context] -> [N, prediction, quantiles]."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.past, self.steps = config.past, config.prediction_length
        self.encoder = nn.GRU(config.features, config.hidden, config.layers, batch_first=True)
        self.decoder = nn.GRU(config.features - config.past, config.hidden, config.layers, batch_first=True)
        self.head = nn.Linear(config.hidden, config.quantiles)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, features, context_length] -> [N, prediction_length, quantiles]."""
        _, state = self.encoder(x.transpose(1, 2))
        states, _ = self.decoder(x[:, self.past :, -self.steps :].transpose(1, 2), state)
        answer: torch.Tensor = self.head(states)
        return answer


class Seq2Seq(Recurrent):
    """The family: one row a model, all models of a batch in one `baddbmm` a step."""

    def __init__(self, key: str, config: Seq2SeqConfig) -> None:
        self.config = config
        size, known = (config.hidden, config.layers), config.features - config.past
        self._encoder = Recurrence("encoder", config.features, *size, config.context_length)
        self._decoder = Recurrence("decoder", known, *size, config.prediction_length)
        self._head = LinearHead(config.hidden, config.quantiles)
        pieces, bound = (self._encoder, self._decoder, self._head), (self._head, self._encoder, self._decoder)
        super().__init__(key, config.input_shape, config.output_shape, pieces, bound)

    def reference(self) -> nn.Module:
        """The plain network, freshly initialised, in eval mode."""
        return Seq2SeqReference(self.config).eval()

    def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Input x [B, features, context_length] -> [B, prediction_length, quantiles]; see Family.forward."""
        head, bias = weights[:2]
        encoder, decoder = weights[2 : 2 + self._encoder.items], weights[2 + self._encoder.items :]
        state = self._encoder.final(encoder, x.transpose(1, 2))
        known = x[:, self.config.past :, -self.config.prediction_length :].transpose(1, 2)
        states = self._decoder.run(decoder, known, state)
        return torch.cat([torch.baddbmm(bias, some, head) for some in states], 1)


ARCHITECTURE = Architecture(name="seq2seq", config=Seq2SeqConfig, family=Seq2Seq)
