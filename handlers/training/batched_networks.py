"""What training must know of a family: which inputs it wants, how it runs differentiably, and its flat parameters.

All of it comes from the architecture's record; an ensemble is trained as its members are.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from handlers.base import Family, Float32
from handlers.forecasters import answers_paths, architecture_of, split_members
from handlers.forecasters.training_forward import Parts, TrainingForward


class InputNeeds(NamedTuple):
    """What a recipe must know of a family."""

    reach: int  #: see `reach`
    whole_days: bool = False  #: the calendar as a channel for each day of the week, and forecasts from midnight
    context: int = 0  #: as long as the network was made for; 0: as the frequency suggests
    paths: int = 0  #: drawn, from a seed


def get_input_needs(family: Family) -> InputNeeds:
    """What its inputs are to be."""
    record, (member, _) = architecture_of(family), split_members(family)
    return InputNeeds(
        record.reach(member),
        whole_days=record.whole_days,
        context=record.context(member) if record.context else 0,
        paths=family.output_shape[1] if record.samples else 0,
    )


def get_likelihood(family: Family) -> Callable[[Parts, torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """What a family that samples is fitted by, differentiable: parts, x as for the forward, y [M, B, prediction].

    It gives [M, B], how unlikely y is, in sum over its steps. None: the family answers quantiles.
    """
    return batched_forward(family) if answers_paths(family) else None


def compute_reach(family: Family) -> int:
    """The last steps of the context that can change the family's answer."""
    return architecture_of(family).reach(split_members(family)[0])


def batched_forward(family: Family) -> TrainingForward:
    """Differentiable: ({name: [M, *shape]}, x [M, B, reach, channels]) -> [M, B, prediction, levels]."""
    member, count = split_members(family)
    forward = architecture_of(family).training_forward(member)
    return forward if count == 1 else _average_members(member, count, forward)


def _average_members(member: Family, count: int, forward: TrainingForward) -> TrainingForward:
    """The members as models of their own, side by side; the answer is their mean."""

    def run(parts: Parts, x: torch.Tensor) -> torch.Tensor:
        apart = {
            name: torch.stack([parts[f"members.{i}.{name}"] for i in range(count)], 1).flatten(0, 1)
            for name in member.parameters
        }
        answers = forward(apart, x.repeat_interleave(count, 0))
        return answers.view(-1, count, *answers.shape[1:]).mean(1)

    return run


def flatten_tensors(family: Family, tensors: Mapping[str, Float32]) -> Float32:
    """A state dict -> its numbers one after another [n]."""
    return np.concatenate([tensors[name].ravel() for name in family.parameters])


def unflatten_weights(family: Family, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Flat parameters [M, n] -> {name: [M, *shape]}."""
    shapes = family.parameters
    pieces = torch.split(weights, [prod(shape) for shape in shapes.values()], dim=1)
    return {name: piece.view(-1, *shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
