"""`gru`: gated recurrent units read the whole context; their last state gives prediction_length x quantiles at once.

Source: Cho et al. 2014, arXiv 1406.1078, as `torch.nn.GRU` has it (the reset gate after the product), whose names the
state dict keeps: 3 H (W + H + 2) parameters a layer of H units and W inputs, and a head; 14,232 by default.

`vmap` has no rule for `nn.GRU`, and `nn.GRU` on a CPU is a loop of eight or so kernels a step and model. Here a step of
all models is five calls in place: one product into gates that hold the input's part already, sigmoid, addcmul, tanh,
lerp. Gates and states lie time-major, so that each step's are contiguous, and only a chunk of the context is held: the
scratch does not grow with it. Weights that lie [in, out] are a seventh faster in batches than nn.GRU's [out, in].
Measured on one core, by default: 1.6 times as fast as `nn.GRU` model by model for 1 model, 6.6 for 8, 10 from 32 on.

Time goes with the context, in training too: a year of hours is fitted in 50 s from 168 steps, and as well in 13
from 48, where the recipe adds the prices of a week before as a channel.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta, Struct
from torch import nn

from handlers.base import Float32, Shape
from handlers.forecasters.layout import Layout, check_finite, check_tensors

CHUNK = 24  #: steps at most whose gates are held; all of 168 at once would save a twentieth of the time at batch 1
MOST_PRODUCTS = 2**31  #: multiplications a forecast: about a tenth of a second of one core
MOST_NUMBERS = 2**20  #: in one input and in one answer
CHUNK_ITEMS, STEP_ITEMS = 7, 6  #: of a layer in a binding, see Recurrence.bind


class GruConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the architecture leaves open. x [features, context_length] -> [prediction_length, quantiles]."""

    features: Annotated[int, Meta(ge=1, le=1024)] = 8
    context_length: Annotated[int, Meta(ge=1, le=10_000)] = 168
    prediction_length: Annotated[int, Meta(ge=1, le=10_000)] = 24
    quantiles: Annotated[int, Meta(ge=1, le=1000)] = 5
    hidden: Annotated[int, Meta(ge=1, le=512)] = 48
    layers: Annotated[int, Meta(ge=1, le=4)] = 1

    def __post_init__(self) -> None:
        """Raises ValueError for what would hold up a worker."""
        require_numbers(self.features * self.context_length, self.prediction_length * self.quantiles)
        require_products(self.context_length * products(self.features, self.hidden, self.layers))


