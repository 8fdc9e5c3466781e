"""Fitting forecasters: all series of a call together, along a leading model dimension. Torch; no files.

The parameters of M models are one tensor [M, n] with one optimiser state; the models share nothing else, so the loss is
a sum of theirs, gradients are clipped and the best weights kept per model. The `tcn` is trained through its receptive
field alone (every kernel-th position, see its module), measured 16 times faster than the plain network.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi, prod
from typing import Any

import msgspec
import numpy as np
import torch
from torch import nn
from torch.func import functional_call, vmap

from handlers.base import Family, Float32
from handlers.deepar import DeepAr, from_network
from handlers.forecasters import build, random_tensors
from handlers.forecasters.tcn import Tcn, TcnConfig
from handlers.series import Series
from handlers.windows import Windows
from model_store.manifest import Forecast, GoldenSample

Config = dict[str, int | float | str | bool | list[int]]
Parts = Mapping[str, torch.Tensor]
Progress = Callable[[int, int, float], None]  #: steps done, of at most, mean holdout loss

WARM_UP = 0.05  #: of the steps, in which the learning rate rises
CLIP = 1.0  #: norm of one model's gradient
GOLDEN_REL = 1e-3
GOLDEN_ABS = 1e-4  #: in units of the scaler's scale: network numbers near zero differ by about 1e-6


@dataclass(frozen=True, slots=True)
class Fitting:
    """How long and how: `epochs` count training windows of one series, `holdout` is the last part of it in time."""

    epochs: float = 20.0
    batch: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 0.01
    average: float = 0.995  #: decay of the weight average that is kept
    holdout: float = 0.1
    holdout_windows: int = 512
    checks: int = 40  #: looks at the holdout in a whole run
    patience: int = 12  #: looks without a better loss of any model, after which the run ends
    max_seconds: float = float("inf")  #: a run that is cut by it is not reproducible
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Fitted:
    """A trained forecaster, ready to be packed. Losses are mean pinball losses of the holdout in the series' unit."""

    name: str
    architecture: str
    config: Config
    forecast: Forecast
    tensors: dict[str, Float32]
    golden: GoldenSample
    loss: float
    naive_loss: float


def reach(family: Family) -> int:
    """The last steps of the context that can change the family's answer."""
    if isinstance(family, Tcn):
        config = family.config
        return int(min(config.context_length, config.kernel**config.layers))
    return family.input_shape[1]


def fit(
    series: Sequence[Series],
    forecasts: Sequence[Forecast],
    architecture: str,
    config: Config,
    fitting: Fitting = Fitting(),
    progress: Progress | None = None,
) -> list[Fitted]:
    """One forecaster per series, all of one family and of equal length; the same numbers for the same seed and threads.

    `config` is completed by what the forecasts say (features, lengths, quantiles).

    Raises:
        SeriesInvalid: too few steps, or no values in one of the parts. ArchiveInvalid: a wrong config.
    """
    config = {**config, **network_config(forecasts[0])}
    family = build(architecture, config)
    data = Windows(series, forecasts, reach(family), fitting.holdout)
    start = np.stack([_flat(family, random_tensors(family, fitting.seed + i)) for i in range(len(series))])
    best = _optimise(family, data, torch.from_numpy(start), fitting, progress)
    losses = _price_losses(family, data, best, fitting)
    found = []
    for i, (each, forecast) in enumerate(zip(series, forecasts, strict=True)):
        parts = _parts(family, best[i : i + 1])
        tensors = {name: part[0].numpy().copy() for name, part in parts.items()}
        golden = golden_sample(architecture, config, forecast, tensors, each)
        found.append(Fitted(each.name, architecture, config, forecast, tensors, golden, *losses[i]))
    return found


def network_config(forecast: Forecast) -> Config:
    """The part of every architecture's config that the forecast decides."""
    return {
        "features": len(forecast.inputs),
        "context_length": forecast.context_length,
        "prediction_length": forecast.prediction_length,
        "quantiles": len(forecast.quantile_levels),
    }


