"""`mqcnn`: the dilated causal convolutions of `tcn` read the past, the decoder of
`handlers.forecasters.multi_horizon_quantile` answers.

Source: Wen et al. 2017, arXiv 1711.11053; with convolutions for the encoder as in Wen and Torkkola 2019. Parameters by
default: 13,568 in the convolutions, 1,056 for the encoder's 32 answers, 34,379 in the decoder.
"""

from typing import Annotated

from msgspec import Meta, Struct

from handlers.forecasters.multi_horizon_quantile import Mq, require_parameters
from handlers.forecasters.tcn import Tcn, TcnConfig


class MqcnnConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the architecture leaves open. x [features, context_length] -> [prediction_length, quantiles]."""

    features: Annotated[int, Meta(ge=1, le=1024)] = 8
    context_length: Annotated[int, Meta(ge=1, le=100_000)] = 168
    prediction_length: Annotated[int, Meta(ge=1, le=10_000)] = 24
    quantiles: Annotated[int, Meta(ge=1, le=1000)] = 5
    channels: Annotated[int, Meta(ge=1, le=1024)] = 32
    kernel: Annotated[int, Meta(ge=1, le=16)] = 3
    layers: Annotated[int, Meta(ge=1, le=16)] = 4
    contexts: Annotated[int, Meta(ge=1, le=256)] = 6  #: numbers for each step, and as many for all
    local: Annotated[int, Meta(ge=1, le=1024)] = 24

    def __post_init__(self) -> None:
        """Raises ValueError for a global layer that is too large, or a forecast beyond the context."""
        if self.prediction_length > self.context_length:
            what = f"prediction_length {self.prediction_length} is above context_length {self.context_length}"
            raise ValueError(f"{what}, whose last columns tell of the forecast steps")
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
        family = Tcn(f"{key}-encoder", encoder)
        super().__init__(key, family, config.prediction_length, config.quantiles, config.contexts, config.local)