class GruReference(nn.Module):
    """The network as one would write it for training: [N, features, context] -> [N, prediction, quantiles]."""

    def __init__(self, config: GruConfig) -> None:
        super().__init__()
        self.shape = (-1, config.prediction_length, config.quantiles)
        self.gru = nn.GRU(config.features, config.hidden, config.layers, batch_first=True)
        self.head = nn.Linear(config.hidden, config.prediction_length * config.quantiles)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, features, context_length] -> [N, prediction_length, quantiles]."""
        states, _ = self.gru(x.transpose(1, 2))
        answer: torch.Tensor = self.head(states[:, -1])
        return answer.view(self.shape)


class Recurrence:
    """The layers of an `nn.GRU` called `name`, of many models at once: their parts in a row, and how they run.

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
        self.items = layers * self._layer_items  # of a binding

    def __repr__(self) -> str:
        return f"<Recurrence {len(self._widths)} layers of {self._hidden}, {self._steps} steps by {self._chunk}>"

    def parameters(self) -> dict[str, Shape]:
        """The state dict's names and shapes, as `nn.GRU` orders them."""
        gates, found = 3 * self._hidden, dict[str, Shape]()
        for (ih, hh), width in zip(self._names, self._widths, strict=True):
            found |= {ih("weight"): (gates, width), hh("weight"): (gates, self._hidden)}
            found |= {ih("bias"): (gates,), hh("bias"): (gates,)}
        return found

    def parts(self) -> Iterator[tuple[str, Shape]]:
        """The row's parts: weights [in, r z n], r and z with one bias, n with one inside the reset's product too."""
        gates = 3 * self._hidden
        for (ih, hh), width in zip(self._names, self._widths, strict=True):
            yield from ((ih("weight"), (width, gates)), (ih("bias"), (1, gates)))
            yield from ((hh("weight"), (self._hidden, gates)), (hh("bias"), (1, self._hidden)))

    def fill(self, part: Mapping[str, Float32], tensors: Mapping[str, Float32]) -> None:
        """State-dict tensors into the parts of a row."""
        shared = 2 * self._hidden
        for ih, hh in self._names:
            part[ih("weight")][...] = tensors[ih("weight")].T
            part[hh("weight")][...] = tensors[hh("weight")].T
            part[ih("bias")][0] = tensors[ih("bias")]
            part[ih("bias")][0, :shared] += tensors[hh("bias")][:shared]
            part[hh("bias")][0] = tensors[hh("bias")][shared:]

    def bind(self, part: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Views of B rows' parts -> for each layer seven tensors that concern a whole chunk, then six a step.

        The seven: the input's weight and bias, the hidden weight and n's hidden bias, the states [1 + chunk, B, 1, H]
        before the first step and after each, the gates r and z of all steps, and n's inner product of all steps. The
        six are views of one step's gates and next state. The gates' memory is shared by the layers, each of which is
        done with a chunk before the next begins.
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
        """Inputs x [B, steps, width] -> the last layer's states [B, n, hidden], n steps after n steps.

        They are scratch that the next n overwrite. `start` has a state [B, 1, hidden] a layer, zero where it is None.
        """
        layers = [bound[at : at + self._layer_items] for at in range(0, self.items, self._layer_items)]
        steps = [list(zip(*[iter(layer[CHUNK_ITEMS:])] * STEP_ITEMS, strict=True)) for layer in layers]
        at, skip = 0, -self._steps % self._chunk  # the first chunk is the short one, at the end of its memory
        while at < self._steps:
            h = x.narrow(1, at, self._chunk - skip)
            for i, layer in enumerate(layers):
                before = layer[-1] if at else start[i] if start else None
                h = _advance(layer, steps[i], h, skip, before)
            yield h
            at, skip = at + self._chunk - skip, 0

    def final(self, bound: Sequence[torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
        """Inputs x [B, steps, width] -> each layer's state [B, 1, hidden] after the last step, in scratch."""
        for _ in self.run(bound, x):
            pass
        return list(bound[self._layer_items - 1 :: self._layer_items])


class Gru:
    """The family: one row a model, all models of a batch in one `baddbmm` a step."""

    input_name = "x"

    def __init__(self, key: str, config: GruConfig) -> None:
        self.key = key
        self.config = config
        self.input_shape: Shape = (config.features, config.context_length)
        self.output_shape: Shape = (config.prediction_length, config.quantiles)
        self._gru = Recurrence("gru", config.features, config.hidden, config.layers, config.context_length)
        out = config.prediction_length * config.quantiles
        head: dict[str, Shape] = {"head.weight": (out, config.hidden), "head.bias": (out,)}
        self.parameters: Mapping[str, Shape] = self._gru.parameters() | head
        self._layout = Layout(dict(self._gru.parts()) | {"head.weight": (config.hidden, out), "head.bias": (1, out)})
        self.row_floats = self._layout.row_floats

    def __repr__(self) -> str:
        return f"<Gru {self.key} {self.input_shape} -> {self.output_shape}, {self.row_floats} floats>"

    def reference(self) -> nn.Module:
        """The plain network, freshly initialised, in eval mode."""
        return GruReference(self.config).eval()

    @np.errstate(over="ignore", invalid="ignore")  # what is not finite is refused at the end
    def row(self, tensors: Mapping[str, Float32]) -> Float32:
        """State dict -> flat row: weights transposed, biases folded where that is exact."""
        check_tensors(self.parameters, tensors)
        row = np.zeros(self.row_floats, np.float32)
        part = self._layout.arrays(row)
        self._gru.fill(part, tensors)
        part["head.weight"][...] = tensors["head.weight"].T
        part["head.bias"][0] = tensors["head.bias"]
        check_finite(row, tensors)
        return row

    def bind(self, block: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows [B, row_floats] -> the head's weight and bias, then what the recurrence binds."""
        part = self._layout.views(block)
        with torch.inference_mode(False):  # so that the scratch may be written with and without inference mode
            return [part["head.weight"], part["head.bias"], *self._gru.bind(part)]

    def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Input x [B, features, context_length] -> [B, prediction_length, quantiles]; see Family.forward."""
        head, bias, *bound = weights
        h = self._gru.final(bound, x.transpose(1, 2))[-1]
        return torch.baddbmm(bias, h, head).view(-1, *self.output_shape)


def _advance(
    layer: Sequence[torch.Tensor],
    steps: Sequence[tuple[torch.Tensor, ...]],
    x: torch.Tensor,
    skip: int,
    before: torch.Tensor | None,
) -> torch.Tensor:
    """One layer over a chunk but for its first `skip` places: x [B, n, width] -> the states [B, n, hidden].

    `before` is the state [B, 1, hidden] before the first of these n steps, zero where it is None.
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


def products(width: int, hidden: int, layers: int) -> int:
    """Multiplications of one step of an `nn.GRU` with `width` inputs."""
    return 3 * hidden * (width + hidden + (layers - 1) * 2 * hidden)


def require_products(count: int) -> None:
    """What one forecast takes is little enough that a step of a worker stays one. Raises ValueError."""
    if count > MOST_PRODUCTS:
        what = f"a forecast takes {count} multiplications, {MOST_PRODUCTS} are allowed"
        raise ValueError(f"{what}; make context_length, prediction_length, hidden or layers smaller")


def require_numbers(given: int, answered: int, last: str = "quantiles") -> None:
    """An input and an answer are of a size that a worker can hold many of. Raises ValueError."""
    for count, fields in ((given, "features x context_length"), (answered, f"prediction_length x {last}")):
        if count > MOST_NUMBERS:
            raise ValueError(f"{fields} is {count}, {MOST_NUMBERS} are allowed")
