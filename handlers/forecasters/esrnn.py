"""`esrnn`: exponential smoothing with rates of the series' own takes level and season away, a GRU forecasts the rest.

Source: Smyl 2020, "A hybrid method of exponential smoothing and recurrent neural networks" (International Journal of
Forecasting 36), in the additive form of Holt and Winters, as prices may be negative. With the rates a and g, for the
steps t of the target y and a season of m steps:

    l_t = a (y_t - s_(t-m)) + (1 - a) l_(t-1)        s_t = g (y_t - l_t) + (1 - g) s_(t-m)

begun with the mean of the context's first season and its distances to it. The GRU reads y_t - s_(t-m) less the last
level, and the other channels; its last state gives prediction_length x quantiles, to which the last level and the
season of each step are added.

Within a season's steps s_(t-m) is known before, so their levels are one product: row t of the m x m matrix A holds
a (1 - a)^(t - j). A row of the bank has A made from the rate. The smoothing takes context / m products; the context's
last whole seasons are read, and a season longer than the context is as long as it. Parameters: the `gru`'s and 2,
14,234 by default.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta
from torch import nn

from handlers.base import Float32, Shape
from handlers.forecasters.architecture import Architecture
from handlers.forecasters.batched_gru import LinearHead, Recurrence, Recurrent
from handlers.forecasters.network_config import RecurrentConfig, count_products, require_numbers, require_products
from handlers.forecasters.row_layout import check_finite, check_tensors


class EsrnnConfig(RecurrentConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The config of `esrnn`. x [features, context_length] -> [prediction_length, quantiles]."""

    season: Annotated[int, Meta(ge=1, le=512)] = 24

    def __post_init__(self) -> None:
        """Raises ValueError for a network that would hold up a worker."""
        require_numbers(self.input_shape, self.output_shape)
        require_products(self.context_length * (count_products(self.features, self.hidden, self.layers) + self.season))

    @property
    def cycle(self) -> int:
        """The season in steps."""
        return min(self.season, self.context_length)

    @property
    def steps(self) -> int:
        """The last steps of the context that are read: whole seasons."""
        return self.context_length // self.cycle * self.cycle


class EsrnnReference(nn.Module):
    """The network as one would write it for training: [N, features, context] -> [N, prediction, quantiles]."""

    def __init__(self, config: EsrnnConfig) -> None:
        super().__init__()
        self.config = config
        self.level_rate = nn.Parameter(torch.zeros(1))  # before the sigmoid
        self.season_rate = nn.Parameter(torch.zeros(1))
        self.gru = nn.GRU(config.features, config.hidden, config.layers, batch_first=True)
        self.head = nn.Linear(config.hidden, config.prediction_length * config.quantiles)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, features, context_length] -> [N, prediction_length, quantiles]."""
        cycle, x = self.config.cycle, x[..., -self.config.steps :]
        a, g = self.level_rate.sigmoid(), self.season_rate.sigmoid()
        level = x[:, 0, :cycle].mean(1)
        seasons, steady = list((x[:, 0, :cycle] - level[:, None]).unbind(1)), []
        for t, y in enumerate(x[:, 0].unbind(1)):
            steady.append(y - seasons[t])
            level = a * steady[-1] + (1 - a) * level
            seasons.append(g * (y - level) + (1 - g) * seasons[t])
        rest = torch.cat([(torch.stack(steady, 1) - level[:, None])[:, None], x[:, 1:]], 1)
        states, _ = self.gru(rest.transpose(1, 2))
        answer = self.head(states[:, -1]).view(-1, self.config.prediction_length, self.config.quantiles)
        ahead = [seasons[len(seasons) - cycle + step % cycle] for step in range(self.config.prediction_length)]
        added: torch.Tensor = answer + (torch.stack(ahead, 1) + level[:, None])[..., None]
        return added


class Smoothing:
    """The rates of level and season, and for a row the matrix (float64) by which a season changes the level."""

    def __init__(self, cycle: int) -> None:
        self._cycle = cycle

    def __repr__(self) -> str:
        return f"<Smoothing of seasons of {self._cycle}>"

    def parameters(self) -> dict[str, Shape]:
        """The names and shapes in the state dict, both before the sigmoid."""
        return {"level_rate": (1,), "season_rate": (1,)}

    def parts(self) -> dict[str, Shape]:
        """The level after each step of a season, by its values and by the level before it; the season's rate."""
        return {"smoothing": (self._cycle, self._cycle), "decay": (self._cycle, 1), "season_rate": (1, 1)}

    def fill(self, part: Mapping[str, Float32], tensors: Mapping[str, Float32]) -> None:
        """Write state-dict tensors into the parts of a row."""
        a, g = (1 / (1 + np.exp(-tensors[name].astype(np.float64))) for name in ("level_rate", "season_rate"))
        t = np.arange(self._cycle)
        part["smoothing"][...] = np.tril(a * (1 - a) ** np.maximum(t[:, None] - t, 0))
        part["decay"][:, 0] = (1 - a) ** (t + 1)
        part["season_rate"][0] = g

    def bind(self, part: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Views of B rows' parts -> smoothing [B, cycle, cycle], decay [B, cycle, 1], the season's rate [B, 1, 1]."""
        return [part[name] for name in self.parts()]


class Esrnn(Recurrent):
    """The family: one row a model, all models of a batch in one product a season, then a step."""

    def __init__(self, key: str, config: EsrnnConfig) -> None:
        self.config = config
        self._gru = Recurrence("gru", config.features, config.hidden, config.layers, config.steps)
        self._head = LinearHead(config.hidden, config.prediction_length * config.quantiles)
        smoothing = Smoothing(config.cycle)
        pieces, bound = (smoothing, self._gru, self._head), (smoothing, self._head, self._gru)
        super().__init__(key, config.input_shape, config.output_shape, pieces, bound)

    def reference(self) -> nn.Module:
        """The plain network, freshly initialised, in eval mode."""
        return EsrnnReference(self.config).eval()

    def row(self, tensors: Mapping[str, Float32]) -> Float32:
        """Make a flat row. The tensors are checked too, since the sigmoid of an infinite rate is finite."""
        check_tensors(self.parameters, tensors)
        check_finite(np.concatenate([tensor.ravel() for tensor in tensors.values()]), tensors)
        return super().row(tensors)

    def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Input x [B, features, context_length] -> [B, prediction_length, quantiles]; see Family.forward."""
        smoothing, decay, rate = (each.float() for each in weights[:3])  # sums of a whole context
        head, bias = weights[3:5]
        cycle, (steps, _) = self.config.cycle, self.output_shape
        x = x[..., -self.config.steps :]
        y = x[:, 0].reshape(len(x), -1, cycle, 1)
        level = y[:, 0].mean(1, keepdim=True)
        season, steady = y[:, 0] - level, []
        for each in y.unbind(1):
            steady.append(each - season)
            levels = torch.baddbmm(decay * level, smoothing, steady[-1])
            season = torch.lerp(season, each - levels, rate)
            level = levels[:, -1:]
        rest = torch.cat([torch.cat(steady, 1) - level, x[:, 1:].transpose(1, 2)], 2)
        state = self._gru.final(weights[5:], rest)[-1]
        ahead = season.repeat(1, -(-steps // cycle), 1)[:, :steps] + level
        answer: torch.Tensor = torch.baddbmm(bias, state, head).view(-1, *self.output_shape) + ahead
        return answer


ARCHITECTURE = Architecture(name="esrnn", config=EsrnnConfig, family=Esrnn)
