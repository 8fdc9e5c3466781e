"""The network of the comparison as a peer's user would write it: plain, eager torch on one thread.

This file is copied beside the handler of each peer. 17,528 parameters at its defaults; x [N, 8, 168] -> [N, 24, 5].
"""

import os

import torch
from safetensors.torch import load_file
from torch import nn


class PlainBlock(nn.Module):
    """relu(causal convolution) + 1x1 convolution: [N, c_in, T] -> [N, c_out, T]."""

    def __init__(self, c_in: int, c_out: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.conv = nn.Conv1d(c_in, c_out, 3, dilation=dilation)
        self.residual = nn.Conv1d(c_in, c_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, c_in, T] -> [N, c_out, T]."""
        convolved: torch.Tensor = torch.relu(self.conv(nn.functional.pad(x, (self.pad, 0)))) + self.residual(x)
        return convolved


class PlainTcn(nn.Module):
    """Four blocks of dilation 1, 3, 9 and 27, and a head on the last step."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[PlainBlock(channels if i else 8, channels, 3**i) for i in range(4)])
        self.head = nn.Linear(channels, 24 * 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, 8, T] -> [N, 24, 5]."""
        answer: torch.Tensor = self.head(self.blocks(x)[..., -1])
        return answer.view(-1, 24, 5)


class PlainMlp(nn.Module):
    """Two layers on a row of features: it costs little, so that a comparison shows what the servers cost. 100 KB."""

    features = 32

    def __init__(self, hidden: int = 512) -> None:
        super().__init__()
        self.first = nn.Linear(self.features, hidden)
        self.second = nn.Linear(hidden, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, 32] -> [N, 16]."""
        answer: torch.Tensor = self.second(torch.relu(self.first(x)))
        return answer


def load_network(folder: str) -> PlainTcn | PlainMlp:
    """Load the network with the weights in `folder`, which say which it is, on one thread."""
    torch.set_num_threads(1)
    weights = load_file(os.path.join(folder, "weights.safetensors"))  # noqa: PTH118 -- as in the peers' own examples
    network: PlainTcn | PlainMlp = (
        PlainMlp() if "first.weight" in weights else PlainTcn(weights["head.weight"].shape[1])
    )
    network.load_state_dict(weights)
    return network.eval()
