"""Fits `ddnn`: dense networks by their own gradient, models and members side by side in one product. Torch.

A run has a fixed number of steps of AdamW with dropout; the average of the weights is kept. Gradients are written out,
which halves the time that autograd takes here. Networks learn either the prices or their distance from a base, a
regression on the means of past days and the last price; the holdout chooses for each model. On markets whose level
wanders (NP of Lago et al. 2021) the base lowers the error by a fifth, on others the network finds more without it.

Measured, one core, three years of days with two covariates: 0.3 s a run of one network.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import cos, pi
from typing import NamedTuple

import torch
from torch.nn.functional import elu

from handlers.forecasters.ddnn import LAYERS, Ddnn
from handlers.training.windows import Windows

STEPS, BATCH = 400, 64
RATE, WARM_UP = 8e-3, 0.05  #: largest learning rate, and the share of the steps in which it rises
DECAY = 0.5  #: weight decay of AdamW
BETAS, EPSILON = (0.9, 0.999), 1e-8  #: of AdamW
AVERAGE = 0.99  #: decay of the average of the weights
DROP_INPUT, DROP_HIDDEN = 0.1, 0.2
LEVEL_RIDGE = 1.0
MOST_WINDOWS = 4096  #: of a fit and of its holdout, for bounded memory
CUT = 256  #: most windows whose whole context is in memory at once
GROUP = 8  #: models of one product; results do not depend on the threads, because groups do not


class Design(NamedTuple):
    """What the models of a group learn from: reads x [m, n, F] of mean 0 and spread 1, and targets y [m, n, P]."""

    x: torch.Tensor
    y: torch.Tensor
    mean: torch.Tensor  #: [m, F]
    spread: torch.Tensor  #: [m, F]


class DenseFit:
    """The networks of all models of one family over their windows; every `members` of them are one ensemble.

    The windows have each series once; the parameters [M x members, n] have all members of a model side by side.
    """

    def __init__(
        self, family: Ddnn, data: Windows, pool: ThreadPoolExecutor, members: int, starts: torch.Tensor, steps: int
    ) -> None:
        """`starts`: initial flat parameters of each member [members, n]; `steps` of a run."""
        self._family, self._data, self._pool, self._members = family, data, pool, members
        self._starts, self._steps = starts, steps
        self._on_base = torch.zeros(len(data), dtype=torch.bool)
        self._groups = [slice(at, min(at + GROUP, len(data))) for at in range(0, len(data), GROUP)]

    def __repr__(self) -> str:
        return f"<DenseFit {self._family.key} {self._data!r}>"

    def best(self, progress: Callable[[int, int, float], None] | None) -> torch.Tensor:
        """Fit flat parameters [M x members, n] to the rows before the holdout, which chooses who learns from a base."""
        found = []
        for weights, loss in self._pool.map(self._best, self._groups):
            found.append(weights)
            if progress:
                progress(len(found), len(self._groups), loss)
        return torch.cat(found).flatten(0, 1)

    def whole(self) -> torch.Tensor:
        """Fit anew to all windows, also those of the holdout, as `best` has chosen."""
        return torch.cat(list(self._pool.map(self._whole, self._groups))).flatten(0, 1)

    def _best(self, models: slice) -> tuple[torch.Tensor, float]:
        learnt = self._design(models, self._data.spaced(self._data.train, MOST_WINDOWS))
        check = self._design(models, self._data.held_out(MOST_WINDOWS), learnt)
        bases = fit_base(self._family, learnt)
        either = [self._train(learnt, base, slice(0, 1)) for base in (torch.zeros_like(bases), bases)]
        plain, based = (self._compute_losses(check, each[:, 0]) for each in either)
        self._on_base[models] = based < plain  # not where nothing is observed and both are NaN
        chosen = self._choose_bases(models, bases)
        first = torch.where(self._on_base[models][:, None, None], either[1], either[0])
        rest = [self._train(learnt, chosen, slice(1, self._members))] if self._members > 1 else []
        return torch.cat([first, *rest], 1), torch.fmin(plain, based).nanmean().item()

    def _whole(self, models: slice) -> torch.Tensor:
        learnt = self._design(models, self._data.spaced(self._data.all, MOST_WINDOWS))
        return self._train(learnt, self._choose_bases(models, fit_base(self._family, learnt)), slice(0, self._members))

    def _choose_bases(self, models: slice, bases: torch.Tensor) -> torch.Tensor:
        return bases * self._on_base[models][:, None, None]

    def _design(self, models: slice, starts: torch.Tensor, like: Design | None = None) -> Design:
        """Make the design of the windows that forecast from these steps [M, n], scaled like another one."""
        x, y = [], []
        for some in torch.split(starts, CUT, 1):
            context, targets = self._data.cut(some, models)
            x.append(context.transpose(2, 3).flatten(2).index_select(2, self._family.taps))
            y.append(targets)
        read = torch.cat(x, 1)
        mean, spread = (read.mean(1), read.std(1, correction=0)) if like is None else (like.mean, like.spread)
        spread = torch.where(spread > 1e-4, spread, 1.0)  # noqa: PLR2004 -- a mark that never changes
        return Design((read - mean[:, None]) / spread[:, None], torch.cat(y, 1), mean, spread)

    def _train(self, design: Design, bases: torch.Tensor, members: slice) -> torch.Tensor:
        """Train members on a design: flat parameters [m, members, n], for reads that are not scaled."""
        return train_networks(
            self._family, design, bases, self._starts[members], self._data.levels, self._steps, members.start
        )

    def _compute_losses(self, check: Design, weights: torch.Tensor) -> torch.Tensor:
        """Compute the mean holdout loss [m] of parameters [m, n], NaN where nothing is observed."""
        parts = split_parameters(self._family, weights)
        read = check.x * check.spread[:, None] + check.mean[:, None]
        answers = run_networks(self._family, parts, read)
        error = check.y[..., None] - answers
        levels = self._data.levels
        return torch.maximum(levels * error, (levels - 1) * error).nanmean((1, 2, 3))


def fit_base(family: Ddnn, design: Design) -> torch.Tensor:
    """Regress targets on block means of the target and its last value: weights [m, base taps, P] of scaled reads."""
    horizon, taps = family.output_shape[0], family.base_taps
    maps = torch.zeros(taps, taps // horizon + 1)
    for block in range(taps // horizon):
        maps[block * horizon : (block + 1) * horizon, block] = 1 / horizon
    if taps:
        maps[horizon - 1, -1] = 1
    levels = design.x[..., :taps] @ maps
    seen = ~design.y.isnan()
    y = (design.y - design.y.nanmean(1, keepdim=True)).nan_to_num() * seen
    gram = levels.transpose(1, 2) @ levels + LEVEL_RIDGE * torch.eye(maps.shape[1])
    found: torch.Tensor = maps @ torch.linalg.solve(gram, levels.transpose(1, 2) @ y)
    return found


def split_parameters(family: Ddnn, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Split flat parameters [..., n] into {name: [..., *shape]}."""
    found, at = {}, 0
    for name, shape in family.parameters.items():
        size = torch.Size(shape).numel()
        found[name] = weights[..., at : at + size].view(*weights.shape[:-1], *shape)
        at += size
    return found


