"""The decoder of `mqcnn` and `mqrnn`, and their family: an encoder, then all steps and levels at once.

Source: Wen et al. 2017, "A multi-horizon quantile recurrent forecaster", arXiv 1711.11053. A global layer turns the
output of the encoder and the known inputs of all forecast steps into one context for each step and one for all; a local
network, the same for every step, turns these two and the known inputs of its step into the quantiles of the step. No
answer is fed back. The known inputs of the steps are the last `prediction_length` columns of every channel: covariates
and calendar of the steps, and for the target the values one prediction length before each.

    e = relu(encoder(x))                                   [hidden]
    c_1 ... c_P, c = relu(global [e, known])               [(P + 1) x contexts]
    y_k = head relu(local [c_k, c, known_k])               [quantiles]

The encoder is a complete family, `tcn` or `gru`, whose head gives e; its row is at the start of the row here.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from handlers.base import Family, Float32, Shape
from handlers.forecasters.row_layout import Rows, check_finite, check_tensors

MOST_PARAMETERS = 2**26
PARTS = ("global", "local", "head")


def require_parameters(features: int, prediction: int, contexts: int, hidden: int) -> None:
    """Check the size of the global layer, which grows with the square of the forecast. Raises ValueError."""
    count = (hidden + features * prediction) * (prediction + 1) * contexts
    if count > MOST_PARAMETERS:
        what = f"the global layer has {count} parameters, {MOST_PARAMETERS} are allowed"
        raise ValueError(f"{what}; make prediction_length, features or contexts smaller")


class MqReference(nn.Module):
    """The network as one would write it for training: [N, features, context] -> [N, prediction, quantiles]."""

    def __init__(self, encoder: Family, prediction: int, quantiles: int, contexts: int, local: int) -> None:
        super().__init__()
        features, hidden = encoder.input_shape[0], encoder.output_shape[1]
        self.steps, self.contexts = prediction, contexts
        self.encoder = encoder.reference()
        self.add_module("global", nn.Linear(hidden + features * prediction, (prediction + 1) * contexts))
        self.local = nn.Linear(2 * contexts + features, local)
        self.head = nn.Linear(local, quantiles)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, features, context_length] -> [N, prediction_length, quantiles]."""
        return self.decode(self.encoder(x), x)

    def decode(self, encoded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Decode the encoder's answer [N, 1, hidden] and the last columns of x into the result of `forward`."""
        known = x[..., -self.steps :].transpose(1, 2)
        seen = torch.cat([torch.relu(encoded.flatten(1)), known.flatten(1)], 1)
        contexts = torch.relu(self.get_submodule("global")(seen)).view(-1, self.steps + 1, self.contexts)
        of_all = contexts[:, -1:].expand(-1, self.steps, -1)
        answer: torch.Tensor = self.head(torch.relu(self.local(torch.cat([contexts[:, :-1], of_all, known], 2))))
        return answer


class Mq(Rows):
    """The family: the encoder's row, then the decoder's parts, all models of a batch in one `baddbmm` a layer."""

    def __init__(
        self, key: str, encoder: Family, prediction_length: int, quantiles: int, contexts: int, local: int
    ) -> None:
        self.encoder = encoder
        features, hidden = encoder.input_shape[0], encoder.output_shape[1]
        self._contexts, self._local, self._hidden = contexts, local, hidden
        seen, given = hidden + features * prediction_length, (prediction_length + 1) * contexts
        widths = {"global": (given, seen), "local": (local, 2 * contexts + features), "head": (quantiles, local)}
        parameters = {f"encoder.{name}": shape for name, shape in encoder.parameters.items()}
        parts: dict[str, Shape] = {"encoder": (encoder.row_floats,)}
        for name, (out, width) in widths.items():
            parameters |= {f"{name}.weight": (out, width), f"{name}.bias": (out,)}
            parts |= {f"{name}.weight": (width, out), f"{name}.bias": (1, out)}
        super().__init__(key, encoder.input_shape, (prediction_length, quantiles), parameters, parts)
        self.read_shape = (features, max(encoder.read_shape[1], prediction_length))

    def reference(self) -> MqReference:
        """The plain network, freshly initialised, in eval mode."""
        steps, quantiles = self.output_shape
        return MqReference(self.encoder, steps, quantiles, self._contexts, self._local).eval()

    def row(self, tensors: Mapping[str, Float32]) -> Float32:
        """Make a flat row. The tensors are checked first, since errors of the encoder would use its own names."""
        check_tensors(self.parameters, tensors)
        check_finite(np.concatenate([tensor.ravel() for tensor in tensors.values()]), tensors)
        return super().row(tensors)

    def bind(self, block: torch.Tensor) -> Sequence[torch.Tensor]:
        """Rows [B, row_floats] -> (bias, weight) a layer, the two layers' inputs and parts of them, the encoder's."""
        part, (features, _), (steps, _) = self._layout.views(block), self.input_shape, self.output_shape
        layers = [part[f"{name}.{kind}"] for name in PARTS for kind in ("bias", "weight")]
        with torch.inference_mode(False):  # so that the scratch may be written with and without inference mode
            seen = block.new_empty(len(block), 1, self._hidden + features * steps)
            local = block.new_empty(len(block), steps, 2 * self._contexts + features)
        encoded, known = seen[..., : self._hidden], seen[:, 0, self._hidden :].view(-1, steps, features)
        scratch = [seen, encoded, known, local, *torch.split(local, [self._contexts, self._contexts, features], 2)]
        return [*layers, *scratch, *self.encoder.bind(block[:, : self.encoder.row_floats])]

    def forward(self, weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Input x [B, features, context_length] -> [B, prediction_length, quantiles]; see Family.forward."""
        bias, weight, local_bias, local_weight, head_bias, head = weights[:6]
        seen, encoded, known, local, of_step, of_all, local_known = weights[6:13]
        steps = self.output_shape[0]
        encoded.copy_(self.encoder.forward(weights[13:], x).relu_())
        known.copy_(x[..., -steps:].transpose(1, 2))
        local_known.copy_(known)
        contexts = torch.baddbmm(bias, seen, weight).relu_().view(-1, steps + 1, self._contexts)
        of_step.copy_(contexts[:, :-1])
        of_all.copy_(contexts[:, -1:])
        return torch.baddbmm(head_bias, torch.baddbmm(local_bias, local, local_weight).relu_(), head)

    def _fill(self, part: Mapping[str, Float32], tensors: Mapping[str, Float32]) -> None:
        """Fill in the row of the encoder, then transposed weights."""
        part["encoder"][...] = self.encoder.row({name: tensors[f"encoder.{name}"] for name in self.encoder.parameters})
        for name in PARTS:
            part[f"{name}.weight"][...] = tensors[f"{name}.weight"].T
            part[f"{name}.bias"][0] = tensors[f"{name}.bias"]
