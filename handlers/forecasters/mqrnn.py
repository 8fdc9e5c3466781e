"""`mqrnn`: the recurrence of `gru` reads the past, the decoder of `handlers.forecasters.multi_horizon_quantile`
answers.

Source: Wen et al. 2017, arXiv 1711.11053, with gated recurrent units where the paper has LSTMs. Parameters by default:
8,352 in the recurrence, 2,352 for the encoder's 48 answers, 36,779 in the decoder.
"""

from typing import Annotated

from msgspec import Meta

from handlers.forecasters.architecture import Architecture
from handlers.forecasters.gru import Gru, GruConfig
from handlers.forecasters.multi_horizon_quantile import Mq, require_parameters
from handlers.forecasters.network_config import RecurrentConfig, require_known_steps


class MqrnnConfig(RecurrentConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The config of `mqrnn`. x [features, context_length] -> [prediction_length, quantiles]."""

    contexts: Annotated[int, Meta(ge=1, le=256)] = 6  #: numbers for each step, and as many for all
    local: Annotated[int, Meta(ge=1, le=1024)] = 24

    def __post_init__(self) -> None:
        """Raises ValueError for a network that would hold up a worker, or a forecast longer than the context."""
        require_known_steps(self)
        require_parameters(self.features, self.prediction_length, self.contexts, self.hidden)
        _make_encoder_config(self)


class Mqrnn(Mq):
    """The family."""

    def __init__(self, key: str, config: MqrnnConfig) -> None:
        self.config = config
        encoder = Gru(f"{key}-encoder", _make_encoder_config(config))
        super().__init__(key, encoder, config.prediction_length, config.quantiles, config.contexts, config.local)


def _make_encoder_config(config: MqrnnConfig) -> GruConfig:
    return GruConfig(
        features=config.features,
        context_length=config.context_length,
        prediction_length=1,
        quantiles=config.hidden,
        hidden=config.hidden,
        layers=config.layers,
    )


ARCHITECTURE = Architecture(name="mqrnn", config=MqrnnConfig, family=Mqrnn)
