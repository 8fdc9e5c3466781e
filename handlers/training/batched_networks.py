"""Networks along a leading model dimension, differentiable: what training runs. Torch.

A family's own `forward` is made for serving: it writes into scratch and has no gradient.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, vmap

from handlers.base import Family, Float32
from handlers.forecasters import samples
from handlers.forecasters.ensemble import Ensemble
from handlers.forecasters.lear import Lear
from handlers.forecasters.mlp import Mlp
from handlers.forecasters.mqcnn import Mqcnn
from handlers.forecasters.multi_horizon_quantile import MqReference
from handlers.forecasters.tcn import Tcn, TcnConfig

Parts = Mapping[str, torch.Tensor]


class Wants(NamedTuple):
    """What a recipe must know of a family."""

    reach: int  #: see `reach`
    weekdays: bool = False  #: the calendar as a channel for each day of the week
    context: int = 0  #: as long as the network was made for; 0: as the frequency suggests
    paths: int = 0  #: drawn, from a seed


def wants(family: Family) -> Wants:
    """What its inputs are to be."""
    if isinstance(family, Ensemble):
        return wants(family.member)
    if isinstance(family, Lear):
        blocks = 1 + max((*family.config.past_blocks, *family.config.known_blocks), default=0)
        return Wants(reach(family), weekdays=True, context=blocks * family.config.prediction_length)
    return Wants(reach(family), paths=family.output_shape[1] if samples(family) else 0)


def likelihood(family: Family) -> Callable[[Parts, torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """What a family that samples is fitted by, differentiable: parts, x as for the forward, y [M, B, prediction].

    It gives [M, B], how unlikely y is, in sum over its steps. None: the family answers quantiles.
    """
    return _one_by_one(family) if samples(family) else None


def reach(family: Family) -> int:
    """The last steps of the context that can change the family's answer."""
    if isinstance(family, Ensemble):
        return reach(family.member)
    if isinstance(family, Tcn):
        config = family.config
        return int(min(config.context_length, config.kernel**config.layers))
    if isinstance(family, Mqcnn):
        return max(reach(family.encoder), family.config.prediction_length)
    return family.input_shape[1]


def batched_forward(family: Family) -> Callable[[Parts, torch.Tensor], torch.Tensor]:
    """Differentiable: ({name: [M, *shape]}, x [M, B, reach, channels]) -> [M, B, prediction, levels]."""
    if isinstance(family, Ensemble):
        member = batched_forward(family.member)
        return lambda parts, x: _ensemble(family, member, parts, x)
    if isinstance(family, Tcn):
        return lambda parts, x: _tcn(family.config, parts, x)
    if isinstance(family, Mqcnn):
        return _mqcnn(family)
    if not isinstance(family, Lear | Mlp):
        return _one_by_one(family)
    return lambda parts, x: _plain(family, parts, x)


def _ensemble(
    family: Ensemble, member: Callable[[Parts, torch.Tensor], torch.Tensor], parts: Parts, x: torch.Tensor
) -> torch.Tensor:
    """The members as models of their own, side by side."""
    count = family.members
    apart = {
        name: torch.stack([parts[f"members.{i}.{name}"] for i in range(count)], 1).flatten(0, 1)
        for name in family.member.parameters
    }
    answers = member(apart, x.repeat_interleave(count, 0))
    return answers.view(-1, count, *answers.shape[1:]).mean(1)


def _plain(family: Family, parts: Parts, x: torch.Tensor) -> torch.Tensor:
    """Any architecture: its reference network, mapped over the models."""
    answer: torch.Tensor = vmap(_network(family))(dict(parts), x)
    return answer


def _one_by_one(family: Family) -> Callable[..., torch.Tensor]:
    """Recurrences: `vmap` has no rule for `nn.GRU`, whose own loop over the steps outweighs one over the models.

    Measured, one core, 168 steps of 128 windows, forward and backward: 34 ms a model; a cell written out in torch for
    four models together takes 29, too little to keep a second one.
    """

    def all_models(parts: Parts, *given: torch.Tensor) -> torch.Tensor:
        one = _network(family)
        models = [{name: part[i] for name, part in parts.items()} for i in range(len(given[0]))]
        return torch.stack([one(model, *(each[i] for each in given)) for i, model in enumerate(models)])

    return all_models


def _network(family: Family) -> Callable[..., torch.Tensor]:
    """The reference of one model: ({name: [*shape]}, x [B, reach, channels]) -> [B, prediction, levels]."""
    with torch.device("meta"):  # a network of its own: a call puts the parameters into it, and threads call at once
        network = family.reference()

    def one(parts: Parts, x: torch.Tensor, *targets: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = functional_call(network, dict(parts), (x.transpose(1, 2), *targets))
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


def _mqcnn(family: Mqcnn) -> Callable[[Parts, torch.Tensor], torch.Tensor]:
    """The encoder as `_tcn`, the decoder mapped over the models."""
    encoder, inner = family.encoder, "encoder."
    assert isinstance(encoder, Tcn)

    def all_models(parts: Parts, x: torch.Tensor) -> torch.Tensor:
        with torch.device("meta"):  # a decoder of its own, as in `_network`
            decoder = Decoder(family.reference())

        def one(parts: Parts, *given: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = functional_call(decoder, dict(parts), given)
            return answer

        of_encoder = {name.removeprefix(inner): part for name, part in parts.items() if name.startswith(inner)}
        encoded = _tcn(encoder.config, of_encoder, x[:, :, -reach(encoder) :])
        rest = {f"network.{name}": part for name, part in parts.items() if not name.startswith(inner)}
        answers: torch.Tensor = vmap(one)(rest, encoded, x.transpose(2, 3))
        return answers

    return all_models


class Decoder(nn.Module):
    """The part of an `mq` network after its encoder."""

    def __init__(self, network: MqReference) -> None:
        super().__init__()
        self.network = network

    def forward(self, encoded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """See MqReference.decode."""
        return self.network.decode(encoded, x)


def flat(family: Family, tensors: Mapping[str, Float32]) -> Float32:
    """A state dict -> its numbers one after another [n]."""
    return np.concatenate([tensors[name].ravel() for name in family.parameters])


def unflat(family: Family, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Flat parameters [M, n] -> {name: [M, *shape]}."""
    shapes = family.parameters
    pieces = torch.split(weights, [prod(shape) for shape in shapes.values()], dim=1)
    return {name: piece.view(-1, *shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