def reference_network(architecture: str, config: Config, tensors: Mapping[str, Float32]) -> nn.Module:
    """The plain network with these weights."""
    network = build(architecture, config).reference()
    network.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    return network


def ask(network: nn.Module, forecast: Forecast, request: object) -> Any:
    """The answer to a DeepAR request, as the server gives it, by calling the network in this process."""
    inputs, encode = DeepAr(forecast).decode(msgspec.json.encode(request))
    with torch.inference_mode():
        return msgspec.json.decode(encode(network(torch.from_numpy(inputs)).numpy()))


def golden_sample(
    architecture: str, config: Config, forecast: Forecast, tensors: Mapping[str, Float32], series: Series
) -> GoldenSample:
    """The forecast after the last full window of the series."""
    end = len(series.values) - forecast.prediction_length
    request = {"instances": [series.instance(end - forecast.history_length, end, forecast.prediction_length)]}
    response = ask(reference_network(architecture, config, tensors), forecast, request)
    tolerance = GOLDEN_ABS * forecast.scaler.scale
    return GoldenSample(request=request, response=response, abs_tolerance=tolerance, rel_tolerance=GOLDEN_REL)


def pinball(y: torch.Tensor, forecast: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Targets [..., P] (NaN: missing, counts 0) and quantiles [..., P, Q] -> [...], the sum over P and mean over Q.

    Koenker and Bassett's loss, max(q e, (q - 1) e) for the error e = y - forecast.
    """
    error = y.nan_to_num()[..., None] - forecast
    loss = torch.maximum(levels * error, (levels - 1) * error).mean(-1)
    return (loss * ~y.isnan()).sum(-1)


def batched_forward(family: Family) -> Callable[[Parts, torch.Tensor], torch.Tensor]:
    """Differentiable: ({name: [M, *shape]}, x [M, B, reach, channels]) -> [M, B, prediction, levels]."""
    if isinstance(family, Tcn):
        return lambda parts, x: _tcn(family.config, parts, x)
    network = family.reference()
    each = vmap(lambda parts, x: functional_call(network, dict(parts), (x.transpose(1, 2),)))
    return lambda parts, x: each(dict(parts), x)


def _tcn(config: TcnConfig, parts: Parts, x: torch.Tensor) -> torch.Tensor:
    models, batch, _, width = x.shape
    h = x
    for i in range(config.layers):
        lead = -h.shape[2] % config.kernel
        if lead:  # a context shorter than the receptive field: zeros before it, at every layer
            h = nn.functional.pad(h, (0, 0, lead, 0))
        u = h.reshape(models, -1, config.kernel * width)
        kernel = parts[f"blocks.{i}.conv.weight"].permute(0, 3, 2, 1).reshape(models, -1, config.channels)
        residual = parts[f"blocks.{i}.residual.weight"][..., 0].transpose(1, 2)
        h = torch.baddbmm(parts[f"blocks.{i}.conv.bias"][:, None], u, kernel).relu()
        h = h + torch.baddbmm(parts[f"blocks.{i}.residual.bias"][:, None], u[..., -width:], residual)
        width = config.channels
        h = h.view(models, batch, -1, width)
    last, head = h.view(models, batch, width), parts["head.weight"].transpose(1, 2)
    answer = torch.baddbmm(parts["head.bias"][:, None], last, head)
    return answer.view(models, batch, config.prediction_length, config.quantiles)


def _optimise(
    family: Family, data: Windows, start: torch.Tensor, fitting: Fitting, progress: Progress | None
) -> torch.Tensor:
    """AdamW on flat parameters [M, n], the learning rate by a warm-up and a cosine; the best average by model."""
    forward, draw = batched_forward(family), torch.Generator().manual_seed(fitting.seed)
    weights = start.clone().requires_grad_()
    average, best = start.clone(), start.clone()
    best_loss = torch.full((len(data),), float("inf"))
    optimiser = torch.optim.AdamW([weights], fitting.learning_rate, weight_decay=fitting.weight_decay, fused=True)
    first, last = data.train
    steps = max(1, round(fitting.epochs * (last - first + 1) / fitting.batch))
    every, idle, until = max(1, steps // fitting.checks), 0, time.monotonic() + fitting.max_seconds
    for step in range(1, steps + 1):
        optimiser.param_groups[0]["lr"] = fitting.learning_rate * _rate(step / steps)
        x, y = data.at(torch.randint(first, last + 1, (len(data), fitting.batch), generator=draw))
        loss = pinball(y, forward(_parts(family, weights), x), data.levels)
        observed = (~y.isnan()).sum((1, 2)).clamp(min=1)
        optimiser.zero_grad()
        torch.autograd.backward((loss.sum(1) / observed).sum())
        assert weights.grad is not None
        weights.grad.mul_((CLIP / (weights.grad.norm(dim=1, keepdim=True) + 1e-12)).clamp(max=1))
        optimiser.step()
        average.lerp_(weights.detach(), max(1 - fitting.average, 1 / step))
        over = time.monotonic() > until
        if step % every == 0 or step == steps or over:
            held = _holdout_loss(family, data, average, fitting)
            better = held < best_loss
            best[better], best_loss[better] = average[better], held[better]
            idle = 0 if better.any() else idle + 1
            if progress:
                progress(step, steps, best_loss.mean().item())
            if over or idle >= fitting.patience:
                break
    return best


def _rate(done: float) -> float:
    return min(done / WARM_UP, (1 + cos(pi * done)) / 2)


def _holdout_loss(family: Family, data: Windows, weights: torch.Tensor, fitting: Fitting) -> torch.Tensor:
    """Mean pinball loss in network numbers [M]."""
    forward, parts = batched_forward(family), _parts(family, weights)
    total, observed = torch.zeros(len(data)), torch.zeros(len(data))
    with torch.inference_mode():
        for starts in data.held_out(fitting.holdout_windows):
            x, y = data.at(starts)
            total += pinball(y, forward(parts, x), data.levels).sum(1)
            observed += (~y.isnan()).sum((1, 2))
    return total / observed.clamp(min=1)


def _price_losses(family: Family, data: Windows, weights: torch.Tensor, fitting: Fitting) -> list[tuple[float, float]]:
    """Mean pinball losses of the holdout in prices: of the models, and of the same time a day (or season) before."""
    forward, parts = batched_forward(family), _parts(family, weights)
    ours, naive, observed = np.zeros(len(data)), np.zeros(len(data)), np.zeros(len(data))
    with torch.inference_mode():
        for starts in data.held_out(fitting.holdout_windows):
            answers = forward(parts, data.at(starts)[0]).double().numpy()
            for m, scaler in enumerate(data.scalers):
                at = starts[m][:, None].numpy() + np.arange(data.horizon)
                y, before = data.values[m][at], data.values[m][at - data.naive_lag]
                known = torch.from_numpy(np.where(np.isnan(before), np.nan, y))
                quantiles = torch.from_numpy(np.sort(from_network(answers[m], scaler)))
                ours[m] += pinball(known, quantiles, data.levels).sum()
                naive[m] += pinball(known, torch.from_numpy(np.nan_to_num(before))[..., None], data.levels).sum()
                observed[m] += (~known.isnan()).sum()
    counts = np.maximum(observed, 1)
    return list(zip((ours / counts).tolist(), (naive / counts).tolist(), strict=True))


def _flat(family: Family, tensors: Mapping[str, Float32]) -> Float32:
    return np.concatenate([tensors[name].ravel() for name in family.parameters])


def _parts(family: Family, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Flat parameters [M, n] -> {name: [M, *shape]}."""
    shapes = family.parameters
    pieces = torch.split(weights, [prod(shape) for shape in shapes.values()], dim=1)
    return {name: piece.view(-1, *shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
