"""A recurrence whose answer to one step is its input at the next: many models, each on many paths, in one product.

The known inputs of the steps are the same on all paths, so that their part of the gates is computed once per model.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

VIEWS = 4  #: tensors of a layer in a binding


class Feedback:
    """The layers of an `nn.GRU` called `name`, whose input is the fed-back value and the known inputs of a step."""

    def __init__(self, name: str, hidden: int, layers: int) -> None:
        self._names = [f"{name}.{{}}_l{i}".format for i in range(layers)]
        self._hidden = hidden
        self.items = VIEWS * layers  # tensors of a binding

    def __repr__(self) -> str:
        return f"<Feedback {len(self._names)} layers of {self._hidden}>"

    def bind(self, part: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return views of B rows' parts, as `batched_gru.Recurrence` lays them out, four a layer."""
        kinds = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
        return [part[name(kind)] for name in self._names for kind in kinds]

    def run(
        self,
        bound: Sequence[torch.Tensor],
        known: torch.Tensor,
        start: Sequence[torch.Tensor],
        value: torch.Tensor,
        told: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> None:
        """Run from the states [B, 1, hidden] of the layers and the last value [B, S] through known inputs [B, P, W-1].

        `told` takes a step and the last layer's states [B, S, hidden], and returns the value that is fed back [B, S].
        """
        layers = [bound[at : at + VIEWS] for at in range(0, self.items, VIEWS)]
        weight, bias, *_ = layers[0]
        of_value, of_known = weight[:, :1], torch.baddbmm(bias, known.to(weight.dtype), weight[:, 1:])
        states = [state.expand(-1, value.shape[1], -1) for state in start]
        for step in range(known.shape[1]):
            given = torch.baddbmm(of_known[:, step : step + 1], value[..., None].to(of_value.dtype), of_value)
            for i, (weight, bias, hidden_weight, hidden_bias) in enumerate(layers):
                if i:
                    given = torch.baddbmm(bias, states[i - 1], weight)
                states[i] = self._advance(given, torch.bmm(states[i], hidden_weight), hidden_bias, states[i])
            value = told(step, states[-1])

    def _advance(
        self, given: torch.Tensor, of_state: torch.Tensor, hidden_bias: torch.Tensor, state: torch.Tensor
    ) -> torch.Tensor:
        """Compute the next states [B, S, hidden] of gates' parts [B, S, 3 hidden], both overwritten."""
        shared = 2 * self._hidden
        gates = of_state[..., :shared].add_(given[..., :shared]).sigmoid_()
        inner = of_state[..., shared:].add_(hidden_bias)
        found = given[..., shared:].addcmul_(gates[..., : self._hidden], inner).tanh_()
        return found.lerp_(state, gates[..., self._hidden :])
