"""The properties of a family for training: its inputs, its differentiable forward, and its flat parameters.

They come from the record of the architecture; an ensemble is trained like its members.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from handlers.base import Family, Float32
from handlers.forecasters import answers_paths, find_architecture, split_members
from handlers.forecasters.mixture import SHARES, Mixture, mix_answers, read_prices
from handlers.forecasters.training_forward import Parts, TrainingForward


class InputNeeds(NamedTuple):
    """The properties of a family that determine an input recipe."""

    reach: int  #: see `compute_reach`
    whole_days: bool = False  #: the calendar as a channel for each day of the week, and forecasts from midnight
    context: int = 0  #: the context that the network was made for; 0: chosen by the frequency
    paths: int = 0  #: number of paths that are drawn from a seed


def get_input_needs(family: Family) -> InputNeeds:
    """Return the requirements on the inputs of a family."""
    record, (member, _) = find_architecture(family), split_members(family)
    if isinstance(member, Mixture):
        parts = list_part_needs(member)
        return InputNeeds(
            max(each.reach for each in parts),
            whole_days=any(each.whole_days for each in parts),
            context=max(each.context for each in parts),
        )
    return InputNeeds(
        record.reach(member),
        whole_days=record.whole_days,
        context=record.context(member) if record.context else 0,
        paths=family.output_shape[1] if record.samples else 0,
    )


def list_part_needs(family: Family) -> list[InputNeeds]:
    """List the requirements of each part of a mixture; those of any other family are one."""
    return [get_input_needs(part) for part in (family.parts if isinstance(family, Mixture) else (family,))]


def get_likelihood(family: Family) -> Callable[[Parts, torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """Return the differentiable loss of a family that samples: (parts, x, y [M, B, prediction]) -> [M, B].

    The loss is the negative log-likelihood of y, summed over its steps. Returns None for a family of quantiles.
    """
    return get_batched_forward(family) if answers_paths(family) else None


def compute_reach(family: Family) -> int:
    """Return how many last steps of the context can change the answer of the family."""
    return find_architecture(family).reach(split_members(family)[0])


def get_batched_forward(family: Family) -> TrainingForward:
    """Return the differentiable ({name: [M, *shape]}, x [M, B, reach, channels]) -> [M, B, prediction, levels]."""
    member, count = split_members(family)
    if isinstance(family, Mixture):
        mixture = family
        return lambda parts, x: mix_answers(run_parts(mixture, parts, x), parts[SHARES][:, None])
    forward = find_architecture(family).training_forward(member)
    return forward if count == 1 else _average_members(member, count, forward)


def run_parts(family: Mixture, parts: Parts, x: torch.Tensor) -> torch.Tensor:
    """Run each part of a mixture on its channels of x [M, B, context, channels]: [M, B, parts, prediction, levels]."""
    answers = []
    for i, (part, places, linear) in enumerate(zip(family.parts, family.places, family.linear, strict=True)):
        read = x[:, :, -compute_reach(part) :, list(places)]
        forward, tensors = get_batched_forward(part), family.take_tensors(i, parts)
        if linear:
            answers.append(forward(tensors, read_prices(read, torch.tensor(linear), 3)).asinh())
        else:
            answers.append(forward(tensors, read))
    return torch.stack(answers, 2)


def _average_members(member: Family, count: int, forward: TrainingForward) -> TrainingForward:
    """Run the members as separate models side by side, and average their answers."""

    def run(parts: Parts, x: torch.Tensor) -> torch.Tensor:
        apart = {
            name: torch.stack([parts[f"members.{i}.{name}"] for i in range(count)], 1).flatten(0, 1)
            for name in member.parameters
        }
        answers = forward(apart, x.repeat_interleave(count, 0))
        return answers.view(-1, count, *answers.shape[1:]).mean(1)

    return run


def flatten_tensors(family: Family, tensors: Mapping[str, Float32]) -> Float32:
    """Concatenate the numbers of a state dict [n]."""
    return np.concatenate([tensors[name].ravel() for name in family.parameters])


def unflatten_weights(family: Family, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Split flat parameters [M, n] into {name: [M, *shape]}."""
    shapes = family.parameters
    pieces = torch.split(weights, [prod(shape) for shape in shapes.values()], dim=1)
    return {name: piece.view(-1, *shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
