"""`mqcnn`: the dilated causal convolutions of `tcn` read the past, the decoder of
`handlers.forecasters.multi_horizon_quantile` answers.

Source: Wen et al. 2017, arXiv 1711.11053; with convolutions for the encoder as in Wen and Torkkola 2019. Parameters by
default: 13,568 in the convolutions, 1,056 for the encoder's 32 answers, 34,379 in the decoder.
"""

from typing import Annotated

import torch
from msgspec import Meta
from torch import nn
from torch.func import functional_call, vmap

from handlers.forecasters import tcn
from handlers.forecasters.architecture import Architecture
from handlers.forecasters.multi_horizon_quantile import Mq, MqReference, require_parameters
from handlers.forecasters.network_config import QuantileConfig, require_known_steps
from handlers.forecasters.tcn import Tcn, TcnConfig
from handlers.forecasters.training_forward import Parts, TrainingForward


class MqcnnConfig(QuantileConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The config of `mqcnn`. x [features, context_length] -> [prediction_length, quantiles]."""

    channels: Annotated[int, Meta(ge=1, le=1024)] = 32
    kernel: Annotated[int, Meta(ge=1, le=16)] = 3
    layers: Annotated[int, Meta(ge=1, le=16)] = 4
    contexts: Annotated[int, Meta(ge=1, le=256)] = 6  #: numbers for each step, and as many for all
    local: Annotated[int, Meta(ge=1, le=1024)] = 24

    def __post_init__(self) -> None:
        """Raises ValueError for a global layer that is too large, or a forecast longer than the context."""
        require_known_steps(self)
        require_parameters(self.features, self.prediction_length, self.contexts, self.channels)


class Mqcnn(Mq):
    """The family."""

    def __init__(self, key: str, config: MqcnnConfig) -> None:
        self.config = config
        encoder = TcnConfig(
            features=config.features,
            context_length=config.context_length,
            prediction_length=1,
            quantiles=config.channels,
            channels=config.channels,
            kernel=config.kernel,
            layers=config.layers,
        )
        self.tcn = Tcn(f"{key}-encoder", encoder)
        super().__init__(key, self.tcn, config.prediction_length, config.quantiles, config.contexts, config.local)


class Decoder(nn.Module):
    """The part of the network after its encoder."""

    def __init__(self, network: MqReference) -> None:
        super().__init__()
        self.network = network

    def forward(self, encoded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Decode; see MqReference.decode."""
        return self.network.decode(encoded, x)


def compute_reach(family: Mqcnn) -> int:
    """Return the last steps that the encoder reads, or the decoder for its known-future columns."""
    return max(tcn.compute_reach(family.tcn), family.config.prediction_length)


def make_training_forward(family: Mqcnn) -> TrainingForward:
    """Run the encoder as in the training of `tcn`, and map the decoder over the models."""
    encode, inner = tcn.make_training_forward(family.tcn), "encoder."

    def run(parts: Parts, x: torch.Tensor) -> torch.Tensor:
        with torch.device("meta"):  # each call has its own decoder, because threads call at the same time
            decoder = Decoder(family.reference())

        def decode(parts: Parts, *given: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = functional_call(decoder, dict(parts), given)
            return answer

        of_encoder = {name.removeprefix(inner): part for name, part in parts.items() if name.startswith(inner)}
        encoded = encode(of_encoder, x[:, :, -tcn.compute_reach(family.tcn) :])
        rest = {f"network.{name}": part for name, part in parts.items() if not name.startswith(inner)}
        answers: torch.Tensor = vmap(decode)(rest, encoded, x.transpose(2, 3))
        return answers

    return run


ARCHITECTURE = Architecture(
    name="mqcnn", config=MqcnnConfig, family=Mqcnn, reach=compute_reach, training_forward=make_training_forward
)
