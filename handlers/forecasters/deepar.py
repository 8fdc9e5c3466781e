"""`deepar`: a recurrence that draws each step from a distribution and reads what it drew: its answer is sample paths.

Source: Salinas et al. 2020, "DeepAR: probabilistic forecasting with autoregressive recurrent networks", arXiv
1704.04110, with gated recurrent units, and the normal distribution in network numbers: where these are asinh of prices,
prices are drawn from Johnson's SU distribution, heavy tails and all (as in Marcjasz et al. 2023 for power prices).

The input of a step is the target before it and what is known of it: a channel shifted by the prediction length tells,
`context - prediction` columns before its end, of the steps that condition the recurrence, and at its end of those that
are forecast; of the target itself, which cannot be shifted, these columns are the values one prediction length before.
The last channel is the request's seed: see `handlers.forecasters.counter_rng`. Paths of all models advance together.

The price of an answer: P steps of `paths` rows each, beside `context - P` of one row. Measured by default, one core:
2.6 ms for 1 model, 1.5 ms a model from 8 on, six to eight times a `gru`, in proportion to `paths`. Parameters:
3 H (W + H + 2) a layer of H units and W inputs, and 2 H + 2; 8,450 by default.
"""

from collections.abc import Sequence

import torch
from torch import nn

from handlers.forecasters.architecture import Architecture
from handlers.forecasters.autoregression import Feedback
from handlers.forecasters.batched_gru import LinearHead, Recurrence, Recurrent
from handlers.forecasters.counter_rng import draw_normals
from handlers.forecasters.network_config import PathsConfig, count_products, require_products

#: paths that advance together, so that gates stay in the cache: 64 models take 1.5 ms each instead of 4.2
CPU_PATHS = 400
LEAST_SCALE = 1e-3  #: lower bound of a scale, in network numbers


class DeeparConfig(PathsConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The config of `deepar`. x [features, context_length] -> [prediction_length, paths]."""

    def __post_init__(self) -> None:
        """Raises ValueError as PathsConfig does, or for a network that would hold up a worker."""
        PathsConfig.__post_init__(self)
        steps = self.context_length + self.prediction_length * (self.paths - 1)
        require_products(steps * count_products(self.features, self.hidden, self.layers))


class DeeparReference(nn.Module):
    """The network as one would write it for training: [N, features, context] -> [N, prediction, paths]."""

    def __init__(self, config: DeeparConfig) -> None:
        super().__init__()
        self.steps, self.paths = config.prediction_length, config.paths
        self.gru = nn.GRU(config.features, config.hidden, config.layers, batch_first=True)
        self.head = nn.Linear(config.hidden, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """Input x [N, features, context_length] -> paths [N, prediction_length, paths], or `likelihood` of y."""
        return self.sampled(x) if y is None else self.likelihood(x, y)

    def sampled(self, x: torch.Tensor) -> torch.Tensor:
        """Draw paths [N, prediction_length, paths]."""
        noise = draw_normals(x[:, -1, :2], self.paths, self.steps)
        known = x[:, :-1].transpose(1, 2)  # [N, context, W - 1]
        past = torch.cat([x[:, 0, self.steps - 1 : -1, None], known[:, : -self.steps]], 2)
        _, state = self.gru(past)
        state = state.repeat_interleave(self.paths, 1)
        value, found = x[:, :1, -1].expand(-1, self.paths), []
        for step, of_step in enumerate(known[:, -self.steps :].unbind(1)):
            given = torch.cat([value[..., None], of_step[:, None].expand(-1, self.paths, -1)], 2)
            states, state = self.gru(given.flatten(0, 1)[:, None], state)
            center, scale = compute_normal(self.head(states).view(len(x), self.paths, 2))
            value = center + scale * noise[..., step]
            found.append(value)
        return torch.stack(found, 1)

    def likelihood(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Compute the negative log-likelihood [N] of the past and the targets y [N, prediction_length] (NaN: missing).

        It is the mean of -log p over all steps given the values before, times the number of targets not missing.
        """
        seen, filled = ~y.isnan(), y.nan_to_num()
        before = torch.cat([x[:, 0, self.steps - 1 :], filled[:, :-1]], 1)
        states, _ = self.gru(torch.cat([before[..., None], x[:, :-1].transpose(1, 2)], 2))
        center, scale = compute_normal(self.head(states))
        target = torch.cat([x[:, 0, self.steps :], filled], 1)
        loss = ((target - center) / scale).square() / 2 + scale.log()
        weight = torch.cat([torch.ones_like(x[:, 0, self.steps :]), seen.to(x.dtype)], 1)
        return (loss * weight).sum(1) / weight.sum(1) * seen.sum(1)


def compute_normal(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute center and scale [...] of the normal distribution from the head's two numbers [..., 2]."""
    return numbers[..., 0], nn.functional.softplus(numbers[..., 1]) + LEAST_SCALE


class Deepar(Recurrent):
    """The family: one row a model, all models and paths of a batch in three products a step."""

    def __init__(self, key: str, config: DeeparConfig) -> None:
        self.config = config
        past = config.context_length - config.prediction_length
        self._gru = Recurrence("gru", config.features, config.hidden, config.layers, past)
        self._feedback = Feedback("gru", config.hidden, config.layers)
        self._head = LinearHead(config.hidden, 2)
        pieces, bound = (self._gru, self._head), (self._head, self._feedback, self._gru)
        super().__init__(key, config.input_shape, config.output_shape, pieces, bound)

    def reference(self) -> nn.Module:
        """The plain network, freshly initialised, in eval mode."""
        return DeeparReference(self.config).eval()

    def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Input x [B, features, context_length] -> [B, prediction_length, paths]; see Family.forward.

        Seeds and draws are float32 for every precision of the network: a shorter seed would be another one.

        The memory of the paths is allocated here, because a binding of each batch size would keep some MB.
        """
        (head, bias), rest, steps = weights[:2], weights[2:], self.config.prediction_length
        known, noise = x[:, :-1].transpose(1, 2), draw_normals(x[:, -1, :2], self.config.paths, steps)
        past = torch.cat([x[:, 0, steps - 1 : -1, None], known[:, :-steps]], 2)
        start = self._gru.final(rest[self._feedback.items :], past)
        found, last = x.new_empty(len(x), *self.output_shape), x[:, :1, -1].expand(-1, self.config.paths)

        def some(models: slice) -> None:
            def drawn(step: int, states: torch.Tensor) -> torch.Tensor:
                center, scale = compute_normal(torch.baddbmm(bias[models], states, head[models]).float())
                return torch.addcmul(center, scale, noise[models, :, step], out=found[models, step])

            bound = [each[models] for each in rest[: self._feedback.items]]
            self._feedback.run(bound, known[models, -steps:], [each[models] for each in start], last[models], drawn)

        size = len(x) if x.is_cuda else max(1, CPU_PATHS // self.config.paths)
        for at in range(0, len(x), size):
            some(slice(at, at + size))
        return found


ARCHITECTURE = Architecture(name="deepar", config=DeeparConfig, family=Deepar, samples=True)
