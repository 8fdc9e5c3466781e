"""The layers of an `nn.GRU` of many models at once, and the common part of families that use them.

`vmap` has no rule for `nn.GRU`, and `nn.GRU` on a CPU is a loop of eight or so kernels a step and model. Here a step of
all models is five calls in place: one product into gates that hold the input's part already, sigmoid, addcmul, tanh,
lerp. Gates and states are time-major, so that those of a step are contiguous, and only a chunk of the context is held,
so that the scratch does not grow with it. Weights that lie [in, out] are a seventh faster in batches than nn.GRU's
[out, in].
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from handlers.base import Float32, Shape
from handlers.forecasters.row_layout import Rows

CHUNK = 24  #: most steps whose gates are held; all 168 at once would save a twentieth of the time at batch 1
CHUNK_ITEMS, STEP_ITEMS = 7, 6  #: tensors of a chunk and of a step of a layer, see Recurrence.bind


class BoundPart(Protocol):
    """A part of a network that a batch's rows are bound to."""

    def bind(self, part: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Views of B rows' parts -> the tensors that `forward` reads and writes for these rows."""


class NetworkPart(Protocol):
    """A part of a network: its tensors, and where they go in a row."""

    def parameters(self) -> Mapping[str, Shape]:
        """The names and shapes in the state dict."""

    def parts(self) -> Mapping[str, Shape]:
        """The names and shapes in the row."""

    def fill(self, part: Mapping[str, Float32], tensors: Mapping[str, Float32]) -> None:
        """Write state-dict tensors into the parts of a row."""


class Recurrent(Rows):
    """A family whose row is `pieces` one after another. A subclass adds `reference` and `forward`.

    `bound` are the parts of a binding in their order, which `forward` relies on.
    """

    def __init__(
        self,
        key: str,
        input_shape: Shape,
        output_shape: Shape,
        pieces: Sequence[NetworkPart],
        bound: Sequence[BoundPart],
    ) -> None:
        parameters, parts = dict[str, Shape](), dict[str, Shape]()
        for piece in pieces:
            parameters |= piece.parameters()
            parts |= piece.parts()
        super().__init__(key, input_shape, output_shape, parameters, parts)
        self._pieces, self._bound = pieces, bound

    def bind(self, block: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows [B, row_floats] -> what each part of `bound` binds, in order."""
        part = self._layout.views(block)
        with torch.inference_mode(False):  # so that the scratch may be written with and without inference mode
            return [tensor for each in self._bound for tensor in each.bind(part)]

    def _fill(self, part: Mapping[str, Float32], tensors: Mapping[str, Float32]) -> None:
        for piece in self._pieces:
            piece.fill(part, tensors)


class LinearHead:
    """The linear layer `head` from a state of `hidden` numbers to `out`: weight [hidden, out] and bias [1, out]."""

    def __init__(self, hidden: int, out: int) -> None:
        self._hidden, self._out = hidden, out

    def __repr__(self) -> str:
        return f"<LinearHead {self._hidden} -> {self._out}>"

    def parameters(self) -> dict[str, Shape]:
        """The names and shapes that `nn.Linear` gives them."""
        return {"head.weight": (self._out, self._hidden), "head.bias": (self._out,)}

    def parts(self) -> dict[str, Shape]:
        """The same with the weight transposed."""
        return {"head.weight": (self._hidden, self._out), "head.bias": (1, self._out)}

    def fill(self, part: Mapping[str, Float32], tensors: Mapping[str, Float32]) -> None:
        """Write state-dict tensors into the parts of a row."""
        part["head.weight"][...] = tensors["head.weight"].T
        part["head.bias"][0] = tensors["head.bias"]

    def bind(self, part: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Views of B rows' parts -> weight [B, hidden, out], bias [B, 1, out]."""
        return [part["head.weight"], part["head.bias"]]


class Recurrence:
    """The layers of an `nn.GRU` called `name`, of many models at once: their parts in a row, and their run.

    For the gates r, z and the candidate n of state h and input x, with * by element and @ by matrix:
    r, z = sigmoid(x @ Wi + h @ Wh + b), n = tanh(x @ Wi + b + r * (h @ Wh + b')), next h = n + z * (h - n).
    """

    def __init__(self, name: str, width: int, hidden: int, layers: int, steps: int) -> None:
        self._names = [(f"{name}.{{}}_ih_l{i}".format, f"{name}.{{}}_hh_l{i}".format) for i in range(layers)]
        self._widths = [width, *[hidden] * (layers - 1)]
        self._hidden = hidden
        self._steps = steps
        self._chunk = -(-steps // -(-steps // CHUNK))
        self._layer_items = CHUNK_ITEMS + STEP_ITEMS * self._chunk
        self.items = layers * self._layer_items  # tensors of a binding

    def __repr__(self) -> str:
        return f"<Recurrence {len(self._widths)} layers of {self._hidden}, {self._steps} steps by {self._chunk}>"

    def parameters(self) -> dict[str, Shape]:
        """The names and shapes in the state dict, as `nn.GRU` orders them."""
        gates, found = 3 * self._hidden, dict[str, Shape]()
        for (ih, hh), width in zip(self._names, self._widths, strict=True):
            found |= {ih("weight"): (gates, width), hh("weight"): (gates, self._hidden)}
            found |= {ih("bias"): (gates,), hh("bias"): (gates,)}
        return found

    def parts(self) -> dict[str, Shape]:
        """The parts of the row: weights [in, r z n], r and z with one bias, n also with one inside the reset."""
        gates, found = 3 * self._hidden, dict[str, Shape]()
        for (ih, hh), width in zip(self._names, self._widths, strict=True):
            found |= {ih("weight"): (width, gates), ih("bias"): (1, gates)}
            found |= {hh("weight"): (self._hidden, gates), hh("bias"): (1, self._hidden)}
        return found

    def fill(self, part: Mapping[str, Float32], tensors: Mapping[str, Float32]) -> None:
        """Write state-dict tensors into the parts of a row."""
        shared = 2 * self._hidden
        for ih, hh in self._names:
            part[ih("weight")][...] = tensors[ih("weight")].T
            part[hh("weight")][...] = tensors[hh("weight")].T
            part[ih("bias")][0] = tensors[ih("bias")]
            part[ih("bias")][0, :shared] += tensors[hh("bias")][:shared]
            part[hh("bias")][0] = tensors[hh("bias")][shared:]

    def bind(self, part: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Bind views of B rows' parts: for each layer seven tensors of a whole chunk, then six a step.

        The seven: the input's weight and bias, the hidden weight and n's hidden bias, the states [1 + chunk, B, 1, H]
        before the first step and after each, the gates r and z of all steps, and n's inner product of all steps. The
        six are views of one step's gates and next state. The gates' memory is shared by the layers, each of which
        finishes a chunk before the next begins.
        """
        hidden, shared, bound = self._hidden, 2 * self._hidden, list[torch.Tensor]()
        some = part[self._names[0][0]("bias")]
        gates = some.new_empty(self._chunk, len(some), 1, 3 * hidden)
        r_z, inner = gates[..., :shared], gates[..., shared:]
        split = (gates, r_z, gates[..., :hidden], gates[..., hidden:shared], inner)
        for ih, hh in self._names:
            states = some.new_empty(self._chunk + 1, len(some), 1, hidden)
            bound += [part[ih("weight")], part[ih("bias")], part[hh("weight")], part[hh("bias")], states, r_z, inner]
            for step in zip(*split, states[1:], strict=True):
                bound += step
        return bound

    def run(
        self, bound: Sequence[torch.Tensor], x: torch.Tensor, start: Sequence[torch.Tensor] | None = None
    ) -> Iterator[torch.Tensor]:
        """Run inputs x [B, steps, width]; yields the last layer's states [B, n, hidden], n steps at a time.

        They are scratch that the next n steps overwrite. Inputs are cast to the weights' precision. `start` has a state
        [B, 1, hidden] per layer; None means zero.
        """
        layers = [bound[at : at + self._layer_items] for at in range(0, self.items, self._layer_items)]
        steps = [list(zip(*[iter(layer[CHUNK_ITEMS:])] * STEP_ITEMS, strict=True)) for layer in layers]
        at, skip = 0, -self._steps % self._chunk  # the first chunk is the short one, at the end of its memory
        while at < self._steps:
            h = x.narrow(1, at, self._chunk - skip).to(bound[0].dtype)
            for i, layer in enumerate(layers):
                before = layer[-1] if at else start[i] if start else None
                h = _advance_layer(layer, steps[i], h, skip, before)
            yield h
            at, skip = at + self._chunk - skip, 0

    def final(self, bound: Sequence[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
        """Run inputs x [B, steps, width]; returns the last state [B, 1, hidden] of each layer, in scratch."""
        for _ in self.run(bound, x):
            pass
        return list(bound[self._layer_items - 1 :: self._layer_items])


def _advance_layer(
    layer: Sequence[torch.Tensor],
    steps: Sequence[tuple[torch.Tensor, ...]],
    x: torch.Tensor,
    skip: int,
    before: torch.Tensor | None,
) -> torch.Tensor:
    """Run one layer over a chunk without its first `skip` places: x [B, n, width] -> the states [B, n, hidden].

    `before` is the state [B, 1, hidden] before the first of these n steps; None means zero.
    """
    weight, bias, hidden_weight, hidden_bias, states, r_z, inner = layer[:CHUNK_ITEMS]
    given = torch.baddbmm(bias, x, weight).transpose(0, 1)[:, :, None]  # faster than products into strided memory
    r_z[skip:].copy_(given[..., : r_z.shape[3]])
    inner[skip:].copy_(hidden_bias)
    h = states[skip].zero_() if before is None else states[skip].copy_(before)
    found = states[skip + 1 :]
    found.copy_(given[..., r_z.shape[3] :])
    for gates, reset_update, reset, update, hidden_n, following in steps[skip:]:
        gates.baddbmm_(h, hidden_weight)
        reset_update.sigmoid_()
        h = following.addcmul_(reset, hidden_n).tanh_().lerp_(h, update)
    return found[:, :, 0].transpose(0, 1)
