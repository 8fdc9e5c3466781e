"""Ensembles: k members of one architecture and config in one archive; the answer is the mean of their quantiles.

Any architecture of quantiles becomes one by `members` in its config. A row is the members' rows side by side, so the
models of a batch and their members run in the same forward, as rows of one bank. Quantiles are averaged level by level
(Vincent 1912; for prices: Marcjasz et al. 2023) and in network numbers, before they are scaled back.

Parameters: k times the member's.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from handlers.base import Family, Float32, Shape
from handlers.forecasters.row_layout import check_finite, check_tensors

MOST_MEMBERS = 64


class EnsembleReference(nn.Module):
    """The members as plain networks, one after another."""

    def __init__(self, member: Family, members: int) -> None:
        super().__init__()
        self.members = nn.ModuleList(member.reference() for _ in range(members))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, features, context_length] -> [N, prediction_length, quantiles]."""
        return torch.stack([member(x) for member in self.members]).mean(0)


class Ensemble:
    """The family: a row is `members` rows of the member's family."""

    def __init__(self, member: Family, members: int) -> None:
        self.key = f"{member.key}-x{members}"
        self.member = member
        self.members = members
        self.input_name = member.input_name
        self.input_shape: Shape = member.input_shape
        self.read_shape: Shape = member.read_shape
        self.output_shape: Shape = member.output_shape
        self.parameters: Mapping[str, Shape] = {
            f"members.{i}.{name}": shape for i in range(members) for name, shape in member.parameters.items()
        }
        self.row_floats = members * member.row_floats

    def __repr__(self) -> str:
        return f"<Ensemble of {self.members} {self.member!r}>"

    def reference(self) -> nn.Module:
        """The plain networks, freshly initialised, in eval mode."""
        return EnsembleReference(self.member, self.members).eval()

    def row(self, tensors: Mapping[str, Float32]) -> Float32:
        """Make the rows of the members side by side."""
        check_tensors(self.parameters, tensors)
        check_finite(np.concatenate([tensor.ravel() for tensor in tensors.values()]), tensors)
        names = self.member.parameters
        return np.concatenate(
            [self.member.row({name: tensors[f"members.{i}.{name}"] for name in names}) for i in range(self.members)]
        )

    def bind(self, block: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows [B, row_floats] -> a tensor as long as there are bindings of the member's family, and these.

        B rows side by side are B x members rows, with one binding. For B times the same row the members do not lie at
        even distances, so that each member has a binding of B rows.
        """
        width = self.member.row_floats
        parts = [block[:, i * width : (i + 1) * width] for i in range(self.members)]
        parts = [block.view(-1, width)] if block.is_contiguous() else parts
        return [block.new_empty(len(parts)), *(each for part in parts for each in self.member.bind(part))]

    def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Input x [B, features, context_length] -> [B, prediction_length, quantiles]; see Family.forward."""
        bindings, *bound = weights
        if len(bindings) == 1:
            of_each = x[:, None].expand(-1, self.members, -1, -1).flatten(0, 1)
            return self.member.forward(bound, of_each).view(len(x), self.members, *self.output_shape).mean(1)
        size = len(bound) // len(bindings)
        return torch.stack([self.member.forward(bound[at : at + size], x) for at in range(0, len(bound), size)]).mean(0)
