"""The two ways a model runs, and what both say about their input. Types only: importing this imports no torch.

A *family* is a network architecture with one configuration: its models differ in numbers alone, so a model is one flat
float32 row and one forward serves many models. A *single* (an ONNX session) serves one model.
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

    key: str  #: equal exactly when architecture and configuration are equal, e.g. `tcn-4f1c2a9b0d3e5a71`
    input_name: str  #: the tensor's name in requests, `x`
    input_shape: Shape  #: of one request row, without batch axis: (features, context length)
    output_shape: Shape  #: of one answer row: (prediction length, quantile levels)
    parameters: Mapping[str, Shape]  #: the tensors of `weights.safetensors`: the reference's state_dict
    row_floats: int  #: floats in a row, a multiple of 16 (64-byte aligned rows)

    def row(self, tensors: Mapping[str, Float32]) -> Float32:
        """State-dict tensors -> the flat row [row_floats], laid out for `forward` (transposed, padded with zeros).

        Raises model_store.errors.ArchiveInvalid for missing, extra, misshapen, non-float32 or non-finite tensors.
        """

    def bind(self, block: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows [B, row_floats] -> what `forward` works on: parameter views of them, and its scratch.

        A row is contiguous; rows lie side by side, or are all the same one (stride 0, many inputs of one model).

        Bind once per staging block: the views follow whatever rows are gathered into it later. The scratch belongs to
        the binding, so a binding runs one forward at a time.
        """

    def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Input x [B, *input_shape], row b under model b's weights -> [B, *output_shape], a new tensor.

        `weights` is a binding of exactly B rows, on x's device. Neither the rows nor x are changed. No autograd, no
        host sync.
        """

    def reference(self) -> nn.Module:
        """The plain single-model network that defines the right answer: x [N, *input_shape] -> [N, *output_shape]."""


class Single(Protocol):
    """One model that is not a row: named arrays in, named arrays out, batch axis first."""

    inputs: Mapping[str, Shape]  #: per request row, without batch axis; -1 where the model leaves it open
    outputs: Sequence[str]
    charge_bytes: int  #: what it costs in memory, charged to the cache's budget

    def run(self, feeds: Mapping[str, Float32]) -> Mapping[str, Float32]:
        """Arrays [N, *shape] -> arrays [N, ...]. Raises handlers.errors.RunFailed when the model itself fails."""

    def run_all(self, requests: Sequence[Mapping[str, Float32]]) -> Sequence[Mapping[str, Float32] | RunFailed]:
        """What `run` gives for each request or why it fails: together where that is faster and proved to be equal."""