def run_networks(family: Ddnn, parts: dict[str, torch.Tensor], read: torch.Tensor) -> torch.Tensor:
    """Run networks [m] on reads [m, n, F]: quantiles [m, n, P, Q]."""
    h = read
    for name in LAYERS:
        h = torch.baddbmm(parts[f"{name}.bias"][:, None], h, parts[f"{name}.weight"].transpose(1, 2))
        h = h if name == LAYERS[-1] else elu(h)
    base = read[..., : family.base_taps] @ parts["base.weight"].transpose(1, 2)
    return h.view(*h.shape[:2], *family.output_shape) + base[..., None]


class _Layers:
    """Weights [m x s, in, out] and biases [m x s, 1, out] of the three layers as views of one flat tensor."""

    def __init__(self, family: Ddnn, flat: torch.Tensor) -> None:
        at, self.views = 0, []
        for name in LAYERS:
            c_out, c_in = family.parameters[f"{name}.weight"]
            self.views.append(flat[:, at : at + c_in * c_out].view(-1, c_in, c_out))
            at += c_in * c_out
            self.views.append(flat[:, at : at + c_out].view(-1, 1, c_out))
            at += c_out


def train_networks(
    family: Ddnn,
    design: Design,
    bases: torch.Tensor,
    starts: torch.Tensor,
    levels: torch.Tensor,
    steps: int,
    seed: int,
) -> torch.Tensor:
    """Train a network for each model [m] and start [s, n]: flat parameters [m, s, n], for reads that are not scaled.

    INVARIANT: what is drawn depends on seed and step alone, so that a model does not depend on the others.
    """
    models, members = len(design.x), len(starts)
    y = design.y - design.x[..., : family.base_taps] @ bases
    layers = _draw_layers(family, starts, y, levels, models)
    gradient, average = torch.zeros_like(layers), layers.clone()
    moments = torch.zeros_like(layers), torch.zeros_like(layers)
    now, slopes = _Layers(family, layers), _Layers(family, gradient)
    draw = torch.Generator().manual_seed(seed)
    count = design.x.shape[1]
    offsets = (count * torch.arange(models))[:, None, None]
    reads, targets = design.x.flatten(0, 1), y.flatten(0, 1)
    for step in range(1, steps + 1):
        places = (torch.randint(0, count, (members, BATCH), generator=draw) + offsets).flatten()
        x = reads.index_select(0, places).view(models, members, BATCH, -1)
        x = (x * _draw_mask(members, x.shape[-1], DROP_INPUT, draw)).flatten(0, 1)
        of = targets.index_select(0, places).view(models * members, BATCH, -1)
        mask = _draw_mask(members, family.config.hidden, DROP_HIDDEN, draw).repeat(models, 1, 1)
        _write_gradient(now.views, slopes.views, x, of.repeat_interleave(len(levels), 2), levels, mask)
        _take_step(layers, gradient, moments, step, RATE * _compute_rate(step / steps))
        average.lerp_(layers, max(1 - AVERAGE, 1 / step))
    return _unscale_parameters(family, design, bases, _Layers(family, average).views, members)


