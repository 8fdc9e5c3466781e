"""Modules as users write them, for tests of graph archives. Inputs are x [N, features, steps]."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 -- torch's own name for it

from handlers.base import Shape


class Dilated(nn.Module):
    """A dilated causal convolution network with residuals."""

    def __init__(self, channels: int = 8, features: int = 3) -> None:
        super().__init__()
        pairs = [(features, channels), (channels, channels)]
        self.convs = nn.ModuleList(nn.Conv1d(a, b, 3, dilation=3**i) for i, (a, b) in enumerate(pairs))
        self.skips = nn.ModuleList(nn.Conv1d(a, b, 1) for a, b in pairs)
        self.head = nn.Linear(channels, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, features, T] -> [N, 4, 3]."""
        for i, (conv, skip) in enumerate(zip(self.convs, self.skips, strict=True)):
            x = torch.relu(conv(F.pad(x, (2 * 3**i, 0)))) + skip(x)
        answer: torch.Tensor = self.head(x[..., -1])
        return answer.view(-1, 4, 3)


class Image(nn.Module):
    """The series as a picture: two-dimensional convolutions, batch normalisation, pooling."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d((1, 2))]
        layers += [nn.Conv2d(4, 4, 3, padding="same"), nn.ELU(), nn.AvgPool2d(2, ceil_mode=True)]
        self.net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, F, T] -> [N, 2, 3]."""
        answer: torch.Tensor = self.net(x[:, None])
        return torch.unflatten(answer, 1, (2, 3))


class Attending(nn.Module):
    """A transformer encoder with learned positions, a causal mask, and heads of attention written out by hand."""

    fading: torch.Tensor
    seen: torch.Tensor

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 16)
        self.positions = nn.Embedding(12, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.qkv = nn.Linear(16, 24)
        self.head = nn.Linear(8, 3)
        self.register_buffer("fading", 0.9 ** torch.arange(12).flip(0)[:, None], persistent=False)
        # The last step sees nothing: its answer is zeros, not NaN.
        self.register_buffer("seen", torch.ones(12, 12, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, 3, 12] -> [N, 4, 3]."""
        h = self.embed(x.transpose(1, 2)) + self.positions(torch.arange(12))
        causal = nn.Transformer.generate_square_subsequent_mask(12)
        h = self.encoder(h * self.fading, mask=causal, is_causal=True)
        q, k, v = self.qkv(h).chunk(3, dim=-1)
        ahead = F.scaled_dot_product_attention(q, k, v, attn_mask=self.seen)
        answer: torch.Tensor = self.head((ahead + F.scaled_dot_product_attention(q, k, v))[:, -4:])
        return answer


class Grouped(nn.Module):
    """Attention in which four heads of queries share two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(3, 16)
        self.key = nn.Linear(3, 8)
        self.value = nn.Linear(3, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, 3, T] -> [N, 4, 4], a line for each head's last step."""
        x = x.transpose(1, 2)
        query, key, value = (
            layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)[:, :, -1]


class Blocks(nn.Module):
    """Attention within blocks of four steps and among equal places in them: positions are divided, with remainders."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, 3, 12] -> [N, 12, 6]."""
        h, place = self.mix(x.transpose(1, 2)), torch.arange(12)
        block, within = place // 4, place % 4
        seen = (block[:, None] == block) | (within[:, None] == within)
        return F.scaled_dot_product_attention(h, h, h, attn_mask=seen)


class RecurrentNet(nn.Module):
    """What `vmap` has no rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 8, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input x [N, 3, T] -> [N, 2, 3]."""
        answer: torch.Tensor = self.head(self.rnn(x.transpose(1, 2))[0][:, -1])
        return answer.view(-1, 2, 3)


def chain_layers(make_layers: Callable[[], list[nn.Module]]) -> Callable[[], nn.Module]:
    """Layers one after another, then [N, ...] -> [N, 5]; each call makes layers of its own."""
    return lambda: nn.Sequential(*make_layers(), nn.Flatten(), nn.LazyLinear(5))


SHAPE: Shape = (3, 12)
#: Everything that must batch.
BATCHED: dict[str, Callable[[], nn.Module]] = {
    "dilated": Dilated,
    "image": Image,
    "encoder": lambda: Attending(norm_first=False),
    "encoder-norm-first": lambda: Attending(norm_first=True),
    "grouped-attention": Grouped,
    "blocks": Blocks,
    "linear": chain_layers(lambda: [nn.Linear(12, 7), nn.GELU(), nn.Linear(7, 4, bias=False), nn.Tanh()]),
    "norms": chain_layers(
        lambda: [nn.Conv1d(3, 8, 5, stride=2), nn.GroupNorm(4, 8), nn.SiLU(), nn.LayerNorm(4), nn.RMSNorm(4)]
    ),
    "batch-norm": chain_layers(
        lambda: [nn.BatchNorm1d(3), nn.Conv1d(3, 6, 3, groups=3), nn.LeakyReLU(), nn.BatchNorm1d(6)]
    ),
    "instance-norm": chain_layers(lambda: [nn.InstanceNorm1d(3, affine=True), nn.Softplus()]),
    "pools": chain_layers(
        lambda: [nn.MaxPool1d(2), nn.AvgPool1d(2), nn.AdaptiveAvgPool1d(2), nn.Hardswish(), nn.Softmax(-1)]
    ),
    "pads": chain_layers(
        lambda: [nn.ConstantPad1d(2, 1.5), nn.ReflectionPad1d(1), nn.ReplicationPad1d(1), nn.CircularPad1d(2)]
    ),
    "activations": chain_layers(
        lambda: [nn.ELU(), nn.Mish(), nn.Hardtanh(), nn.Sigmoid(), nn.PReLU(3), nn.LogSoftmax(-1), nn.GLU(-1)]
    ),
    "transposed": chain_layers(
        lambda: [nn.ConvTranspose1d(3, 4, 3, stride=2), nn.Upsample(scale_factor=2), nn.Dropout(0.5)]
    ),
    "attention": lambda: nn.TransformerEncoderLayer(12, 3, 16, batch_first=True),
}


def make_module(build: Callable[[], nn.Module], seed: int, shape: Shape = SHAPE) -> nn.Module:
    """The module in evaluation mode, its numbers by the seed alone, lazy layers seeing x [1, *shape]."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = build().eval()
        module(torch.zeros(1, *shape))
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(torch.rand_like(tensor) * 0.5 + 0.75)  # also what starts as one and zero differs
                tensor.add_(torch.rand_like(tensor) * 0.1)
    return module
