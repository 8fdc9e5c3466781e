"""The two ways in which a model runs, and the description of its input. Types only; imports no torch.

A *family* is a network architecture with one configuration. Its models differ only in numbers, so that a model is one
flat float32 row and one forward serves many models. A *single* (an ONNX session) serves one model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from torch import nn

    from handlers.errors import RunFailed

Float32 = npt.NDArray[np.float32]
Shape = tuple[int, ...]


class Family(Protocol):
    """A network with a leading model dimension. Instances are immutable and shared by all models of the family."""

    key: str  #: equal if and only if architecture and configuration are equal, e.g. `tcn-4f1c2a9b0d3e5a71`
    input_name: str  #: the tensor's name in requests, `x`
    input_shape: Shape  #: shape of one request row, without batch axis: (features, context length)
    read_shape: Shape  #: as `input_shape`; the last axis is shorter where `forward` reads only its last steps
    output_shape: Shape  #: shape of one answer row: (prediction length, quantile levels)
    parameters: Mapping[str, Shape]  #: the tensors of `weights.safetensors`: the reference's state_dict
    row_floats: int  #: floats in a row, a multiple of 16 (64-byte aligned rows)

    def row(self, tensors: Mapping[str, Float32]) -> Float32:
        """Make of state-dict tensors the flat row [row_floats], laid out for `forward` (transposed, padded with zeros).

        Raises model_store.errors.ArchiveInvalid for missing, extra, misshapen, non-float32 or non-finite tensors.
        """

    def bind(self, block: torch.Tensor) -> Sequence[torch.Tensor]:
        """Bind rows [B, row_floats] for `forward`: returns parameter views of them, and its scratch.

        A row is contiguous; rows lie side by side, or are all the same one (stride 0, many inputs of one model).

        One binding serves a staging block, because its views show the rows that are gathered into it later. The scratch
        belongs to the binding, so that a binding runs one forward at a time.
        """

    def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Run x [B, *input_shape], row b with the weights of model b -> [B, *output_shape], a new tensor.

        x may lack the first steps of its last axis, as long as those of `read_shape` are there: they are not read.

        `weights` is a binding of exactly B rows, on the device of x. Neither the rows nor x are changed. It uses no
        autograd and does not synchronise with the device.

        x is float32 for rows of every precision. A family casts what it multiplies by weights, and nothing else: seeds
        and other whole numbers of an input would not survive.
        """

    def reference(self) -> nn.Module:
        """Make the plain single-model network that defines the answer: x [N, *input_shape] -> [N, *output_shape]."""


class Single(Protocol):
    """One model that is not a row: named arrays in, named arrays out, batch axis first."""

    inputs: Mapping[str, Shape]  #: shape of one request row, without batch axis; -1 for open dimensions
    outputs: Mapping[str, Shape]
    charge_bytes: int  #: bytes of memory, which count against the budget of the cache

    def run(self, feeds: Mapping[str, Float32]) -> Mapping[str, Float32]:
        """Run arrays [N, *shape] -> arrays [N, ...]. Raises handlers.errors.RunFailed if the model itself fails."""

    def run_all(self, requests: Sequence[Mapping[str, Float32]]) -> Sequence[Mapping[str, Float32] | RunFailed]:
        """Run each request as `run` does; returns outputs or errors. They run together if that is faster and equal."""
