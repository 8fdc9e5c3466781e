"""`tcn`: a dilated causal convolution network with residuals that reads its last `kernel**layers` steps.

Layer i has dilation kernel**i, so only every kernel**(i + 1)-th position, counted back from the last step, reaches the
answer: 81 <- 27 <- 9 <- 3 <- 1 for kernel 3 and 4 layers. In time order the taps of one needed position are `kernel`
neighbours among the positions needed below it, so that the input matrix of a layer is a plain view of the layer below:
h [positions * kernel, C] -> u [positions, kernel * C], and its last C columns are the residual's input. No gathers.

The residual's bias costs an operation and is folded away when a row is made: with h = h' + s for a constant s per
channel, conv(h) = conv(h') + (sum of its taps) s, so s moves into the next bias and at last into the head's. A context
shorter than the receptive field is padded with zeros at every layer, as in the reference; such zeros are h' = -s, which
is written into the row where it is needed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

import numpy as np
import torch
from msgspec import Meta
from torch import nn

from handlers.base import Float32, Shape
from handlers.forecasters.architecture import Architecture
from handlers.forecasters.network_config import QuantileConfig
from handlers.forecasters.row_layout import Rows
from handlers.forecasters.training_forward import Parts, TrainingForward


class TcnConfig(QuantileConfig, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The config of `tcn`. x [features, context_length] -> [prediction_length, quantiles]."""

    channels: Annotated[int, Meta(ge=1, le=1024)] = 32
    kernel: Annotated[int, Meta(ge=1, le=16)] = 3
    layers: Annotated[int, Meta(ge=1, le=16)] = 4


