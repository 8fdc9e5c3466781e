"""Networks along a leading model dimension, differentiable: what training runs. Torch.

A family's own `forward` is made for serving: it writes into scratch and has no gradient.
"""

from collections.abc import Callable, Mapping
from math import prod

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, vmap

from handlers.base import Family, Float32
from handlers.forecasters.gru import Gru
from handlers.forecasters.seq2seq import Seq2Seq
from handlers.forecasters.tcn import Tcn, TcnConfig

Parts = Mapping[str, torch.Tensor]


def reach(family: Family) -> int:
    """The last steps of the context that can change the family's answer."""
    if isinstance(family, Tcn):
        config = family.config
        return int(min(config.context_length, config.kernel**config.layers))
    return family.input_shape[1]


def batched_forward(family: Family) -> Callable[[Parts, torch.Tensor], torch.Tensor]:
    """Differentiable: ({name: [M, *shape]}, x [M, B, reach, channels]) -> [M, B, prediction, levels]."""
    if isinstance(family, Tcn):
        return lambda parts, x: _tcn(family.config, parts, x)
    if isinstance(family, Gru | Seq2Seq):
        return lambda parts, x: _one_by_one(family, parts, x)
    return lambda parts, x: _plain(family, parts, x)


def _plain(family: Family, parts: Parts, x: torch.Tensor) -> torch.Tensor:
    """Any architecture: its reference network, mapped over the models."""
    answer: torch.Tensor = vmap(_network(family))(dict(parts), x)
    return answer


def _one_by_one(family: Family, parts: Parts, x: torch.Tensor) -> torch.Tensor:
    """Recurrences: `vmap` has no rule for `nn.GRU`, whose own loop over the steps outweighs one over the models.

    Measured, one core, 168 steps of 128 windows, forward and backward: 34 ms a model; a cell written out in torch for
    four models together takes 29, too little to keep a second one.
    """
    one = _network(family)
    return torch.stack([one({name: part[i] for name, part in parts.items()}, x[i]) for i in range(len(x))])


def _network(family: Family) -> Callable[[Parts, torch.Tensor], torch.Tensor]:
    """The reference of one model: ({name: [*shape]}, x [B, reach, channels]) -> [B, prediction, levels]."""
    with torch.device("meta"):  # a network of its own: a call puts the parameters into it, and threads call at once
        network = family.reference()

    def one(parts: Parts, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = functional_call(network, dict(parts), (x.transpose(1, 2),))
        return answer

    return one


def _tcn(config: TcnConfig, parts: Parts, x: torch.Tensor) -> torch.Tensor:
    """Only the positions that reach the answer, every kernel-th of a layer."""
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


def flat(family: Family, tensors: Mapping[str, Float32]) -> Float32:
    """A state dict -> its numbers one after another [n]."""
    return np.concatenate([tensors[name].ravel() for name in family.parameters])


def unflat(family: Family, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Flat parameters [M, n] -> {name: [M, *shape]}."""
    shapes = family.parameters
    pieces = torch.split(weights, [prod(shape) for shape in shapes.values()], dim=1)
    return {name: piece.view(-1, *shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
