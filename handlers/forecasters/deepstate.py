"""`deepstate`: a linear-Gaussian state space model whose parameters a recurrence gives step by step: sample paths.

Source: Rangapuram et al. 2018, "Deep state space models for time series forecasting" (NeurIPS), with gated recurrent
units. The state is a level and `harmonics` pairs that turn once, twice ... a season; the observation of a step is the
level, the pairs' first numbers and an offset, with noise. The recurrence reads what is known of a step, aligned as in
`deepar`, and gives the offset and three scales: of the observation's noise, of the level's and of the season's change.

A Kalman filter takes in the context's last `context - prediction` targets. A path then draws a step from the filter's
prediction and takes the draw in as if it had been observed: that is an exact draw from the joint distribution, and what
depends on the path are means alone, as gains and variances depend on no observation. The last channel is the request's
seed, see `handlers.forecasters.counter_rng`.

The price of an answer: `context` filter steps of a dozen small products, one after another. Measured by default, one
core: 14 ms for 1 model, 0.8 to 1 ms a model from 32 on. Parameters: 3 H (W + H + 2) a layer of H units and W inputs,
and 4 H + 4; 4,068 by default.
"""

from collections.abc import Mapping, Sequence
from math import cos, pi, sin
from typing import Annotated, NamedTuple

import torch
from msgspec import Meta
from torch import nn

from handlers.forecasters.architecture import Architecture
from handlers.forecasters.batched_gru import LinearHead, Recurrence, Recurrent
from handlers.forecasters.counter_rng import draw_normals
from handlers.forecasters.network_config import Hidden, PathsConfig, count_products, require_products

LEAST_SCALE = 1e-2  #: lower bound of a scale, in network numbers
NUMBERS = 4  #: numbers that the recurrence gives for a step


