"""Two ways to run many models at once without an engine, with which `loadtest.benchmarks.step` compares Fleetcast's
step.

Both take models as state dicts of the reference networks, and answer which[B] models for x [B, *input_shape]. They are
simple implementations: the rows are copied, every layer is one batched product, nothing is measured or chosen.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch

from handlers.base import Family, Float32

MOST = 512  #: rows of a batch

Tensors = Mapping[str, Float32]


class FlatTcn:
    """`tcn`: a model is a flat row, a batch copies rows into one block, parameters are views of it.

    Only positions that reach the last step are computed; their taps are picked by index before each layer's product.
    """

    def __init__(self, family: Family, models: Sequence[Tensors]) -> None:
        self._output = family.output_shape
        self._layers = sum(name.endswith("conv.weight") for name in models[0])
        kernel = models[0]["blocks.0.conv.weight"].shape[2]
        parts = [self._parts(tensors) for tensors in models]
        self._shapes = [part.shape for part in parts[0]]
        self._ends = [0, *accumulate(part.size for part in parts[0])]
        self._rows = torch.from_numpy(np.stack([np.concatenate([part.ravel() for part in each]) for each in parts]))
        self._block = torch.empty(MOST, self._rows.shape[1])
        self._views: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}
        self._first, self._taps, self._last = _list_positions(family.input_shape[1], kernel, self._layers)

    def __repr__(self) -> str:
        """For example `<FlatTcn of 500 models>`."""
        return f"<FlatTcn of {len(self._rows)} models>"

    def __call__(self, which: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """See the module."""
        count = len(which)
        block, weights = self._of(count)
        torch.index_select(self._rows, 0, which, out=block)
        h = x.transpose(1, 2).index_select(1, self._first)
        for i, (taps, last) in enumerate(zip(self._taps, self._last, strict=True)):
            kernel, bias, residual, residual_bias = weights[4 * i : 4 * i + 4]
            u = h.index_select(1, taps).view(count, len(last), -1)
            a = torch.baddbmm(bias, u, kernel).relu_()
            h = a.baddbmm_(h.index_select(1, last), residual).add_(residual_bias)
        return torch.baddbmm(weights[-1], h, weights[-2]).view(-1, *self._output)

    def _of(self, count: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the block of so many rows and its parameters, made once."""
        if count not in self._views:
            block = self._block[:count]
            places = zip(pairwise(self._ends), self._shapes, strict=True)
            self._views[count] = (block, [block[:, a:b].view(count, *shape) for (a, b), shape in places])
        return self._views[count]

    def _parts(self, tensors: Tensors) -> list[Float32]:
        """Return the parameters of a model as the products need them: [in, out] matrices and [1, out] biases."""
        parts = []
        for i in range(self._layers):
            kernel = tensors[f"blocks.{i}.conv.weight"]  # [out, in, taps]
            parts.append(np.ascontiguousarray(kernel.transpose(2, 1, 0)).reshape(-1, kernel.shape[0]))
            parts.append(tensors[f"blocks.{i}.conv.bias"][None])
            parts.append(tensors[f"blocks.{i}.residual.weight"][..., 0].T)
            parts.append(tensors[f"blocks.{i}.residual.bias"][None])
        return [*parts, tensors["head.weight"].T, tensors["head.bias"][None]]


class SplitMlp:
    """`mlp`: every parameter is one tensor of all models, and a batch picks its models' from each of them."""

    def __init__(self, family: Family, models: Sequence[Tensors]) -> None:
        self._output = family.output_shape
        self._all = {name: torch.from_numpy(np.stack([each[name] for each in models])) for name in models[0]}

    def __repr__(self) -> str:
        """For example `<SplitMlp of 128 models>`."""
        return f"<SplitMlp of {len(self._all['head.bias'])} models>"

    def __call__(self, which: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """See the module."""
        mine = {name: tensor.index_select(0, which) for name, tensor in self._all.items()}
        h = x.flatten(1)[:, None]
        for name in ("first", "second", "head"):
            h = torch.baddbmm(mine[f"{name}.bias"][:, None], h, mine[f"{name}.weight"].transpose(1, 2))
            if name != "head":
                h.relu_()
        return h.view(-1, *self._output)


def _list_positions(
    context: int, kernel: int, layers: int
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Steps of the input that are read; for each layer its outputs' taps, and their own steps, among those below.

    The context is at least as long as the receptive field.
    """
    needed = [[context - 1]]
    for layer in reversed(range(layers)):
        apart = kernel**layer
        needed.append(sorted({step - back * apart for step in needed[-1] for back in range(kernel)}))
    assert needed[-1][0] >= 0, "the context is shorter than the receptive field"
    taps, last = [], []
    for layer, (below, above) in enumerate(pairwise(needed[::-1])):
        at = {step: i for i, step in enumerate(below)}
        apart = kernel**layer
        taps.append(torch.tensor([at[step - back * apart] for step in above for back in reversed(range(kernel))]))
        last.append(torch.tensor([at[step] for step in above]))
    return torch.tensor(needed[-1]), taps, last
