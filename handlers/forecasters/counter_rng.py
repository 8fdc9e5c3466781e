"""Noise that depends on a request alone: the same for every batch, device and order of requests.

Counter-based, as in Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": number i of a request is a hash
of its seed and i, here splitmix64 (Steele et al. 2014). There is no state, so models and paths are drawn together.
"""

import torch

BITS = 23  #: of a uniform number, so that it and its distance to 0 and 1 are exact in float32


def normals(seeds: torch.Tensor, paths: int, steps: int) -> torch.Tensor:
    """The seed channel's first two columns [N, 2], whole numbers of 24 bits -> standard normals [N, paths, steps]."""
    key = _mixed((seeds[:, :1].long() << 24) + seeds[:, 1:2].long())
    counters = torch.arange(1, paths * steps + 1, device=seeds.device)
    whole = _shifted(_mixed(key + counters * _signed(0x9E3779B97F4A7C15)), 64 - BITS)
    uniform = (whole.to(torch.float32) + 0.5) * 2.0**-BITS
    found: torch.Tensor = torch.special.ndtri(uniform)
    return found.view(-1, paths, steps)


def _mixed(z: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64, in integers that wrap around."""
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, zeros coming in."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64)
