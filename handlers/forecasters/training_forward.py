"""Differentiable networks with a leading model dimension, by which training runs many models of a family at once.

The `forward` of a family is for serving: it writes into scratch and has no gradient. Training runs the reference
network instead, with parameters that have a leading model dimension M.
"""

from collections.abc import Callable, Mapping

import torch
from torch.func import functional_call, vmap

from handlers.base import Family

Parts = Mapping[str, torch.Tensor]  #: the state dict of M models: {name: [M, *shape]}
#: (parts, x [M, B, reach, channels]) -> [M, B, prediction, levels]. Families that sample are also called with the
#: targets y [M, B, prediction] and then give the loss [M, B] of y.
TrainingForward = Callable[..., torch.Tensor]


def map_over_models(family: Family) -> TrainingForward:
    """Run the reference network under `vmap`: all models in one call, for networks without recurrences."""
    return lambda parts, x: vmap(_run_reference(family))(dict(parts), x)


def run_one_by_one(family: Family) -> TrainingForward:
    """Run the reference network for one model after another, which works for every network.

    `vmap` has no rule for `nn.GRU`, whose own loop over the steps outweighs one over the models. Measured, one core,
    168 steps of 128 windows, forward and backward: 34 ms a model; a cell written out in torch for four models together
    takes 29, too little to keep a second one.
    """

    def run_all(parts: Parts, *given: torch.Tensor) -> torch.Tensor:
        one = _run_reference(family)
        models = [{name: part[i] for name, part in parts.items()} for i in range(len(given[0]))]
        return torch.stack([one(model, *(each[i] for each in given)) for i, model in enumerate(models)])

    return run_all


def _run_reference(family: Family) -> Callable[..., torch.Tensor]:
    """Run the reference of one model: ({name: [*shape]}, x [B, reach, channels]) -> [B, prediction, levels]."""
    # A call puts the parameters into the network, and threads call at the same time, so that each needs a network.
    with torch.device("meta"):
        network = family.reference()

    def run(parts: Parts, x: torch.Tensor, *targets: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = functional_call(network, dict(parts), (x.transpose(1, 2), *targets))
        return answer

    return run