def _draw_layers(
    family: Ddnn, starts: torch.Tensor, y: torch.Tensor, levels: torch.Tensor, models: int
) -> torch.Tensor:
    """Lay out the starts for `_Layers` [m x s, n], with the quantiles of the targets as the last bias."""
    parts = split_parameters(family, starts)
    quantiles = y.nanquantile(levels, dim=1).permute(1, 2, 0).flatten(1).nan_to_num()  # [m, P x Q]
    found = []
    for name in LAYERS:
        weight = parts[f"{name}.weight"].transpose(1, 2).flatten(1).repeat(models, 1)
        bias = parts[f"{name}.bias"].repeat(models, 1)
        found += [weight, quantiles.repeat_interleave(len(starts), 0) if name == LAYERS[-1] else bias]
    return torch.cat(found, 1)


def _draw_mask(members: int, width: int, share: float, draw: torch.Generator) -> torch.Tensor:
    """Draw what is dropped of a batch [members, BATCH, width]: 0, or what keeps the mean."""
    return (torch.rand((members, BATCH, width), generator=draw) >= share) / (1 - share)


def _write_gradient(
    layers: Sequence[torch.Tensor],
    slopes: Sequence[torch.Tensor],
    x: torch.Tensor,
    y: torch.Tensor,
    levels: torch.Tensor,
    mask: torch.Tensor,
) -> None:
    """Write the gradient of the mean pinball loss of a batch x [b, BATCH, F], y [b, BATCH, P x Q] (NaN: missing)."""
    first, first_bias, second, second_bias, head, head_bias = layers
    h1 = torch.baddbmm(first_bias, x, first)
    a1 = elu(h1) * mask
    h2 = torch.baddbmm(second_bias, a1, second)
    a2 = elu(h2)
    answer = torch.baddbmm(head_bias, a2, head)
    error = (y < answer).to(y.dtype) - levels.repeat(y.shape[2] // len(levels))
    error = error.masked_fill_(y.isnan(), 0) / (y.shape[1] * y.shape[2])
    _write_slopes(slopes[4:], a2, error)
    error = torch.bmm(error, head.transpose(1, 2)) * _elu_slope(h2)
    _write_slopes(slopes[2:4], a1, error)
    error = torch.bmm(error, second.transpose(1, 2)) * mask * _elu_slope(h1)
    _write_slopes(slopes[:2], x, error)


def _write_slopes(slopes: Sequence[torch.Tensor], given: torch.Tensor, error: torch.Tensor) -> None:
    torch.bmm(given.transpose(1, 2), error, out=slopes[0])
    torch.sum(error, 1, keepdim=True, out=slopes[1])


def _elu_slope(h: torch.Tensor) -> torch.Tensor:
    return h.clamp(max=0).exp()


def _take_step(
    weights: torch.Tensor, gradient: torch.Tensor, moments: tuple[torch.Tensor, torch.Tensor], step: int, rate: float
) -> None:
    """Take a step of AdamW (Loshchilov and Hutter 2019) in place.

    The first optimiser of `torch.optim` in a process imports torch's compiler, 1.7 s: as long as several fits.
    """
    first, second = moments
    weights.mul_(1 - rate * DECAY)
    first.lerp_(gradient, 1 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    spread = (second / (1 - BETAS[1] ** step)).sqrt_().add_(EPSILON)
    weights.addcdiv_(first, spread, value=-rate / (1 - BETAS[0] ** step))


def _compute_rate(done: float) -> float:
    return min(done / WARM_UP, (1 + cos(pi * done)) / 2)


def _unscale_parameters(
    family: Ddnn, design: Design, bases: torch.Tensor, layers: Sequence[torch.Tensor], members: int
) -> torch.Tensor:
    """Lay out networks for reads that are not scaled, as their state dict is: [m, members, n]."""
    first, bias, second, second_bias, head, head_bias = layers
    spread, mean = (each.repeat_interleave(members, 0) for each in (design.spread, design.mean))
    first = first / spread[..., None]
    bias = bias - mean[:, None] @ first
    base = (bases / design.spread[:, : family.base_taps, None]).repeat_interleave(members, 0)
    shift = mean[:, None, : family.base_taps] @ base  # [m x s, 1, P]
    head_bias = head_bias - shift.repeat_interleave(family.output_shape[1], 2)
    found = []
    for weight, of_layer in ((first, bias), (second, second_bias), (head, head_bias)):
        found += [weight.transpose(1, 2).flatten(1), of_layer.flatten(1)]
    found.append(base.transpose(1, 2).flatten(1))
    return torch.cat(found, 1).view(-1, members, sum(each.shape[1] for each in found))