class TcnBlock(nn.Module):
    """relu(causal convolution) + 1x1 convolution: [N, c_in, T] -> [N, c_out, T]."""

    def __init__(self, c_in: int, c_out: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.pad = (kernel - 1) * dilation
        self.conv = nn.Conv1d(c_in, c_out, kernel, dilation=dilation)
        self.residual = nn.Conv1d(c_in, c_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, c_in, T] -> [N, c_out, T]."""
        convolved: torch.Tensor = torch.relu(self.conv(nn.functional.pad(x, (self.pad, 0)))) + self.residual(x)
        return convolved


class TcnReference(nn.Module):
    """The network as one would write it for training: [N, features, context] -> [N, prediction, quantiles]."""

    def __init__(self, config: TcnConfig) -> None:
        super().__init__()
        widths = [config.features, *[config.channels] * config.layers]
        self.shape = (-1, config.prediction_length, config.quantiles)
        self.blocks = nn.Sequential(
            *[TcnBlock(widths[i], widths[i + 1], config.kernel, config.kernel**i) for i in range(config.layers)]
        )
        self.head = nn.Linear(config.channels, config.prediction_length * config.quantiles)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, features, context_length] -> [N, prediction_length, quantiles]."""
        answer: torch.Tensor = self.head(self.blocks(x)[..., -1])
        return answer.view(self.shape)


class Layer(NamedTuple):
    """The sizes of one layer's work for one model."""

    width: int  #: number of input channels
    positions: int  #: number of outputs that are needed
    lead: int  #: zero positions before the first known input, < kernel; 0 where the context is long enough


class Tcn(Rows):
    """The family: one row a model, all models of a batch in one `baddbmm` a product."""

    def __init__(self, key: str, config: TcnConfig) -> None:
        self.config = config
        self._steps = min(config.context_length, config.kernel**config.layers)  # of the context that are read
        self._layers = tuple(_list_layers(config, self._steps))
        given, answered = (config.features, config.context_length), (config.prediction_length, config.quantiles)
        super().__init__(key, given, answered, dict(_list_parameters(config)), dict(self._parts()))
        self.read_shape = (config.features, self._steps)

    def reference(self) -> nn.Module:
        """The plain network, freshly initialised, in eval mode."""
        return TcnReference(self.config).eval()

    def bind(self, block: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows [B, row_floats] -> [input, (u, bias, conv, h, last, residual) a layer, bias, h, head, (edge, pad) ...].

        u, last and h are views of scratch, h of one layer being u of the next. Making them here instead of in every
        forward saves a third of its time at batch 1, which is dominated by the number of calls.
        """
        part = self._layout.views(block)
        rows, channels = block.shape[0], self.config.channels
        with torch.inference_mode(False):  # so that the scratch may be written with and without inference mode
            scratch = [
                block.new_zeros(rows, self.config.kernel * layer.positions, layer.width) for layer in self._layers
            ]
            last_h = block.new_zeros(rows, 1, channels)
        known = [below[:, layer.lead :] for below, layer in zip(scratch, self._layers, strict=True)]
        bound = [known[0].transpose(1, 2)]
        for i, (layer, h) in enumerate(zip(self._layers, [*known[1:], last_h], strict=True)):
            u = scratch[i].view(rows, layer.positions, -1)
            bound += [u, part[f"bias.{i}"], part[f"conv.{i}"], h, u[..., -layer.width :], part[f"residual.{i}"]]
        bound += [part["head.bias"], last_h, part["head"]]
        for i, layer in enumerate(self._layers):
            if f"pad.{i}" in part:
                bound += [scratch[i][:, : layer.lead], part[f"pad.{i}"]]
        return bound

    def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Input x [B, features, context_length] -> [B, prediction_length, quantiles]; see Family.forward."""
        weights[0].copy_(x.narrow(2, x.shape[2] - self._steps, self._steps))
        end = 1 + 6 * len(self._layers)
        for at in range(end + 3, len(weights), 2):
            weights[at].copy_(weights[at + 1])
        for at in range(1, end, 6):
            u, bias, conv, h, last, residual = weights[at : at + 6]
            torch.baddbmm(bias, u, conv, out=h).relu_().baddbmm_(last, residual)
        return torch.baddbmm(weights[end], weights[end + 1], weights[end + 2]).view(-1, *self.output_shape)

    def _fill(self, part: Mapping[str, Float32], tensors: Mapping[str, Float32]) -> None:
        """Fill in kernels as [kernel * C, C'] with folded residual biases (in float64); see the module."""
        shift = np.zeros(self.config.features)  # s of the module's docstring, for the layer below
        for i, layer in enumerate(self._layers):
            kernel = tensors[f"blocks.{i}.conv.weight"]  # [C', C, kernel]
            residual = tensors[f"blocks.{i}.residual.weight"][..., 0]  # [C', C]
            conv = part[f"conv.{i}"].reshape(self.config.kernel, layer.width, -1)
            conv[...] = kernel.transpose(2, 1, 0)
            # Its taps lie far apart here, so that numpy adds them up in a sixth of the time that it takes in `kernel`.
            part[f"bias.{i}"][0] = tensors[f"blocks.{i}.conv.bias"] + shift @ conv.sum(0, dtype=np.float64)
            part[f"residual.{i}"][...] = residual.T
            if f"pad.{i}" in part:
                part[f"pad.{i}"][0] = -shift
            shift = tensors[f"blocks.{i}.residual.bias"] + residual @ shift
        part["head"][...] = tensors["head.weight"].T
        part["head.bias"][0] = tensors["head.bias"] + tensors["head.weight"] @ shift

    def _parts(self) -> Iterator[tuple[str, Shape]]:
        """Return the parts of the row in the order in which a forward reads them."""
        channels = self.config.channels
        for i, layer in enumerate(self._layers):
            if i and layer.lead:
                yield f"pad.{i}", (1, layer.width)
            yield f"bias.{i}", (1, channels)
            yield f"conv.{i}", (self.config.kernel * layer.width, channels)
            yield f"residual.{i}", (layer.width, channels)
        out = self.config.prediction_length * self.config.quantiles
        yield "head.bias", (1, out)
        yield "head", (channels, out)


def _list_layers(config: TcnConfig, steps: int) -> Iterator[Layer]:
    """List the layers from the input up: every kernel-th position below, counted back, is needed above."""
    width, known = config.features, steps
    for _ in range(config.layers):
        positions = -(-known // config.kernel)
        yield Layer(width, positions, config.kernel * positions - known)
        width, known = config.channels, positions


def _list_parameters(config: TcnConfig) -> Iterator[tuple[str, Shape]]:
    """Return the names and shapes of the state dict of the reference."""
    width = config.features
    for i in range(config.layers):
        yield f"blocks.{i}.conv.weight", (config.channels, width, config.kernel)
        yield f"blocks.{i}.conv.bias", (config.channels,)
        yield f"blocks.{i}.residual.weight", (config.channels, width, 1)
        yield f"blocks.{i}.residual.bias", (config.channels,)
        width = config.channels
    out = config.prediction_length * config.quantiles
    yield "head.weight", (out, config.channels)
    yield "head.bias", (out,)


def compute_reach(family: Tcn) -> int:
    """Return how many last steps of the context can change the answer."""
    return int(min(family.config.context_length, family.config.kernel**family.config.layers))


def make_training_forward(family: Tcn) -> TrainingForward:
    """Run only the positions that reach the answer, every kernel-th of a layer."""
    config = family.config

    def run(parts: Parts, x: torch.Tensor) -> torch.Tensor:
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

    return run


ARCHITECTURE = Architecture(
    name="tcn", config=TcnConfig, family=Tcn, reach=compute_reach, training_forward=make_training_forward
)