class DeepstateConfig(PathsConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The config of `deepstate`. x [features, context_length] -> [prediction_length, paths]."""

    season: Annotated[int, Meta(ge=2, le=10_000)] = 24
    harmonics: Annotated[int, Meta(ge=0, le=16)] = 3
    hidden: Hidden = 32

    def __post_init__(self) -> None:
        """Raises ValueError as PathsConfig does, or for a network that would hold up a worker."""
        PathsConfig.__post_init__(self)
        width = 1 + 2 * self.harmonics
        filtered = 2 * width**3 * self.context_length + 2 * width**2 * self.prediction_length * self.paths
        require_products(self.context_length * count_products(self.features - 1, self.hidden, self.layers) + filtered)


class Space(NamedTuple):
    """The constant part of the model, for a state of d numbers."""

    observation: torch.Tensor  #: [d], ones and zeros
    turn: torch.Tensor  #: [d, d], the state's next mean is turn @ state
    changes: torch.Tensor  #: [2, d], ones where the level's and the season's scale apply

    def bind(self, part: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The three tensors on the device of the rows."""
        device = part["head.weight"].device
        return [each.to(device) for each in self]


def make_state_space(config: DeepstateConfig) -> Space:
    """Make the constants for a level and the harmonics of the season."""
    width = 1 + 2 * config.harmonics
    turn, changes = torch.eye(width), torch.zeros(2, width)
    changes[0, 0], changes[1, 1:] = 1, 1
    for i in range(config.harmonics):
        angle, at = 2 * pi * (i + 1) / config.season, 1 + 2 * i
        turn[at : at + 2, at : at + 2] = torch.tensor([[cos(angle), sin(angle)], [-sin(angle), cos(angle)]])
    observation = torch.tensor([1.0, *[1.0, 0.0] * config.harmonics])
    return Space(observation, turn, changes)


class Filter:
    """A Kalman filter of B series, on S paths each: means [B, S, d], and one covariance [B, d, d] for all paths."""

    def __init__(self, constants: Space, numbers: torch.Tensor) -> None:
        """Start with the recurrence's numbers [B, steps, 4]; the first state has mean zero and unit variance."""
        self._space = constants
        self._offset = numbers[..., 0, None]
        scales = nn.functional.softplus(numbers[..., 1:]) + LEAST_SCALE
        self._noise = scales[..., :1].square()
        self._change = torch.diag_embed(scales[..., 1:].square() @ constants.changes)  # [B, steps, d, d]
        width = len(constants.observation)
        self._mean = numbers.new_zeros(len(numbers), 1, width)
        self._covariance = torch.diag_embed(numbers.new_ones(len(numbers), width))

    def __repr__(self) -> str:
        return f"<Filter of {len(self._mean)} series, {self._mean.shape[2]} numbers each>"

    def predict(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict the mean [B, S] and variance [B, 1] of the observation at a step."""
        seen = self._covariance @ self._space.observation
        variance = (seen @ self._space.observation)[:, None] + self._noise[:, step]
        self._gain = seen / variance
        self._seen = seen
        return self._mean @ self._space.observation + self._offset[:, step], variance

    def update(self, step: int, error: torch.Tensor) -> None:
        """Update with the distance [B, S] of the observation to its predicted mean, and advance by a step."""
        turn = self._space.turn
        self._mean = (self._mean + error[..., None] * self._gain[:, None]) @ turn.T
        covariance = self._covariance - self._gain[..., None] * self._seen[:, None]
        self._covariance = turn @ covariance @ turn.T + self._change[:, step]

    def drawn(self, first: int, noise: torch.Tensor) -> torch.Tensor:
        """Draw paths [B, P, S] from step `first` on, from standard normals [B, S, P]."""
        found = []
        for step in range(noise.shape[2]):
            mean, variance = self.predict(first + step)
            error = variance.sqrt() * noise[..., step]
            found.append(mean + error)
            self.update(first + step, error)
        return torch.stack(found, 1)


class DeepstateReference(nn.Module):
    """The network as one would write it for training: [N, features, context] -> [N, prediction, paths]."""

    def __init__(self, config: DeepstateConfig) -> None:
        super().__init__()
        self.config = config
        self.gru = nn.GRU(config.features - 1, config.hidden, config.layers, batch_first=True)
        self.head = nn.Linear(config.hidden, NUMBERS)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """Input x [N, features, context_length] -> paths [N, prediction_length, paths], or the loss of y [N].

        The loss is the mean of -log p over all steps given the values before, times the number of targets y [N,
        prediction_length] that are not missing.
        """
        steps = self.config.prediction_length
        states, _ = self.gru(x[:, :-1].transpose(1, 2))
        found, past = Filter(make_state_space(self.config), self.head(states)), x[:, 0, steps:]
        if y is None:
            for step, value in enumerate(past.unbind(1)):
                found.update(step, value[:, None] - found.predict(step)[0])
            return found.drawn(past.shape[1], draw_normals(x[:, -1, :2], self.config.paths, steps))
        target, losses = torch.cat([past, y], 1), []
        for step, value in enumerate(target.unbind(1)):
            mean, variance = found.predict(step)
            error = torch.where(value.isnan()[:, None], 0.0, value.nan_to_num()[:, None] - mean)
            losses.append(((error.square() / variance + variance.log()) / 2)[:, 0])
            found.update(step, error)
        seen = (~target.isnan()).to(x.dtype)
        return (torch.stack(losses, 1) * seen).sum(1) / seen.sum(1) * (~y.isnan()).sum(1)


class Deepstate(Recurrent):
    """The family: one row a model, all models and paths of a batch in the products of one filter."""

    def __init__(self, key: str, config: DeepstateConfig) -> None:
        self.config = config
        self._space = make_state_space(config)
        self._gru = Recurrence("gru", config.features - 1, config.hidden, config.layers, config.context_length)
        self._head = LinearHead(config.hidden, NUMBERS)
        pieces, bound = (self._gru, self._head), (self._head, self._space, self._gru)
        super().__init__(key, config.input_shape, config.output_shape, pieces, bound)

    def reference(self) -> nn.Module:
        """The plain network, freshly initialised, in eval mode."""
        return DeepstateReference(self.config).eval()

    def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Input x [B, features, context_length] -> [B, prediction_length, paths]; see Family.forward.

        Seeds, draws and variances are float32 for every precision of the network, because a shorter seed would be
        another one, and shorter variances would not stay positive.
        """
        (head, bias), constants, steps = weights[:2], Space(*weights[2:5]), self.config.prediction_length
        states = self._gru.run(weights[5:], x[:, :-1].transpose(1, 2))
        found = Filter(constants, torch.cat([torch.baddbmm(bias, some, head) for some in states], 1).float())
        past = x[:, 0, steps:]
        for step, value in enumerate(past.unbind(1)):
            found.update(step, value[:, None] - found.predict(step)[0])
        return found.drawn(past.shape[1], draw_normals(x[:, -1, :2], self.config.paths, steps))


ARCHITECTURE = Architecture(name="deepstate", config=DeepstateConfig, family=Deepstate, samples=True)
